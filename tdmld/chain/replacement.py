"""Places of a running job that become vacant, who takes them, and rollbacks.

    taken --(a fault, a mismatch, Leave)--> vacant: a node is asked
    asked --(Accept)--> taken       asked --(Decline; accept_window)--> the next one is asked

**A slot.** Who loses it is paid nothing for what is not settled: these segments are void, and its
owner gets no other place in the job. The standby is asked first, for it holds the state; then the
cheapest node that the rules of matching allow. Never whoever accused the last worker, an auditor
or the witness: nobody can win a place by its word. The new worker begins at the boundary `held` and
commits again from the first unsettled segment on; its neighbours keep their segments, and the
links are compared anew. Where nobody is left to ask, the job is refunded; in lane mode diloco it
goes on without that lane, if there is another.

**The standby.** When it took a slot, or its copies were not proven UNPROVEN_COPIES times on end,
its place is matched again among the asks, as long as it takes: a job can go on without one.

**Rollback.** When an audit finds a segment wrong, the work of all slots from there on grew from it:
it is void, and the job's epoch grows, so that nothing that was signed before means anything after.

Incarnations and epochs only grow, and there are limits.INCARNATIONS and limits.ROLLBACKS of them:
so much work can be asked for twice, and the fees that an offer locks cover it.
"""

from msgspec.structs import replace

from tdmld.chain import closing, due, limits, market, rounds, settlement
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.events import (
    CaseClosed,
    JobRolledBack,
    LaneLost,
    SlotAsked,
    SlotTaken,
    SlotVacated,
    StandbyAsked,
    StandbyTaken,
    StandbyVacated,
)
from tdmld.chain.execution import Execution, known_job, known_slot, require
from tdmld.chain.market import Candidate
from tdmld.chain.records import (
    Cause,
    CloseReason,
    Due,
    Former,
    Job,
    JobStatus,
    Member,
    ProofStatus,
    SlotState,
    Timer,
)
from tdmld.chain.segments import neighbours
from tdmld.chain.settlement import arm_settlement, arm_stall, count, unproven_copy
from tdmld.chain.transactions import Accept, Decline, LaneMode

COUNTED_AS = {
    Cause.ABSENT: "faults",
    Cause.UNDELIVERED: "faults",
    Cause.STALL: "faults",
    Cause.LEFT: "faults",
    Cause.UNPROVEN: "faults",
    Cause.UNANSWERED: "faults",
    Cause.MISMATCH: "mismatches",
    Cause.UNOPENED: "mismatches",
}
"""The fact that a cause counts for the owner; the others count for nothing."""
_KEEPS_OTHER_PLACES = frozenset({Cause.UNANSWERED, Cause.DECLINED, Cause.MOVED})
"""Causes that exclude the node at most, and not its owner."""


# -- a slot


def vacate(run: Execution, job_id: bytes, slot: int, cause: Cause, barred: bytes = b"") -> None:
    """The worker loses the slot, and another is asked; may end the job. `barred`: the owner of the
    accuser, who does not get it."""
    job, state = run.job(job_id), run.slot(job_id, slot)
    if cause in COUNTED_AS:
        count(run, state.worker.owner, **{COUNTED_AS[cause]: 1})
    if job.is_own(slot):
        detail = f"slot {slot} is the source's own, and became vacant: {cause}"
        closing.refund(run, job_id, _reason(cause), detail)
        return
    closing.void(run, job_id, slot, state.settled)
    rounds.void_slot(run, job, slot, state.settled)  # also what it held before it committed
    close_cases(run, job, slot)
    excluded = tuple(sorted({*run.job(job_id).excluded, state.worker.owner}))
    run.state.put_job(replace(run.job(job_id), excluded=excluded))
    state = replace(run.slot(job_id, slot), barred=barred, unproven=0, delivered=())
    _pass_over(run, job_id, slot, state, cause)
    job = run.job(job_id)
    if not job.final:
        restart_windows(run, job_id)
        arm_settlement(run, job)


