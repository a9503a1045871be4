"""What every rule gets: the state, the genesis, the block it stands in, and a place for events."""

from dataclasses import dataclass, field

from tdmld.chain.blocks import follows
from tdmld.chain.errors import InvalidTransaction, InvariantViolation
from tdmld.chain.events import Event
from tdmld.chain.genesis import Genesis, Parameters
from tdmld.chain.records import Job, Segment, SlotState
from tdmld.chain.state import State


@dataclass(frozen=True, slots=True)
class BlockContext:
    """The finalized header's facts that rules may depend on. `beacon`: mix of this very height."""

    height: int
    view: int
    parent_view: int
    time_ms: int
    proposer: bytes
    beacon: bytes

    @property
    def tainted(self) -> bool:
        """A leader before this one was passed over, so somebody may have chosen the beacon."""
        return not follows(self.parent_view, self.view)


@dataclass(slots=True)
class Execution:
    """One block, or one transaction of it (a fork), being executed."""

    state: State
    genesis: Genesis
    context: BlockContext
    events: list[Event] = field(default_factory=list)

    @property
    def height(self) -> int:
        return self.context.height

    @property
    def parameters(self) -> Parameters:
        return self.genesis.parameters

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def fork(self) -> "Execution":
        return Execution(self.state.fork(), self.genesis, self.context)

    def merge(self, child: "Execution") -> None:
        self.state.merge(child.state)
        self.events.extend(child.events)

    # -- records that the rules know to exist: their absence is our bug

    def job(self, job: bytes) -> Job:
        found = self.state.job(job)
        if found is None:
            raise InvariantViolation(f"the job {job.hex()} has vanished")
        return found

    def slot(self, job: bytes, slot: int) -> SlotState:
        found = self.state.slot(job, slot)
        if found is None:
            raise InvariantViolation(f"the slot {slot} of the job {job.hex()} has vanished")
        return found

    def segment(self, job: bytes, slot: int, segment: int) -> Segment:
        found = self.state.segment(job, slot, segment)
        if found is None:
            raise InvariantViolation(f"segment {segment} of slot {slot}, {job.hex()}, has vanished")
        return found


def require(rule: bool, broken: str) -> None:
    """Raise InvalidTransaction(broken) unless `rule` holds."""
    if not rule:
        raise InvalidTransaction(broken)


def known_job(run: Execution, job: bytes) -> Job:
    """The job that a transaction speaks of."""
    found = run.state.job(job)
    if found is None:
        raise InvalidTransaction(f"no job {job.hex()}: is its offer final?")
    return found


def known_slot(run: Execution, job: Job, slot: int) -> SlotState:
    """The slot that a transaction speaks of."""
    found = run.state.slot(job.id, slot) if slot < job.slots else None
    if found is None:
        raise InvalidTransaction(f"the job has no slot {slot}: it has {job.slots}, once matched")
    return found
