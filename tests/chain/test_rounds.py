"""Rounds of lanes that meet once a segment: whose contributions are in, and when."""

import pytest
from msgspec.structs import replace

from tdmld.chain.due import height_of
from tdmld.chain.events import RoundDecided
from tdmld.chain.records import CloseReason, Due, JobStatus, Round, Timer
from tdmld.chain.transactions import AttestContributions, LaneMode, Stage
from tests.chain.test_jobs import worker
from tests.chain.test_segments import sworn
from tests.chain.world import GIB, Vice, World, make_genesis, mark

ONE = Stage(1_000_000, GIB)


def active(lanes: int, stages: int = 1, nodes: int = 12, **changes: object) -> tuple[World, bytes]:
    world = World(make_genesis(nodes))
    world.block(*(world.ask(index, standby_slots=16) for index in range(nodes)))
    fields: dict[str, object] = {
        "audit_rate": 0,
        "lanes": lanes,
        "lane_mode": LaneMode.DILOCO,
        "lane_weights": (1,) * lanes,
        "stages": (ONE,) * stages,
        **changes,
    }
    job = world.submit(**fields)
    world.play_until(job, JobStatus.ACTIVE)
    return world, job


def commit(world: World, job: bytes, *slots: int, number: int = 0) -> None:
    for slot in slots:
        world.do(world.keys[worker(world, job, slot)], sworn(world, job, slot, number))


def attest(world: World, job: bytes, slot: int, *lanes: int, number: int = 0) -> None:
    said = AttestContributions(job, 0, slot, number, lanes)
    world.do(world.keys[worker(world, job, slot)], said)


def refused(world: World, job: bytes, slot: int, *lanes: int, number: int = 0) -> str:
    said = AttestContributions(job, 0, slot, number, lanes)
    return world.refused(world.keys[worker(world, job, slot)], said)


def the_round(world: World, job: bytes, number: int = 0) -> Round:
    found = world.state.round(job, number)
    assert found is not None
    return found


def test_a_round_is_decided_at_once_when_all_lanes_are_ready() -> None:
    world, job = active(2, stages=2)
    commit(world, job, 0, 1, 2, 3)
    attest(world, job, 0, 1)
    attest(world, job, 1, 1)
    assert the_round(world, job).ready == (0, world.height)
    assert "round 0 is not decided" in world.refused(
        world.keys[worker(world, job, 0)], sworn(world, job, 0, 1)
    )
    attest(world, job, 2, 0)
    assert the_round(world, job).decided == 0
    attest(world, job, 3, 0)
    decided = the_round(world, job)
    assert (decided.decided, decided.included) == (world.height, (0, 1))
    assert decided.contributions == tuple(mark("delta", slot, 0) for slot in range(4))
    assert RoundDecided(job, 0, (0, 1)) in world.events
    commit(world, job, 0, number=1)


def test_a_contribution_counts_when_more_than_half_of_the_lanes_hold_it() -> None:
    world, job = active(5)
    commit(world, job, 0, 1)
    attest(world, job, 1, 0)
    assert the_round(world, job).ready[0] == 0, "two of five"
    attest(world, job, 2, 0)
    assert the_round(world, job).ready[0] == world.height, "three of five, its own counted"


def test_late_lanes_are_waited_for_and_then_left_out() -> None:
    world, job = active(3)
    commit(world, job, 0, 1)
    attest(world, job, 0, 1)
    entry = Due(Timer.ROUND, job, 0, 0)
    assert height_of(world.state, entry) is None, "one of three is ready"
    attest(world, job, 1, 0)
    patience = world.parameters.segment_window // 2 // 2
    assert height_of(world.state, entry) == world.height + patience
    world.wait(patience - 1)
    assert the_round(world, job).decided == 0
    world.wait(1)
    decided = the_round(world, job)
    assert decided.included == (0, 1)
    assert decided.contributions == (mark("delta", 0, 0), mark("delta", 1, 0), b"")
    commit(world, job, 2)
    assert the_round(world, job) == decided, "it commits, and is out all the same"
    commit(world, job, 0, 1, 2, number=1)


def test_a_lane_that_comes_in_time_is_in() -> None:
    world, job = active(3)
    commit(world, job, 0, 1)
    attest(world, job, 0, 1)
    attest(world, job, 1, 0)
    commit(world, job, 2)
    attest(world, job, 0, 1, 2)
    assert the_round(world, job).included == (0, 1, 2)
    assert height_of(world.state, Due(Timer.ROUND, job, 0, 0)) is None


