"""Rounds of lanes that meet once a segment (lane mode diloco): whose contributions are in.

Segment r of every slot ends with a contribution, a file whose id stands in its Commit; segment
r + 1 of every lane begins with those of the lanes that are *in* round r. All stages of a lane are
in, or none. The closing segment makes none: it only begins with those of the last round.

    Commits of segment r + AttestContributions -> lanes become ready -> decided

A lane is **ready** once each of its slots has committed, and for each stage more than half of the
living lanes hold that contribution, the lane itself counted: whoever then vanishes, it can be
fetched. A round is **decided** when all living lanes are ready; or, once more than half of them
are, after `late_lane_percent` of the median duration of the last rounds, with those that are ready
then. A lane that is late keeps what it did in its error feedback and loses nothing else; it must
still commit its segment, and begins the next one like all others.

What was decided is pinned: a worker that takes a slot over and commits that segment again must make
the same contribution, for the others have begun with it.
"""

from msgspec.structs import replace

from tdmld.chain import due
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.events import RoundDecided
from tdmld.chain.execution import Execution, known_job, known_slot, require
from tdmld.chain.records import Due, Job, JobStatus, Round, Timer
from tdmld.chain.settlement import arm_stall
from tdmld.chain.transactions import AttestContributions

REMEMBERED = 5
"""Rounds whose median duration says how long late lanes are waited for."""


def attest(run: Execution, node: bytes, said: AttestContributions) -> None:
    """A worker holds contributions that other lanes made for its stage."""
    job = known_job(run, said.job)
    require(job.status is JobStatus.ACTIVE, f"the job is {job.status}, not active")
    slot = known_slot(run, job, said.slot)
    require(
        slot.worker.node == node and slot.worker.accepted, "this node does not work in that slot"
    )
    require(said.epoch == job.epoch, f"this speaks of epoch {said.epoch}; in force is {job.epoch}")
    require(job.contributes(said.round), f"segment {said.round} of this job gives no contribution")
    stage = job.stage_of(said.slot)
    others = [lane for lane in living(job) if lane != job.lane_of(said.slot)]
    require(list(said.lanes) == sorted({*said.lanes} & {*others}), "lanes: other lanes, ascending")
    record = _round(run, job, said.round)
    require(record.decided == 0, f"round {said.round} is decided")
    for lane in said.lanes:
        require(
            run.slot(job.id, job.slot_at(lane, stage)).committed > said.round,
            f"lane {lane} has not committed segment {said.round} of this stage",
        )
    before, now = record.attested[said.slot], sum(1 << lane for lane in said.lanes)
    require(before & now == before != now, "this slot has said all that before, or more")
    record = replace(record, attested=_put(record.attested, said.slot, now))
    _go_on(run, job, said.round, record)


def committed(run: Execution, job: Job, number: int) -> None:
    """A slot has committed segment `number`: see whether its lane is ready now."""
    if not job.contributes(number):
        return
    record = _round(run, job, number)
    if record.decided == 0:
        _go_on(run, job, number, record)


def contradicts(run: Execution, job: Job, slot: int, number: int, contribution: bytes) -> bool:
    """Whether others have begun with another contribution of this segment."""
    record = run.state.round(job.id, number)
    if record is None or record.decided == 0:
        return False
    return record.contributions[slot] not in (b"", contribution)


def is_open(run: Execution, job: Job, segment: int) -> bool:
    """Whether a segment must wait for a round to be decided."""
    if segment == 0 or not job.contributes(segment - 1):
        return False
    before = run.state.round(job.id, segment - 1)
    return before is None or before.decided == 0


def over(run: Execution, entry: Due) -> None:
    """Due: late lanes were waited for long enough."""
    job = run.job(entry.job)
    record = run.state.round(job.id, entry.segment)
    if job.status is not JobStatus.ACTIVE or record is None or record.decided:
        raise InvariantViolation("a round is due that is not open")
    _decide(run, job, entry.segment, record)


def holding_up(run: Execution, job: Job) -> tuple[int, ...]:
    """The slots for which the open round waits: those that have not committed it; where all have,
    those that do not say that they hold what the others made. Empty where no round is open."""
    number = _newest(run, job)
    if number is None or not is_open(run, job, number + 1):
        return ()
    late = tuple(slot for slot in job.living if run.slot(job.id, slot).committed <= number)
    if late:
        return late
    record, lanes = _round(run, job, number), living(job)
    everybody = sum(1 << lane for lane in lanes)
    return tuple(
        slot for slot in job.living if record.attested[slot] | 1 << job.lane_of(slot) != everybody
    )


