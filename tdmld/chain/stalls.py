"""Who is to blame when a job stands still.

A pipeline stops as a whole when one of its members does, so the chain must be told where.

    Stall  -> a case against the slot at the other end of the link
    case   --(answer_window without Present)--> that slot is vacated: a fault
    present--(Witness: not delivered)---------> vacated: a fault
    present--(Witness: delivered; silence)----> closed; the third time of one pair separates it

**Blame flows on.** A slot that waits itself cannot deliver: while it has a case of its own open on
another link, there is none against it, and an older one is closed. So blame runs along the line of
those who wait, to the one that does not.

**The witness** is the standby, for it can fetch from everybody, and may not take the slot that
becomes vacant by its word.

**Without any word**, the windows of commitments decide: when one ends, a slot that is behind the
others loses its place. Where none is behind, the chain waits for one window more, then for those
who hold up a round; when there are none of these either, nobody can be blamed, and the job ends.
"""

from msgspec.structs import replace

from tdmld.chain import closing, due, limits, rounds
from tdmld.chain.complaints import (
    Leave,
    Present,
    Stall,
    Witness,
)
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.events import CaseOpened
from tdmld.chain.execution import Execution, known_job, known_slot, require
from tdmld.chain.records import Case, Cause, CloseReason, Due, Job, JobStatus, SlotState, Timer
from tdmld.chain.replacement import close_case, vacate
from tdmld.chain.segments import links_of, neighbours, other_end, require_current
from tdmld.chain.settlement import allowed, waits_for_settlement


def leave(run: Execution, node: bytes, said: Leave) -> None:
    """A worker gives its slot up."""
    _worker(run, node, said)
    vacate(run, said.job, said.slot, Cause.LEFT)


def stall(run: Execution, node: bytes, said: Stall) -> None:
    """A worker waits in vain for a frame: a case against the slot that should send it."""
    job, state = _worker(run, node, said)
    require(
        said.number == state.stalls,
        f"this is accusation {said.number} of the slot; the next one is {state.stalls}",
    )
    require(state.stalls < limits.STALLS, f"a slot accuses at most {limits.STALLS} times")
    require(said.link in links_of(job, said.slot), f"this slot has no link {said.link}")
    slot, _ = other_end(job, said.slot, said.link)
    accused = run.slot(job.id, slot)
    require(slot in job.living and accused.worker.accepted, "that slot is vacant")
    require(accused.case is None, "a case is open against that slot")
    require(
        all(_accuser(run, job, end) != slot for end in neighbours(job, slot) if end != said.slot),
        "that slot waits itself for another one",
    )
    require(
        state.committed < accused.committed
        or accused.committed < allowed(run.state, job, slot, neighbours(job, slot)),
        "that slot may not go on before something settles, or is copied",
    )
    if state.case is not None and state.case.accuser != slot:
        close_case(run, job, said.slot, "it waits itself for another slot")
    mine = run.slot(job.id, said.slot)
    run.state.put_slot(job.id, said.slot, replace(mine, stalls=mine.stalls + 1))
    until = run.height + run.parameters.answer_window
    case = Case(said.slot, said.link, said.seq, run.height, until)
    run.state.put_slot(job.id, slot, replace(run.slot(job.id, slot), case=case))
    due.put(run.state, Due(Timer.CASE, job.id, slot), until)
    run.emit(CaseOpened(job.id, slot, said.slot, said.link, said.seq))


def present(run: Execution, node: bytes, said: Present) -> None:
    """An accused worker is there. The standby, if there is one, tries what it delivers."""
    job, state = _worker(run, node, said)
    case = _open_case(state, said.opened)
    require(not case.present, "this worker has said so")
    if not job.copied:
        close_case(run, job, said.slot, "it is there, and there is no witness")
        return
    until = run.height + run.parameters.answer_window
    heard = replace(case, present=True, until=until)
    run.state.put_slot(job.id, said.slot, replace(state, case=heard))
    due.put(run.state, Due(Timer.CASE, job.id, said.slot), until)


