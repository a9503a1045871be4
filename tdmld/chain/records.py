"""What the ledger remembers: frozen records, stored by `state.State`.

Keys are raw 32-byte public keys; the empty bytes mean "nobody yet" or "not known yet". Heights are
0 where the thing has not happened. A record is never changed: rules make a new one
(`msgspec.structs.replace`) and put it.
"""

from enum import StrEnum

from tdmld.chain.codec import Amount, Hash, Maybe32, Natural, PublicKey, Record
from tdmld.chain.transactions import LaneMode, LinkRoots, Stage


class Node(Record, frozen=True):
    """A registered node key and what of its capacity is in use."""

    owner: PublicKey
    from_height: Natural
    memory_used: Natural = 0
    standby_used: Natural = 0
    audits_open: Natural = 0
    revoked: Natural = 0
    """Height of its revocation: from the next block on it may do nothing. 0: in force."""
    convicted: Natural = 0
    """Height of the first evidence against it: it is not elected again. 0: none."""
    jailed: Natural = 0
    """Height at which it lost its turns to lead, for missing too many; 0 again once it returned."""


class StandingAsk(Record, frozen=True):
    """A node's ask in force; fields as in transactions.Ask, and the height it was made at. Of its
    receipts stay: how many owners found it `open`, and to which nodes it has `paths`."""

    session: PublicKey
    class_id: str
    memory: Natural
    price: Amount
    audit_capacity: Natural
    standby_slots: Natural
    until_height: Natural
    open: Natural
    paths: tuple[PublicKey, ...]
    height: Natural


class JobStatus(StrEnum):
    """ANNEX A2. The last three are final."""

    OFFERED = "offered"
    MATCHED = "matched"
    PREPARING = "preparing"
    ACTIVE = "active"
    FINISHING = "finishing"
    CLOSED = "closed"
    REFUNDED = "refunded"
    EXPIRED = "expired"


FINAL = frozenset({JobStatus.CLOSED, JobStatus.REFUNDED, JobStatus.EXPIRED})


SPLIT = "split"
"""The privacy mode in which the source works in slot 0 itself."""


class CloseReason(StrEnum):
    """Why a job is over."""

    NONE = ""
    FETCHED = "fetched"
    NOT_FETCHED = "not_fetched"  # the result window is over
    NO_MATCH = "no_match"  # no set of asks fits the offer
    DECLINED = "declined"  # matched MATCH_TRIES times, never accepted by all
    GENESIS = "genesis"  # boundary 0 not attested, or unequal
    MISMATCH = "mismatch"  # link roots or list roots differ
    FAULT = "fault"  # somebody stopped working
    DEADLINE = "deadline"


class Cause(StrEnum):
    """Why a place of a job became vacant (records.Former, events.SlotVacated). `counted_as` in
    replacement.py says which of them are faults."""

    ABSENT = "absent"  # accused of a stall, it did not say that it is there
    UNDELIVERED = "undelivered"  # the witness did not get the frame from it
    SEPARATED = "separated"  # it delivers to the witness, but too often not to its neighbour
    STALL = "stall"  # it was behind for a whole segment window
    LEFT = "left"  # it gave the place up itself
    MISMATCH = "mismatch"  # an audit found another list than it committed to
    UNOPENED = "unopened"  # it did not open its seal
    UNPROVEN = "unproven"  # it did not prove its copies, or, a worker, did not answer their proofs
    UNEQUAL = "unequal"  # its copies were found unequal; nobody knows by whose fault
    UNANSWERED = "unanswered"  # asked to take the place, it did not answer
    DECLINED = "declined"  # asked to take the place, it gave it back
    MOVED = "moved"  # the standby, which took a slot


class Member(Record, frozen=True):
    """Who stands in a role of a job. `price`: agreed units per slot and segment. `session` is
    empty until the node accepted."""

    node: PublicKey
    owner: PublicKey
    price: Amount
    session: Maybe32 = b""

    @property
    def accepted(self) -> bool:
        return self.session != b""


