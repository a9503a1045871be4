"""Payment of finished segments, out of escrow, without anybody asking for it.

A segment is *ready* when its draw has come out in its favour (records.CLEARED: not drawn, passed,
or flagged `unaudited`), `settle_window` has passed since it was linked, and the copy that is due
after it was proven or the time for that is over.

**A round settles together**: segment n of every slot is paid in one block, once all of them are
ready. So `settled` is one number for the whole job, and everything that a rollback or a replacement
may take back is unpaid. Segments settle in order, each once; one due entry a job pays them.

Worker: the agreed price; nothing for the source's own slot. Standby: `standby_price` for every
segment since the last proven boundary, when its keyed hash equalled the worker's. Auditor:
`audit_price`, from the audit budget.

**What must be kept.** A replacement begins at `held`: the newest settled boundary of which the
present standby has proven to hold every slot. Until then its own worker and its neighbours keep
what leads on from there, so `held` also bounds how far a slot runs ahead (`allowed`), but for the
way to the next copy: without it nothing could change any more.
"""

from collections.abc import Iterable

from msgspec.structs import replace

from tdmld.chain import due
from tdmld.chain.accounts import (
    Facts,
)
from tdmld.chain.codec import NATURAL_MAX
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.events import JobFinishing, Paid, SegmentSettled
from tdmld.chain.execution import Execution
from tdmld.chain.records import (
    CLEARED,
    Audit,
    AuditStatus,
    Due,
    Job,
    JobStatus,
    ProofStatus,
    Segment,
    SegmentStatus,
    SlotState,
    Timer,
)
from tdmld.chain.state import State


def copy_due_after(job: Job, slot: int, segment: int) -> bool:
    """Whether the state of a slot after `segment` must be proven by the standby."""
    boundary = segment + 1
    if job.is_own(slot):
        return False
    return boundary % job.state_every == 0 or boundary == job.rounds


def unproven_copy(segment: Segment) -> bool:
    """Whether a copy was due after the settled segment, and was not proven."""
    return segment.proof in (ProofStatus.UNEQUAL, ProofStatus.MISSING)


def copied_segments(job: Job, segment: int) -> int:
    """How many segments the standby is paid for when it proves the state after `segment`."""
    return (segment % job.state_every) + 1


def at_limit(job: Job, slot: SlotState) -> bool:
    """Whether the slot may not commit before something of it settles (S3)."""
    return slot.committed < job.rounds and slot.committed - slot.settled >= job.unsettled


def keep_from(state: State, job: Job, slot: int, ends: Iterable[int]) -> int:
    """The oldest boundary that the slot and the slots at the `ends` of its links may need again:
    what belongs to earlier segments may be forgotten."""
    found = (state.slot(job.id, other) for other in (slot, *ends))
    return min((other.held for other in found if other is not None), default=0)


def allowed(state: State, job: Job, slot: int, ends: Iterable[int]) -> int:
    """How many segments the slot may have finished now: at most D unsettled ones, and no more than
    it has room to keep (`keep_from`), but always as many as lead to the next copy. Beyond that it
    stalls; nothing is dropped."""
    record = state.slot(job.id, slot)
    settled = 0 if record is None else record.settled
    room = keep_from(state, job, slot, ends) + job.unsettled + 2 * job.state_every
    return min(job.rounds, settled + job.unsettled, max(room, settled + job.state_every))


def waits_for_settlement(run: Execution, job: Job) -> bool:
    """Whether a slot is at its limit D, and all have linked what is to be settled next: then it is
    the chain that everybody waits for, and no member."""
    slots = [run.slot(job.id, slot) for slot in job.living]
    if not any(at_limit(job, state) for state in slots):
        return False
    for number, state in zip(job.living, slots, strict=True):
        segment = run.state.segment(job.id, number, state.settled)
        if segment is None or segment.status is SegmentStatus.COMMITTED:
            return False
    return True


def arm_stall(run: Execution, job: Job, slot: int, window: int = 0) -> None:
    """(Re)start the slot's window (`segment_window`, or another), or stop it where the slot is
    done, must wait, or is vacant."""
    state = run.slot(job.id, slot)
    entry = Due(Timer.STALL, job.id, slot)
    if state.committed == job.rounds or at_limit(job, state) or not state.worker.accepted:
        due.cancel(run.state, entry)
    else:
        due.put(run.state, entry, run.height + (window or run.parameters.segment_window))


def arm_settlement(run: Execution, job: Job) -> None:
    """Set the job's settlement for the first height at which its next round can be ready.

    Nothing is set while a segment of it still lacks a link or a verdict: their coming calls again.
    """
    entry = Due(Timer.SETTLE, job.id)
    at = _round_ready_at(run, job)
    if at is None:
        due.cancel(run.state, entry)
    else:
        due.put(run.state, entry, max(run.height + 1, at))


