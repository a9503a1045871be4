"""Jobs, accounts and blocks as the RPC shows them: pure functions of the finalized state."""

from collections.abc import Iterator, Mapping

from tdmld.chain.crypto import address
from tdmld.chain.records import (
    Audit,
    AuditStatus,
    Cause,
    Job,
    JobStatus,
    ProofStatus,
    SlotState,
)
from tdmld.chain.reputation import reputation
from tdmld.chain.state import State
from tdmld.node.bottleneck import SlotTimes as Times
from tdmld.node.bottleneck import bottleneck
from tdmld.node.duties import assigned
from tdmld.node.jobreports import MICRO, SlotReport
from tdmld.plaintext import plain
from tdmld.rpc.jobtypes import FormerWorker, SlotTimes
from tdmld.rpc.types import (
    AccountInfo,
    AuditInfo,
    AuditState,
    JobDetail,
    JobSummary,
    ResultStatus,
    SegmentLoss,
    SlotInfo,
    StandbyInfo,
    ValidatorInfo,
)
from tdmld.train.spec import Spec

SEGMENTS_SHOWN = 500
"""Of each slot: an answer must not read a long job's whole history while votes wait."""
_AUDIT_STATES: dict[AuditStatus, AuditState] = {
    AuditStatus.WAITING: "drawn",
    AuditStatus.DRAWN: "drawn",
    AuditStatus.FAILED: "expired",
    AuditStatus.COMMITTED: "committed",
    AuditStatus.OPENED: "opened",
    AuditStatus.PASSED: "passed",
    AuditStatus.MISMATCH: "mismatch",
    AuditStatus.UNOPENED: "mismatch",
    AuditStatus.SILENT: "unaudited",
    AuditStatus.DROPPED: "expired",
}


def account(state: State, owner: bytes, height: int) -> AccountInfo:
    """An owner's account."""
    record = state.account(owner)
    locked = 0
    for job_id in state.active_jobs():
        job = state.job(job_id)
        if job is not None and job.submitter == owner:
            locked += job.locked
    return AccountInfo(
        address=address(owner),
        height=height,
        balance=str(record.balance),
        nonce=record.nonce,
        vote_stake=str(record.vote_stake),
        work_stake=str(record.work_stake),
        unbonding=str(state.unbondings(owner).total),
        locked=str(locked),
        reputation=reputation(state.facts(owner)),
    )


def validators(state: State, epoch: int) -> tuple[ValidatorInfo, ...]:
    """The seats of an epoch, by node key."""
    chosen = state.validator_set(epoch)
    found = []
    for seat in () if chosen is None else chosen.seats:
        node = state.node(seat.node)
        found.append(
            ValidatorInfo(
                owner=address(seat.owner),
                node=address(seat.node),
                weight=str(seat.weight),
                leads=seat.leads,
                jailed=0 if node is None else node.jailed,
            )
        )
    return tuple(found)


def summary(
    state: State, job: Job, height: int, *, spec: Spec | None, name: str, lock: int
) -> JobSummary:
    """A line about a job. `lock` is what its offer locked, without the deposit."""
    slots = assigned(state, job)
    return JobSummary(
        id=job.id.hex(),
        state=job.status.value,
        submitter=address(job.submitter),
        height=height,
        offered=job.offered,
        family=spec.family if spec is not None else "unknown",
        stages=len(job.stages),
        lanes=job.lanes,
        rounds=job.rounds,
        steps=job.rounds * job.segment_steps,
        segments_settled=sum(slot.settled for slot in slots),
        escrow=str(lock),
        spent=str(sum(paid.total for paid in state.payments(job.id).values())),
        name=name,
        reason=plain(job.detail or job.reason.value),
        loss=_newest_loss(state, job, slots),
    )


def detail(
    state: State,
    job: Job,
    height: int,
    *,
    spec: Spec | None,
    name: str,
    lock: int,
    deposit: int,
    reports: Mapping[int, SlotReport] | None = None,
) -> JobDetail:
    """All that the chain knows of a job, and what nodes report of their slots (by index)."""
    slots, told = assigned(state, job), reports or {}
    audits = list(_audits(state, job, slots))
    return JobDetail(
        summary=summary(state, job, height, spec=spec, name=name, lock=lock),
        spec_id=job.spec_id.hex(),
        segment_steps=job.segment_steps,
        slots=tuple(_slot(state, job, i, slot, spec, told.get(i)) for i, slot in enumerate(slots)),
        standbys=_standby(state, job, slots),
        audits=tuple(
            AuditInfo(
                lane=job.lane_of(index),
                stage=job.stage_of(index),
                segment=number,
                auditor=address(audit.auditor) if audit.auditor else "",
                state=_AUDIT_STATES[audit.status],
                drawn=audit.drawn,
            )
            for index, number, audit in audits
        ),
        losses=tuple(_losses(state, job, slots)),
        budget=str(lock + deposit),
        payments={
            address(owner): str(paid.total) for owner, paid in state.payments(job.id).items()
        },
        deadline=job.deadline,
        result=_result(job),
        epoch=job.epoch,
        former=tuple(_former(job, slots)),
        lost_lanes=job.lost_lanes,
        bottleneck=bottleneck(
            [
                Times(job.lane_of(index), job.stage_of(index), report.seconds)
                for index, report in sorted(told.items())
            ]
        ),
    )


