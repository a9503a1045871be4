"""Workers that are forked from a warm process: same bits, exact ends, and nobody is left over."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import trio

from tdmld.node.channel import Genesis
from tdmld.node.errors import FailureCause, WorkerFailed
from tdmld.node.jobfiles import prepare_directory
from tdmld.node.layout import Layout
from tdmld.node.machine_types import SlotId
from tdmld.node.worker_task import Task
from tdmld.node.workers import WorkerLauncher
from tdmld.train.families import FAMILIES
from tdmld.train.spec import decode_spec
from tests.train.support import FAMILY_CONFIGS, encode_document, spec_document

JOB = b"j" * 32
RAW = encode_document(spec_document(pipeline__cuts=[0, 1, 3, 4]))
LARGE = FAMILIES["llama"].canonical(FAMILY_CONFIGS["llama"] | {"intermediate_size": 65_536})
WIDE = encode_document(spec_document(pipeline__cuts=[0, 1, 3, 4], config=LARGE))
SPEC, MIDDLE = decode_spec(RAW), SlotId(0, 1)
"""A stage that reads no text can be drawn without a carrier."""
PATIENCE_SECONDS = 900
NICE = 3
NOT_WARM = ("sh", "-c", 'case "$*" in *zygote*) exit 9;; esac; exec "$@"', "sh")
"""A launcher under which the zygote cannot start, and workers can."""
DAEMON = """
import sys, trio
from pathlib import Path
from tests.node.test_zygote import Bench
async def main():
    async with Bench.open(Path(sys.argv[1])) as bench:
        pid, _ = await bench.idle()
        print(bench.workers.zygote_pid, pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.fixture(autouse=True)
async def patience() -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE_SECONDS):
        yield


@dataclass
class Bench:
    """A launcher of workers, and tasks for them."""

    root: Path
    workers: WorkerLauncher
    nursery: trio.Nursery
    layout: Layout = field(init=False)
    writers: list[int] = field(default_factory=list)
    """What keeps idle workers waiting."""

    def __post_init__(self) -> None:
        self.layout = Layout(self.root)
        prepare_directory(self.layout.standby(JOB, *MIDDLE), self.layout.spec(JOB), RAW)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, root: Path, launcher: tuple[str, ...] = (), memory: int = 0
    ) -> AsyncIterator["Bench"]:
        async with trio.open_nursery() as nursery:
            workers = WorkerLauncher(Layout(root), launcher, 5, memory, nursery)
            bench = cls(root, workers, nursery)
            yield bench
            nursery.cancel_scope.cancel()
        for writer in bench.writers:
            os.close(writer)

    async def draw(self) -> Genesis:
        directory = self.layout.standby(JOB, *MIDDLE)
        return await self.workers.draw(JOB, MIDDLE, SPEC, None, directory)

    async def idle(self) -> tuple[int, "trio.MemoryReceiveChannel[WorkerFailed]"]:
        """A worker that waits for its spec for ever: its process id, and a channel for its end."""
        failed, failures = trio.open_memory_channel[WorkerFailed](1)
        fifo = self.root / "fifo"
        os.mkfifo(fifo)
        directory = self.layout.standby(JOB, *MIDDLE)
        task = Task("genesis", str(fifo), str(directory), 0, 1, draw=True, niceness=NICE)

        async def run() -> None:
            try:
                await self.workers.run(JOB, MIDDLE, task, None, Genesis)
            except WorkerFailed as error:
                failed.send_nowait(error)

        self.nursery.start_soon(run)
        while (writer := _writer(fifo)) is None:  # noqa: ASYNC110  # nobody would set an event
            await trio.sleep(0.05)
        self.writers.append(writer)
        assert self.workers.zygote_pid is not None
        (child,) = psutil.Process(self.workers.zygote_pid).children()
        return child.pid, failures


async def gone(pid: int) -> None:
    """Wait until a process of somebody else has ended; whether it was reaped is not our matter."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


def _writer(fifo: Path) -> int | None:
    """The other end of a named pipe that somebody reads from; None while nobody does."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


async def test_a_forked_worker_finds_the_bits_of_one_that_was_started_alone(
    tmp_path: Path,
) -> None:
    async with (
        Bench.open(tmp_path / "warm") as warm,
        Bench.open(tmp_path / "alone", NOT_WARM) as alone,
    ):
        first = await warm.draw()
        assert warm.workers.zygote_pid is not None
        assert await alone.draw() == first
        assert alone.workers.zygote_pid is None
        assert await warm.draw() == first


async def test_a_killed_worker_ends_with_its_signal_and_the_zygote_goes_on(
    tmp_path: Path,
) -> None:
    async with Bench.open(tmp_path) as bench:
        pid, failures = await bench.idle()
        zygote = bench.workers.zygote_pid
        worker = psutil.Process(pid)
        assert os.getsid(pid) == pid
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] < 1000
        assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] <= 1
        assert worker.nice() == min(os.nice(0) + NICE, 19)
        # Its log, the packet socket, what stdin is, the spec: nothing of the zygote or of others.
        assert worker.num_fds() <= 6
        os.kill(pid, signal.SIGTERM)
        error = await failures.receive()
        assert "SIGTERM" in str(error)
        assert error.cause is FailureCause.KILLED
        await bench.draw()
        assert bench.workers.zygote_pid == zygote


async def test_workers_end_with_their_zygote_and_the_next_one_is_started_alone(
    tmp_path: Path,
) -> None:
    async with Bench.open(tmp_path) as bench:
        pid, failures = await bench.idle()
        assert bench.workers.zygote_pid is not None
        os.kill(bench.workers.zygote_pid, signal.SIGKILL)
        assert "SIGKILL" in str(await failures.receive())
        await gone(pid)
        await bench.draw()


async def test_zygote_and_workers_end_with_the_daemon(tmp_path: Path) -> None:
    daemon = subprocess.Popen(  # noqa: ASYNC220  # starting it does not wait
        [sys.executable, "-c", DAEMON, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    with daemon, daemon.stdout:
        line = await trio.to_thread.run_sync(daemon.stdout.readline)
        pids = [int(word) for word in line.split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        daemon.kill()
    for pid in pids:
        await gone(pid)


async def test_a_worker_over_its_memory_says_so(tmp_path: Path) -> None:
    # Less than it has already: it may allocate nothing more that is large.
    async with Bench.open(tmp_path, memory=64 << 20) as bench:
        bench.layout.spec(JOB).write_bytes(WIDE)
        with pytest.raises(WorkerFailed, match="memory") as failed:
            await bench.draw()
        assert failed.value.cause is FailureCause.OUT_OF_MEMORY


async def test_a_worker_says_what_it_refuses(tmp_path: Path) -> None:
    async with Bench.open(tmp_path) as bench:
        bench.layout.spec(JOB).write_bytes(b"{}")
        with pytest.raises(WorkerFailed, match="missing") as failed:
            await bench.draw()
        assert failed.value.cause is FailureCause.REFUSED
