"""The RPC's answers from a real ledger: subscriptions, and how much one question may cost."""

from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from tdmld.chain.ledger import BlockResult
from tdmld.chain.records import Job, JobStatus, Member, Segment, SlotState
from tdmld.node import jobevents, views
from tdmld.node.api import Api
from tdmld.node.jobfeed import EVENTS_BUFFERED
from tdmld.node.machine import SlotId, StepDone
from tdmld.rpc.types import JobEvent
from tests.chain.world import World, node_key
from tests.node.fake_chain import FakeChain, submit


class Rig:
    def __init__(self, world: World, data_dir: Path) -> None:
        self.world, self.chain = world, FakeChain(world)
        self.agent = SimpleNamespace(progress={}, auditing={}, ask=None)
        self.api = Api(
            key=node_key(6),
            genesis=world.genesis,
            host=SimpleNamespace(set_handler=lambda protocol, handler: None),  # type: ignore[arg-type]
            chain=self.chain,  # type: ignore[arg-type]
            store=SimpleNamespace(get_spec=lambda spec: None, block=lambda height: None),  # type: ignore[arg-type]
            machine=None,  # type: ignore[arg-type]
            agent=self.agent,  # type: ignore[arg-type]
            peers=SimpleNamespace(now_ms=lambda: 0),  # type: ignore[arg-type]
            reach=None,  # type: ignore[arg-type]
            data_dir=data_dir,
            stop=trio.Event(),
        )

    async def applied(self, result: BlockResult) -> None:
        header = SimpleNamespace(time_ms=self.world.height * 500)
        block = SimpleNamespace(header=header)
        self.chain.feed.put(
            SimpleNamespace(height=self.world.height, events=result.events, block=block)  # type: ignore[arg-type]
        )
        await trio.testing.wait_all_tasks_blocked()

    async def play(self, job: bytes) -> None:
        while not self.world.job(job).final:
            await self.applied(self.world.play(job))


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    world = World()
    world.all_ask()
    made = Rig(world, tmp_path)
    nursery.start_soon(made.api.run)
    await trio.testing.wait_all_tasks_blocked()
    return made


async def follow(rig: Rig, job: bytes, into: list[JobEvent]) -> None:
    async for event in rig.api.job_subscribe(job.hex()):
        into.append(event)


async def test_a_subscriber_hears_a_job_to_its_end(rig: Rig, nursery: trio.Nursery) -> None:
    job, heard = submit(rig.world), list[JobEvent]()
    other = submit(rig.world)
    async with trio.open_nursery() as followers:
        followers.start_soon(follow, rig, job, heard)
        await trio.testing.wait_all_tasks_blocked()
        await rig.play(other)
        await rig.play(job)
    assert {event.job for event in heard} == {job.hex()}
    kinds = [event.kind for event in heard]
    assert kinds.count("segment") == kinds.count("settled") == 4
    assert "closed" in [event.state for event in heard]
    assert kinds.index("state") == 0
    assert not rig.api._feed.subscribers
    late = [event async for event in rig.api.job_subscribe(job.hex())]
    assert late == []


async def test_a_subscriber_may_leave_at_any_event(rig: Rig) -> None:
    """The server closes the generator below a cancel scope of its own."""
    job = submit(rig.world)
    events = rig.api.job_subscribe(job.hex())

    async def play() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await rig.play(job)

    async with trio.open_nursery() as players:
        players.start_soon(play)
        async with aclosing(events):  # type: ignore[type-var]
            async for _ in events:
                break
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await events.aclose()  # type: ignore[attr-defined]
        players.cancel_scope.cancel()
    assert not rig.api._feed.subscribers


async def test_who_does_not_read_loses_steps_and_nothing_else(
    rig: Rig, nursery: trio.Nursery
) -> None:
    job, heard = submit(rig.world), list[JobEvent]()
    nursery.start_soon(follow, rig, job, heard)
    await trio.testing.wait_all_tasks_blocked()
    for step in range(3 * EVENTS_BUFFERED):
        rig.api._step(StepDone(job, SlotId(0, 1), step, 2.0, 0.1))
    await rig.play(job)
    steps = [event.step for event in heard if event.kind == "step"]
    assert steps == list(range(EVENTS_BUFFERED + 1))  # one more was waited for
    assert heard[-1].kind != "step"


async def test_a_block_that_cannot_be_shown_ends_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    job, heard = submit(rig.world), list[JobEvent]()
    nursery.start_soon(follow, rig, job, heard)
    await trio.testing.wait_all_tasks_blocked()

    def broken(*arguments: object) -> None:
        raise KeyError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(jobevents, "event", broken)
        while rig.world.job(job).status is not JobStatus.ACTIVE:
            await rig.applied(rig.world.play(job))
    await rig.play(job)
    assert "closed" in [event.state for event in heard]


class Counting:
    """A state in which every segment of every slot stands; counts what is read."""

    def __init__(self) -> None:
        self.reads = 0

    def segment(self, job: bytes, slot: int, number: int) -> Segment:
        self.reads += 1
        zero = bytes(32)
        return Segment(zero, 0, 0, zero, zero, zero, zero, (), zero, number, b"", 0)

    def audit(self, job: bytes, slot: int, number: int) -> None:
        self.reads += 1


async def test_one_look_at_a_long_job_reads_a_bounded_part_of_it(rig: Rig) -> None:
    """Votes wait while the answer is made."""
    job: Job = rig.world.job(submit(rig.world))
    state: Any = Counting()
    slot = SlotState(Member(bytes(32), bytes(32), 1), committed=1_000_000)
    slots = [slot, slot]
    losses = list(views._losses(state, job, slots))
    list(views._audits(state, job, slots))
    views._proved(state, job, 0, slot)
    assert state.reads <= 5 * views.SEGMENTS_SHOWN
    assert len(losses) == views.SEGMENTS_SHOWN
    assert (losses[0].segment, losses[-1].segment) == (0, 998_000)
    few = [SlotState(Member(bytes(32), bytes(32), 1), committed=3)] * 2
    assert [loss.segment for loss in views._losses(state, job, few)] == [0, 1, 2]
    assert list(views._losses(state, job, [SlotState(slot.worker)] * 2)) == []
