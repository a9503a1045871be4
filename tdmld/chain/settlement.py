"""Payment of finished segments, out of escrow, without anybody asking for it.

A segment is *ready* when its draw has come out in its favour (records.CLEARED: not drawn, passed,
or flagged `unaudited`), `settle_window` has passed since it was linked, and the copy that is due
after it was proven or the time for that is over. Segments of a slot settle in order, each once.
One due entry a slot pays worker, standby and auditor of every segment that is ready.

Worker: the agreed price. Standby: `standby_price` for every segment since the last proven boundary,
when its keyed hash equalled the worker's. Auditor: `audit_price`, from the audit budget.
"""

from msgspec.structs import replace

from tdmld.chain import due
from tdmld.chain.codec import NATURAL_MAX
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.events import JobFinishing, Paid, SegmentSettled
from tdmld.chain.execution import Execution
from tdmld.chain.records import (
    CLEARED,
    Audit,
    AuditStatus,
    Due,
    Facts,
    Job,
    JobStatus,
    ProofStatus,
    Segment,
    SegmentStatus,
    SlotState,
    Timer,
)


def copy_due_after(job: Job, segment: int) -> bool:
    """Whether the state after `segment` must be proven by the standby."""
    boundary = segment + 1
    return boundary % job.state_every == 0 or boundary == job.rounds


def copied_segments(job: Job, segment: int) -> int:
    """How many segments the standby is paid for when it proves the state after `segment`."""
    return (segment % job.state_every) + 1


def at_limit(job: Job, slot: SlotState) -> bool:
    """Whether the slot may not commit before something of it settles (S3)."""
    return slot.committed < job.rounds and slot.committed - slot.settled >= job.unsettled


def waits_for_settlement(run: Execution, job: Job, slot: int) -> bool:
    """Whether the slot is at its limit D, and what it waits for is the chain and not a neighbour.

    A slot at its limit whose next segment is not even linked waits for the other end of a link.
    """
    state = run.slot(job.id, slot)
    if not at_limit(job, state):
        return False
    waiting = run.segment(job.id, slot, state.settled)
    return waiting.status is not SegmentStatus.COMMITTED


def arm_stall(run: Execution, job: Job, slot: int) -> None:
    """(Re)start the slot's `segment_window`, or stop it where the slot is done or must wait."""
    state = run.slot(job.id, slot)
    entry = Due(Timer.STALL, job.id, slot)
    if state.committed == job.rounds or at_limit(job, state):
        due.cancel(run.state, entry)
    else:
        due.put(run.state, entry, run.height + run.parameters.segment_window)


def arm_settlement(run: Execution, job: Job, slot: int) -> None:
    """Set the slot's settlement for the first height at which its next segment can be ready.

    Nothing is set while that segment still lacks a link or a verdict: their coming calls again.
    """
    state = run.slot(job.id, slot)
    entry = Due(Timer.SETTLE, job.id, slot)
    if state.settled == state.committed:
        return
    segment = run.segment(job.id, slot, state.settled)
    if segment.status not in CLEARED:
        due.cancel(run.state, entry)
        return
    due.put(run.state, entry, max(run.height + 1, _ready_at(run, segment)))


def settle(run: Execution, entry: Due) -> None:
    """Due: pay every segment of the slot that is ready, in order."""
    job = run.job(entry.job)
    if job.status is not JobStatus.ACTIVE:
        raise InvariantViolation(f"a settlement is due in a job that is {job.status}")
    was_at_limit = at_limit(job, run.slot(job.id, entry.slot))
    while (segment := _next(run, job.id, entry.slot)) is not None:
        if segment.status not in CLEARED or _ready_at(run, segment) > run.height:
            break
        pay_segment(run, job.id, entry.slot)
    state = run.slot(job.id, entry.slot)
    if state.settled == job.rounds and _all_settled(run, job):
        _finish(run, job.id)
        return
    arm_settlement(run, job, entry.slot)
    if was_at_limit and not at_limit(job, state):
        # Slots of a lane wait for each other: all get a whole window from here.
        for slot in range(job.slots):
            arm_stall(run, job, slot)


def settle_cleared(run: Execution, job: Job) -> None:
    """At a refund: pay what already is in the clear, in order, windows or not."""
    for slot in range(job.slots):
        while (segment := _next(run, job.id, slot)) is not None and segment.status in CLEARED:
            pay_segment(run, job.id, slot)


