"""What goes into and comes out of `tdmld.node.machine.Machine`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tdmld.node.errors import FailureCause
from tdmld.train.segment import SegmentRecord


@dataclass(frozen=True, order=True, slots=True)
class SlotId:
    """One stage of one lane of a job. Unpacks as (lane, stage)."""

    lane: int
    stage: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.lane, self.stage))

    def index(self, stages: int) -> int:
        """The slot index of the chain."""
        return self.lane * stages + self.stage

    @classmethod
    def of(cls, index: int, stages: int) -> "SlotId":
        """The slot with a chain's slot index."""
        return cls(*divmod(index, stages))

    def __str__(self) -> str:
        return f"{self.lane}.{self.stage}"


class StateRoots(NamedTuple):
    """Roots of the two parts of a slot's state."""

    shared: bytes
    lane: bytes


@dataclass(frozen=True)
class GenesisRoots:
    """Roots of the state that a slot begins with, and of the data; what AttestGenesis says when
    the state is boundary 0."""

    shared: bytes
    lane: bytes
    data: bytes


class LinkPeer(NamedTuple):
    """Who is at the other end of a link: its name as seen from here ("up", "down", "lane<k>"), the
    session (carrier PeerId) of that end's worker, and the least incarnation that it may have."""

    name: str
    session: str
    incarnation: int = 0


@dataclass(frozen=True)
class SlotAssignment:
    """One slot that this machine shall work on.

    job          32 bytes; the job id
    spec         the canonical spec's bytes
    epoch        of the job: raised by a rollback
    incarnation  of the slot: raised when another worker takes it
    links        in the order of `Spec.links(lane, stage)`
    members      sessions of everybody who may fetch this job's states and frames from us
    start        boundary to begin at; 0 is drawn, or the given weights, when it is not here
    roots        that the state at `start` must have; None while boundary 0 is not attested
    committed    segments below it stand on the chain: their lists stay, with the salts of the seals
    """

    job: bytes
    spec: bytes
    slot: SlotId
    epoch: int
    incarnation: int
    links: tuple[LinkPeer, ...]
    members: frozenset[str]
    start: int = 0
    roots: StateRoots | None = None
    committed: int = 0


@dataclass(frozen=True)
class LinkSource:
    """Where an auditor gets one link's received frames: the root that they must have (the
    neighbour's sent root = the audited slot's received root) and sessions that hold them."""

    root: bytes
    holders: tuple[str, ...]


@dataclass(frozen=True)
class StateSource:
    """Where a state part comes from: the root that it must have and sessions that hold it."""

    root: bytes
    holders: tuple[str, ...]


@dataclass(frozen=True)
class ContributionSource:
    """Where a lane's contribution of a round comes from: its committed id and sessions that hold
    it, the one that made it first."""

    id: bytes
    holders: tuple[str, ...]


@dataclass(frozen=True)
class AuditTask:
    """Replay of `segment` of `slot`.

    start          roots of the state at boundary `segment`
    links          per link name of the audited slot: its received frames
    state_holders  sessions that hold the start state, in the order in which to try them
    data_holders   sessions that hold the data shards (only asked for what is not here)
    included       lanes mode `diloco`: lanes of round `segment` - 1 that entered this segment
    contributions  of that round, by lane: those included and the slot's own (none in segment 0)
    """

    job: bytes
    spec: bytes
    slot: SlotId
    segment: int
    start: StateRoots
    links: Mapping[str, LinkSource]
    state_holders: tuple[str, ...]
    data_holders: tuple[str, ...] = ()
    included: tuple[int, ...] = ()
    contributions: Mapping[int, ContributionSource] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultInfo:
    """A finished job's exported directory."""

    result_id: bytes
    directory: Path
    files: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class StepDone:
    """A worker finished one optimizer step.

    seconds  wall time of the step
    timings  where it went, in seconds: "compute", "waiting" (for frames), "verifying" (hashing)
    """

    job: bytes
    slot: SlotId
    step: int
    loss: float | None
    seconds: float
    timings: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0


@dataclass(frozen=True)
class SegmentDone:
    """A segment is finished: its list, the frames and the state after it are on disk, synced.
    The daemon may commit to `record` now. `salt` (32 bytes, in the list file too) is for the seal
    of the steps root. `under`: the epoch and incarnation that the slot was open under."""

    job: bytes
    slot: SlotId
    record: SegmentRecord
    salt: bytes
    under: tuple[int, int]


@dataclass(frozen=True)
class SlotFinished:
    """The slot ran its last segment and both ends of each link have everything."""

    job: bytes
    slot: SlotId


@dataclass(frozen=True)
class SlotFailed:
    """The slot stopped and will not go on by itself: `reason` says why, in words for the user.
    Everything that it had on disk is kept; `open_slot` takes it up again (`resume_point`)."""

    job: bytes
    slot: SlotId
    reason: str
    cause: FailureCause


@dataclass(frozen=True)
class LinkWaits:
    """A worker has waited `seconds` for frame `seq` of a link, and waits on. Said again from time
    to time while it does; a StepDone later than the last one says that the wait is over."""

    job: bytes
    slot: SlotId
    link: str
    seq: int
    seconds: float


@dataclass(frozen=True)
class CarrierDown:
    """The carrier process ended. Requests fail with CarrierUnavailable until CarrierUp; every open
    slot is reported SlotFailed (cause CARRIER) right after this event."""

    reason: str


@dataclass(frozen=True)
class CarrierUp:
    """A restarted carrier serves again, under the same session."""

    addresses: tuple[str, ...]


Event = StepDone | SegmentDone | SlotFinished | SlotFailed | LinkWaits | CarrierDown | CarrierUp