def _pass_over(run: Execution, job_id: bytes, slot: int, state: SlotState, cause: Cause) -> None:
    """Put down why the node in the record is not the worker, and ask the next one."""
    job, last = run.job(job_id), state.worker
    former = Former(
        last.node, last.owner, cause, job.epoch, state.incarnation, state.settled, run.height
    )
    state = replace(
        state,
        worker=replace(last, session=b""),
        incarnation=state.incarnation + 1,
        since=0,
        former=(*state.former, former),
    )
    run.state.put_slot(job_id, slot, state)
    due.cancel(run.state, Due(Timer.STALL, job_id, slot))
    due.cancel(run.state, Due(Timer.REPLACE, job_id, slot))
    run.emit(SlotVacated(job_id, slot, last.node, cause, job.epoch, state.incarnation))
    found = None if state.incarnation > limits.INCARNATIONS else _find(run, job, slot)
    if found is None:
        _nobody(run, job, slot, cause)
        return
    closing.use_slot(run, job, slot, last.node, -1)
    closing.use_slot(run, job, slot, found.node, 1)
    run.state.put_slot(job_id, slot, replace(state, worker=found))
    at = run.height + run.parameters.accept_window
    due.put(run.state, Due(Timer.REPLACE, job_id, slot), at)
    run.emit(SlotAsked(job_id, slot, found.node, state.incarnation))


def _find(run: Execution, job: Job, slot: int) -> Member | None:
    """The standby, or the cheapest node that may take the slot now."""
    fitting = [c for c in market.candidates_for(run, job) if _fits(run, job, slot, c)]
    if job.standby is not None:
        owner, node = job.standby.owner, job.standby.node
        if job.standby.accepted:
            for candidate in fitting:
                if candidate.node == node:
                    return _member(job, slot, candidate)
        fitting = [c for c in fitting if c.owner != owner]
    beacon = run.context.beacon
    best = min(
        fitting,
        key=lambda c: (
            market.price_of(job, slot, c.ask) * c.weight,
            market.lot(beacon, job, slot, c),
        ),
        default=None,
    )
    return None if best is None else _member(job, slot, best)


def _fits(run: Execution, job: Job, slot: int, candidate: Candidate) -> bool:
    """Whether a node may take a vacant slot, by the rules of matching."""
    others = [(other, run.slot(job.id, other).worker) for other in job.living if other != slot]
    ends = [run.slot(job.id, end).worker.node for end in neighbours(job, slot)]
    price = market.price_of(job, slot, candidate.ask)
    return (
        candidate.ask.class_id == job.class_id
        and candidate.node != job.source
        and candidate.owner != run.slot(job.id, slot).barred
        and candidate.memory >= job.stages[job.stage_of(slot)].memory
        and price <= job.slot_price_max * job.weight_of(slot)
        and all(worker.node != candidate.node for _, worker in others)
        and all(
            worker.owner != candidate.owner
            for other, worker in others
            if job.lane_of(other) == job.lane_of(slot)
        )
        and all(
            market.has_path(candidate, end, run.state.ask(end), run.parameters.dial_receipts)
            for end in ends
        )
    )


def _member(job: Job, slot: int, candidate: Candidate) -> Member:
    return Member(candidate.node, candidate.owner, market.price_of(job, slot, candidate.ask))


def _nobody(run: Execution, job: Job, slot: int, cause: Cause) -> None:
    """Nobody may take the slot: the job ends, or goes on without the lane."""
    lane = job.lane_of(slot)
    if job.lane_mode is LaneMode.DILOCO and any(job.lane_of(s) != lane for s in job.living):
        _lose_lane(run, job, lane)
        return
    detail = f"slot {slot} became vacant, and nobody is left to take it: {cause}"
    closing.refund(run, job.id, _reason(cause), detail)


def _lose_lane(run: Execution, job: Job, lane: int) -> None:
    """The lane's members are free, without a fault; the others go on."""
    for slot in (s for s in job.living if job.lane_of(s) == lane):
        state = run.slot(job.id, slot)
        closing.void(run, job.id, slot, state.settled)
        close_cases(run, job, slot)
        closing.use_slot(run, job, slot, state.worker.node, -1)
        for timer in (Timer.STALL, Timer.REPLACE):
            due.cancel(run.state, Due(timer, job.id, slot))
    job = run.job(job.id)
    job = replace(job, lost_lanes=tuple(sorted((*job.lost_lanes, lane))))
    run.state.put_job(job)
    run.emit(LaneLost(job.id, lane))
    rounds.reconsider(run, job)
    arm_settlement(run, run.job(job.id))


def _reason(cause: Cause) -> CloseReason:
    wrong = cause in (Cause.MISMATCH, Cause.UNOPENED)
    return CloseReason.MISMATCH if wrong else CloseReason.FAULT


