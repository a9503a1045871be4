"""What a block did, for agents, RPC subscriptions and dashboards.

Events are a convenience: everything they say can be read from the state, and nothing in consensus
depends on them. Money in units, roles as in `records.Earnings`.
"""

from tdmld.chain.codec import Record


class JobOffered(Record, frozen=True, tag="job_offered"):
    job: bytes


class JobMatched(Record, frozen=True, tag="job_matched"):
    """`workers` by slot index; each member must accept or decline."""

    job: bytes
    attempt: int
    workers: tuple[bytes, ...]
    standby: bytes


class JobUnmatched(Record, frozen=True, tag="job_unmatched"):
    """Offered again without the nodes that declined or did not answer."""

    job: bytes
    without: tuple[bytes, ...]


class JobPreparing(Record, frozen=True, tag="job_preparing"):
    job: bytes


class JobActive(Record, frozen=True, tag="job_active"):
    job: bytes


class JobFinishing(Record, frozen=True, tag="job_finishing"):
    """Everything is settled; holders merge the result."""

    job: bytes


class ResultKnown(Record, frozen=True, tag="result_known"):
    job: bytes
    result: bytes


class ResultDisputed(Record, frozen=True, tag="result_disputed"):
    """A holder attested another result than one before it."""

    job: bytes
    node: bytes
    result: bytes


class JobEnded(Record, frozen=True, tag="job_ended"):
    """`status` closed, refunded or expired; `refund` is what went back to the submitter."""

    job: bytes
    status: str
    reason: str
    detail: str
    refund: int


class SegmentCommitted(Record, frozen=True, tag="segment_committed"):
    job: bytes
    slot: int
    segment: int


class SegmentLinked(Record, frozen=True, tag="segment_linked"):
    job: bytes
    slot: int
    segment: int


class SegmentSettled(Record, frozen=True, tag="segment_settled"):
    job: bytes
    slot: int
    segment: int


class StatesDiffer(Record, frozen=True, tag="states_differ"):
    """Lanes disagree about the shared state of `stage` after `segment`: all are audited."""

    job: bytes
    stage: int
    segment: int


class RoundDecided(Record, frozen=True, tag="round_decided"):
    """The contributions of these lanes go into the next segment of every lane."""

    job: bytes
    round: int
    included: tuple[int, ...]


class ProofKeyKnown(Record, frozen=True, tag="proof_key_known"):
    """The standby and then the worker must prove the state after `segment` with `key`."""

    job: bytes
    slot: int
    segment: int
    key: bytes


class ProofChecked(Record, frozen=True, tag="proof_checked"):
    job: bytes
    slot: int
    segment: int
    equal: bool


class AuditDrawn(Record, frozen=True, tag="audit_drawn"):
    job: bytes
    slot: int
    segment: int
    auditor: bytes
    attempt: int


class AuditStep(Record, frozen=True, tag="audit_step"):
    """An audit reached `status` (records.AuditStatus)."""

    job: bytes
    slot: int
    segment: int
    status: str


class AuditPassed(Record, frozen=True, tag="audit_passed"):
    job: bytes
    slot: int
    segment: int
    auditor: bytes


class AuditMismatch(Record, frozen=True, tag="audit_mismatch"):
    job: bytes
    slot: int
    segment: int
    auditor: bytes


class Unaudited(Record, frozen=True, tag="unaudited"):
    """A drawn segment goes on without a verdict."""

    job: bytes
    slot: int
    segment: int
    reason: str


class SlotVacated(Record, frozen=True, tag="slot_vacated"):
    """`node` lost the slot, or did not take it when it was asked (`cause`: records.Cause).
    `incarnation`: the one that begins."""

    job: bytes
    slot: int
    node: bytes
    cause: str
    epoch: int
    incarnation: int


class SlotAsked(Record, frozen=True, tag="slot_asked"):
    """`node` is asked to take a vacant slot: it must accept or decline."""

    job: bytes
    slot: int
    node: bytes
    incarnation: int


class SlotTaken(Record, frozen=True, tag="slot_taken"):
    """`node` works in the slot from now on; it begins at the boundary `held`."""

    job: bytes
    slot: int
    node: bytes
    incarnation: int
    held: int


class StandbyVacated(Record, frozen=True, tag="standby_vacated"):
    """The standby's place is empty. It took a slot (`cause` moved), or lost the place."""

    job: bytes
    node: bytes
    cause: str


class StandbyAsked(Record, frozen=True, tag="standby_asked"):
    job: bytes
    node: bytes
    turn: int


class StandbyTaken(Record, frozen=True, tag="standby_taken"):
    job: bytes
    node: bytes


class JobRolledBack(Record, frozen=True, tag="job_rolled_back"):
    """`epoch` begins: every slot goes on from `boundary`."""

    job: bytes
    epoch: int
    boundary: int


class LaneLost(Record, frozen=True, tag="lane_lost"):
    """Nobody is left to take a slot of the lane: the job goes on without it."""

    job: bytes
    lane: int


class CaseOpened(Record, frozen=True, tag="case_opened"):
    """`accuser` waits in vain for frame `seq` on its link `link`, whose other end is `slot`."""

    job: bytes
    slot: int
    accuser: int
    link: str
    seq: int


class CaseClosed(Record, frozen=True, tag="case_closed"):
    """`slot` is accused no more. Not delivered: it was vacated."""

    job: bytes
    slot: int
    accuser: int
    delivered: bool
    reason: str


class Paid(Record, frozen=True, tag="paid"):
    job: bytes
    owner: bytes
    role: str
    amount: int


class Slashed(Record, frozen=True, tag="slashed"):
    """`node` voted against itself in `epoch`; its owner paid."""

    node: bytes
    owner: bytes
    epoch: int
    burned: int


class Jailed(Record, frozen=True, tag="jailed"):
    """`node` missed `missed` turns to lead in `epoch`: it has none until it returns."""

    node: bytes
    owner: bytes
    epoch: int
    missed: int


class Returned(Record, frozen=True, tag="returned"):
    """A jailed node is at work again, and leads from the next set on."""

    node: bytes


Event = (
    JobOffered
    | JobMatched
    | JobUnmatched
    | JobPreparing
    | JobActive
    | JobFinishing
    | ResultKnown
    | ResultDisputed
    | JobEnded
    | SegmentCommitted
    | SegmentLinked
    | SegmentSettled
    | StatesDiffer
    | RoundDecided
    | ProofKeyKnown
    | ProofChecked
    | AuditDrawn
    | AuditStep
    | AuditPassed
    | AuditMismatch
    | Unaudited
    | SlotVacated
    | SlotAsked
    | SlotTaken
    | StandbyVacated
    | StandbyAsked
    | StandbyTaken
    | JobRolledBack
    | LaneLost
    | CaseOpened
    | CaseClosed
    | Paid
    | Slashed
    | Jailed
    | Returned
)
ValidatorEvent = Slashed | Jailed | Returned
"""Those that speak of a validator, and of no job."""
