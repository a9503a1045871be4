"""The agent when something died: its worker, its carrier, itself, a neighbour, another's honour."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
    Present,
    Stall,
    Witness,
)
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import (
    Commit,
)
from tdmld.node.auditwork import AuditWork
from tdmld.node.channel import WAITS_SECONDS
from tdmld.node.duty import OpenVerdict
from tdmld.node.errors import CarrierUnavailable
from tdmld.node.layout import Layout, list_file
from tdmld.node.machine import (
    CarrierUp,
    FailureCause,
    LinkWaits,
    SegmentDone,
    SlotFailed,
    SlotId,
)
from tdmld.node.slotwork import RESTARTS, STALL_SECONDS
from tdmld.train.segment import LinkRoots, SegmentRecord, StepDigests, write_list
from tests.chain.test_replacement import leave, slot_of
from tests.chain.test_stalls import accuse, complaint, here
from tests.chain.world import Vice, World, make_genesis
from tests.node.agentkit import Rig
from tests.node.fake_chain import place_of, worker_of

SALT = bytes(32)


@pytest.fixture
def world() -> World:
    made = World(make_genesis(9))
    made.all_ask(9)
    return made


@pytest.fixture
def serve(nursery: trio.Nursery, tmp_path: Path) -> Any:
    async def start(world: World, index: int) -> Rig:
        (tmp_path / "jobs").mkdir(exist_ok=True)
        rig = Rig(world, index, tmp_path)
        nursery.start_soon(rig.agent.run)
        with trio.fail_after(30):
            await rig.machine.heard.wait()
        await trio.testing.wait_all_tasks_blocked()
        return rig

    return start


def submit(world: World, **changes: Any) -> bytes:
    """Owner 0 offers a job of eight rounds; what its spec says does not matter here."""
    job = world.submit(**{"audit_rate": 0, "rounds": 8, **changes})
    world.play_until(job, JobStatus.MATCHED)
    return job


def record(world: World, job: bytes, slot: int, number: int) -> SegmentRecord:
    """What an honest worker of the world's table of hashes finds."""
    found = world.job(job)
    sworn = world.true_commit(found, slot, number, bytes(32))
    step = StepDigests(number, (), bytes(32), bytes(32), 0)
    return SegmentRecord(
        segment=number,
        start_shared=sworn.start_shared,
        start_lane=sworn.start_lane,
        end_shared=sworn.end_shared,
        end_lane=sworn.end_lane,
        link_roots=tuple(LinkRoots(link.link, link.sent, link.received) for link in sworn.links),
        has_loss=False,
        steps=(step,),
    )


async def active(world: World, serve: Any, slot: int = 0, **offer: Any) -> tuple[Rig, bytes]:
    """The agent of the worker of a slot, in a job that everybody else begins to work for."""
    job = submit(world, **offer)
    rig = await serve(world, worker_of(world, job, slot))
    await rig.play(job, JobStatus.PREPARING)
    await rig.play(job, JobStatus.ACTIVE)
    return rig, job


def play(world: World, job: bytes, holds: Callable[[], bool]) -> None:
    """Let everybody work until something holds."""
    for _ in range(500):
        if holds():
            return
        world.play(job)
    raise AssertionError("it never does")


async def play_to(rig: Rig, job: bytes, slot: int, committed: int) -> None:
    """Everybody, the world's actor in our place too, works until a slot has committed so much."""
    play(rig.world, job, lambda: slot_of(rig.world, job, slot).committed >= committed)
    await rig.look()


def opened(rig: Rig) -> list[tuple[int, int, int]]:
    """(epoch, incarnation, start) of each opening."""
    return [(one.epoch, one.incarnation, one.start) for (one,) in rig.called("open_slot")]


async def fail(rig: Rig, job: bytes, cause: FailureCause, slot: int = 0) -> None:
    rig.machine.send.send_nowait(SlotFailed(job, SlotId(0, slot), "it died", cause))
    await rig.look()


async def test_a_worker_that_died_is_started_again_at_once(world: World, serve: Any) -> None:
    rig, job = await active(world, serve)
    before = opened(rig)
    await fail(rig, job, FailureCause.KILLED)
    assert opened(rig)[len(before) :] == [(0, 0, 0)]
    assert rig.agent.progress[job, 0].restarts == 1
    assert rig.sent(Leave) == []