def witness(run: Execution, node: bytes, said: Witness) -> None:
    """The standby says whether the accused worker delivered the frame to it."""
    job = _active(run, said.job)
    state = known_slot(run, job, said.slot)
    require_current(job, said.epoch, state.incarnation, said.incarnation)
    case = _open_case(state, said.opened)
    require(case.present, "that worker has not said yet that it is there")
    if job.standby is None or not job.standby.accepted or job.standby.node != node:
        raise InvalidTransaction("the witness is the standby")
    if not said.delivered:
        vacate(run, job.id, said.slot, Cause.UNDELIVERED, job.standby.owner)
        return
    close_case(run, job, said.slot, "it delivers to the witness")
    state = run.slot(job.id, said.slot)
    state = replace(state, delivered=(*state.delivered, case.accuser))
    run.state.put_slot(job.id, said.slot, state)
    if state.delivered.count(case.accuser) == limits.STALLS_OF_PAIR:
        vacate(run, job.id, said.slot, Cause.SEPARATED)


def case_over(run: Execution, entry: Due) -> None:
    """Due: the accused did not say that it is there, or the witness said nothing."""
    state = run.slot(entry.job, entry.slot)
    if state.case is not None and not state.case.present:
        vacate(run, entry.job, entry.slot, Cause.ABSENT)
    elif state.case is not None:
        close_case(run, run.job(entry.job), entry.slot, "the witness was silent")


def window_over(run: Execution, entry: Due) -> None:
    """Due: a slot has not committed for a whole window."""
    job, window = run.job(entry.job), run.parameters.segment_window
    slots = {slot: run.slot(job.id, slot) for slot in job.living}
    mine = slots[entry.slot]
    furthest = max(state.committed for state in slots.values())
    behind = min(state.committed for state in slots.values())
    room = allowed(run.state, job, entry.slot, neighbours(job, entry.slot))
    if (
        waits_for_settlement(run, job)
        or any(state.case is not None or not state.worker.accepted for state in slots.values())
        or behind < mine.committed
        or room <= mine.committed
    ):
        # The chain, an open question or another slot is waited for; that has a timer of its own.
        due.put(run.state, entry, run.height + window)
        return
    culprits: tuple[int, ...] = (entry.slot,)
    if behind == furthest:
        quiet_since = max(job.active, job.repaired, *(s.last_commit for s in slots.values()))
        if run.height < quiet_since + 2 * window:
            due.put(run.state, entry, quiet_since + 2 * window)
            return
        culprits = rounds.holding_up(run, job)
    if not culprits or len(culprits) == len(slots):
        detail = f"slot {entry.slot} did not commit segment {mine.committed} within {window} blocks"
        closing.refund(run, job.id, CloseReason.FAULT, detail)
        return
    for slot in culprits:
        if not run.job(job.id).final and slot in run.job(job.id).living:
            vacate(run, job.id, slot, Cause.STALL)


def _active(run: Execution, job_id: bytes) -> Job:
    job = known_job(run, job_id)
    require(job.status is JobStatus.ACTIVE, f"the job is {job.status}, not active")
    return job


def _worker(run: Execution, node: bytes, said: Leave | Stall | Present) -> tuple[Job, SlotState]:
    """The job and the slot that the signer works in now."""
    job = _active(run, said.job)
    state = known_slot(run, job, said.slot)
    require(
        said.slot in job.living and state.worker.node == node and state.worker.accepted,
        "this node does not work in that slot",
    )
    require_current(job, said.epoch, state.incarnation, said.incarnation)
    return job, state


def _open_case(state: SlotState, opened: int) -> Case:
    if state.case is None or state.case.opened != opened:
        raise InvalidTransaction(f"no case of height {opened} is open against that slot")
    return state.case


def _accuser(run: Execution, job: Job, slot: int) -> int | None:
    """Who has a case open against the slot."""
    state = run.state.slot(job.id, slot)
    return None if state is None or state.case is None else state.case.accuser