def restart_windows(run: Execution, job_id: bytes) -> None:
    """After a repair everybody gets the time of a start for the next segment."""
    job = replace(run.job(job_id), repaired=run.height)
    run.state.put_job(job)
    for slot in job.living:
        arm_stall(run, job, slot, run.parameters.activate_window)


def close_cases(run: Execution, job: Job, slot: int) -> None:
    """A slot gets another worker, or goes back: nobody waits for it, nor it for anybody."""
    for end in neighbours(job, slot):
        state = run.state.slot(job.id, end)
        if state is None:
            continue
        left = tuple(accuser for accuser in state.delivered if accuser != slot)
        if left != state.delivered:
            run.state.put_slot(job.id, end, replace(state, delivered=left))
        if state.case is not None and state.case.accuser == slot:
            close_case(run, job, end, "the accuser's work begins anew")
    if run.slot(job.id, slot).case is not None:
        close_case(run, job, slot, "its work begins anew")


def close_case(run: Execution, job: Job, slot: int, reason: str) -> None:
    """The open case against the slot is over, and nothing follows from it."""
    state = run.slot(job.id, slot)
    assert state.case is not None
    due.cancel(run.state, Due(Timer.CASE, job.id, slot))
    run.state.put_slot(job.id, slot, replace(state, case=None))
    run.emit(CaseClosed(job.id, slot, state.case.accuser, True, reason))


# -- answers


def accept(run: Execution, node: bytes, answer: Accept) -> None:
    """Somebody takes the place that it was asked for."""
    job = known_job(run, answer.job)
    if job.status is not JobStatus.ACTIVE:
        market.accept(run, node, answer)
        return
    member, state = _asked(run, job, node, answer)
    require(len(answer.session) == 32 and any(answer.session), "session: not a key")
    member = replace(member, session=answer.session)
    if state is None:
        due.cancel(run.state, Due(Timer.STANDBY, job.id))
        run.state.put_job(replace(job, standby=member, standby_since=run.height))
        for slot in job.living:
            run.state.put_slot(job.id, slot, replace(run.slot(job.id, slot), unproven=0))
        run.emit(StandbyTaken(job.id, node))
        return
    due.cancel(run.state, Due(Timer.REPLACE, job.id, answer.slot))
    taken = replace(state, worker=member, since=run.height, barred=b"")
    run.state.put_slot(job.id, answer.slot, taken)
    run.emit(SlotTaken(job.id, answer.slot, node, state.incarnation, state.held))
    if job.standby is not None and job.standby.node == node:
        vacate_standby(run, job.id, Cause.MOVED)
    restart_windows(run, job.id)


def decline(run: Execution, node: bytes, answer: Decline) -> None:
    """A node does not want the place: costs it nothing but its turn."""
    job = known_job(run, answer.job)
    if job.status is not JobStatus.ACTIVE:
        market.decline(run, node, answer)
        return
    _, state = _asked(run, job, node, answer)
    _without(run, job, node)
    if state is None:
        vacate_standby(run, job.id, Cause.DECLINED)
    else:
        _pass_over(run, job.id, answer.slot, state, Cause.DECLINED)


def replace_over(run: Execution, entry: Due) -> None:
    """Due: a node did not say whether it takes the slot."""
    job, state = run.job(entry.job), run.slot(entry.job, entry.slot)
    count(run, state.worker.owner, faults=1)
    _without(run, job, state.worker.node)
    if job.standby is not None and job.standby.node == state.worker.node:
        # Counted already: its place is vacant, too, for it does not answer.
        vacate_standby(run, job.id, Cause.UNANSWERED, counted=True)
    _pass_over(run, job.id, entry.slot, state, Cause.UNANSWERED)


def _asked(
    run: Execution, job: Job, node: bytes, answer: Accept | Decline
) -> tuple[Member, SlotState | None]:
    """The place that the node was asked for; its slot, or None for the standby's."""
    state = None
    if answer.slot == limits.STANDBY_SLOT:
        member, turn = job.standby, job.standby_turn
    else:
        state = known_slot(run, job, answer.slot)
        require(answer.slot in job.living, "the lane of this slot is lost")
        member, turn = state.worker, state.incarnation
    require(
        answer.attempt == turn, f"this answers turn {answer.attempt}; the present one is {turn}"
    )
    if member is None or member.node != node:
        raise InvalidTransaction("this node was not asked for that place")
    require(not member.accepted, "this node has accepted already")
    return member, state


