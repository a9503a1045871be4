"""Starting worker processes: live ones for the carrier, and those that serve one task."""

import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import trio

from tdmld.node.channel import (
    PACKET_BYTES,
    Failure,
    FrameMemory,
    Genesis,
    Segment,
    Step,
    decode_packet,
)
from tdmld.node.errors import ControlError, WorkerFailed
from tdmld.node.layout import Layout
from tdmld.node.machine_types import GenesisRoots, SlotId
from tdmld.node.supervise import Child, minimal_environment
from tdmld.node.worker_task import Task
from tdmld.train.numerics import pinned_environment
from tdmld.train.spec import Spec

T = TypeVar("T", Genesis, Segment)


class LiveSlot:
    """A slot that this machine works on. Its descriptors stay here, so that neither carrier nor
    worker sees an end of file when the other one dies: the supervisor decides what happens."""

    child: Child

    def __init__(self, job: bytes, slot: SlotId, spec: Spec) -> None:
        self.job = job
        self.slot = slot
        self.spec = spec
        self.roots: GenesisRoots | None = None
        self.drawn = trio.Event()
        """Set when `roots` or `failure` is known."""
        self.failure = ""
        self.closing = False
        self.announced = False
        """`open_slot` has returned: failures are events from now on."""
        links = spec.links(slot.lane, slot.stage)
        self._memory = FrameMemory.create(len(links), spec.stages, spec.frame_bytes)
        self._carrier_end, self._worker_end = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )

    @property
    def child_started(self) -> bool:
        """Whether the worker process exists."""
        return hasattr(self, "child")

    @property
    def carrier_descriptors(self) -> tuple[int, int]:
        """Packet socket and memory, for the carrier."""
        return self._carrier_end.fileno(), self._memory

    @property
    def worker_descriptors(self) -> tuple[int, int]:
        """Packet socket and memory, for the worker."""
        return self._worker_end.fileno(), self._memory

    def close(self) -> None:
        """Close our copies. Idempotent."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        self._carrier_end.close()
        self._worker_end.close()


class WorkerLauncher:
    """Starts workers with the pinned environment, the launcher's prefix and nothing else."""

    def __init__(
        self, layout: Layout, launcher: Sequence[str], niceness: int, nursery: trio.Nursery
    ) -> None:
        self._layout = layout
        self._launcher = tuple(launcher)
        self._niceness = niceness
        self._nursery = nursery

    def start_live(self, live: LiveSlot, text: int | None, directory: Path) -> Child:
        """Start the worker of a slot. WorkerFailed when it cannot be started."""
        task = self._task(live.job, live.slot, "live", directory)
        child = self._start(live.job, live.slot, task, text, *live.worker_descriptors)
        self._nursery.start_soon(child.watch)
        return child

    async def run(
        self,
        job: bytes,
        slot: SlotId,
        mode: Literal["genesis", "replay"],
        text: int | None,
        directory: Path,
        expected: type[T],
        segment: int = 0,
    ) -> T:
        """Run one worker to its end; gives its report. WorkerFailed. Cancelled, kills it.

        text  descriptor from which it gets the text; None for a stage that does not read it
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        report: T | None = None
        failure: WorkerFailed | None = None
        with ours:
            with theirs:
                task = self._task(job, slot, mode, directory, segment)
                child = self._start(job, slot, task, text, theirs.fileno(), None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.watch)
                try:
                    report = await self._report(trio.socket.from_stdlib_socket(ours), expected)
                except WorkerFailed as error:
                    # Raised below: the nursery would put it into a group.
                    failure = WorkerFailed(f"the {mode} worker of slot {slot}: {error}")
                    child.kill()
                await child.ended.wait()
        if failure is not None:
            raise failure
        if child.status != 0 or report is None:
            raise WorkerFailed(f"the {mode} worker of slot {slot} {child.epitaph()}")
        return report

    @staticmethod
    async def _report(reader: "trio.socket.SocketType", expected: type[T]) -> T | None:
        """The worker's report, read to the end of what it says. WorkerFailed."""
        report: T | None = None
        while raw := await _receive(reader):
            try:
                packet = decode_packet(raw)
            except ControlError as error:
                raise WorkerFailed(str(error)) from error
            if isinstance(packet, expected):
                report = packet
            elif isinstance(packet, Failure):
                raise WorkerFailed(packet.text)
            elif not isinstance(packet, Step):
                raise WorkerFailed(f"it sent a {type(packet).__name__}")
        return report

    def _task(
        self,
        job: bytes,
        slot: SlotId,
        mode: Literal["live", "genesis", "replay"],
        directory: Path,
        segment: int = 0,
    ) -> Task:
        return Task(
            mode,
            str(self._layout.spec(job)),
            str(directory),
            slot.lane,
            slot.stage,
            segment,
            self._niceness,
        )

    def _start(
        self,
        job: bytes,
        slot: SlotId,
        task: Task,
        text: int | None,
        end: int,
        memory: int | None,
    ) -> Child:
        argv = [*self._launcher, sys.executable, "-m", "tdmld.node.worker", "--socket", str(end)]
        descriptors = [end]
        for option, descriptor in (("--memory", memory), ("--text", text)):
            if descriptor is not None:
                argv += [option, str(descriptor)]
                descriptors.append(descriptor)
        argv += ["--task", msgspec.json.encode(task).decode()]
        name = f"worker-{job.hex()[:16]}-{slot}-{task.mode}.log"
        env = pinned_environment(minimal_environment())
        start = partial(Child, argv, descriptors, env, self._layout.logs / name)
        try:
            return start()
        except OSError as error:
            raise WorkerFailed(f"a worker cannot be started ({argv[0]}): {error}") from error


async def _receive(reader: "trio.socket.SocketType") -> bytes:
    try:
        return await reader.recv(PACKET_BYTES)
    except ConnectionError:
        return b""