def settle(run: Execution, entry: Due) -> None:
    """Due: pay every round that is ready, in order."""
    job = run.job(entry.job)
    if job.status is not JobStatus.ACTIVE:
        raise InvariantViolation(f"a settlement is due in a job that is {job.status}")
    limited = any(at_limit(job, run.slot(job.id, slot)) for slot in job.living)
    while (at := _round_ready_at(run, job)) is not None and at <= run.height:
        for slot in job.living:
            pay_segment(run, job.id, slot)
        _hold(run, job)
    if run.slot(job.id, job.living[0]).settled == job.rounds:
        _finish(run, job.id)
        return
    arm_settlement(run, run.job(job.id))
    if limited:
        # They waited for each other: all get a whole window from here.
        for slot in job.living:
            arm_stall(run, job, slot)


def _round_ready_at(run: Execution, job: Job) -> int | None:
    """Height from which on the next segment of every slot may settle; None where one may not."""
    at = 0
    for slot in job.living:
        segment = _next(run, job.id, slot)
        if segment is None or segment.status not in CLEARED:
            return None
        at = max(at, _ready_at(run, segment))
    return at


def settle_cleared(run: Execution, job: Job) -> None:
    """At a refund: pay what already is in the clear, in order, windows or not."""
    for slot in job.living:
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
    proof = segment.proof
    if proof is ProofStatus.WAITING:
        proof = ProofStatus.MISSING
    settled = replace(segment, settled=run.height, proof=proof)
    run.state.put_slot(job_id, slot, _settled_slot(job, slot, state, settled))
    run.state.put_segment(job_id, slot, number, settled)
    if not job.is_own(slot):
        pay(run, job_id, worker.owner, "worker", worker.price)
        count(run, worker.owner, segments=1)
    if proof is ProofStatus.EQUAL:
        amount = job.standby_price * copied_segments(job, number)
        pay(run, job_id, segment.holder, "standby", amount)
        count(run, segment.holder, proofs=1)
    audit = run.state.audit(job_id, slot, number)
    if audit is not None and audit.status is AuditStatus.PASSED:
        pay_auditor(run, job_id, slot, number, audit)
    run.emit(SegmentSettled(job_id, slot, number))


def _settled_slot(job: Job, slot: int, state: SlotState, segment: Segment) -> SlotState:
    """The slot once its next segment has settled."""
    boundary, held, unproven = state.settled + 1, state.held, state.unproven
    # A worker that has committed nothing since may be gone: nobody can copy from it.
    there = segment.standby_hash != b"" or state.last_commit > segment.committed
    if unproven_copy(segment) and segment.committed >= job.standby_since and there:
        unproven += 1
    if not job.copied or job.is_own(slot):
        held, unproven = boundary, 0
    return replace(state, settled=boundary, held=held, unproven=unproven)


def _hold(run: Execution, job: Job) -> None:
    """A round has settled. When the standby has proven to hold every slot after it, all of them
    would begin there: neighbours that are lost together need each other's frames from one cut."""
    if job.standby is None or not job.copied:
        return
    slots = [slot for slot in job.living if not job.is_own(slot)]
    boundary = run.slot(job.id, slots[0]).settled
    segments = [run.segment(job.id, slot, boundary - 1) for slot in slots]
    if any(s.proof is not ProofStatus.EQUAL or s.holder != job.standby.owner for s in segments):
        return
    for slot in slots:
        state = run.slot(job.id, slot)
        run.state.put_slot(job.id, slot, replace(state, held=boundary, unproven=0))


def pay_auditor(run: Execution, job_id: bytes, slot: int, segment: int, audit: Audit) -> None:
    """Pay an auditor for its verdict, whatever it was, out of what the draw reserved."""
    job = run.job(job_id)
    price = job.audit_price_of(slot)
    reserved = job.audits_reserved - price
    if audit.paid or reserved < 0:
        raise InvariantViolation("an audit would be paid twice")
    run.state.put_job(replace(job, audits_reserved=reserved))
    run.state.put_audit(job_id, slot, segment, replace(audit, paid=price))
    pay(run, job_id, audit.owner, "auditor", price)
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


def _finish(run: Execution, job_id: bytes) -> None:
    job = replace(run.job(job_id), status=JobStatus.FINISHING, finished=run.height)
    run.state.put_job(job)
    due.cancel(run.state, Due(Timer.DEADLINE, job_id))
    due.cancel(run.state, Due(Timer.STANDBY, job_id))
    due.put(run.state, Due(Timer.RESULT, job_id), run.height + run.parameters.result_window)
    run.emit(JobFinishing(job_id))
