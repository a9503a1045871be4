"""What happens in a job, in words: chain events for those who follow it."""

from dataclasses import dataclass

from tdmld.chain import events as happened
from tdmld.chain.crypto import address
from tdmld.chain.records import Job
from tdmld.chain.state import State
from tdmld.plaintext import plain
from tdmld.rpc.types import EventKind, JobEvent, JobState

CAUSES = {
    "absent": "it did not say that it is there",
    "undelivered": "it delivered nothing to the witness either",
    "separated": "it and its neighbour do not get on",
    "stall": "it was behind for too long",
    "left": "it gave the slot up",
    "mismatch": "an audit found its work wrong",
    "unopened": "it did not open its seal",
    "unproven": "it did not prove its copies",
    "unequal": "its copies were not equal",
    "unanswered": "it did not answer",
    "declined": "it declined",
    "moved": "it took a slot",
}
"""records.Cause in words."""


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
        case happened.RoundDecided(round=number, included=included):
            lanes = ", ".join(map(str, included)) or "none"
            return _Told("round", f"Round {number} is decided: lanes {lanes}.", segment=number)
        case happened.StatesDiffer(stage=stage, segment=segment):
            text = f"Lanes disagree about stage {stage} after segment {segment}: all are audited."
            return _Told("fault", text, segment=segment)
        case happened.Paid(owner=owner, role=role, amount=amount):
            article = "an" if role == "auditor" else "a"
            text = f"Paid {amount} to {article} {role}."
            return _Told("payment", text, address=address(owner), amount=amount)
        case _:
            return _tell_repair(job, entry)


def _tell_repair(job: Job, entry: happened.Event) -> _Told | None:
    """Who lost a place, who takes it, and what is done again."""

    def place(slot: int) -> str:
        return f"stage {job.stage_of(slot)}, lane {job.lane_of(slot)}"

    match entry:
        case happened.SlotVacated(slot=slot, node=node, cause=cause):
            text = f"{address(node)} lost {place(slot)}: {CAUSES.get(cause, cause)}."
            return _Told("fault", text, slot, address=address(node))
        case happened.SlotAsked(slot=slot, node=node):
            text = f"{address(node)} is asked to take {place(slot)}."
            return _Told("repair", text, slot, address=address(node))
        case happened.SlotTaken(slot=slot, node=node, held=held):
            text = f"{address(node)} takes {place(slot)} and goes on from boundary {held}."
            return _Told("repair", text, slot, address=address(node))
        case happened.StandbyVacated(node=node, cause=cause):
            text = f"{address(node)} is not the standby any more: {CAUSES.get(cause, cause)}."
            return _Told("repair", text, address=address(node))
        case happened.StandbyAsked(node=node):
            text = f"{address(node)} is asked to stand by."
            return _Told("repair", text, address=address(node))
        case happened.StandbyTaken(node=node):
            return _Told("repair", f"{address(node)} stands by.", address=address(node))
        case happened.JobRolledBack(epoch=epoch, boundary=boundary):
            text = f"Rolled back to boundary {boundary}; epoch {epoch} begins."
            return _Told("repair", text, segment=boundary)
        case happened.LaneLost(lane=lane):
            text = f"Nobody is left for lane {lane}; the job goes on without it."
            return _Told("fault", text, job.slot_at(lane, 0))
        case happened.CaseOpened(slot=slot, accuser=accuser, link=link, seq=seq):
            text = f"{place(accuser)} waits in vain for frame {seq} of {link} from {place(slot)}."
            return _Told("fault", text[0].upper() + text[1:], slot)
        case happened.CaseClosed(slot=slot, reason=reason):
            return _Told("repair", f"The case against {place(slot)} is over: {reason}.", slot)
        case _:
            return None
