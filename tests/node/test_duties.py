"""What stands for a node at a state of the chain, and what does not."""

from typing import TypeVar

from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import AuditStatus, JobStatus
from tdmld.chain.transactions import Accept
from tdmld.node import duty
from tdmld.node.duties import duties, lost_places, party
from tests.chain import test_rounds as lanes
from tests.chain.test_jobs import active, standby, worker
from tests.chain.test_replacement import leave, play_to, slot_of
from tests.chain.test_stalls import accuse, here, line
from tests.chain.world import Vice, World, mark

QUIET = {"audit_rate": 0, "rounds": 8}

D = TypeVar("D", bound=duty.Duty)


def stands(world: World, job: bytes, node: bytes, kind: type[D]) -> list[D]:
    """The duties of one kind that a node has in a job now."""
    found = duties(world.state, node, world.job(job))
    return [todo for todo in found if isinstance(todo, kind)]


def accept(world: World, job: bytes, node: bytes) -> None:
    """A node takes the place that it was asked to take."""
    (place,) = stands(world, job, node, duty.TakePlace)
    world.do(world.keys[node], Accept(job, place.attempt, place.slot, mark("session of", node)))


def roll_back(rounds: int = 8) -> tuple[World, bytes]:
    """A job whose slot 0 cheated in segment 1 and was found out; its second epoch."""
    world, job = active(rounds=rounds, audit_rate=1_000_000, audit_budget=2_000_000)
    world.vices[worker(world, job, 0)] = frozenset({Vice.CHEATS})
    world.bad_segment = 1
    for _ in range(400):
        if world.job(job).epoch:
            return world, job
        world.play(job)
    raise AssertionError("nobody found it out")


def test_a_slot_is_kept_open_as_long_as_the_job_is_active() -> None:
    world, job = active(**QUIET)
    node = worker(world, job, 0)
    expected = [duty.OpenSlot(job, 0, 0, 0)]
    assert stands(world, job, node, duty.OpenSlot) == expected
    play_to(world, job, 0, 8)
    assert stands(world, job, node, duty.OpenSlot) == expected, "a neighbour may need its frames"
    assert stands(world, job, node, duty.RunSegments) == []
    world.play_until(job, JobStatus.FINISHING)
    assert stands(world, job, node, duty.OpenSlot) == []


def test_what_may_run_ends_at_the_unsettled_limit() -> None:
    world, job = active(**QUIET)
    node = worker(world, job, 0)
    assert stands(world, job, node, duty.RunSegments) == [duty.RunSegments(job, 0, 0, 0, 4)]
    play_to(world, job, 0, 4)
    settled = slot_of(world, job, 0).settled
    assert stands(world, job, node, duty.RunSegments)[0].until == settled + 4


def test_a_vacant_slot_is_taken_by_the_one_that_is_asked() -> None:
    world, job = active(**QUIET)
    play_to(world, job, 0, 3)
    first, gone = standby(world, job), leave(world, job, 1)
    incarnation = slot_of(world, job, 1).incarnation
    assert stands(world, job, first, duty.TakePlace) == [duty.TakePlace(job, incarnation, 1)]
    assert stands(world, job, first, duty.OpenSlot) == [], "it has not accepted"
    assert list(duties(world.state, gone, world.job(job))) == []
    accept(world, job, first)
    assert stands(world, job, first, duty.OpenSlot) == [duty.OpenSlot(job, 1, 0, incarnation)]
    assert stands(world, job, first, duty.CommitSegment)[0].incarnation == incarnation
    assert [former.node for former in lost_places(world.state, world.job(job))] == [gone]


def test_a_slot_is_not_opened_beside_a_vacant_one_and_its_links_follow_the_new_worker() -> None:
    world, job = active(**QUIET)
    play_to(world, job, 0, 3)
    neighbour = worker(world, job, 0)
    (before,) = stands(world, job, neighbour, duty.ReachPeers)
    leave(world, job, 1)
    assert stands(world, job, neighbour, duty.OpenSlot) == []
    assert stands(world, job, neighbour, duty.ReachPeers)[0].peers == ()
    first = standby(world, job)
    accept(world, job, first)
    (after,) = stands(world, job, neighbour, duty.ReachPeers)
    assert after != before
    assert after.peers == (("down", mark("session of", first), slot_of(world, job, 1).incarnation),)
    assert stands(world, job, neighbour, duty.OpenSlot)


