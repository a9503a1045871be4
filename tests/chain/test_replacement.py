"""Vacant places: who loses one, who is asked for it, and where its work begins again."""

import pytest

from tdmld.chain import limits
from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
)
from tdmld.chain.events import (
    SegmentSettled,
    SlotAsked,
    SlotTaken,
    SlotVacated,
    StandbyTaken,
    StandbyVacated,
)
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import Cause, CloseReason, JobStatus, ProofStatus, SlotState
from tdmld.chain.settlement import allowed, keep_from
from tdmld.chain.transactions import (
    Accept,
    Decline,
    LaneMode,
    Payload,
)
from tests.chain.test_jobs import active, standby, worker
from tests.chain.world import Vice, World, make_genesis, mark, node_key, owner_key

QUIET = {"audit_rate": 0, "rounds": 8}


def slot_of(world: World, job: bytes, slot: int) -> SlotState:
    found = world.state.slot(job, slot)
    assert found is not None
    return found


def play_to(world: World, job: bytes, slot: int, committed: int) -> None:
    """Play until the slot has committed so many segments."""
    for _ in range(400):
        if slot_of(world, job, slot).committed >= committed:
            return
        world.play(job)
    raise AssertionError("it never did")


def keepers(world: World, only: int, nodes: int) -> None:
    """All ask; one of them, too dear to be a worker, can hold copies."""
    dear: dict[str, object] = {"price": 1_500}
    none: dict[str, object] = {"standby_slots": 0}
    world.block(*(world.ask(i, **(dear if i == only else none)) for i in range(nodes)))


def leave(world: World, job: bytes, slot: int) -> bytes:
    """The slot's worker gives it up; its node."""
    state = slot_of(world, job, slot)
    epoch, node = world.job(job).epoch, state.worker.node
    payload = Leave(job, epoch, slot, state.incarnation, LeaveReason.DEVICE)
    world.do(world.keys[node], payload)
    return node


def used(world: World, node: bytes) -> tuple[int, int, int]:
    record = world.state.node(node)
    assert record is not None
    return record.memory_used, record.standby_used, record.audits_open


def test_the_standby_takes_the_slot_and_another_one_the_standbys_place() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 3)
    held, settled = slot_of(world, job_id, 1).held, slot_of(world, job_id, 1).settled
    first = standby(world, job_id)
    gone = leave(world, job_id, 1)
    state = slot_of(world, job_id, 1)
    assert (state.worker.node, state.worker.accepted) == (first, False)
    assert (state.committed, state.settled, state.held) == (settled, settled, held)
    assert world.job(job_id).standby is not None  # until it has accepted
    assert used(world, gone) == (0, 0, 0)
    world.play(job_id)
    state = slot_of(world, job_id, 1)
    assert (state.worker.node, state.worker.accepted) == (first, True)
    assert state.worker.price == 10_000
    assert state.since == world.height
    assert world.job(job_id).standby is None
    assert used(world, first) == (1 << 30, 0, 0)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    owner = world.state.owner_of(gone)
    assert owner is not None
    assert job.excluded == (owner,)
    assert world.state.facts(owner).faults == 1
    (taken,) = [event for event in world.events if isinstance(event, SlotTaken)]
    assert (taken.node, taken.held) == (first, held)
    (second,) = [event.node for event in world.events if isinstance(event, StandbyTaken)]
    assert second not in (first, gone)
    assert world.next_due() is None
    assert world.state.earnings(job_id, owner).worker == settled * 10_000


def test_segments_that_are_void_are_paid_to_nobody_and_made_again() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 4)
    state = slot_of(world, job_id, 0)
    assert state.committed > state.settled
    beside = slot_of(world, job_id, 1)
    gone = leave(world, job_id, 0)
    for number in range(state.settled, state.committed):
        assert world.state.segment(job_id, 0, number) is None
    assert slot_of(world, job_id, 1).committed == beside.committed
    world.play_until(job_id)
    paid = [e for e in world.events if isinstance(e, SegmentSettled) and e.slot == 0]
    assert [event.segment for event in paid] == list(range(8))
    for number in range(8):
        segment = world.state.segment(job_id, 0, number)
        assert segment is not None
        assert (segment.worker == gone) is (number < state.settled)