async def test_a_slot_that_fails_again_and_again_is_given_up(
    world: World, serve: Any, autojump_clock: trio.testing.MockClock
) -> None:
    rig, job = await active(world, serve)
    for _ in range(RESTARTS):
        await fail(rig, job, FailureCause.OUT_OF_MEMORY)
        await trio.sleep(60)
    assert rig.sent(Leave) == []
    await fail(rig, job, FailureCause.OUT_OF_MEMORY)
    await trio.sleep(60)
    assert rig.sent(Leave) == [Leave(job, 0, 0, 0, LeaveReason.MEMORY)]


async def test_what_would_end_the_same_way_again_is_not_tried_again(
    world: World, serve: Any
) -> None:
    rig, job = await active(world, serve)
    before = opened(rig)
    await fail(rig, job, FailureCause.REFUSED)
    assert opened(rig) == before
    assert rig.sent(Leave) == [Leave(job, 0, 0, 0, LeaveReason.STOPPED)]


async def test_a_finished_segment_lets_failures_be_forgotten(
    world: World, serve: Any, autojump_clock: trio.testing.MockClock
) -> None:
    rig, job = await active(world, serve)
    for number in range(RESTARTS + 2):
        await fail(rig, job, FailureCause.DIED)
        await trio.sleep(60)
        done = SegmentDone(job, SlotId(0, 0), record(world, job, 0, number), SALT, (0, 0))
        rig.machine.send.send_nowait(done)
        await rig.look()
    assert rig.sent(Leave) == []


async def test_a_carrier_that_is_back_is_used_at_once(world: World, serve: Any) -> None:
    rig, job = await active(world, serve)
    rig.machine.broken = CarrierUnavailable
    await fail(rig, job, FailureCause.CARRIER)
    count = len(opened(rig))
    rig.machine.broken = None
    rig.machine.send.send_nowait(CarrierUp(()))
    await rig.look()
    assert len(opened(rig)) == count + 1


async def test_what_was_finished_under_an_older_epoch_is_not_committed_to(
    world: World, serve: Any
) -> None:
    """News of a worker that was closed may come when the slot is open under the next name: its list
    is gone, and with it the salt."""
    rig, job = await active(world, serve)
    late = SegmentDone(job, SlotId(0, 0), record(world, job, 0, 0), SALT, (0, 7))
    rig.machine.send.send_nowait(late)
    await rig.look()
    assert rig.sent(Commit) == []
    rig.machine.send.send_nowait(replace(late, under=(0, 0)))
    await rig.look()
    assert len(rig.sent(Commit)) == 1