def test_a_new_standby_is_asked_and_brings_the_states_that_are_held() -> None:
    world, job = active(**QUIET)
    play_to(world, job, 0, 4)
    leave(world, job, 1)
    accept(world, job, standby(world, job))
    for _ in range(60):
        found = world.job(job).standby
        if found is not None:
            break
        world.block()
    node = standby(world, job)
    turn = world.job(job).standby_turn
    assert stands(world, job, node, duty.TakePlace) == [duty.TakePlace(job, turn, STANDBY_SLOT)]
    assert stands(world, job, node, duty.HoldState) == []
    accept(world, job, node)
    held = {(todo.slot, todo.boundary) for todo in stands(world, job, node, duty.HoldState)}
    for slot in (0, 1):
        if boundary := slot_of(world, job, slot).held:
            assert (slot, boundary) in held


def test_a_rollback_makes_every_duty_of_a_slot_another_one() -> None:
    world, job = roll_back()
    other = worker(world, job, 1)
    incarnation = slot_of(world, job, 1).incarnation
    if stands(world, job, other, duty.OpenSlot):
        assert stands(world, job, other, duty.OpenSlot) == [duty.OpenSlot(job, 1, 1, incarnation)]
    world.play(job)
    world.play(job)
    assert stands(world, job, other, duty.OpenSlot) == [duty.OpenSlot(job, 1, 1, incarnation)]
    (todo,) = stands(world, job, other, duty.CommitSegment)
    assert (todo.epoch, todo.segment) == (1, slot_of(world, job, 1).committed)


def test_an_audit_of_a_segment_that_was_made_again_is_another_duty() -> None:
    world, job = roll_back()
    play_to(world, job, 0, 3)
    for number in range(slot_of(world, job, 0).settled, 3):
        audit = world.state.audit(job, 0, number)
        if audit is not None and audit.status is AuditStatus.DRAWN:
            (todo, *_) = stands(world, job, audit.auditor, duty.ReplaySegment)
            assert todo.epoch == 1


def test_who_is_accused_says_that_it_is_there_and_then_the_standby_tries_it() -> None:
    world, job = line()
    case = accuse(world, job, 1, "down")
    accused, witness = worker(world, job, 2), standby(world, job)
    present = duty.SayPresent(job, 2, 0, 0, case.opened)
    assert stands(world, job, accused, duty.SayPresent) == [present]
    assert stands(world, job, witness, duty.TryDelivery) == []
    world.do(world.keys[accused], here(world, job, 2))
    assert stands(world, job, accused, duty.SayPresent) == []
    trial = duty.TryDelivery(job, 2, 0, 0, case.opened, "up", 7)
    assert stands(world, job, witness, duty.TryDelivery) == [trial]


def test_contributions_of_siblings_are_held_until_the_round_is_decided() -> None:
    world, job = lanes.active(3, rounds=4)
    node = worker(world, job, 0)
    assert stands(world, job, node, duty.HoldContributions) == []
    lanes.commit(world, job, 1)
    hold = duty.HoldContributions(job, 0, 0, 0, (1,))
    assert stands(world, job, node, duty.HoldContributions) == [hold]
    lanes.attest(world, job, 0, 1)
    assert stands(world, job, node, duty.HoldContributions) == []
    lanes.commit(world, job, 0, 2)
    hold = duty.HoldContributions(job, 0, 0, 0, (2,))
    assert stands(world, job, node, duty.HoldContributions) == [hold]


def test_a_lane_runs_one_segment_beyond_the_last_round_that_is_decided() -> None:
    world, job = lanes.active(2, rounds=4)
    node = worker(world, job, 0)

    def until() -> int:
        (todo,) = stands(world, job, node, duty.RunSegments)
        return todo.until

    assert until() == 1
    lanes.commit(world, job, 0, 1)
    assert until() == 1, "round 0 is not decided"
    lanes.attest(world, job, 0, 1)
    lanes.attest(world, job, 1, 0)
    assert until() == 2


def test_everybody_who_has_a_place_belongs_to_a_job_and_nobody_who_lost_one() -> None:
    world, job = active(**QUIET)
    play_to(world, job, 0, 3)
    gone = leave(world, job, 1)
    nodes = {node for node, _ in party(world.state, world.job(job))}
    assert gone not in nodes
    assert {worker(world, job, 0), standby(world, job), world.job(job).source} <= nodes