def test_what_a_worker_signed_before_it_lost_the_slot_means_nothing_after() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 2)
    gone = worker(world, job_id, 1)
    job, number = world.job(job_id), slot_of(world, job_id, 1).committed
    late = world.true_commit(job, 1, number, gone)
    again = Leave(job_id, 0, 1, 0, LeaveReason.DISK)
    leave(world, job_id, 1)
    assert "does not work in that slot" in world.refused(world.keys[gone], late)
    assert "does not work in that slot" in world.refused(world.keys[gone], again)
    asked = world.keys[slot_of(world, job_id, 1).worker.node]
    session = mark("s")
    assert "turn 0" in world.refused(asked, Accept(job_id, 0, 1, session))
    early = world.true_commit(job, 1, slot_of(world, job_id, 1).committed, asked.public)
    assert "does not work in that slot" in world.refused(asked, early)
    assert "was not asked" in world.refused(world.keys[gone], Accept(job_id, 1, 1, session))
    world.do(asked, Accept(job_id, 1, 1, session))
    assert "has accepted" in world.refused(asked, Accept(job_id, 1, 1, session))


def test_a_standby_that_declines_keeps_its_place_and_the_next_node_is_asked() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 2)
    kept = standby(world, job_id)
    leave(world, job_id, 1)
    world.do(world.keys[kept], Decline(job_id, 1, 1))
    state = slot_of(world, job_id, 1)
    assert state.worker.node not in (kept, worker(world, job_id, 0))
    assert state.incarnation == 2
    assert [former.cause for former in state.former] == [Cause.LEFT, Cause.DECLINED]
    assert world.state.facts(world.state.owner_of(kept) or b"").faults == 0
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert standby(world, job_id) == kept


def test_a_standby_that_does_not_answer_loses_both_places() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 2)
    silent = standby(world, job_id)
    world.vices[silent] = frozenset({Vice.MUTE})
    leave(world, job_id, 1)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert world.state.facts(world.state.owner_of(silent) or b"").faults == 1
    assert [f.cause for f in slot_of(world, job_id, 1).former] == [Cause.LEFT, Cause.UNANSWERED]
    (lost,) = [event for event in world.events if isinstance(event, StandbyVacated)]
    assert (lost.node, lost.cause) == (silent, Cause.UNANSWERED)


def test_who_is_asked_fits_as_at_a_matching() -> None:
    """In force, of the class, cheap and big enough, of an owner that works nowhere in the lane."""
    world = World(make_genesis(9))
    changes: dict[int, dict[str, object]] = {
        3: {"price": 1_500, "standby_slots": 4},
        4: {"price": 3_000},
        5: {"memory": 1},
        6: {"class_id": "gpu"},
        7: {"price": 1_900},
        8: {"price": 1_800},
    }
    world.block(*(world.ask(i, **{"standby_slots": 0, **changes.get(i, {})}) for i in range(1, 9)))
    job_id = world.submit(**QUIET)
    world.play_until(job_id, JobStatus.ACTIVE)
    assert standby(world, job_id) == node_key(3).public
    world.vices[standby(world, job_id)] = frozenset({Vice.DECLINES})
    play_to(world, job_id, 0, 1)
    leave(world, job_id, 0)
    world.play(job_id)
    assert slot_of(world, job_id, 0).worker.node == node_key(8).public
    assert slot_of(world, job_id, 0).worker.price == 18_000
    world.do(node_key(8), Decline(job_id, slot_of(world, job_id, 0).incarnation, 0))
    assert slot_of(world, job_id, 0).worker.node == node_key(7).public
    world.do(node_key(7), Decline(job_id, slot_of(world, job_id, 0).incarnation, 0))
    job = world.job(job_id)
    assert (job.status, job.reason) == (JobStatus.REFUNDED, CloseReason.FAULT)
    assert world.next_due() is None
    assert all(used(world, node_key(index).public) == (0, 0, 0) for index in range(9))


