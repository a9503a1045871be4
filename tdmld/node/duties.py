"""What the chain expects of a node: a pure function of the finalized state.

There is no coordinator. After each block every node asks `duties` what is its turn; the market
agent does it. The kinds stand in `duty`, what each does in `performer`.
"""

from collections.abc import Iterator

from tdmld.chain.crypto import address
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import (
    Audit,
    AuditStatus,
    Case,
    Cause,
    Former,
    Job,
    JobStatus,
    ProofStatus,
    Segment,
    SlotState,
)
from tdmld.chain.segments import links_of, neighbours, other_end
from tdmld.chain.settlement import allowed, keep_from
from tdmld.chain.state import State
from tdmld.chain.transactions import LaneMode
from tdmld.node.duty import (
    CloseJob,
    CommitSegment,
    Duty,
    ForgetSegments,
    HoldContributions,
    HoldState,
    MakeResult,
    OpenSeal,
    OpenSlot,
    OpenVerdict,
    PrepareCopy,
    PrepareSlot,
    ProveState,
    ReachPeers,
    ReplaySegment,
    RunSegments,
    SayPresent,
    TakePlace,
    TryDelivery,
)

Party = frozenset[tuple[bytes, bytes]]
"""(node key, session key) of everybody who has to do with a job."""
_At = tuple[bytes, int, int, int, int]
"""Job, slot, epoch, incarnation and number of a committed segment."""


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
    standby = job.standby is not None and job.standby.node == node
    yield from _places(node, job, slots)
    if job.status is JobStatus.MATCHED:
        return
    standby = standby and job.standby is not None and job.standby.accepted
    if job.status is JobStatus.PREPARING:
        for index, slot in enumerate(slots):
            if any(roots.node == node for roots in slot.attested):
                continue
            if slot.worker.node == node:
                yield PrepareSlot(job.id, index)
            elif standby and not job.is_own(index):
                yield PrepareCopy(job.id, index)
        return
    if job.status is JobStatus.ACTIVE:
        for index in job.living:
            yield from _of_slot(state, node, job, index, slots, standby=standby)
    elif all(holder != node for holder, _ in job.results) and node in makers(job, slots):
        yield MakeResult(job.id)


def makers(job: Job, slots: list[SlotState]) -> tuple[bytes, ...]:
    """Nodes that make and keep the result: the source alone when nobody else may see slot 0, else
    the standby and the worker of the last stage of the first living lane."""
    if job.is_own(0):
        return (job.source,)
    lane = next(lane for lane in range(job.lanes) if lane not in job.lost_lanes)
    last = slots[job.slot_at(lane, len(job.stages) - 1)].worker.node
    return (last,) if job.standby is None else (job.standby.node, last)


def until(state: State, job: Job, index: int) -> int:
    """Our slot may run segments below this: what the chain allows, and in lanes mode `diloco` one
    beyond the last round that is decided."""
    most = allowed(state, job, index, neighbours(job, index))
    if job.lane_mode is not LaneMode.DILOCO:
        return most
    slot = state.slot(job.id, index)
    number = min(0 if slot is None else slot.committed, most)
    while number < most and (number == 0 or is_decided(state, job, number - 1)):
        number += 1
    return number


def is_decided(state: State, job: Job, number: int) -> bool:
    """Whether it is known whose contributions of a round go into the next segment."""
    found = state.round(job.id, number)
    return found is not None and found.decided > 0


def _places(node: bytes, job: Job, slots: list[SlotState]) -> Iterator[Duty]:
    matched = job.status is JobStatus.MATCHED
    for index in job.living:
        slot = slots[index]
        if slot.worker.node == node and not slot.worker.accepted:
            yield TakePlace(job.id, job.attempt if matched else slot.incarnation, index)
    if job.standby is not None and job.standby.node == node and not job.standby.accepted:
        yield TakePlace(job.id, job.attempt if matched else job.standby_turn, STANDBY_SLOT)