class Job(Record, frozen=True):
    """An offer and how far it has come. Money still locked: `locked`."""

    id: Hash
    submitter: PublicKey
    source: PublicKey
    source_session: PublicKey
    spec_id: Hash
    spec_bytes: Natural
    stages: tuple[Stage, ...]
    lanes: Natural
    ring: bool
    lane_mode: LaneMode
    lane_weights: tuple[Natural, ...]
    rounds: Natural
    segment_steps: Natural
    unsettled: Natural
    state_every: Natural
    tokens: Natural
    class_wanted: str
    privacy: str
    slot_price_max: Amount
    standby_price: Amount
    audit_rate: Natural
    audit_price: Amount
    deadline: Natural
    escrow: Amount
    audit_budget: Amount
    fee_budget: Amount
    deposit: Amount
    offered: Natural
    status: JobStatus = JobStatus.OFFERED
    reason: CloseReason = CloseReason.NONE
    detail: str = ""
    """For people: what exactly ended the job."""
    class_id: str = ""
    """The class that was matched."""
    attempt: Natural = 0
    declined: tuple[bytes, ...] = ()
    standby: Member | None = None
    epoch: Natural = 0
    audits_reserved: Amount = 0
    """Part of audit_budget that open audits will be paid from."""
    matched: Natural = 0
    active: Natural = 0
    finished: Natural = 0
    closed: Natural = 0
    results: tuple[tuple[bytes, bytes], ...] = ()
    """(node, result id) of each AttestResult."""
    result: Maybe32 = b""
    """The result id once two holders agree."""
    previous_closed: Maybe32 = b""
    """The job that was closed before this one: newest first list of final jobs."""
    excluded: tuple[bytes, ...] = ()
    """Owners that lost a place in this job, sorted: none of their nodes gets another."""
    standby_turn: Natural = 0
    """The `attempt` of the standby's Accept and Decline: it grows with each vacancy of its place
    and each node that is asked. At the matching it is `attempt`."""
    standby_since: Natural = 0
    """Height at which the present standby accepted; 0 at the matching's."""
    repaired: Natural = 0
    """Height of the last vacancy, rollback or acceptance of a place; 0 where there was none."""
    lost_lanes: tuple[Natural, ...] = ()
    """Lanes that could not be staffed any more, ascending: the job goes on without them."""

    @property
    def slots(self) -> int:
        return self.lanes * len(self.stages)

    @property
    def locked(self) -> int:
        """Everything of the submitter's that the job still holds, in units."""
        return self.escrow + self.audit_budget + self.fee_budget + self.deposit

    @property
    def final(self) -> bool:
        return self.status in FINAL

    @property
    def living(self) -> tuple[int, ...]:
        """The slots of the lanes that are not lost, ascending."""
        if not self.lost_lanes:
            return tuple(range(self.slots))
        return tuple(s for s in range(self.slots) if self.lane_of(s) not in self.lost_lanes)

    @property
    def copied(self) -> bool:
        """Whether somebody holds copies now: a standby that accepted."""
        return self.standby is not None and self.standby.accepted

    def stage_of(self, slot: int) -> int:
        return slot % len(self.stages)

    def lane_of(self, slot: int) -> int:
        return slot // len(self.stages)

    def slot_at(self, lane: int, stage: int) -> int:
        return lane * len(self.stages) + stage

    def weight_of(self, slot: int) -> int:
        """How many times the micro-batches of a lane of weight 1 pass the slot: prices follow."""
        return self.lane_weights[self.lane_of(slot)]

    def audit_price_of(self, slot: int) -> int:
        """What an audit of one segment of the slot is paid: a heavier lane is more to replay."""
        return self.audit_price * self.weight_of(slot)

    def is_own(self, slot: int) -> bool:
        """Whether the source works in the slot itself, for a text that it shows to nobody: not
        paid, not audited, not copied, and attested by itself alone."""
        return self.privacy == SPLIT and slot == 0

    def contributes(self, segment: int) -> bool:
        """Whether a segment with this index makes a contribution: all but the closing one."""
        return self.lane_mode is LaneMode.DILOCO and segment + 1 < self.rounds


class GenesisRoots(Record, frozen=True):
    """One member's roots of boundary 0 of a slot."""

    node: PublicKey
    shared: Hash
    lane: Hash
    data: Hash