def _without(run: Execution, job: Job, node: bytes) -> None:
    declined = tuple(sorted({*job.declined, node}))
    run.state.put_job(replace(job, declined=declined))


# -- the standby


def vacate_standby(run: Execution, job_id: bytes, cause: Cause, *, counted: bool = False) -> None:
    """The standby's place becomes vacant; another is looked for from the next block on."""
    job = run.job(job_id)
    if job.standby is None:
        return
    node, owner = job.standby.node, job.standby.owner
    if cause in COUNTED_AS and not counted:
        count(run, owner, **{COUNTED_AS[cause]: 1})
    closing.use_standby(run, job, node, -1)
    if cause not in _KEEPS_OTHER_PLACES:
        job = replace(job, excluded=tuple(sorted({*job.excluded, owner})))
    run.state.put_job(replace(job, standby=None, standby_turn=job.standby_turn + 1))
    for slot in job.living:
        state = run.slot(job_id, slot)
        if state.committed > state.settled:  # else its worker may still be on its way from `held`
            run.state.put_slot(job_id, slot, replace(state, held=state.settled))
    run.emit(StandbyVacated(job_id, node, cause))
    due.put(run.state, Due(Timer.STANDBY, job_id), run.height + 1)


def standby_over(run: Execution, entry: Due) -> None:
    """Due: look for a standby; one that was asked and did not answer is passed over."""
    job = run.job(entry.job)
    if job.standby is not None:
        _without(run, job, job.standby.node)
        vacate_standby(run, job.id, Cause.UNANSWERED)
        return
    if job.standby_turn > limits.STANDBY_TURNS:
        return
    workers = [run.slot(job.id, slot).worker.owner for slot in job.living]
    pool = [c for c in market.candidates_for(run, job) if c.ask.class_id == job.class_id]
    found = market.cast_standby(job, pool, workers, run.context.beacon)
    due.put(run.state, entry, run.height + run.parameters.accept_window)
    if found is None:
        return
    closing.use_standby(run, job, found.node, 1)
    run.state.put_job(replace(job, standby=found))
    run.emit(StandbyAsked(job.id, found.node, job.standby_turn))


# -- settlement and rollback


def settle(run: Execution, entry: Due) -> None:
    """Due: pay the rounds that are ready; who did not prove its copies loses its place."""
    settlement.settle(run, entry)
    job = run.job(entry.job)
    if job.status is not JobStatus.ACTIVE:
        if job.standby is not None and not job.copied:
            closing.use_standby(run, job, job.standby.node, -1)
            run.state.put_job(replace(job, standby=None))
        for slot in job.living:
            if run.slot(job.id, slot).case is not None:
                close_case(run, job, slot, "all segments are settled")
        return
    for slot in job.living:
        state, now = run.slot(job.id, slot), run.job(job.id)
        if state.unproven < limits.UNPROVEN_COPIES or not now.copied or slot not in now.living:
            continue
        number = state.settled - 1
        while not unproven_copy(segment := run.segment(job.id, slot, number)):
            number -= 1
        if segment.proof is ProofStatus.UNEQUAL:
            vacate_standby(run, job.id, Cause.UNEQUAL)
        elif segment.standby_hash == b"":
            vacate_standby(run, job.id, Cause.UNPROVEN)
        else:
            vacate(run, job.id, slot, Cause.UNPROVEN)
        if run.job(job.id).final:
            return


def rollback(run: Execution, job_id: bytes, boundary: int, detail: str) -> bool:
    """All work from `boundary` on is void, and a new epoch begins; False where it was the last one
    and the job is refunded (`detail`) instead."""
    job = run.job(job_id)
    if job.epoch == limits.ROLLBACKS:
        closing.refund(run, job_id, CloseReason.MISMATCH, detail)
        return False
    for slot in job.living:
        close_cases(run, job, slot)
        closing.void(run, job_id, slot, max(boundary, run.slot(job_id, slot).settled))
    rounds.void_from(run, job, boundary)
    job = replace(run.job(job_id), epoch=job.epoch + 1)
    run.state.put_job(job)
    run.emit(JobRolledBack(job_id, job.epoch, boundary))
    restart_windows(run, job_id)
    arm_settlement(run, run.job(job_id))
    return True
