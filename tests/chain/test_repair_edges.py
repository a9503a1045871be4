"""Repairs that meet an end: the last round, a lost lane, copies that are never whole."""

from tdmld.chain.complaints import Stall
from tdmld.chain.due import height_of
from tdmld.chain.events import SlotVacated, StandbyVacated
from tdmld.chain.records import Cause, CloseReason, Due, JobStatus, Timer
from tdmld.chain.settlement import allowed
from tdmld.chain.transactions import AttestContributions, LaneMode, Stage, StandbyProof
from tests.chain.actors import Vice, mark, node_key
from tests.chain.test_jobs import active, standby, worker
from tests.chain.test_replacement import QUIET, keepers, leave, play_to, slot_of, used
from tests.chain.test_rounds import active as active_lanes
from tests.chain.test_rounds import attest, commit, the_round
from tests.chain.world import GIB, World, make_genesis


def test_a_case_that_is_open_when_the_last_round_settles_is_over() -> None:
    world = World(make_genesis(7, answer_window=300))
    world.all_ask(7)
    job_id = world.submit(**QUIET)
    world.play_until(job_id, JobStatus.ACTIVE)
    world.stop_before[worker(world, job_id, 1)] = 7
    play_to(world, job_id, 0, 8)
    while slot_of(world, job_id, 1).settled < 7:
        world.play(job_id)
    last = slot_of(world, job_id, 1)
    accuser, accused = world.keys[last.worker.node], worker(world, job_id, 0)
    world.do(accuser, Stall(job_id, 0, 1, last.incarnation, 0, "up", 7))
    assert slot_of(world, job_id, 0).case is not None
    world.do(accuser, world.true_commit(world.job(job_id), 1, 7, last.worker.node))
    while world.job(job_id).status is JobStatus.ACTIVE:
        world.block()
    assert world.job(job_id).status is JobStatus.FINISHING
    assert slot_of(world, job_id, 0).case is None
    assert height_of(world.state, Due(Timer.CASE, job_id, 0)) is None
    world.wait(310)
    assert worker(world, job_id, 0) == accused
    assert world.play_until(job_id).reason is CloseReason.FETCHED


def test_a_lost_lane_loses_its_other_places_once() -> None:
    """Both workers of a lane fail at once; for the first slot nobody has the memory."""
    world = World(make_genesis(12))
    big, dear = {"memory": 4 * GIB, "price": 1_900}, {"memory": GIB, "price": 1_500}
    world.block(*(world.ask(i, **(big if i in (1, 2) else dear)) for i in range(12)))
    stages = (Stage(1_000_000, 4 * GIB), Stage(1_000_000, GIB))
    job_id = world.submit(**QUIET, lanes=2, lane_mode=LaneMode.DILOCO, stages=stages)
    world.play_until(job_id, JobStatus.ACTIVE)
    for slot in (0, 1):
        world.vices[worker(world, job_id, slot)] = frozenset({Vice.LOSES_COPY})
    first = [worker(world, job_id, slot) for slot in (0, 1)]
    while not world.job(job_id).final:
        world.play(job_id)
        if world.job(job_id).status is JobStatus.FINISHING:
            break
    job = world.play_until(job_id)
    assert (job.reason, job.lost_lanes) == (CloseReason.FETCHED, (0,))
    assert [worker(world, job_id, slot) for slot in (0, 1)] == first
    assert all(used(world, node_key(index).public) == (0, 0, 0) for index in range(12))


def test_what_waited_for_a_lane_settles_once_it_is_lost() -> None:
    world = World(make_genesis(7))
    keepers(world, 6, 7)
    job_id = world.submit(
        **QUIET, lanes=3, lane_mode=LaneMode.DILOCO, stages=world.offer().stages[:1]
    )
    world.play_until(job_id, JobStatus.ACTIVE)
    play_to(world, job_id, 1, 2)
    world.vices = {node_key(index).public: frozenset({Vice.IGNORES_PLACE}) for index in range(7)}
    leave(world, job_id, 0)
    while not world.job(job_id).lost_lanes:
        world.play(job_id)
    states = [slot_of(world, job_id, slot) for slot in (1, 2)]
    assert all(state.committed - state.settled == 4 for state in states), "both at their limit"
    assert height_of(world.state, Due(Timer.SETTLE, job_id)) is not None
    assert world.play_until(job_id).reason is CloseReason.FETCHED


