"""How a job ends: closed, refunded or expired. Whatever it still holds goes back to its submitter.

On a refund, segments that are in the clear (records.CLEARED) are still paid, windows or not; a
segment whose draw, audit or link is pending, or that failed, is not, nor is any later one of its
slot, for segments settle in order. Settled payments stay. What is left of the deposit goes back in
every case.
"""

from msgspec.structs import replace

from tdmld.chain import due, rounds
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.events import JobEnded
from tdmld.chain.execution import Execution
from tdmld.chain.records import AuditStatus, CloseReason, Due, Job, JobStatus, Timer
from tdmld.chain.settlement import pay_auditor, settle_cleared

_OF_JOB = (
    Timer.MATCH,
    Timer.ACCEPT,
    Timer.ACTIVATE,
    Timer.DEADLINE,
    Timer.RESULT,
    Timer.SETTLE,
    Timer.STANDBY,
)
_OF_SLOT = (Timer.STALL, Timer.REPLACE, Timer.CASE)
_OF_SEGMENT = (Timer.KEY, Timer.DRAW, Timer.AUDIT)


def refund(run: Execution, job_id: bytes, reason: CloseReason, detail: str) -> None:
    """End a job that cannot go on."""
    settle_cleared(run, run.job(job_id))
    end(run, job_id, JobStatus.REFUNDED, reason, detail)


def end(
    run: Execution, job_id: bytes, status: JobStatus, reason: CloseReason, detail: str = ""
) -> None:
    """Stop everything of the job, free its members, return what it holds, keep the record."""
    job = run.job(job_id)
    if job.final:
        raise InvariantViolation(f"the job {job_id.hex()} would end twice")
    for timer in _OF_JOB:
        due.cancel(run.state, Due(timer, job_id))
    if job.class_id:
        rounds.stop(run, job)
        for slot in range(job.slots):
            _stop_slot(run, job, slot)
        release(run, job)
    job = run.job(job_id)
    refunded = job.locked
    ended = replace(
        job,
        status=status,
        reason=reason,
        detail=detail,
        closed=run.height,
        escrow=0,
        audit_budget=0,
        audits_reserved=0,
        fee_budget=0,
        deposit=0,
    )
    run.state.put_job(ended)
    account = run.state.account(job.submitter)
    run.state.put_account(job.submitter, replace(account, balance=account.balance + refunded))
    run.emit(JobEnded(job_id, status, reason, detail, refunded))


def release(run: Execution, job: Job) -> None:
    """Give the capacity that a job's members use back to the nodes."""
    _use(run, job, -1)


def reserve(run: Execution, job: Job) -> None:
    """Take the capacity that a matching needs."""
    _use(run, job, 1)


def _use(run: Execution, job: Job, sign: int) -> None:
    for slot in job.living:
        use_slot(run, job, slot, run.slot(job.id, slot).worker.node, sign)
    if job.standby is not None:
        use_standby(run, job, job.standby.node, sign)


def use_slot(run: Execution, job: Job, slot: int, node: bytes, sign: int) -> None:
    """Take (1) or give back (-1) what a slot needs of its worker's node."""
    _take(run, node, memory=sign * job.stages[job.stage_of(slot)].memory)


def use_standby(run: Execution, job: Job, node: bytes, sign: int) -> None:
    """The same of the standby's node."""
    _take(run, node, standby=sign * job.slots)


def count_open_audit(run: Execution, node: bytes, change: int) -> None:
    """One audit more (+1) or less (-1) is open at `node`."""
    _take(run, node, audits=change)


def void(run: Execution, job_id: bytes, slot: int, first: int) -> None:
    """Take back the unsettled segments of a slot from `first` on: nobody works, copies or audits
    for them any more, and nobody but an auditor whose verdict is known is paid for them."""
    state = run.slot(job_id, slot)
    for segment in range(first, state.committed):
        for timer in _OF_SEGMENT:
            due.cancel(run.state, Due(timer, job_id, slot, segment))
        audit = run.state.audit(job_id, slot, segment)
        if audit is not None and audit.status is AuditStatus.PASSED:
            pay_auditor(run, job_id, slot, segment, audit)
        elif audit is not None and audit.open:
            if audit.held:
                count_open_audit(run, audit.auditor, -1)
            job = run.job(job_id)
            left = job.audits_reserved - job.audit_price_of(slot)
            run.state.put_job(replace(job, audits_reserved=left))
        run.state.put_audit(job_id, slot, segment, None)
        run.state.put_segment(job_id, slot, segment, None)
    if first < state.committed:
        run.state.put_slot(job_id, slot, replace(state, committed=first))
        rounds.void_slot(run, run.job(job_id), slot, first)


def _take(
    run: Execution, node: bytes, *, memory: int = 0, standby: int = 0, audits: int = 0
) -> None:
    record = run.state.node(node)
    if record is None:
        raise InvariantViolation(f"the node {node.hex()} has vanished")
    changed = replace(
        record,
        memory_used=record.memory_used + memory,
        standby_used=record.standby_used + standby,
        audits_open=record.audits_open + audits,
    )
    if min(changed.memory_used, changed.standby_used, changed.audits_open) < 0:
        raise InvariantViolation(f"the node {node.hex()} would be freed of more than it does")
    run.state.put_node(node, changed)


def _stop_slot(run: Execution, job: Job, slot: int) -> None:
    for timer in _OF_SLOT:
        due.cancel(run.state, Due(timer, job.id, slot))
    state = run.slot(job.id, slot)
    for segment in range(state.settled, state.committed):
        for timer in _OF_SEGMENT:
            due.cancel(run.state, Due(timer, job.id, slot, segment))
        audit = run.state.audit(job.id, slot, segment)
        if audit is not None and audit.open:
            if audit.held:
                count_open_audit(run, audit.auditor, -1)
            dropped = replace(audit, status=AuditStatus.DROPPED)
            run.state.put_audit(job.id, slot, segment, dropped)
