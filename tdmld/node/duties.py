"""What the chain expects of a node: a pure function of the finalized state.

There is no coordinator. After each block every node asks `duties` what is its turn; the market
agent does it. A duty is a value: it stands as long as the state shows it undone and disappears when
the state shows it done, so a lost transaction, a restart and a late block need no special case.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tdmld.chain.crypto import address
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import (
    Audit,
    AuditStatus,
    Job,
    JobStatus,
    ProofStatus,
    Segment,
    SlotState,
)
from tdmld.chain.state import State

Party = frozenset[tuple[bytes, bytes]]
"""(node key, session key) of everybody who has to do with a job."""


@dataclass(frozen=True)
class Duty:
    """Something to do for one job. Equal duties are the same duty."""

    job: bytes

    def __str__(self) -> str:
        """In words, for the log."""
        rest = [f"{name} {getattr(self, name)}" for name in self.__dataclass_fields__]
        return " ".join([type(self).__name__, "of job", self.job.hex()[:12], *rest[1:]])


@dataclass(frozen=True)
class TakePlace(Duty):
    """Accept or decline the place that matching gave us. `slot`: index or STANDBY_SLOT."""

    attempt: int
    slot: int


@dataclass(frozen=True)
class PrepareSlot(Duty):
    """Fetch the data, draw the slot's weights, attest their roots, and be ready to run."""

    slot: int


@dataclass(frozen=True)
class PrepareCopy(Duty):
    """As the standby: draw a slot's weights too, and attest their roots."""

    slot: int


@dataclass(frozen=True)
class RunSegments(Duty):
    """Let the worker of our slot run segments below `until` (the stall at D)."""

    slot: int
    until: int


@dataclass(frozen=True)
class CommitSegment(Duty):
    """Commit to the next segment of our slot, as soon as it is done."""

    slot: int
    segment: int


@dataclass(frozen=True)
class ProveState(Duty):
    """Publish the keyed hash of the state after `segment`: as the standby, then as the worker."""

    slot: int
    segment: int


@dataclass(frozen=True)
class HoldState(Duty):
    """As the standby: bring the state after `segment` here."""

    slot: int
    segment: int


@dataclass(frozen=True)
class ReplaySegment(Duty):
    """As the drawn auditor: replay and commit to what was found."""

    slot: int
    segment: int
    attempt: int


@dataclass(frozen=True)
class OpenSeal(Duty):
    """As the audited worker: open the seal of a commitment."""

    slot: int
    segment: int


@dataclass(frozen=True)
class OpenVerdict(Duty):
    """As the auditor: open what was found."""

    slot: int
    segment: int
    attempt: int


@dataclass(frozen=True)
class ForgetSegments(Duty):
    """Segments of any slot of the job below `settled` are paid: frames and states that only they
    needed may go."""

    slot: int
    settled: int


@dataclass(frozen=True)
class MakeResult(Duty):
    """Assemble, keep and attest the trained model."""


@dataclass(frozen=True)
class CloseJob(Duty):
    """The job is over: stop what runs for it."""


def assigned(state: State, job: Job) -> list[SlotState]:
    """The slots of a job that is matched, by index; none of one that is not."""
    slots = [state.slot(job.id, index) for index in range(job.slots)]
    return [slot for slot in slots if slot is not None]


def duties(state: State, node: bytes, job: Job) -> Iterator[Duty]:
    """Everything that `job` expects of `node` at this state, the most urgent first."""
    if job.final:
        yield CloseJob(job.id)
        return
    if job.status is JobStatus.OFFERED:
        return
    slots = assigned(state, job)
    mine = [index for index, slot in enumerate(slots) if slot.worker.node == node]
    standby = job.standby is not None and job.standby.node == node
    if job.status is JobStatus.MATCHED:
        for index in mine:
            if not slots[index].worker.accepted:
                yield TakePlace(job.id, job.attempt, index)
        if standby and job.standby is not None and not job.standby.accepted:
            yield TakePlace(job.id, job.attempt, STANDBY_SLOT)
        return
    if job.status is JobStatus.PREPARING:
        for index, slot in enumerate(slots):
            if any(roots.node == node for roots in slot.attested):
                continue
            if index in mine:
                yield PrepareSlot(job.id, index)
            elif standby:
                yield PrepareCopy(job.id, index)
        return
    for index, slot in enumerate(slots):
        yield from _of_slot(state, node, job, index, slot, standby=standby)
        if mine or standby:
            yield ForgetSegments(job.id, index, slot.settled)
    if job.status is JobStatus.FINISHING and all(holder != node for holder, _ in job.results):
        last = len(job.stages) - 1
        if standby or slots[last].worker.node == node:
            yield MakeResult(job.id)


def _of_slot(
    state: State, node: bytes, job: Job, index: int, slot: SlotState, *, standby: bool
) -> Iterator[Duty]:
    worker = slot.worker.node == node
    if worker and slot.committed < job.rounds:
        yield CommitSegment(job.id, index, slot.committed)
        yield RunSegments(job.id, index, min(job.rounds, slot.settled + job.unsettled))
    for number in range(slot.settled, slot.committed):
        segment = state.segment(job.id, index, number)
        if segment is None:
            continue
        yield from _proofs(node, job, index, number, segment, worker=worker, standby=standby)
        audit = state.audit(job.id, index, number)
        if audit is not None:
            yield from _of_audit(node, job, index, number, audit, worker=worker)


def _proofs(
    node: bytes,
    job: Job,
    index: int,
    number: int,
    segment: Segment,
    *,
    worker: bool,
    standby: bool,
) -> Iterator[Duty]:
    if segment.proof is not ProofStatus.WAITING:
        return
    if standby and not segment.standby_hash:
        if segment.proof_key:
            yield ProveState(job.id, index, number)
        else:
            yield HoldState(job.id, index, number)
    if worker and segment.standby_hash and not segment.worker_hash:
        yield ProveState(job.id, index, number)


def _of_audit(
    node: bytes, job: Job, index: int, number: int, audit: Audit, *, worker: bool
) -> Iterator[Duty]:
    if audit.auditor == node and audit.status is AuditStatus.DRAWN:
        yield ReplaySegment(job.id, index, number, audit.attempt)
    if worker and audit.status is AuditStatus.COMMITTED:
        yield OpenSeal(job.id, index, number)
    if audit.auditor == node and audit.status is AuditStatus.OPENED:
        yield OpenVerdict(job.id, index, number, audit.attempt)


def party(state: State, job: Job) -> Party:
    """Everybody who has to do with a job. A session is empty before its node accepted."""
    found = {(job.source, job.source_session)}
    if job.standby is not None:
        found.add((job.standby.node, job.standby.session))
    if job.status is JobStatus.OFFERED:
        return frozenset(found)
    for index, slot in enumerate(assigned(state, job)):
        found.add((slot.worker.node, slot.worker.session))
        for number in range(slot.settled, slot.committed):
            audit = state.audit(job.id, index, number)
            if audit is not None and audit.held:
                found.add((audit.auditor, audit.session))
    return frozenset(found)


def sessions(party: Party) -> frozenset[str]:
    """Carriers' PeerIds, of those who have said theirs."""
    return frozenset(address(session) for _, session in party if session)