async def test_a_restarted_daemon_goes_on_where_its_disk_says_and_commits_what_was_done(
    world: World, serve: Any, tmp_path: Path
) -> None:
    job = submit(world)
    mine = worker_of(world, job, 0)
    world.play_until(job, JobStatus.ACTIVE)
    play(world, job, lambda: slot_of(world, job, 0).committed >= 1)
    done = record(world, job, 0, 1)
    path = list_file(Layout(tmp_path).slot(job, 0, 0), 1)
    path.parent.mkdir(parents=True)
    write_list(path, done, SALT)
    rig = Rig(world, mine, tmp_path)
    rig.machine.here.add((SlotId(0, 0), 2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.agent.run)
        with trio.fail_after(30):
            while not rig.sent(Commit):
                await rig.look()
        nursery.cancel_scope.cancel()
    assert opened(rig) == [(0, 0, 2)]
    (sworn,) = rig.sent(Commit)[:1]
    assert (sworn.segment, sworn.end_shared) == (1, done.end_shared)


async def test_a_slot_begins_where_the_chain_can_still_begin_when_its_own_state_is_gone(
    world: World, serve: Any
) -> None:
    rig, job = await active(world, serve)
    await play_to(rig, job, 0, 3)
    slot = slot_of(world, job, 0)
    rig.machine.lost.add(slot.committed)
    await fail(rig, job, FailureCause.DIED)
    assert opened(rig)[-1] == (0, 0, slot.held)


async def test_a_rollback_opens_the_slot_anew_in_the_next_epoch(world: World, serve: Any) -> None:
    job = submit(world, audit_rate=1_000_000, audit_budget=5_000_000)
    world.vices[node_of(world, job, 1)] = frozenset({Vice.CHEATS})
    rig = await serve(world, worker_of(world, job, 0))
    await rig.play(job, JobStatus.PREPARING)
    await rig.play(job, JobStatus.ACTIVE)
    play(world, job, lambda: world.job(job).epoch > 0)
    for _ in range(4):
        world.play(job)
    await rig.look()
    assert opened(rig)[-1][0] == 1
    assert world.job(job).epoch == 1


async def test_a_slot_that_another_node_has_is_closed(world: World, serve: Any) -> None:
    rig, job = await active(world, serve)
    leave(world, job, 0)
    await rig.look()
    assert rig.called("close_slot")[-1:] == [[SlotId(0, 0)]]
    count = len(opened(rig))
    await rig.block()
    assert len(opened(rig)) == count


async def test_a_survivor_learns_who_is_at_the_other_end_of_its_link(
    world: World, serve: Any
) -> None:
    rig, job = await active(world, serve)
    leave(world, job, 1)
    world.play(job)  # the next worker accepts
    await rig.look()
    slot = slot_of(world, job, 1)
    link, _, incarnation = rig.called("set_link_peer")[-1][1:]
    assert (link, incarnation) == ("down", slot.incarnation)
    assert slot.worker.accepted


async def test_a_replacement_brings_the_state_that_is_held_and_begins_there(
    world: World, serve: Any
) -> None:
    job = submit(world)
    standby = world.job(job).standby
    assert standby is not None
    rig = await serve(world, place_of(world, standby.node))
    await rig.play(job, JobStatus.PREPARING)
    await rig.play(job, JobStatus.ACTIVE)
    play(world, job, lambda: slot_of(world, job, 0).held > 0)
    leave(world, job, 0)
    world.play(job)
    slot = slot_of(world, job, 0)
    rig.machine.lost |= {slot.committed} - {slot.held}
    await rig.look()
    assert opened(rig) == [(0, slot.incarnation, slot.held)]


async def test_a_neighbour_that_is_silent_for_long_is_accused(world: World, serve: Any) -> None:
    rig, job = await active(world, serve)
    world.wait(70)

    async def wait(seconds: float) -> None:
        rig.machine.send.send_nowait(LinkWaits(job, SlotId(0, 0), "down", 3, seconds))
        await rig.look()

    await wait(STALL_SECONDS - 1)
    assert rig.sent(Stall) == []
    await wait(STALL_SECONDS + 1)
    assert rig.sent(Stall) == [Stall(job, 0, 0, 0, 0, "down", 3)]


async def test_a_neighbour_that_has_just_taken_its_slot_is_not_accused(
    world: World, serve: Any
) -> None:
    rig, job = await active(world, serve)
    leave(world, job, 1)
    world.play(job)
    await rig.look()
    waits = LinkWaits(job, SlotId(0, 0), "down", 3, 10 * STALL_SECONDS)
    rig.machine.send.send_nowait(waits)
    await rig.look()
    assert rig.sent(Stall) == []


async def test_who_is_accused_and_waits_itself_says_for_whom(world: World, serve: Any) -> None:
    three = world.offer().stages[:1] * 3
    job = submit(world, stages=three)
    rig = await serve(world, worker_of(world, job, 1))
    await rig.play(job, JobStatus.ACTIVE)
    rig.machine.send.send_nowait(LinkWaits(job, SlotId(0, 1), "down", 5, 1.0))
    await rig.look()
    case = accuse(world, job, 0, "down")
    await rig.look()
    assert rig.sent(Stall) == [Stall(job, 0, 1, 0, 0, "down", 5)]
    assert rig.sent(Present) == [Present(job, 0, 1, 0, case.opened)]


async def test_a_wait_that_is_over_accuses_nobody(
    world: World, serve: Any, autojump_clock: trio.testing.MockClock
) -> None:
    """The worker says again and again that it waits; when it does not, it has got its frame."""
    three = world.offer().stages[:1] * 3
    job = submit(world, stages=three)
    rig = await serve(world, worker_of(world, job, 1))
    await rig.play(job, JobStatus.ACTIVE)
    rig.machine.send.send_nowait(LinkWaits(job, SlotId(0, 1), "down", 5, 1.0))
    await rig.look()
    await trio.sleep(2 * WAITS_SECONDS)
    case = accuse(world, job, 0, "down")
    await rig.look()
    assert rig.sent(Stall) == []
    assert rig.sent(Present) == [Present(job, 0, 1, 0, case.opened)]


async def test_before_its_first_step_a_slot_is_as_patient_as_the_chain(serve: Any) -> None:
    """How long a step takes is not known yet; with a large model it is more than a moment."""
    world = World(make_genesis(9, activate_window=1200))
    world.all_ask(9)
    rig, job = await active(world, serve)
    world.wait(700)
    for seconds, accused in ((STALL_SECONDS + 1, 0), (299.0, 0), (301.0, 1)):
        rig.machine.send.send_nowait(LinkWaits(job, SlotId(0, 0), "down", 3, seconds))
        await rig.look()
        assert len(rig.sent(Stall)) == accused


async def test_a_node_that_was_restarted_knows_the_pace_from_the_chain(serve: Any) -> None:
    world = World(make_genesis(9, activate_window=1200, segment_window=1200))
    world.all_ask(9)
    job = submit(world)
    world.play_until(job, JobStatus.ACTIVE)
    world.wait(200)
    play(world, job, lambda: slot_of(world, job, 0).committed > 0)
    rig = await serve(world, worker_of(world, job, 0))
    world.wait(900)
    for seconds, accused in ((STALL_SECONDS + 1, 0), (299.0, 0), (330.0, 1)):
        rig.machine.send.send_nowait(LinkWaits(job, SlotId(0, 0), "down", 20, seconds))
        await rig.look()
        assert len(rig.sent(Stall)) == accused


@pytest.mark.parametrize("delivers", [True, False])
async def test_the_standby_says_whether_the_accused_delivers_to_it(
    world: World, serve: Any, autojump_clock: trio.testing.MockClock, delivers: bool
) -> None:
    job = submit(world)
    standby = world.job(job).standby
    assert standby is not None
    rig = await serve(world, place_of(world, standby.node))
    rig.machine.delivers = delivers
    await rig.play(job, JobStatus.ACTIVE)
    case = accuse(world, job, 0, "down")
    node = slot_of(world, job, 1).worker.node
    world.do(world.keys[node], here(world, job, 1))
    await rig.look()
    said = Witness(job, 0, 1, 0, case.opened, delivers)
    assert rig.sent(Witness) == ([said] if delivers else []), "who is started again gets its time"
    while not rig.sent(Witness):
        await rig.block()
        await trio.sleep(1)
    assert rig.sent(Witness) == [said]
    assert world.height < slot_of(world, job, 1).case.until  # type: ignore[union-attr]
    assert rig.called("probe_frame")[0] == [SlotId(0, 1), 0, "up", 7]


async def test_nobody_owes_a_frame_of_a_segment_that_it_may_not_run_yet(
    world: World, serve: Any
) -> None:
    job = submit(world)
    standby = world.job(job).standby
    assert standby is not None
    rig = await serve(world, place_of(world, standby.node))
    rig.machine.delivers = False
    await rig.play(job, JobStatus.ACTIVE)
    liar, node = (slot_of(world, job, slot).worker.node for slot in (0, 1))
    world.do(world.keys[liar], complaint(world, job, 0, "down", seq=10**6))
    world.do(world.keys[node], here(world, job, 1))
    await rig.look()
    assert [said.delivered for said in rig.sent(Witness)] == [True]
    assert not rig.called("probe_frame")


async def test_what_nobody_needs_any_more_is_forgotten(world: World, serve: Any) -> None:
    rig, job = await active(world, serve)
    play(world, job, lambda: slot_of(world, job, 0).held > 0)
    await rig.look()
    assert rig.called("forget_segments")[-1] == [SlotId(0, 0), slot_of(world, job, 0).held]


def node_of(world: World, job: bytes, slot: int) -> bytes:
    return slot_of(world, job, slot).worker.node


async def test_of_a_segment_that_a_rollback_left_standing_the_present_epoch_is_named() -> None:
    said: list[Any] = []

    async def submit_(payload: Any) -> None:
        said.append(payload)

    desk: Any = SimpleNamespace(
        node=bytes(32), epoch=lambda job: 3, salt=lambda what: SALT, submit=submit_
    )
    work, job = AuditWork(desk), bytes(32)
    todo = OpenVerdict(job, 1, 0, 0, 5, 0)
    work._found[job, 1, 0, 0, 5] = bytes(32)
    await work.open_verdict(cast(Any, None), cast(Any, SimpleNamespace(id=job)), todo)
    assert [payload.epoch for payload in said] == [3]