class Former(Record, frozen=True):
    """Who had a slot before, and lost it at `height` with `settled` segments settled. One that was
    only asked has the cause `unanswered` or `declined`."""

    node: PublicKey
    owner: PublicKey
    cause: Cause
    epoch: Natural
    incarnation: Natural
    settled: Natural
    height: Natural


class Case(Record, frozen=True):
    """An open accusation of a slot: `accuser` (a slot) waits for frame `seq` on its link `link`.
    Until `until` the accused must say that it is there (`present`), then the standby must say
    whether it got that frame."""

    accuser: Natural
    link: str
    seq: Natural
    opened: Natural
    until: Natural
    present: bool = False


class SlotState(Record, frozen=True):
    """One slot of a matched job. While a place is vacant `worker` is whom the chain asked last: it
    has not accepted (no session)."""

    worker: Member
    incarnation: Natural = 0
    """Grows with each vacancy and each node that is asked; at the matching it is Job.attempt. It is
    the `attempt` of the answers to the chain's asking, and stands in what the worker sends."""
    attested: tuple[GenesisRoots, ...] = ()
    genesis: GenesisRoots | None = None
    """The worker's, once the standby's are equal: the start of segment 0."""
    committed: Natural = 0
    """Index of the next segment to commit."""
    settled: Natural = 0
    """Index of the next segment to settle."""
    last_commit: Natural = 0
    held: Natural = 0
    """The newest settled boundary whose copy was proven equal, where a replacement begins; while
    the job has no standby, the same as `settled`."""
    since: Natural = 0
    """Height at which the present worker took the slot; 0 until it accepted."""
    unproven: Natural = 0
    """Copies on end that were due and settled without being proven equal."""
    barred: Maybe32 = b""
    """The owner that accused the last worker: it does not get the slot."""
    case: Case | None = None
    """The accusation that is open against this slot."""
    stalls: Natural = 0
    """Cases that this slot's workers have opened; at most limits.STALLS."""
    delivered: tuple[Natural, ...] = ()
    """Accusers, a slot for each time, to whom the witness found this worker to deliver."""
    former: tuple[Former, ...] = ()
    """Who had the slot before, the first one first."""


class SegmentStatus(StrEnum):
    COMMITTED = "committed"
    LINKED = "linked"  # both ends of every link agree; its draw is due
    UNDRAWN = "undrawn"
    DRAWN = "drawn"  # an audit is open
    PASSED = "passed"
    UNAUDITED = "unaudited"  # drawn, but no verdict; `note` says why
    BY_SUBMITTER = "audited_by_submitter"  # drawn, but nobody is eligible
    MISMATCH = "mismatch"


CLEARED = frozenset(
    {
        SegmentStatus.UNDRAWN,
        SegmentStatus.PASSED,
        SegmentStatus.UNAUDITED,
        SegmentStatus.BY_SUBMITTER,
    }
)
"""What may settle."""


class ProofStatus(StrEnum):
    NONE = "none"  # no copy is due at this boundary
    WAITING = "waiting"
    EQUAL = "equal"
    UNEQUAL = "unequal"
    MISSING = "missing"


class Segment(Record, frozen=True):
    """One committed segment of a slot; roots as in transactions.Commit."""

    worker: PublicKey
    epoch: Natural
    incarnation: Natural
    start_shared: Hash
    start_lane: Hash
    end_shared: Hash
    end_lane: Hash
    links: tuple[LinkRoots, ...]
    seal: Hash
    loss: Natural | None
    contribution: Maybe32
    committed: Natural
    forced: bool = False
    """Lanes disagree about the shared state after it: it is audited for certain."""
    status: SegmentStatus = SegmentStatus.COMMITTED
    linked: Natural = 0
    note: str = ""
    proof: ProofStatus = ProofStatus.NONE
    proof_key: Maybe32 = b""
    """Beacon of committed + draw_delay; key of the StandbyProofs."""
    proof_until: Natural = 0
    standby_hash: Maybe32 = b""
    worker_hash: Maybe32 = b""
    settled: Natural = 0
    """Height of its payment; 0 while it is unsettled."""
    holder: Maybe32 = b""
    """Owner of the standby that gave `standby_hash`."""