def _of_slot(
    state: State, node: bytes, job: Job, index: int, slots: list[SlotState], *, standby: bool
) -> Iterator[Duty]:
    slot = slots[index]
    worker = slot.worker.node == node and slot.worker.accepted
    if slot.case is not None:
        yield from _of_case(job, index, slot, slot.case, worker=worker, standby=standby)
    if worker:
        yield from _of_worker(state, job, index, slots)
    if standby and slot.held and not job.is_own(index) and slot.worker.accepted:
        yield HoldState(job.id, index, job.epoch, slot.held)
    for number in range(slot.settled, slot.committed):
        segment = state.segment(job.id, index, number)
        if segment is None:
            continue
        at = (job.id, index, segment.epoch, segment.incarnation, number)
        yield from _proofs(at, segment, worker=worker, standby=standby)
        audit = state.audit(job.id, index, number)
        if audit is not None:
            yield from _of_audit(node, at, audit, worker=worker)
    if worker:
        yield ForgetSegments(job.id, index, keep_from(state, job, index, neighbours(job, index)))
    elif standby:
        yield ForgetSegments(job.id, index, slot.held)


def _of_worker(state: State, job: Job, index: int, slots: list[SlotState]) -> Iterator[Duty]:
    slot = slots[index]
    at = (job.id, index, job.epoch, slot.incarnation)
    ends = {link: slots[other_end(job, index, link)[0]] for link in links_of(job, index)}
    if all(end.worker.accepted for end in ends.values()):
        yield OpenSlot(*at)
    there = [
        (link, end.worker.session, end.incarnation)
        for link, end in ends.items()
        if end.worker.accepted
    ]
    yield ReachPeers(*at, tuple(there))
    if slot.committed < job.rounds:
        if slot.committed - slot.settled < job.unsettled:
            yield CommitSegment(*at, slot.committed)
        yield RunSegments(*at, until(state, job, index))
    if job.lane_mode is LaneMode.DILOCO:
        yield from _contributions(state, job, index, slots)


def _contributions(state: State, job: Job, index: int, slots: list[SlotState]) -> Iterator[Duty]:
    """Siblings' contributions of rounds that are not decided. There are two such rounds at most:
    nobody commits to a segment before the round before it is decided."""
    stage, lane = job.stage_of(index), job.lane_of(index)
    newest = max(slots[at].committed for at in job.living)
    for number in range(max(0, newest - 2), newest):
        found = state.round(job.id, number)
        if not job.contributes(number) or (found is not None and found.decided):
            continue
        held = 0 if found is None else found.attested[index]
        missing = tuple(
            other
            for other in range(job.lanes)
            if other not in (lane, *job.lost_lanes)
            and slots[job.slot_at(other, stage)].committed > number
            and not held >> other & 1
        )
        if missing:
            yield HoldContributions(job.id, index, job.epoch, number, missing)


def _of_case(
    job: Job, index: int, slot: SlotState, case: Case, *, worker: bool, standby: bool
) -> Iterator[Duty]:
    if worker and not case.present:
        yield SayPresent(job.id, index, job.epoch, slot.incarnation, case.opened)
    if standby and case.present:
        _, link = other_end(job, case.accuser, case.link)
        at = (job.id, index, job.epoch, slot.incarnation, case.opened)
        yield TryDelivery(*at, link, case.seq)


def _proofs(at: _At, segment: Segment, *, worker: bool, standby: bool) -> Iterator[Duty]:
    if segment.proof is not ProofStatus.WAITING:
        return
    if standby and not segment.standby_hash:
        if segment.proof_key:
            yield ProveState(*at)
        else:
            job, index, epoch, _, number = at
            yield HoldState(job, index, epoch, number + 1)
    if worker and segment.standby_hash and not segment.worker_hash:
        yield ProveState(*at)


def _of_audit(node: bytes, at: _At, audit: Audit, *, worker: bool) -> Iterator[Duty]:
    if audit.auditor == node and audit.status is AuditStatus.DRAWN:
        yield ReplaySegment(*at, audit.attempt)
    if worker and audit.status is AuditStatus.COMMITTED:
        yield OpenSeal(*at)
    if audit.auditor == node and audit.status is AuditStatus.OPENED:
        yield OpenVerdict(*at, audit.attempt)


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


def lost_places(state: State, job: Job) -> list[Former]:
    """Everybody who worked in a slot of the job and does not any more."""
    formers = [former for slot in assigned(state, job) for former in slot.former]
    return [former for former in formers if former.cause not in (Cause.UNANSWERED, Cause.DECLINED)]


def sessions(party: Party) -> frozenset[str]:
    """Carriers' PeerIds, of those who have said theirs."""
    return frozenset(address(session) for _, session in party if session)