def test_a_slot_is_not_replaced_for_ever() -> None:
    world = World(make_genesis(20))
    world.all_ask(20)
    job_id = world.submit(**{**QUIET, "stages": world.offer().stages[:1]})
    world.play_until(job_id, JobStatus.ACTIVE)
    count = 0
    while not world.job(job_id).final:
        state = slot_of(world, job_id, 0)
        key, turn = world.keys[state.worker.node], state.incarnation
        payload: Payload = Leave(job_id, 0, 0, turn, LeaveReason.MEMORY)
        if not state.worker.accepted:
            payload = Accept(job_id, turn, 0, mark("s"))
        world.do(key, payload)
        count += 1
    assert world.job(job_id).reason is CloseReason.FAULT
    state = slot_of(world, job_id, 0)
    assert state.incarnation <= limits.INCARNATIONS + 1
    assert count > 10


def test_several_slots_can_be_vacant_at_once() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 3)
    leave(world, job_id, 0)
    leave(world, job_id, 1)
    asked = {slot_of(world, job_id, slot).worker.node for slot in range(2)}
    assert len(asked) == 2
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED


def test_a_round_settles_in_one_block() -> None:
    world, job_id = active(**QUIET)
    for _ in range(300):
        before = len(world.events)
        world.play(job_id)
        settled = [e for e in world.events[before:] if isinstance(e, SegmentSettled)]
        numbers = {event.segment for event in settled}
        assert [e.slot for e in settled] == [0, 1] * len(numbers)
        if world.job(job_id).final:
            break
    assert world.job(job_id).reason is CloseReason.FETCHED


def test_held_is_the_newest_settled_copy_and_bounds_how_far_a_slot_goes() -> None:
    world, job_id = active(**QUIET, state_every=2, unsettled=4)
    seen = set()
    for _ in range(300):
        world.play(job_id)
        job = world.job(job_id)
        if job.status is not JobStatus.ACTIVE:
            break
        for slot in range(2):
            state = slot_of(world, job_id, slot)
            seen.add(state.held)
            assert state.held == state.settled - state.settled % 2
            proven = world.state.segment(job_id, slot, state.held - 1) if state.held else None
            assert proven is None or proven.proof is ProofStatus.EQUAL
            room = allowed(world.state, job, slot, [1 - slot])
            assert state.committed <= room <= min(8, state.settled + 4)
            assert keep_from(world.state, job, slot, [1 - slot]) == state.held
    assert seen >= {0, 2, 4}


def test_a_standby_that_loses_its_copies_is_replaced_and_the_work_goes_on() -> None:
    world, job_id = active(**QUIET)
    first = standby(world, job_id)
    world.vices[first] = frozenset({Vice.LOSES_COPY})
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    (lost,) = [event for event in world.events if isinstance(event, StandbyVacated)]
    assert (lost.node, lost.cause) == (first, Cause.UNPROVEN)
    owner = world.state.owner_of(first)
    assert owner is not None
    assert world.state.facts(owner).faults == 1
    assert owner in job.excluded
    assert world.state.earnings(job_id, owner).standby == 0
    assert used(world, first) == (0, 0, 0)


def test_a_worker_that_does_not_confirm_copies_is_replaced() -> None:
    world, job_id = active(**QUIET)
    mute = worker(world, job_id, 0)
    world.vices[mute] = frozenset({Vice.LOSES_COPY})
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert [f.cause for f in slot_of(world, job_id, 0).former][:1] == [Cause.UNPROVEN]
    assert worker(world, job_id, 0) != mute


def test_unequal_copies_cost_the_standby_its_place_and_nobody_a_fault() -> None:
    world, job_id = active(**QUIET)
    forger = standby(world, job_id)
    world.vices[forger] = frozenset({Vice.FORGES_COPY})
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    (lost,) = [event for event in world.events if isinstance(event, StandbyVacated)]
    assert (lost.node, lost.cause) == (forger, Cause.UNEQUAL)
    assert all(world.state.facts(owner_key(i).public).faults == 0 for i in range(7))


