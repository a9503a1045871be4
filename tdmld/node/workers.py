"""Starting worker processes: live ones for the carrier, and those that serve one task."""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import trio

from tdmld.node.channel import (
    PACKET_BYTES,
    Failure,
    FrameMemory,
    Genesis,
    Segment,
    Step,
    decode_packet,
    link_memory,
)
from tdmld.node.errors import ContentUnavailable, ControlError, FailureCause, WorkerFailed
from tdmld.node.layout import Layout, state
from tdmld.node.machine_types import AuditTask, GenesisRoots, SlotAssignment, SlotId
from tdmld.node.supervise import Child, Process, minimal_environment
from tdmld.node.worker_task import Task, encode_task
from tdmld.node.zygoteclient import ZygoteClient
from tdmld.train.numerics import pinned_environment
from tdmld.train.spec import Spec
from tdmld.train.specfields import GivenInit
from tdmld.train.statefile import PARTS, part_file

T = TypeVar("T", Genesis, Segment)


class LiveSlot:
    """A slot that this machine works on. Its descriptors stay here, so that neither carrier nor
    worker sees an end of file when the other one dies: the supervisor decides what happens."""

    child: Process

    def __init__(self, assignment: SlotAssignment, spec: Spec) -> None:
        self.job = assignment.job
        self.slot = assignment.slot
        self.under = (assignment.epoch, assignment.incarnation)
        self.spec = spec
        self.roots: GenesisRoots | None = None
        self.ready = trio.Event()
        """Set when `roots` or `failure` is known."""
        self.failure: WorkerFailed | None = None
        self.gone = trio.Event()
        """Its worker has ended and its links are closed."""
        self.closing = False
        self.announced = False
        """`open_slot` has returned: failures are events from now on."""
        self.granted = assignment.start
        self._memory = FrameMemory.create(link_memory(spec, *self.slot))
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
    """Starts workers with the pinned environment, the launcher's prefix and nothing else: forks of
    the zygote, or processes of their own while there is none."""

    def __init__(
        self,
        layout: Layout,
        launcher: Sequence[str],
        niceness: int,
        memory: int,
        nursery: trio.Nursery,
        device: str = "cpu",
    ) -> None:
        """`memory`: bytes of private memory that a worker may have; 0: as many as it can get.
        `device`: where workers compute, "cpu" or "cuda:<number>"."""
        self._layout = layout
        self._launcher = tuple(launcher)
        self._niceness = niceness
        self._memory = memory
        self._nursery = nursery
        self._device = device
        self._zygote = ZygoteClient(launcher, layout.logs / "zygote.log", nursery, device)

    def warm_up(self) -> None:
        """Be ready to start workers quickly."""
        self._zygote.warm_up()

    @property
    def zygote_pid(self) -> int | None:
        """Process id of the zygote while there is one, for status."""
        return self._zygote.pid

    async def start_live(
        self, live: LiveSlot, assignment: SlotAssignment, text: int | None, directory: Path
    ) -> Process:
        """Start the worker of a slot. WorkerFailed when it cannot be started."""
        task = Task(
            "live",
            str(self._layout.spec(live.job)),
            str(directory),
            live.slot.lane,
            live.slot.stage,
            boundary=assignment.start,
            draw=draws(assignment, directory),
            given=self._given(live.spec, live.slot),
            niceness=self._niceness,
            memory=self._memory,
        )
        child = await self._start(live.job, live.slot, task, text, *live.worker_descriptors)
        self._nursery.start_soon(child.watch)
        return child

    async def draw(
        self, job: bytes, slot: SlotId, spec: Spec, text: int | None, directory: Path
    ) -> Genesis:
        """Make a slot's first state in `directory`; see `run`."""
        task = Task(
            "genesis",
            str(self._layout.spec(job)),
            str(directory),
            slot.lane,
            slot.stage,
            draw=True,
            given=self._given(spec, slot),
            niceness=self._niceness,
            memory=self._memory,
        )
        return await self.run(job, slot, task, text, Genesis)

    async def replay(self, audit: AuditTask, text: int | None, directory: Path) -> None:
        """Replay an audited segment in `directory`, which gets its list; see `run`."""
        task = Task(
            "replay",
            str(self._layout.spec(audit.job)),
            str(directory),
            audit.slot.lane,
            audit.slot.stage,
            boundary=audit.segment,
            included=audit.included,
            niceness=self._niceness,
            memory=self._memory,
        )
        await self.run(audit.job, audit.slot, task, text, Segment)

    async def run(
        self, job: bytes, slot: SlotId, task: Task, text: int | None, expected: type[T]
    ) -> T:
        """Run one worker to its end; gives its report. WorkerFailed. Cancelled, kills it.

        text  descriptor from which it gets the text; None for a stage that does not read it
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        report: T | None = None
        failure: WorkerFailed | None = None
        what = f"the {task.mode} worker of slot {slot}"
        with ours:
            with theirs:
                child = await self._start(job, slot, task, text, theirs.fileno(), None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.watch)
                try:
                    report = await self._report(trio.socket.from_stdlib_socket(ours), expected)
                except WorkerFailed as error:
                    # Raised below: the nursery would put it into a group.
                    failure = WorkerFailed(f"{what}: {error}", error.cause)
                    child.kill()
                await child.ended.wait()
        if failure is not None:
            raise failure
        if child.status != 0 or report is None:
            raise WorkerFailed(f"{what} {child.epitaph()}", child.cause)
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
                raise WorkerFailed(packet.text, cause_named(packet.cause))
            elif not isinstance(packet, Step):
                raise WorkerFailed(f"it sent a {type(packet).__name__}")
        return report

    def _given(self, spec: Spec, slot: SlotId) -> tuple[str, ...]:
        """Paths of the weights that a slot begins with; none where the spec draws them."""
        return tuple(str(self._layout.given(root)) for _, root in given_parts(spec, slot))

    async def _start(
        self,
        job: bytes,
        slot: SlotId,
        task: Task,
        text: int | None,
        end: int,
        memory: int | None,
    ) -> Process:
        path = self._layout.logs / f"worker-{job.hex()[:16]}-{slot}-{task.mode}.log"
        words = encode_task(task)
        argv = [*self._launcher, sys.executable, "-m", "tdmld.node.worker", "--socket", str(end)]
        descriptors = [end]
        for option, descriptor in (("--memory", memory), ("--text", text)):
            if descriptor is not None:
                argv += [option, str(descriptor)]
                descriptors.append(descriptor)
        argv += ["--task", words]
        try:
            forked = await self._zygote.fork(words, end, memory, text, path)
            if forked is not None:
                return forked
            env = pinned_environment(minimal_environment(), self._device)
            return Child(argv, descriptors, env, path)
        except OSError as error:
            raise WorkerFailed(f"a worker cannot be started ({argv[0]}): {error}") from error


def given_parts(spec: Spec, slot: SlotId) -> list[tuple[str, bytes]]:
    """(part, root) of the files that a slot begins with when its weights are given."""
    init = spec.init
    if not isinstance(init, GivenInit):
        return []
    parts = [("shared", bytes.fromhex(init.roots[slot.stage]))]
    if init.lane_roots:
        parts.append(("lane", bytes.fromhex(init.lane_roots[slot.index(spec.stages)])))
    return parts


def given_roots(spec: Spec) -> tuple[bytes, ...]:
    """Roots of all the files that a job with given weights begins with."""
    init = spec.init
    if not isinstance(init, GivenInit):
        return ()
    return tuple(bytes.fromhex(root) for root in dict.fromkeys((*init.roots, *init.lane_roots)))


def shared_roots(spec: Spec) -> tuple[bytes, ...]:
    """Those of them that other members may have: of a split job not what slot 0 begins with."""
    own = spec.privacy == "split"
    kept = {root for _, root in given_parts(spec, SlotId(0, 0))} if own else set()
    return tuple(root for root in given_roots(spec) if root not in kept)


def draws(assignment: SlotAssignment, directory: Path) -> bool:
    """Whether a slot begins with a state that its worker makes; else it loads the one that is here.
    ContentUnavailable when it can do neither."""
    found = state(directory, assignment.start)
    here = all((found / part_file(part)).is_file() for part in PARTS)
    if assignment.start > 0 and not here:
        raise ContentUnavailable(
            f"no state of slot {assignment.slot} at boundary {assignment.start} is here: use"
            " fetch_slot_state first"
        )
    return not here or (assignment.start == 0 and assignment.roots is None)


def cause_named(word: str) -> FailureCause:
    """The cause that another process of ours named; DIED for none."""
    return next((cause for cause in FailureCause if cause.value == word), FailureCause.DIED)


async def _receive(reader: "trio.socket.SocketType") -> bytes:
    try:
        return await reader.recv(PACKET_BYTES)
    except ConnectionError:
        return b""