def pay_segment(run: Execution, job_id: bytes, slot: int) -> None:
    """Pay the slot's next unsettled segment, once and for all."""
    job, state = run.job(job_id), run.slot(job_id, slot)
    number = state.settled
    segment = run.segment(job_id, slot, number)
    if segment.settled or number >= job.rounds:
        raise InvariantViolation(f"segment {number} of slot {slot} would be paid twice")
    worker = state.worker
    run.state.put_slot(job_id, slot, replace(state, settled=number + 1))
    proof = segment.proof
    if proof is ProofStatus.WAITING:
        proof = ProofStatus.MISSING
    run.state.put_segment(job_id, slot, number, replace(segment, settled=run.height, proof=proof))
    pay(run, job_id, worker.owner, "worker", worker.price)
    count(run, worker.owner, segments=1)
    if proof is ProofStatus.EQUAL and job.standby is not None:
        amount = job.standby_price * copied_segments(job, number)
        pay(run, job_id, job.standby.owner, "standby", amount)
        count(run, job.standby.owner, proofs=1)
    audit = run.state.audit(job_id, slot, number)
    if audit is not None and audit.status is AuditStatus.PASSED:
        pay_auditor(run, job_id, slot, number, audit)
    run.emit(SegmentSettled(job_id, slot, number))


def pay_auditor(run: Execution, job_id: bytes, slot: int, segment: int, audit: Audit) -> None:
    """Pay an auditor for its verdict, whatever it was, out of what the draw reserved."""
    job = run.job(job_id)
    reserved = job.audits_reserved - job.audit_price
    if audit.paid or reserved < 0:
        raise InvariantViolation("an audit would be paid twice")
    run.state.put_job(replace(job, audits_reserved=reserved))
    run.state.put_audit(job_id, slot, segment, replace(audit, paid=job.audit_price))
    pay(run, job_id, audit.owner, "auditor", job.audit_price)
    count(run, audit.owner, audits=1)


def pay(run: Execution, job_id: bytes, owner: bytes, role: str, amount: int) -> None:
    """Move `amount` from the job (its escrow; for auditors its audit budget) to an owner."""
    job, account = run.job(job_id), run.state.account(owner)
    if role == "auditor":
        left, job = job.audit_budget - amount, replace(job, audit_budget=job.audit_budget - amount)
    else:
        left, job = job.escrow - amount, replace(job, escrow=job.escrow - amount)
    if left < 0:
        raise InvariantViolation(f"the escrow of {job_id.hex()} does not cover a {role}'s pay")
    run.state.put_job(job)
    run.state.put_account(owner, replace(account, balance=account.balance + amount))
    earned = run.state.earnings(job_id, owner)
    run.state.put_earnings(job_id, owner, replace(earned, **{role: getattr(earned, role) + amount}))
    count(run, owner, earned=amount)
    run.emit(Paid(job_id, owner, role, amount))


def count(run: Execution, owner: bytes, **facts: int) -> None:
    """Add to an owner's facts. They stop at the greatest number that a record can hold: the same
    money may be earned again and again."""
    old: Facts = run.state.facts(owner)
    new = {name: min(getattr(old, name) + more, NATURAL_MAX) for name, more in facts.items()}
    run.state.put_facts(owner, replace(old, **new))


def _next(run: Execution, job_id: bytes, slot: int) -> Segment | None:
    state = run.slot(job_id, slot)
    if state.settled == state.committed:
        return None
    return run.segment(job_id, slot, state.settled)


def _ready_at(run: Execution, segment: Segment) -> int:
    if segment.linked == 0 or segment.status is SegmentStatus.COMMITTED:
        raise InvariantViolation("a segment without equal links would settle")
    at = segment.linked + run.parameters.settle_window
    return max(at, segment.proof_until) if segment.proof is ProofStatus.WAITING else at


def _all_settled(run: Execution, job: Job) -> bool:
    return all(run.slot(job.id, slot).settled == job.rounds for slot in range(job.slots))


def _finish(run: Execution, job_id: bytes) -> None:
    job = replace(run.job(job_id), status=JobStatus.FINISHING, finished=run.height)
    run.state.put_job(job)
    due.cancel(run.state, Due(Timer.DEADLINE, job_id))
    due.put(run.state, Due(Timer.RESULT, job_id), run.height + run.parameters.result_window)
    run.emit(JobFinishing(job_id))