def test_without_a_standby_what_is_settled_counts_as_held_and_the_job_ends_well() -> None:
    world = World(make_genesis(4))
    keepers(world, 3, 4)
    job_id = world.submit(**QUIET)
    world.play_until(job_id, JobStatus.ACTIVE)
    play_to(world, job_id, 0, 3)
    leave(world, job_id, 1)
    for _ in range(400):
        world.play(job_id)
        job = world.job(job_id)
        if job.status is not JobStatus.ACTIVE:
            break
        for slot in range(2):
            state = slot_of(world, job_id, slot)
            if job.standby is None and state.settled > 2:
                assert state.held == state.settled
    job = world.play_until(job_id)
    assert job.standby is None
    assert job.reason is CloseReason.FETCHED
    assert len(job.results) == 1


def test_a_standby_that_was_asked_last_minute_is_let_go() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 3)
    leave(world, job_id, 1)
    world.play(job_id)
    world.vices = {node_key(index).public: frozenset({Vice.IGNORES_PLACE}) for index in range(7)}
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert job.standby is None
    assert world.next_due() is None
    assert all(used(world, node_key(index).public) == (0, 0, 0) for index in range(7))


def test_answers_for_the_standbys_place_carry_its_turn() -> None:
    world, job_id = active(**QUIET)
    play_to(world, job_id, 0, 2)
    leave(world, job_id, 1)
    world.play(job_id)  # the standby takes the slot
    world.block()
    job = world.job(job_id)
    assert job.standby is not None
    assert job.standby_turn == 1
    asked = world.keys[job.standby.node]
    assert "turn 0" in world.refused(asked, Accept(job_id, 0, STANDBY_SLOT, mark("s")))
    world.do(asked, Decline(job_id, 1, STANDBY_SLOT))
    assert world.job(job_id).standby is None
    assert asked.public in world.job(job_id).declined
    world.block()
    other = world.job(job_id).standby
    assert other is None or other.node != asked.public


def test_a_lane_that_nobody_can_take_is_lost_and_the_others_go_on() -> None:
    world = World(make_genesis(7))
    keepers(world, 6, 7)
    job_id = world.submit(
        **QUIET, lanes=3, lane_mode=LaneMode.DILOCO, stages=world.offer().stages[:1]
    )
    world.play_until(job_id, JobStatus.ACTIVE)
    play_to(world, job_id, 1, 2)
    world.vices = {node_key(index).public: frozenset({Vice.DECLINES}) for index in range(7)}
    gone = leave(world, job_id, 0)
    for _ in range(20):
        if world.job(job_id).lost_lanes:
            break
        world.play(job_id)
    assert world.job(job_id).lost_lanes == (0,)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert worker(world, job_id, 0) != worker(world, job_id, 1)
    settled = {(e.slot, e.segment) for e in world.events if isinstance(e, SegmentSettled)}
    assert {(slot, number) for slot in (1, 2) for number in range(8)} <= settled
    assert (0, 7) not in settled
    assert used(world, gone) == (0, 0, 0)
    assert world.next_due() is None
    assert all(used(world, node_key(index).public) == (0, 0, 0) for index in range(7))


@pytest.mark.parametrize("mode", [LaneMode.SYNC, LaneMode.DILOCO])
def test_lanes_survive_a_worker_that_dies(mode: LaneMode) -> None:
    world = World(make_genesis(9))
    world.all_ask(9)
    job_id = world.submit(**QUIET, lanes=2, lane_mode=mode)
    world.play_until(job_id, JobStatus.ACTIVE)
    play_to(world, job_id, 3, 3)
    world.vices[worker(world, job_id, 2)] = frozenset({Vice.MUTE})
    world.stop_before[worker(world, job_id, 2)] = 3
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert any(isinstance(event, SlotVacated) for event in world.events)
    assert any(isinstance(event, SlotAsked) for event in world.events)


def test_nobody_loses_a_place_in_a_job_that_has_all_its_segments() -> None:
    world, job_id = active(audit_rate=0, rounds=4)
    mute = worker(world, job_id, 0)
    world.vices[mute] = frozenset({Vice.LOSES_COPY})
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert slot_of(world, job_id, 0).unproven == limits.UNPROVEN_COPIES
    assert (worker(world, job_id, 0), job.repaired) == (mute, 0)