class Round(Record, frozen=True):
    """The contributions that the segments of one index made, in a job of lane mode diloco."""

    attested: tuple[Natural, ...]
    """By slot: the lanes whose contributions to its stage its worker holds, lane k as bit k."""
    ready: tuple[Natural, ...]
    """By lane: the height at which all its contributions were committed and held; 0 before."""
    decided: Natural = 0
    """Height at which it was decided who is in; 0 before."""
    included: tuple[Natural, ...] = ()
    """The lanes that are in, ascending, once it is decided."""
    contributions: tuple[bytes, ...] = ()
    """By slot: the id of its contribution, once it is decided; no bytes where its lane is out."""


class AuditStatus(StrEnum):
    WAITING = "waiting"  # every eligible auditor is busy; tried again at `until`
    DRAWN = "drawn"  # the auditor replays
    FAILED = "failed"  # it could not; another is drawn at `until`
    COMMITTED = "committed"  # the worker must open
    OPENED = "opened"  # the auditor must open
    PASSED = "passed"
    MISMATCH = "mismatch"
    UNOPENED = "unopened"  # the worker did not open
    SILENT = "silent"  # the auditor did not open, or nobody is left to draw
    DROPPED = "dropped"  # the job ended first


HELD_AUDIT = frozenset({AuditStatus.DRAWN, AuditStatus.COMMITTED, AuditStatus.OPENED})
"""An auditor is at it: it counts against that node's capacity."""
OPEN_AUDIT = HELD_AUDIT | {AuditStatus.WAITING, AuditStatus.FAILED}


class Audit(Record, frozen=True):
    """The audit of a drawn segment. `until`: height at which the present step is over; `drawn`:
    height at which this auditor was drawn, or the wait for one began. While it waits there is no
    auditor."""

    auditor: Maybe32
    owner: Maybe32
    session: Maybe32
    drawn: Natural
    until: Natural
    attempt: Natural = 0
    tried: tuple[bytes, ...] = ()
    """Owners that were drawn before and did not come through."""
    status: AuditStatus = AuditStatus.DRAWN
    missing: str = ""
    hash: Maybe32 = b""
    salt: Maybe32 = b""
    steps: Maybe32 = b""
    """The worker's opening."""
    worker_list: Maybe32 = b""
    auditor_list: Maybe32 = b""
    paid: Amount = 0

    @property
    def open(self) -> bool:
        return self.status in OPEN_AUDIT

    @property
    def held(self) -> bool:
        return self.status in HELD_AUDIT


class Earnings(Record, frozen=True):
    """What one owner was paid for one job, in units, by role."""

    worker: Amount = 0
    standby: Amount = 0
    auditor: Amount = 0

    @property
    def total(self) -> int:
        return self.worker + self.standby + self.auditor


class Keys(Record, frozen=True):
    """A sorted set of keys: one bucket of an index."""

    keys: tuple[bytes, ...] = ()


class Timer(StrEnum):
    """Kinds of due entries."""

    MATCH = "match"
    ACCEPT = "accept"
    ACTIVATE = "activate"
    DEADLINE = "deadline"
    STALL = "stall"
    KEY = "key"
    DRAW = "draw"
    AUDIT = "audit"
    SETTLE = "settle"
    ROUND = "round"
    RESULT = "result"
    REPLACE = "replace"  # a node was asked to take a vacant slot
    STANDBY = "standby"  # the standby's place is vacant, or a node was asked to take it
    CASE = "case"  # the present step of an accusation is over


class Due(Record, frozen=True):
    """A due entry. There is at most one of an identity, and the identity is all of it."""

    timer: Timer
    job: Hash
    slot: Natural = 0
    segment: Natural = 0


class DueList(Record, frozen=True):
    """All entries of one height, in the order in which they were set."""

    entries: tuple[Due, ...]


class Heights(Record, frozen=True):
    """A sorted set of heights (or of buckets of heights): the index of the due queue."""

    heights: tuple[Natural, ...] = ()


class At(Record, frozen=True):
    """The height that a due entry stands at."""

    height: Natural


class Head(Record, frozen=True):
    """The newest final job."""

    job: Hash