def test_a_standby_that_proves_only_some_slots_is_replaced() -> None:
    """Never all of them at one boundary: no cut from which lost slots could begin together."""
    world, job_id = active(audit_rate=0, rounds=40, unsettled=2, state_every=1)
    sly = standby(world, job_id)
    for _ in range(2_500):
        moves = [
            (node, payload)
            for node, payload in world.moves(job_id)
            if node != sly
            or not isinstance(payload, StandbyProof)
            or (payload.segment + payload.slot) % 2
        ]
        world.block(*(world.sign(world.keys[node], payload) for node, payload in moves))
        job = world.job(job_id)
        if job.status is not JobStatus.ACTIVE or job.standby is None or job.standby.node != sly:
            break
    (lost,) = [event for event in world.events if isinstance(event, StandbyVacated)]
    assert (lost.node, lost.cause) == (sly, Cause.UNPROVEN)
    assert slot_of(world, job_id, 0).settled <= 4


def test_copies_that_are_never_proven_do_not_keep_a_job_from_going_on() -> None:
    """A worker that says other hashes than each standby: nobody can say who lies."""
    world = World(make_genesis(16))
    world.all_ask(16)
    job_id = world.submit(audit_rate=0, rounds=16, unsettled=2, state_every=1)
    world.play_until(job_id, JobStatus.ACTIVE)
    world.vices[worker(world, job_id, 0)] = frozenset({Vice.FORGES_COPY})
    while (job := world.job(job_id)).status is JobStatus.ACTIVE:
        for slot in range(2):
            state = slot_of(world, job_id, slot)
            if state.settled < job.rounds:
                assert allowed(world.state, job, slot, [1 - slot]) > state.settled
        world.play(job_id)
    assert world.play_until(job_id).reason is CloseReason.FETCHED


def test_a_worker_has_time_to_answer_a_standby_that_speaks_at_the_last_moment() -> None:
    world, job_id = active(**QUIET)
    mine, keeper = worker(world, job_id, 0), standby(world, job_id)
    world.vices[keeper] = frozenset({Vice.LOSES_COPY})
    play_to(world, job_id, 0, 2)
    found = world.state.segment(job_id, 0, 1)
    assert found is not None
    while world.height + 1 < found.proof_until - 1:
        world.play(job_id)
    found = world.state.segment(job_id, 0, 1)
    assert found is not None
    value = mark("keyed", found.proof_key, 0, 1)
    said = StandbyProof(job_id, 0, 0, found.incarnation, 1, value)
    world.do(world.keys[keeper], said)
    heard = world.state.segment(job_id, 0, 1)
    assert heard is not None
    assert heard.proof_until == world.height + world.parameters.answer_window
    world.wait(world.parameters.answer_window - 2)
    world.do(world.keys[mine], said)
    assert slot_of(world, job_id, 0).unproven == 0


def test_what_a_lost_worker_held_counts_no_more_though_it_had_committed_nothing() -> None:
    world, job = active_lanes(3, rounds=6)
    commit(world, job, 1)
    attest(world, job, 0, 1)
    assert the_round(world, job).ready[1] == world.height
    leave(world, job, 0)
    record = the_round(world, job)
    assert (record.attested, record.ready) == ((0, 0, 0), (0, 0, 0))
    attest(world, job, 2, 1)
    world.play(job)
    assert any(isinstance(event, SlotVacated) for event in world.events)
    said = AttestContributions(job, 0, 0, 0, (1,))
    world.do(world.keys[worker(world, job, 0)], said)