def void_slot(run: Execution, job: Job, slot: int, first: int) -> None:
    """A slot's segments from `first` on are void: what it made and what it holds counts no more in
    a round that is open. Decided ones stay as they are."""
    lane, stage = job.lane_of(slot), job.stage_of(slot)
    for number in range(first, first + job.unsettled):
        record = run.state.round(job.id, number)
        if record is None or record.decided:
            continue
        attested = list(record.attested)
        attested[slot] = 0
        for other in range(job.lanes):
            attested[job.slot_at(other, stage)] &= ~(1 << lane)
        ready = tuple(
            since if _is_ready(run, job, number, attested, of) and of != lane else 0
            for of, since in enumerate(record.ready)
        )
        run.state.put_round(job.id, number, Round(tuple(attested), ready))
        if 2 * sum(1 for since in ready if since) <= len(living(job)):
            due.cancel(run.state, Due(Timer.ROUND, job.id, 0, number))


def void_from(run: Execution, job: Job, boundary: int) -> None:
    """All segments from `boundary` on are void, and so are their rounds."""
    for number in range(boundary, boundary + job.unsettled):
        if run.state.round(job.id, number) is not None:
            run.state.put_round(job.id, number, None)
            due.cancel(run.state, Due(Timer.ROUND, job.id, 0, number))


def reconsider(run: Execution, job: Job) -> None:
    """A lane is lost: the open round may wait for nobody else."""
    number = _newest(run, job)
    if number is not None:
        committed(run, job, number)


def stop(run: Execution, job: Job) -> None:
    """The job is over: nothing is decided any more."""
    number = _newest(run, job)
    if number is not None:
        due.cancel(run.state, Due(Timer.ROUND, job.id, 0, number))


def living(job: Job) -> tuple[int, ...]:
    """The lanes that are not lost, ascending."""
    return tuple(lane for lane in range(job.lanes) if lane not in job.lost_lanes)


def _newest(run: Execution, job: Job) -> int | None:
    """The newest round that a living slot has committed: only that one can be open, for none goes
    on before it is decided."""
    number = max((run.slot(job.id, slot).committed for slot in job.living), default=0) - 1
    return number if number >= 0 and job.contributes(number) else None


def _round(run: Execution, job: Job, number: int) -> Round:
    nothing = Round((0,) * job.slots, (0,) * job.lanes)
    return run.state.round(job.id, number) or nothing


def _put(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _is_ready(
    run: Execution, job: Job, number: int, attested: tuple[int, ...] | list[int], lane: int
) -> bool:
    lanes = living(job)
    for stage in range(len(job.stages)):
        if run.slot(job.id, job.slot_at(lane, stage)).committed <= number:
            return False
        holders = sum(attested[job.slot_at(other, stage)] >> lane & 1 for other in lanes)
        if 2 * (1 + holders) <= len(lanes):
            return False
    return True


def _go_on(run: Execution, job: Job, number: int, record: Round) -> None:
    """Keep an open round as it is now; decide it, or begin to wait for late lanes."""
    lanes = living(job)
    record = replace(
        record,
        ready=tuple(
            since
            or (
                run.height
                if lane in lanes and _is_ready(run, job, number, record.attested, lane)
                else 0
            )
            for lane, since in enumerate(record.ready)
        ),
    )
    run.state.put_round(job.id, number, record)
    ready = [lane for lane in lanes if record.ready[lane]]
    if len(ready) == len(lanes):
        _decide(run, job, number, record)
        return
    entry = Due(Timer.ROUND, job.id, 0, number)
    if 2 * len(ready) > len(lanes) and due.height_of(run.state, entry) is None:
        due.put(run.state, entry, run.height + _patience(run, job, number))


def _patience(run: Execution, job: Job, number: int) -> int:
    """Blocks that late lanes get, from the height at which more than half were ready."""

    def end(earlier: int) -> int:
        return job.active if earlier < 0 else _round(run, job, earlier).decided

    last = range(max(0, number - REMEMBERED), number)
    durations = sorted(end(earlier) - end(earlier - 1) for earlier in last)
    usual = durations[len(durations) // 2] if durations else run.parameters.segment_window // 2
    return max(1, usual * run.parameters.late_lane_percent // 100)


def _decide(run: Execution, job: Job, number: int, record: Round) -> None:
    included = tuple(lane for lane in living(job) if record.ready[lane])
    decided = replace(
        record,
        decided=run.height,
        included=included,
        contributions=tuple(
            run.segment(job.id, slot, number).contribution if job.lane_of(slot) in included else b""
            for slot in range(job.slots)
        ),
    )
    run.state.put_round(job.id, number, decided)
    due.cancel(run.state, Due(Timer.ROUND, job.id, 0, number))
    run.emit(RoundDecided(job.id, number, included))
    for slot in job.living:
        # Whoever waited for this gets a whole window for the next segment.
        if run.slot(job.id, slot).committed > number:
            arm_stall(run, job, slot)