def _slot(
    state: State,
    job: Job,
    index: int,
    slot: SlotState,
    spec: Spec | None,
    report: SlotReport | None,
) -> SlotInfo:
    stage = job.stage_of(index)
    earned = state.earnings(job.id, slot.worker.owner).worker
    seconds = {} if report is None else report.seconds
    step_seconds = sum(seconds.values())
    tokens = job.tokens * job.weight_of(index) / job.segment_steps
    return SlotInfo(
        lane=job.lane_of(index),
        stage=stage,
        layers=spec.layers(stage) if spec is not None else (0, 0),
        worker=address(slot.worker.node),
        state=_phase(job, slot),
        segment=slot.committed,
        settled=slot.settled,
        price=str(slot.worker.price),
        earned=str(earned),
        incarnation=slot.incarnation,
        held=slot.held,
        step=None if report is None else report.step,
        loss=None if report is None else report.loss,
        gradient_norm=None if report is None or report.norm is None else report.norm / MICRO,
        tokens_per_second=tokens / step_seconds if step_seconds > 0 else 0.0,
        restarts=0 if report is None else report.restarts,
        times=SlotTimes(**seconds) if seconds else None,
    )


def _former(job: Job, slots: list[SlotState]) -> Iterator[FormerWorker]:
    for index, slot in enumerate(slots):
        for former in slot.former:
            yield FormerWorker(
                lane=job.lane_of(index),
                stage=job.stage_of(index),
                node=address(former.node),
                owner=address(former.owner),
                cause=former.cause.value,
                convicted=former.cause in (Cause.MISMATCH, Cause.UNOPENED),
                epoch=former.epoch,
                incarnation=former.incarnation,
                settled=former.settled,
                height=former.height,
            )


def _phase(job: Job, slot: SlotState) -> str:
    if job.status is JobStatus.MATCHED:
        return "accepted" if slot.worker.accepted else "waiting"
    if job.status is JobStatus.ACTIVE and not slot.worker.accepted:
        return "vacant"
    if job.status is JobStatus.PREPARING:
        return "ready" if slot.attested else "preparing"
    if job.status is JobStatus.ACTIVE and slot.committed < job.rounds:
        full = slot.committed - slot.settled >= job.unsettled
        return "stalled" if full else "running"
    return "done" if slot.settled == job.rounds else "stopped" if job.final else "settling"


def _newest(slot: SlotState) -> range:
    """The committed segments that are shown."""
    return range(max(0, slot.committed - SEGMENTS_SHOWN), slot.committed)


def _proved(state: State, job: Job, index: int, slot: SlotState) -> int:
    """The newest boundary whose copy the standby proved, 0 for none of those shown."""
    for number in reversed(_newest(slot)):
        segment = state.segment(job.id, index, number)
        if segment is not None and segment.proof is ProofStatus.EQUAL:
            return number + 1
    return 0


def _standby(state: State, job: Job, slots: list[SlotState]) -> tuple[StandbyInfo, ...]:
    if job.standby is None:
        return ()
    proved = min((_proved(state, job, i, slot) for i, slot in enumerate(slots)), default=0)
    return (
        StandbyInfo(
            node=address(job.standby.node),
            slots=tuple((job.lane_of(i), job.stage_of(i)) for i in range(job.slots)),
            proved=proved,
            earned=str(state.earnings(job.id, job.standby.owner).standby),
        ),
    )


def _audits(state: State, job: Job, slots: list[SlotState]) -> Iterator[tuple[int, int, Audit]]:
    for index, slot in enumerate(slots):
        for number in _newest(slot):
            audit = state.audit(job.id, index, number)
            if audit is not None:
                yield index, number, audit


def _losses(state: State, job: Job, slots: list[SlotState]) -> Iterator[SegmentLoss]:
    """Losses of the whole job: of a long one, those of evenly spaced segments."""
    committed = max((slot.committed for slot in slots), default=0)
    head = 0 if job.ring else len(job.stages) - 1
    for number in range(0, committed, max(1, -(-committed // SEGMENTS_SHOWN))):
        for index, slot in enumerate(slots):
            if job.stage_of(index) != head or number >= slot.committed:
                continue  # only the stage with the head sees a loss
            segment = state.segment(job.id, index, number)
            if segment is not None and segment.loss is not None:
                yield SegmentLoss(lane=job.lane_of(index), segment=number, loss=segment.loss)


def _newest_loss(state: State, job: Job, slots: list[SlotState]) -> int | None:
    found: dict[int, list[int]] = {}
    for index, slot in enumerate(slots):
        number = slot.committed - 1
        segment = state.segment(job.id, index, number) if number >= 0 else None
        if segment is not None and segment.loss is not None:
            found.setdefault(number, []).append(segment.loss)
    if not found:
        return None
    newest = found[max(found)]
    return sum(newest) // len(newest)


def _result(job: Job) -> ResultStatus | None:
    if not job.results:
        return None
    wanted = job.result or job.results[0][1]
    return ResultStatus(
        id=wanted.hex(),
        holders=tuple(address(node) for node, result in job.results if result == wanted),
        fetched=job.reason.value == "fetched",
    )
