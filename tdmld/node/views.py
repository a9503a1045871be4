"""Jobs, accounts and blocks as the RPC shows them: pure functions of the finalized state."""

from collections.abc import Iterator
from dataclasses import dataclass

from tdmld.chain import events as happened
from tdmld.chain.crypto import address
from tdmld.chain.records import (
    Audit,
    AuditStatus,
    Job,
    JobStatus,
    ProofStatus,
    SlotState,
)
from tdmld.chain.reputation import reputation
from tdmld.chain.state import State
from tdmld.node.duties import assigned
from tdmld.plaintext import plain
from tdmld.rpc.types import (
    AccountInfo,
    AuditInfo,
    AuditState,
    EventKind,
    JobDetail,
    JobEvent,
    JobState,
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
) -> JobDetail:
    """All that the chain knows of a job."""
    slots = assigned(state, job)
    audits = list(_audits(state, job, slots))
    return JobDetail(
        summary=summary(state, job, height, spec=spec, name=name, lock=lock),
        spec_id=job.spec_id.hex(),
        segment_steps=job.segment_steps,
        slots=tuple(_slot(state, job, i, slot, spec) for i, slot in enumerate(slots)),
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
    )


def _slot(state: State, job: Job, index: int, slot: SlotState, spec: Spec | None) -> SlotInfo:
    stage = job.stage_of(index)
    earned = state.earnings(job.id, slot.worker.owner).worker
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
    )


def _phase(job: Job, slot: SlotState) -> str:
    if job.status is JobStatus.MATCHED:
        return "accepted" if slot.worker.accepted else "waiting"
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
    for number in range(0, committed, max(1, -(-committed // SEGMENTS_SHOWN))):
        for index, slot in enumerate(slots):
            if job.stage_of(index) != len(job.stages) - 1 or number >= slot.committed:
                continue  # only the last stage sees a loss
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


@dataclass(frozen=True)
class _Told:
    """A chain event in words; `slot` and `segment` say where, when it has a place."""

    kind: EventKind
    text: str
    slot: int | None = None
    segment: int | None = None
    state: JobState | None = None
    loss: int | None = None
    address: str = ""
    amount: int = 0


def event(
    state: State, entry: happened.Event, job_id: bytes, height: int, time: str
) -> JobEvent | None:
    """What a chain event says to somebody who follows `job_id`; None when it is not for them."""
    job = state.job(job_id)
    if isinstance(entry, happened.ValidatorEvent) or entry.job != job_id or job is None:
        return None
    told = _tell(state, job, entry)
    if told is None:
        return None
    return JobEvent(
        job=job_id.hex(),
        height=height,
        time=time,
        kind=told.kind,
        text=plain(told.text),
        state=told.state,
        lane=None if told.slot is None else job.lane_of(told.slot),
        stage=None if told.slot is None else job.stage_of(told.slot),
        segment=told.segment,
        loss=told.loss,
        address=told.address,
        amount=str(told.amount),
    )


def _tell(state: State, job: Job, entry: happened.Event) -> _Told | None:
    def where(slot: int, segment: int) -> str:
        return f"segment {segment} of stage {job.stage_of(slot)}, lane {job.lane_of(slot)}"

    match entry:
        case happened.JobOffered():
            text = "The offer is on the chain; matching is due."
            return _Told("state", text, state="offered")
        case happened.JobMatched(workers=workers):
            text = f"Matched to {len(workers)} workers and a standby; they are asked to accept."
            return _Told("state", text, state="matched")
        case happened.JobUnmatched(without=without):
            text = f"Offered again without {len(without)} nodes that did not accept."
            return _Told("state", text, state="offered")
        case happened.JobPreparing():
            text = "All accepted; members fetch the data and draw the weights."
            return _Told("state", text, state="preparing")
        case happened.JobActive():
            text = "Everybody drew the same weights; training begins."
            return _Told("state", text, state="active")
        case happened.JobFinishing():
            text = "All segments are settled; holders assemble the model."
            return _Told("state", text, state="finishing")
        case happened.JobEnded(reason=reason, detail=detail, refund=refund):
            told = f"{job.status} ({detail or reason})"
            text = f"The job is {told}; {refund} go back to the submitter."
            return _Told("state", text, state=job.status.value, amount=refund)
        case happened.ResultKnown(result=result):
            return _Told("result", f"The result is {result.hex()}.")
        case happened.ResultDisputed(node=node):
            return _Told("fault", "A holder attested another result.", address=address(node))
        case happened.SegmentCommitted(slot=slot, segment=segment):
            record = state.segment(job.id, slot, segment)
            loss = None if record is None else record.loss
            shown = "" if loss is None else f", loss {loss / 1e6:.4f}"
            text = f"Committed {where(slot, segment)}{shown}."
            return _Told("segment", text, slot, segment, loss=loss)
        case happened.SegmentSettled(slot=slot, segment=segment):
            return _Told("settled", f"Settled {where(slot, segment)}.", slot, segment)
        case happened.AuditDrawn(slot=slot, segment=segment, auditor=auditor):
            text = f"Audit of {where(slot, segment)} drawn."
            return _Told("audit", text, slot, segment, address=address(auditor))
        case happened.AuditPassed(slot=slot, segment=segment, auditor=auditor):
            text = f"Audit of {where(slot, segment)} passed."
            return _Told("audit", text, slot, segment, address=address(auditor))
        case happened.AuditMismatch(slot=slot, segment=segment, auditor=auditor):
            text = f"Audit of {where(slot, segment)} found other bits than the worker's."
            return _Told("fault", text, slot, segment, address=address(auditor))
        case happened.Unaudited(slot=slot, segment=segment, reason=reason):
            text = f"No verdict on {where(slot, segment)}: {reason}."
            return _Told("audit", text, slot, segment)
        case happened.Paid(owner=owner, role=role, amount=amount):
            article = "an" if role == "auditor" else "a"
            text = f"Paid {amount} to {article} {role}."
            return _Told("payment", text, address=address(owner), amount=amount)
        case _:
            return None