def test_how_long_late_lanes_are_waited_for_follows_the_last_rounds() -> None:
    world, job = active(3, rounds=9, unsettled=8, state_every=2)
    lasted: list[int] = []
    for number, pause in enumerate((0, 30, 4, 8, 20, 12, 0)):
        before = world.job(job).active if number == 0 else the_round(world, job, number - 1).decided
        world.wait(pause)
        commit(world, job, 0, 1, number=number)
        attest(world, job, 0, 1, number=number)
        attest(world, job, 1, 0, number=number)
        due = height_of(world.state, Due(Timer.ROUND, job, 0, number))
        usual = sorted(lasted[-5:])[len(lasted[-5:]) // 2] if lasted else 30
        assert due == world.height + max(1, usual // 2)
        commit(world, job, 2, number=number)
        attest(world, job, 0, 1, 2, number=number)
        lasted.append(the_round(world, job, number).decided - before)


def test_what_is_attested_must_be_there_and_new() -> None:
    world, job = active(3, stages=2)
    assert "has not committed" in refused(world, job, 0, 1)
    commit(world, job, 2, 3, 4)
    for lanes, rule in [
        ((0,), "other lanes"),
        ((2, 1), "other lanes"),
        ((1, 1), "other lanes"),
        ((3,), "other lanes"),
    ]:
        assert rule in refused(world, job, 0, *lanes)
    assert "has not committed" in refused(world, job, 1, 2)
    attest(world, job, 0, 1)
    assert "said all that" in refused(world, job, 0, 1)
    assert "said all that" in refused(world, job, 0, 2), "again with those of before"
    attest(world, job, 0, 1, 2)
    stranger = world.keys[worker(world, job, 1)]
    assert "does not work" in world.refused(stranger, AttestContributions(job, 0, 0, 0, (1,)))
    mine = world.keys[worker(world, job, 0)]
    assert "epoch 1" in world.refused(mine, AttestContributions(job, 1, 0, 0, (1,)))
    assert "gives no contribution" in refused(world, job, 0, 1, number=3)


def test_no_more_is_attested_once_it_is_decided() -> None:
    world, job = active(2)
    commit(world, job, 0, 1)
    attest(world, job, 0, 1)
    attest(world, job, 1, 0)
    assert "round 0 is decided" in refused(world, job, 0, 1)


@pytest.mark.parametrize("mode", [LaneMode.SINGLE, LaneMode.SYNC])
def test_other_lane_modes_have_no_contributions(mode: LaneMode) -> None:
    lanes = 1 if mode is LaneMode.SINGLE else 2
    world, job = active(lanes, lane_mode=mode)
    good = sworn(world, job, 0, 0)
    assert good.contribution == b""
    mine = world.keys[worker(world, job, 0)]
    assert "contribution" in world.refused(mine, replace(good, contribution=mark("x")))
    assert "gives no contribution" in refused(world, job, 0, 1)
    world.do(mine, good)


def test_all_segments_but_the_closing_one_contribute() -> None:
    world, job = active(2, rounds=2)
    mine = world.keys[worker(world, job, 0)]
    assert "contribution" in world.refused(mine, replace(sworn(world, job, 0, 0), contribution=b""))
    commit(world, job, 0, 1)
    attest(world, job, 0, 1)
    attest(world, job, 1, 0)
    last = sworn(world, job, 0, 1)
    assert last.contribution == b""
    assert "contribution" in world.refused(mine, replace(last, contribution=mark("x")))
    world.do(mine, last)


def test_whole_jobs_of_several_lanes_end_well() -> None:
    for lanes, stages in ((2, 2), (3, 1), (4, 2)):
        world, job = active(lanes, stages, rounds=6, audit_rate=300_000, audit_budget=900_000)
        found = world.play_until(job)
        assert found.reason is CloseReason.FETCHED
        for number in range(5):
            assert the_round(world, job, number).included == tuple(range(lanes))


def test_a_worker_that_takes_over_must_contribute_what_the_others_began_with() -> None:
    for honest in (True, False):
        world, job = active(2, rounds=6)
        commit(world, job, 0, 1)
        attest(world, job, 0, 1)
        attest(world, job, 1, 0)
        gone = worker(world, job, 0)
        world.vices[gone] = frozenset({Vice.LEAVES})
        while worker(world, job, 0) == gone or not world.state.slot(job, 0).worker.accepted:  # type: ignore[union-attr]
            world.play(job)
        again = sworn(world, job, 0, 0)
        if not honest:
            again = replace(again, contribution=mark("other"))
        if world.state.slot(job, 0).committed == 0:  # type: ignore[union-attr]
            world.do(world.keys[worker(world, job, 0)], again)
            ended = world.job(job).reason is CloseReason.MISMATCH
            assert ended is not honest
        assert the_round(world, job).included == (0, 1), "what is decided stays"


def test_an_open_round_forgets_a_slot_that_became_vacant() -> None:
    world, job = active(3, rounds=6)
    commit(world, job, 0, 1)
    attest(world, job, 0, 1)
    attest(world, job, 1, 0)
    entry = Due(Timer.ROUND, job, 0, 0)
    assert height_of(world.state, entry) is not None
    world.vices[worker(world, job, 0)] = frozenset({Vice.LEAVES})
    payloads = [raw for node, raw in world.moves(job) if node == worker(world, job, 0)]
    world.block(*(world.sign(world.keys[worker(world, job, 0)], one) for one in payloads))
    record = the_round(world, job)
    assert record.attested == (0, 0, 0), "nobody holds what its successor will make"
    assert record.ready == (0, 0, 0)
    assert height_of(world.state, entry) is None


def test_a_rollback_takes_back_the_rounds_from_its_boundary_on() -> None:
    world, job = active(2, rounds=6, audit_rate=1_000_000, audit_budget=900_000)
    cheat = worker(world, job, 0)
    world.vices[cheat] = frozenset({Vice.CHEATS})
    world.bad_segment = 2
    while world.job(job).epoch == 0:
        world.play(job)
    assert the_round(world, job, 1).decided
    found = world.state.round(job, 2)
    assert found is None or not found.decided
    assert world.play_until(job).reason is CloseReason.FETCHED


def test_a_round_that_nobody_attests_is_the_fault_of_those_who_keep_silent() -> None:
    world, job = active(2, rounds=6)
    commit(world, job, 0, 1)
    attest(world, job, 0, 1)
    silent = worker(world, job, 1)
    owner = world.state.owner_of(silent)
    assert owner is not None
    world.wait(max(world.parameters.segment_window, world.parameters.activate_window) + 2)
    assert world.state.facts(owner).faults == 1
    assert worker(world, job, 1) != silent
