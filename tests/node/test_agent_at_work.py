"""The agent on a real ledger, with a machine that only remembers what it was told."""

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import address
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import AuditFail, Decline
from tdmld.node.agent import PUBLISHED_SECONDS, RETRY_BLOCKS
from tdmld.node.errors import ControlError, WorkerFailed
from tdmld.node.machine import FailureCause, SlotFailed, SlotId, StepDone
from tdmld.p2p import PeerInfo
from tests.chain.world import Vice, World, node_key
from tests.node.agentkit import Rig
from tests.node.fake_chain import (
    SPEC,
    place_of,
    session_of,
    submit,
    worker_of,
)


@pytest.fixture
def world() -> World:
    made = World()
    made.all_ask()
    return made


@pytest.fixture
def serve(nursery: trio.Nursery, tmp_path: Path) -> Any:
    async def start(world: World, index: int, broken: type[Exception] | None = None) -> Rig:
        (tmp_path / "jobs").mkdir(exist_ok=True)
        rig = Rig(world, index, tmp_path)
        rig.machine.broken = broken
        nursery.start_soon(rig.agent.run)
        with trio.fail_after(30):
            await rig.machine.heard.wait()
        await trio.testing.wait_all_tasks_blocked()
        return rig

    return start


async def test_a_carrier_is_where_its_own_node_says_and_nobody_else(
    world: World, serve: Any
) -> None:
    job = submit(world)
    mine, other = worker_of(world, job, 0), worker_of(world, job, 1)
    rig = await serve(world, mine)
    liar = node_key(15)
    rig.record(liar, session_of(other), "/ip4/6.6.6.6/tcp/1")
    rig.record(node_key(other), session_of(other), "/ip4/127.0.0.1/tcp/2")
    await rig.play(job, JobStatus.ACTIVE)
    assert rig.machine.peers == [PeerInfo(address(session_of(other)), ("/ip4/127.0.0.1/tcp/2",))]


async def test_a_carrier_that_refuses_what_it_is_told_ends_nothing(
    world: World, serve: Any
) -> None:
    job = submit(world)
    mine, other = worker_of(world, job, 0), worker_of(world, job, 1)
    rig = await serve(world, mine)
    rig.machine.broken = ControlError
    rig.record(node_key(other), session_of(other), "/ip4/127.0.0.1/tcp/2")
    await rig.play(job, JobStatus.PREPARING)
    rig.machine.broken = None
    await rig.look()
    assert len(rig.machine.peers) == 1


async def test_a_defect_in_one_duty_ends_neither_the_agent_nor_other_duties(
    world: World, serve: Any
) -> None:
    job = submit(world)
    standby = world.job(job).standby
    assert standby is not None
    rig = await serve(world, place_of(world, standby.node))
    world.vices[standby.node] = frozenset({Vice.MUTE})
    await rig.block(*(world.sign(world.keys[n], p) for n, p in world.moves(job)))
    await rig.look()
    # It accepted by itself; drawing the weights raises something that nobody expects.
    assert [type(payload).__name__ for payload in rig.chain.sent] == ["Accept"]
    world.vices.clear()
    await rig.play(job, JobStatus.PREPARING)
    await rig.look()
    assert rig.machine.draws == 2
    await rig.play(job)
    assert rig.machine.closed == [job]


async def test_of_a_job_that_is_over_nothing_is_remembered(world: World, serve: Any) -> None:
    job = submit(world)
    rig = await serve(world, worker_of(world, job, 0))
    await rig.play(job, JobStatus.PREPARING)
    await rig.play(job, JobStatus.ACTIVE)
    assert rig.remembers(job)
    await rig.play(job)
    await rig.look()
    assert rig.machine.closed == [job]
    assert rig.remembers(job) == []
    # What the worker said last comes late, and is about nothing any more.
    rig.machine.send.send_nowait(StepDone(job, SlotId(0, 0), 1, None, 0.1))
    rig.machine.send.send_nowait(SlotFailed(job, SlotId(0, 0), "killed", FailureCause.KILLED))
    await rig.look()
    assert rig.remembers(job) == []


