"""Machines with real carrier and worker processes: training, standby, audit, result, deaths."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node import control
from tdmld.node.errors import (
    AuditImpossible,
    CarrierUnavailable,
    ContentMismatch,
    ContentRefused,
    ContentUnavailable,
    MachineError,
    WorkerFailed,
)
from tdmld.node.layout import Layout, state
from tdmld.node.machine import (
    AuditTask,
    CarrierDown,
    CarrierUp,
    Event,
    FailureCause,
    LinkPeer,
    LinkSource,
    Machine,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotFinished,
    SlotId,
    StateRoots,
    StateSource,
    StepDone,
    open_machine,
)
from tdmld.p2p import PeerInfo
from tdmld.train import limits
from tdmld.train.segment import SegmentRecord
from tdmld.train.spec import decode_spec
from tests.train.support import TEXT, encode_document, spec_document

JOB, CHAIN, KEY = b"j" * 32, b"c" * 32, bytes(range(32))
SPEC = encode_document(spec_document())
ONE_STAGE = encode_document(spec_document(pipeline__cuts=[0, 4]))
PATIENCE_SECONDS = 200
"""A machine that does other work as well takes many times longer."""


@pytest.fixture(autouse=True)
async def patience() -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE_SECONDS):
        yield


@asynccontextmanager
async def machines(root: Path, count: int) -> AsyncIterator[list[Machine]]:
    """Machines that know each other, with the data and as members of the job."""
    async with AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(open_machine(root / str(n), chain_id=CHAIN))
            for n in range(count)
        ]
        everybody = frozenset(machine.session for machine in made)
        text = root / "text"
        text.write_bytes(TEXT)
        await made[-1].import_text(text)
        for machine in made:
            await machine.set_peers(
                [PeerInfo(m.session, m.addresses) for m in made if m is not machine]
            )
            await machine.set_members(JOB, everybody)
        for machine in made:
            await machine.fetch_data(JOB, SPEC, [made[-1].session])
        yield made


def assignment(spec: bytes, stage: int, workers: list[Machine], everybody: list[Machine]) -> Any:
    program = decode_spec(spec)
    ends = {link: program.other_end(0, stage, link)[1] for link in program.links(0, stage)}
    return SlotAssignment(
        job=JOB,
        spec=spec,
        slot=SlotId(0, stage),
        epoch=0,
        incarnation=0,
        links=tuple(
            LinkPeer(link, workers[end % len(workers)].session) for link, end in ends.items()
        ),
        members=frozenset(machine.session for machine in everybody),
    )


@dataclass
class Seen:
    records: list[SegmentRecord] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)


async def follow(machine: Machine, seen: Seen) -> None:
    """Read events until the slot is finished."""
    async for event in machine.events:
        match event:
            case SegmentDone(record=record, salt=salt):
                assert len(salt) == 32
                seen.records.append(record)
            case StepDone(loss=loss):
                seen.losses.append(loss)
            case SlotFinished():
                return
            case other:
                pytest.fail(f"unexpected {other}")


async def wait_for(machine: Machine, kind: type[Event]) -> Any:
    async for event in machine.events:
        if isinstance(event, kind):
            return event
    raise AssertionError("no more events")


async def abandoned_fetch(machine: Machine, holder: Machine, root: Path) -> None:
    """A fetch that nobody waits for any more stops: its file does not appear afterwards."""

    async def fetch(path: Path) -> None:
        item = control.ResultFile(JOB, "config.json")
        await machine._carrier.call(
            lambda n: control.FetchFile(n, item, 1 << 16, (holder.session,), str(path)),
            control.Stored,
        )

    assert holder.carrier_pid is not None
    os.kill(holder.carrier_pid, signal.SIGSTOP)
    try:
        with trio.move_on_after(0.3) as waited:
            await fetch(root / "abandoned" / "config.json")
    finally:
        os.kill(holder.carrier_pid, signal.SIGCONT)
    assert waited.cancelled_caught
    await fetch(root / "wanted" / "config.json")
    await fetch(root / "wanted" / "again.json")
    assert not (root / "abandoned").exists()


async def test_two_machines_train_and_a_third_stands_by_audits_and_makes_the_result(
    tmp_path: Path,
) -> None:
    async with machines(tmp_path, 3) as (upper, lower, third):
        workers = [upper, lower]
        drawn: dict[int, Any] = {}

        async def open_slot(stage: int) -> None:
            task = assignment(SPEC, stage, workers, [upper, lower, third])
            drawn[stage] = await workers[stage].open_slot(task)

        async def draw_copy() -> None:
            drawn[-1] = await third.genesis_roots(JOB, SPEC, SlotId(0, 0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_slot, 0)
            nursery.start_soon(open_slot, 1)
            nursery.start_soon(draw_copy)
        assert drawn[-1] == drawn[0] != drawn[1]

        seen = [Seen(), Seen()]
        async with trio.open_nursery() as nursery:
            for stage, machine in enumerate(workers):
                nursery.start_soon(follow, machine, seen[stage])
            for stage, machine in enumerate(workers):
                await machine.grant(JOB, SlotId(0, stage), 2)

        up, down = seen[0].records, seen[1].records
        assert [record.segment for record in up] == [record.segment for record in down] == [0, 1]
        assert (up[0].start_shared, up[0].start_lane) == (drawn[0].shared, drawn[0].lane)
        for mine, theirs in zip(up, down, strict=True):
            assert mine.links["down"] == theirs.links["up"][::-1]
        assert seen[0].losses == [None] * 6
        assert all(isinstance(loss, float) for loss in seen[1].losses)

        # Standby: the state at the end, and a hash of it that the worker finds as well.
        for stage, record in ((0, up[1]), (1, down[1])):
            slot, roots = SlotId(0, stage), StateRoots(record.end_shared, record.end_lane)
            await third.hold_state(JOB, SPEC, slot, 2, [workers[stage].session], roots)
            found = await third.keyed_hash(JOB, slot, 2, KEY)
            assert found == await workers[stage].keyed_hash(JOB, slot, 2, KEY)
        wrong = StateRoots(bytes(32), bytes(32))
        with pytest.raises(ContentUnavailable, match="promised"):
            await third.hold_state(JOB, SPEC, SlotId(0, 0), 1, [upper.session], wrong)

        # Audit: the third machine finds the same record, from what the neighbours kept.
        def task(received: bytes, holders: tuple[str, ...]) -> AuditTask:
            return AuditTask(
                job=JOB,
                spec=SPEC,
                slot=SlotId(0, 0),
                segment=1,
                start=StateRoots(up[1].start_shared, up[1].start_lane),
                links={"down": LinkSource(received, holders)},
                state_holders=(upper.session,),
            )

        found = await third.audit(task(up[1].links["down"][1], (upper.session, lower.session)))
        assert found == up[1]
        assert found.list_root(JOB, 0) == up[1].list_root(JOB, 0)
        with pytest.raises(AuditImpossible, match="frames of link down"):
            await third.audit(task(bytes(32), (lower.session,)))

        # Result: from the standby's own copies; the submitter checks its id.
        final = {
            SlotId(0, 0): StateSource(up[1].end_shared, ()),
            SlotId(0, 1): StateSource(down[1].end_shared, (lower.session,)),
        }
        result = await third.make_result(JOB, SPEC, final)
        out = tmp_path / "out"
        got = await upper.fetch_result(
            JOB, SPEC, result.result_id, [lower.session, third.session], out
        )
        assert (got.result_id, got.files) == (result.result_id, result.files)
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
        with pytest.raises(ContentRefused, match="not empty"):
            await upper.fetch_result(JOB, SPEC, result.result_id, [third.session], out)
        with pytest.raises(ContentUnavailable, match="another result"):
            await upper.fetch_result(JOB, SPEC, bytes(32), [third.session], tmp_path / "other")
        assert not (tmp_path / "other").exists()
        await abandoned_fetch(upper, third, tmp_path)
        # A holder cannot make us take more than the spec's model has.
        huge = tmp_path / "2" / "jobs" / JOB.hex() / "result" / "model.safetensors"
        os.truncate(huge, huge.stat().st_size + (32 << 20))
        with pytest.raises(ContentUnavailable, match="at most"):
            await upper.fetch_result(
                JOB, SPEC, result.result_id, [third.session], tmp_path / "huge"
            )

        # The end: what nobody needs any more goes, lists and result stay.
        for stage, machine in enumerate(workers):
            await machine.forget_segments(JOB, SlotId(0, stage), 2)
            owner = tmp_path / str(stage) / "jobs" / JOB.hex() / f"slot-0.{stage}"
            assert list((owner / "ring").iterdir()) == []
            assert sorted(path.name for path in (owner / "state").iterdir()) == ["1", "2"]
            await machine.close_job(JOB, "done")
            assert sorted(path.name for path in owner.iterdir()) == ["list"]


async def test_a_killed_worker_and_a_killed_carrier_are_reported_and_disturb_nothing_else(
    tmp_path: Path,
) -> None:
    async with machines(tmp_path, 1) as (machine,):
        task = assignment(ONE_STAGE, 0, [machine], [machine])
        other = encode_document(spec_document(TEXT + b"more"))
        with pytest.raises(ContentUnavailable, match="fetch_data"):
            await machine.open_slot(assignment(other, 0, [machine], [machine]))

        first = await machine.open_slot(task)
        with pytest.raises(MachineError, match="open already"):
            await machine.open_slot(task)
        pid = machine.worker_pid(JOB, task.slot)
        assert pid is not None
        assert machine.carrier_pid is not None
        core = min(1, abs(resource.getrlimit(resource.RLIMIT_CORE)[1]))
        for process in (pid, machine.carrier_pid):
            # With 1, unlike 0, the kernel does not even pipe a core to a program.
            assert resource.prlimit(process, resource.RLIMIT_CORE) == (core, core)
        os.kill(pid, signal.SIGKILL)
        failed = await wait_for(machine, SlotFailed)
        assert failed.slot == task.slot
        assert "SIGKILL" in failed.reason
        assert failed.cause is FailureCause.KILLED
        await machine.close_slot(JOB, task.slot, "failed")
        await machine.grant(JOB, task.slot, 1)

        session, addresses = machine.session, machine.addresses
        assert await machine.open_slot(task) == first
        worker = machine.worker_pid(JOB, task.slot)
        assert worker is not None
        assert machine.carrier_pid is not None
        os.kill(machine.carrier_pid, signal.SIGKILL)
        down = await wait_for(machine, CarrierDown)
        assert "SIGKILL" in down.reason
        with pytest.raises(CarrierUnavailable):
            await machine.set_members(JOB, frozenset())
        failed = await wait_for(machine, SlotFailed)
        assert "carrier" in failed.reason
        assert failed.cause is FailureCause.CARRIER
        up = await wait_for(machine, CarrierUp)
        assert (machine.session, up.addresses) == (session, addresses)
        ((shard, _),) = await machine.import_text(tmp_path / "text")
        path = Layout(tmp_path / "0").blob(shard)
        assert path.exists()
        await machine.drop_data({shard, bytes(32)})
        assert not path.exists()


async def test_peers_and_members_without_number_or_sense_harm_nothing(tmp_path: Path) -> None:
    def session(number: int) -> str:
        return KeyPair(number.to_bytes(32, "big")).address

    many = [PeerInfo(session(n), ("/dns4/" + "a" * 240 + "/tcp/1",) * 20) for n in range(1, 400)]
    async with open_machine(tmp_path / "0", chain_id=CHAIN) as machine:
        await machine.set_peers([PeerInfo(session(0), ("/ip4/1.2.3.4/tcp/99999",)), *many])
        given = [n.to_bytes(32, "big") for n in range(limits.STAGES + limits.SLOTS)]
        many = frozenset(session(n) for n in range(1, 1500))
        await machine.set_members(JOB, many, bytes(32), given=given)
        assert machine.carrier_pid is not None


async def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    say = ("sh", "-c", "echo no such luck >&2; exit 7", "sh")
    async with open_machine(tmp_path / "0", chain_id=CHAIN, launcher=say) as machine:
        await machine.import_text(text)
        task = assignment(ONE_STAGE, 0, [machine], [machine])
        with pytest.raises(MachineError, match=r"status 7.*no such luck"):
            await machine.open_slot(task)
        with pytest.raises(MachineError, match=r"status 7.*no such luck"):
            await machine.genesis_roots(JOB, ONE_STAGE, SlotId(0, 0))


async def test_a_job_that_is_closed_while_it_is_prepared_leaves_nobody_waiting(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    asleep = ("sh", "-c", 'case "$*" in *zygote*) exit 1;; esac; exec sleep 1000', "sh")
    async with open_machine(tmp_path / "0", chain_id=CHAIN, launcher=asleep) as machine:
        await machine.import_text(text)
        task = assignment(ONE_STAGE, 0, [machine], [machine])
        failed = trio.Event()

        async def open_slot() -> None:
            with pytest.raises(WorkerFailed, match="closed"):
                await machine.open_slot(task)
            failed.set()

        nursery.start_soon(open_slot)
        while machine.worker_pid(JOB, task.slot) is None:
            await trio.testing.wait_all_tasks_blocked(0.01)
        await machine.close_job(JOB, "refunded")
        with trio.fail_after(20):
            await failed.wait()


async def test_a_worker_that_gives_up_fails_its_task_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    async with open_machine(tmp_path / "0", chain_id=CHAIN) as machine:
        ((shard, size),) = await machine.import_text(text)
        layout = Layout(tmp_path / "0")
        state(layout.standby(JOB, 0, 0), 0).parent.mkdir(parents=True)
        state(layout.standby(JOB, 0, 0), 0).write_text("where a directory should be")
        # The error itself, not a group: whoever called expects a MachineError.
        with pytest.raises(WorkerFailed, match="File exists"):
            await machine.genesis_roots(JOB, ONE_STAGE, SlotId(0, 0))
        layout.blob(shard).write_bytes(bytes(size))
        with pytest.raises(ContentMismatch, match="shard 0 is not the one"):
            await machine.genesis_roots(JOB, ONE_STAGE, SlotId(0, 0))


async def test_a_carrier_that_cannot_start_says_why(tmp_path: Path) -> None:
    async with open_machine(tmp_path / "0", chain_id=CHAIN) as machine:
        with pytest.raises(MachineError, match="carrier process did not start"):
            async with open_machine(tmp_path / "1", chain_id=CHAIN, listen=machine.addresses):
                pytest.fail("two carriers on one port")
    (tmp_path / "2" / "keys").mkdir(parents=True)
    (tmp_path / "2" / "keys" / "session.key").write_bytes(b"short")
    with pytest.raises(MachineError, match=r"session\.key"):
        async with open_machine(tmp_path / "2", chain_id=CHAIN):
            pytest.fail("a key of 5 bytes")


DAEMON = """
import sys, trio
from pathlib import Path
from tdmld.node.machine import SlotId, open_machine

