"""A job's life between its members' acceptance and its end (ANNEX A2).

preparing --(boundary 0 of every slot attested twice, equal)--> active
active    --(every segment of every slot settled)-------------> finishing
finishing --(result attested twice, Fetched; or window)-------> closed
preparing, active --(unequal roots, nobody left, deadline)----> refunded
"""

from msgspec.structs import replace

from tdmld.chain import due
from tdmld.chain.closing import end, refund
from tdmld.chain.events import JobActive, ResultDisputed, ResultKnown
from tdmld.chain.execution import Execution, known_job, known_slot, require
from tdmld.chain.records import CloseReason, Due, GenesisRoots, Job, JobStatus, Timer
from tdmld.chain.settlement import arm_stall, count
from tdmld.chain.transactions import AttestGenesis, AttestResult, Fetched


def attest_genesis(run: Execution, node: bytes, found: AttestGenesis) -> None:
    """A worker or the standby says what boundary 0 of a slot is."""
    job = known_job(run, found.job)
    require(job.status is JobStatus.PREPARING, f"the job is {job.status}, not preparing")
    slot = known_slot(run, job, found.slot)
    is_standby = job.standby is not None and job.standby.node == node
    own = job.is_own(found.slot)
    require(
        slot.worker.node == node or (is_standby and not own),
        "boundary 0 is attested by the slot's worker and by the standby",
    )
    require(all(roots.node != node for roots in slot.attested), "this node has attested this slot")
    mine = GenesisRoots(node, found.shared, found.lane, found.data)
    slot = replace(slot, attested=(*slot.attested, mine))
    if len(slot.attested) < 2 and not own:
        run.state.put_slot(job.id, found.slot, slot)
        return
    one, two = slot.attested[0], slot.attested[-1]
    if (one.shared, one.lane, one.data) != (two.shared, two.lane, two.data):
        run.state.put_slot(job.id, found.slot, slot)
        detail = f"slot {found.slot}: worker and standby found different states at boundary 0"
        refund(run, job.id, CloseReason.GENESIS, detail)
        return
    run.state.put_slot(job.id, found.slot, replace(slot, genesis=one))
    if all(run.slot(job.id, number).genesis is not None for number in range(job.slots)):
        _activate(run, job)


def _activate(run: Execution, job: Job) -> None:
    run.state.put_job(replace(job, status=JobStatus.ACTIVE, active=run.height))
    due.cancel(run.state, Due(Timer.ACTIVATE, job.id))
    for slot in range(job.slots):
        arm_stall(run, job, slot, run.parameters.activate_window)
    run.emit(JobActive(job.id))


def activate_over(run: Execution, entry: Due) -> None:
    """Due: somebody did not attest boundary 0 in time."""
    job = run.job(entry.job)
    for slot in range(job.slots):
        state = run.slot(job.id, slot)
        if all(roots.node != state.worker.node for roots in state.attested):
            count(run, state.worker.owner, faults=1)
    if job.standby is not None and any(
        all(roots.node != job.standby.node for roots in run.slot(job.id, slot).attested)
        for slot in range(job.slots)
        if not job.is_own(slot)
    ):
        count(run, job.standby.owner, faults=1)
    refund(run, job.id, CloseReason.GENESIS, "boundary 0 was not attested in time")


def deadline(run: Execution, entry: Due) -> None:
    """Due: the offer's deadline."""
    job = run.job(entry.job)
    detail = f"not finished by height {job.deadline}"
    if job.status in (JobStatus.OFFERED, JobStatus.MATCHED):
        end(run, job.id, JobStatus.EXPIRED, CloseReason.DEADLINE, detail)
    else:
        refund(run, job.id, CloseReason.DEADLINE, detail)


def attest_result(run: Execution, node: bytes, found: AttestResult) -> None:
    """A holder has the result. Two equal ids make it known, or that of the only holder; nobody
    attests twice."""
    job = known_job(run, found.job)
    require(job.status is JobStatus.FINISHING, f"the job is {job.status}, not finishing")
    require(node in result_holders(run, job), "this node is no holder of the result")
    require(all(node != other for other, _ in job.results), "this node has attested a result")
    others = {result for _, result in job.results}
    if len(result_holders(run, job)) == 1:
        others.add(found.result)
    job = replace(job, results=(*job.results, (node, found.result)))
    if found.result in others:
        job = replace(job, result=found.result)
        run.emit(ResultKnown(job.id, found.result))
    elif others:
        run.emit(ResultDisputed(job.id, node, found.result))
    run.state.put_job(job)


def result_holders(run: Execution, job: Job) -> tuple[bytes, ...]:
    """Nodes that make and keep the result: the standby, and the last worker of the first lane. Of
    a split job only the source has all of it."""
    if job.is_own(0):
        return (job.source,)
    last = run.slot(job.id, job.living[len(job.stages) - 1]).worker.node
    return (last,) if job.standby is None else (job.standby.node, last)


def fetched(run: Execution, owner: bytes, receipt: Fetched) -> None:
    """The submitter has the result: the job closes."""
    job = known_job(run, receipt.job)
    require(owner == job.submitter, "only the submitter of the job says that it was fetched")
    require(job.status is JobStatus.FINISHING, f"the job is {job.status}, not finishing")
    require(job.result != b"", "no result is known yet: two holders must attest the same one")
    end(run, job.id, JobStatus.CLOSED, CloseReason.FETCHED)


def result_over(run: Execution, entry: Due) -> None:
    """Due: the result was kept long enough."""
    end(run, entry.job, JobStatus.CLOSED, CloseReason.NOT_FETCHED, "the result window is over")