async def test_files_of_a_job_that_ended_while_this_node_was_away_are_removed(
    world: World, serve: Any, tmp_path: Path
) -> None:
    job = submit(world)
    mine = worker_of(world, job, 0)
    world.play_until(job)
    (tmp_path / "jobs" / job.hex() / "slot-0.0" / "ring").mkdir(parents=True)
    (tmp_path / "jobs" / "notes").mkdir()
    rig = await serve(world, mine)
    assert rig.machine.closed == [job]


async def test_a_place_that_does_not_fit_on_the_disk_is_declined(
    world: World, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(world)
    monkeypatch.setattr("tdmld.node.performer.free_bytes", lambda directory: 1000)
    rig = await serve(world, worker_of(world, job, 1))
    with trio.fail_after(30):
        await rig.chain.submitted.wait()
    assert rig.sent(Decline) == [Decline(job, 0, 1)]


async def test_an_audit_that_comes_too_slowly_is_given_up_in_time(world: World, serve: Any) -> None:
    """Who is audited and gives its state a byte at a time must not make it the auditor's fault."""
    for node in world.keys:
        world.vices[node] = frozenset({Vice.NEVER_AUDITS})
    job = submit(world, audit_rate=1_000_000)
    world.play_until(job, JobStatus.ACTIVE)
    while (audit := world.state.audit(job, 0, 0)) is None:
        world.play(job)
    rig = await serve(world, place_of(world, audit.auditor))
    assert rig.machine.audits
    while not rig.sent(AuditFail) and world.height < audit.until:
        await rig.block()
    failed = next(fail for fail in rig.sent(AuditFail) if (fail.slot, fail.segment) == (0, 0))
    assert "in time" in failed.missing
    assert world.height < audit.until - 1
    assert (job, 0, 0) not in rig.agent.auditing


async def test_a_replay_that_breaks_is_given_up_and_another_auditor_drawn(
    world: World, serve: Any
) -> None:
    for node in world.keys:
        world.vices[node] = frozenset({Vice.NEVER_AUDITS})
    job = submit(world, audit_rate=1_000_000)
    world.play_until(job, JobStatus.ACTIVE)
    while (audit := world.state.audit(job, 1, 0)) is None:
        world.play(job)
    rig = await serve(world, place_of(world, audit.auditor), broken=WorkerFailed)
    failed = next(fail for fail in rig.sent(AuditFail) if (fail.slot, fail.segment) == (1, 0))
    assert "not finite" in failed.missing


async def test_the_text_of_a_job_that_is_over_goes_when_no_other_needs_it(
    world: World, serve: Any, mock_clock: trio.testing.MockClock
) -> None:
    # Jumped by hand: a clock that jumps by itself does so while the agent waits for a thread.
    shards = {content for content, _ in SPEC.shards}
    first, second = submit(world), submit(world)
    rig = await serve(world, worker_of(world, first, 0))
    rig.agent._known |= {first, second}
    await rig.play(first)
    assert rig.machine.closed == [first]
    assert rig.machine.dropped == set()
    rig.agent.published(SPEC)
    await rig.play(second)
    assert rig.machine.closed == [first, second]
    assert rig.machine.dropped == set()
    mock_clock.jump(2 * PUBLISHED_SECONDS)
    third = submit(world)
    rig.agent._known.add(third)
    await rig.play(third)
    assert rig.machine.dropped == shards


async def test_a_job_that_could_not_be_closed_is_closed_later(world: World, serve: Any) -> None:
    job = submit(world)
    rig = await serve(world, worker_of(world, job, 0))
    rig.machine.broken = ControlError
    await rig.play(job)
    assert rig.machine.closed == []
    rig.machine.broken = None
    for _ in range(RETRY_BLOCKS + 1):
        await rig.block()
    assert rig.machine.closed == [job]
    for _ in range(RETRY_BLOCKS + 1):
        await rig.block()
    assert rig.machine.closed == [job]