async def main():
    root = Path(sys.argv[1])
    async with open_machine(root, chain_id=b"c" * 32, launcher=("env", "A=b")) as machine:
        await machine.import_text(Path(sys.argv[2]))
        async with trio.open_nursery() as nursery:
            spec = sys.argv[3].encode()
            nursery.start_soon(machine.genesis_roots, b"j" * 32, spec, SlotId(0, 0))
            await trio.testing.wait_all_tasks_blocked(0.2)
            print(machine.carrier_pid, flush=True)
            await trio.sleep_forever()

import trio.testing
trio.run(main)
"""


def children_of(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_when_the_daemon_is_killed_its_processes_end(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    argv = [sys.executable, "-c", DAEMON, str(tmp_path / "0"), str(text), ONE_STAGE.decode()]
    daemon = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
    try:
        assert daemon.stdout is not None
        assert await daemon.stdout.receive_some(100)
        children = [os.pidfd_open(pid) for pid in children_of(daemon.pid)]
        assert len(children) == 2
    finally:
        daemon.kill()
        await daemon.wait()
    for child in children:
        await trio.lowlevel.wait_readable(child)
        os.close(child)


async def test_a_download_goes_on_when_the_carrier_was_killed(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 256
    async with (
        open_machine(tmp_path / "0", chain_id=CHAIN) as holder,
        open_machine(tmp_path / "1", chain_id=CHAIN) as asker,
    ):
        await holder.set_members(JOB, frozenset({asker.session}))
        await asker.set_peers([PeerInfo(holder.session, holder.addresses)])
        result = Layout(tmp_path / "0").result(JOB)
        result.mkdir(parents=True)
        (result / "model").write_bytes(data)
        target = tmp_path / "got" / "model"

        async def fetch() -> None:
            item = control.ResultFile(JOB, "model")
            await asker._carrier.call(
                lambda n: control.FetchFile(n, item, 1 << 30, (holder.session,), str(target)),
                control.Stored,
            )

        async def broken() -> None:
            with pytest.raises(CarrierUnavailable):
                await fetch()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(broken)
            while not any(part.stat().st_size > 16 << 20 for part in target.parent.glob("*.part")):
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert asker.carrier_pid is not None
            os.kill(asker.carrier_pid, signal.SIGKILL)
        await wait_for(asker, CarrierUp)
        await asker.set_peers([PeerInfo(holder.session, holder.addresses)])
        await fetch()
        assert target.read_bytes() == data
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        log = (tmp_path / "1" / "logs" / "carrier.jsonl").read_text()
        assert re.search(r"model goes on: (\d\d+) of 256 chunks are here", log)
