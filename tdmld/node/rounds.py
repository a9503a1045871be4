"""Where contributions of lanes mode `diloco` come from, by the state of the chain."""

from tdmld.chain.records import Job
from tdmld.chain.state import State
from tdmld.node.desk import Desk, slot_of
from tdmld.node.machine import ContributionSource


def included_in(state: State, job: Job, segment: int) -> tuple[int, ...]:
    """The lanes whose contributions of the round before enter a segment that may be run."""
    if segment == 0 or not job.contributes(segment - 1):
        return ()
    found = state.round(job.id, segment - 1)
    assert found is not None, "a segment is run when the round before it is decided"
    assert found.decided, "a segment is run when the round before it is decided"
    return found.included


def contribution_of(
    desk: Desk, state: State, job: Job, index: int, number: int
) -> ContributionSource | None:
    """A slot's contribution of a round, at its worker, else at the siblings and the standby that
    brought it; None when it committed to none."""
    segment = state.segment(job.id, index, number)
    if segment is None or not segment.contribution:
        return None
    stage = job.stage_of(index)
    lanes = [job.lane_of(index), *(k for k in range(job.lanes) if k != job.lane_of(index))]
    sessions = [slot_of(state, job, job.slot_at(lane, stage)).worker.session for lane in lanes]
    if job.standby is not None:
        sessions.append(job.standby.session)
    return ContributionSource(segment.contribution, tuple(desk.others(sessions)))


def contributions_for(
    desk: Desk, state: State, job: Job, index: int, segment: int
) -> dict[int, ContributionSource]:
    """What of the round before a slot needs to run a segment: the included lanes' and its own."""
    lanes = {*included_in(state, job, segment)}
    if lanes or (segment and job.contributes(segment - 1)):
        lanes.add(job.lane_of(index))
    stage = job.stage_of(index)
    found = {
        lane: contribution_of(desk, state, job, job.slot_at(lane, stage), segment - 1)
        for lane in sorted(lanes)
    }
    return {lane: source for lane, source in found.items() if source is not None}
