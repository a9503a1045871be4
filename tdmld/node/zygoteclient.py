"""The daemon's end of the zygote: starts it when the first worker is wanted, has workers forked."""

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from tdmld.node.controlsocket import ControlSocket
from tdmld.node.errors import ControlError
from tdmld.node.supervise import Child, ChildLog, Process, minimal_environment
from tdmld.node.zygote import NOT_FORKED, Ended, Fork, Forked, Ready, decode, encode
from tdmld.train.numerics import pinned_environment

log = logging.getLogger(__name__)

START_SECONDS = 600.0
"""For the imports. While it lives it is as fast as a worker that is started alone would be."""
FORK_SECONDS = 30.0
"""For a fork; a zygote that hangs keeps nobody from starting a worker."""
STATUS_SECONDS = 2.0
"""For the zygote to say how a worker ended that has ended."""
BACKOFF_FIRST_SECONDS = 5.0
BACKOFF_LAST_SECONDS = 300.0


class ForkedWorker(Process):
    """A worker that the zygote forked and reaps. Owns the pidfd."""

    def __init__(self, pid: int, pidfd: int, output: ChildLog) -> None:
        super().__init__(pid, output)
        self._pidfd = pidfd
        self._told = trio.Event()
        self._status = -int(signal.SIGKILL)
        """Of a worker whose zygote is gone: the kernel killed it then."""

    def tell(self, status: int) -> None:
        """The zygote says how it ended."""
        self._status = status
        self._told.set()

    def orphaned(self) -> None:
        """The zygote is gone; nobody will say how it ended."""
        self._told.set()

    async def watch(self) -> None:
        """Wait for the end. Cancelled, kills the worker."""
        try:
            await trio.lowlevel.wait_readable(self._pidfd)
        finally:
            self.kill()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(STATUS_SECONDS):
                    await self._told.wait()
            os.close(self._pidfd)
            self.status = self._status
            self.ended.set()

    def kill(self) -> None:
        """Kill it now; the zygote kills its group before it reaps it."""
        if not self.ended.is_set():
            _kill(self._pidfd)

    def abandon(self) -> None:
        """In the place of `watch`: nobody wants it any more."""
        self.kill()
        os.close(self._pidfd)
        self.ended.set()


class _Wanted:
    __slots__ = ("answered", "output", "worker")

    def __init__(self, output: ChildLog) -> None:
        self.answered = trio.Event()
        self.output = output
        self.worker: ForkedWorker | None = None


class ZygoteClient:
    """Keeps one zygote running from the first `warm_up` on. Use it from the main thread's run."""

    def __init__(
        self,
        launcher: Sequence[str],
        log_path: Path,
        nursery: trio.Nursery,
        device: str = "cpu",
    ) -> None:
        """`device`: where workers compute, as in `numerics.pinned_environment`."""
        self._device = device
        self._argv = (*launcher, sys.executable, "-m", "tdmld.node.zygote", "--control")
        self._log_path = log_path
        self._nursery = nursery
        self._begun = False
        self._socket: ControlSocket | None = None
        """Of a zygote that is ready."""
        self._settled = trio.Event()
        """It is ready, or gone: no reason to wait."""
        self._ids = itertools.count(1)
        self._wanted: dict[int, _Wanted] = {}
        self._workers: dict[int, ForkedWorker] = {}
        self.pid: int | None = None

    def warm_up(self) -> None:
        """Start the zygote if it was not started yet."""
        if not self._begun:
            self._begun = True
            self._nursery.start_soon(self._run)

    async def fork(
        self, task: str, end: int, memory: int | None, text: int | None, path: Path
    ) -> ForkedWorker | None:
        """A worker for a task, its output in the log `path`; run its `watch`. None when there is no
        zygote that could fork it: start a process then. OSError (the log). Cancelled, no worker
        stays."""
        self.warm_up()
        with trio.move_on_after(START_SECONDS):
            await self._settled.wait()
        if self._socket is None:
            return None
        number = next(self._ids)
        with ChildLog(path) as output:
            wanted = self._wanted[number] = _Wanted(output)
            others = tuple(fd for fd in (memory, text) if fd is not None)
            request = Fork(number, task, memory is not None, text is not None)
            try:
                with trio.move_on_after(FORK_SECONDS):
                    await self._socket.send(encode(request), (end, output.fileno(), *others))
                    await wanted.answered.wait()
            except ControlError as error:
                log.warning("%s", error)
            except trio.Cancelled:
                if wanted.worker is not None:
                    wanted.worker.abandon()
                raise
            finally:
                del self._wanted[number]
        return wanted.worker

    async def _run(self) -> None:
        pause = BACKOFF_FIRST_SECONDS
        while True:
            began = trio.current_time()
            reason = await self._one_life()
            self._settled.set()
            if trio.current_time() - began > BACKOFF_LAST_SECONDS:
                pause = BACKOFF_FIRST_SECONDS
            log.warning(
                "the zygote %s; workers are started one by one, it is tried again in %.0f s",
                reason,
                pause,
            )
            await trio.sleep(pause)
            pause = min(pause * 2, BACKOFF_LAST_SECONDS)
            self._settled = trio.Event()

    async def _one_life(self) -> str:
        """Run one zygote to its end; gives the reason."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock = ControlSocket(ours)
        argv = (*self._argv, str(theirs.fileno()))
        env = pinned_environment(minimal_environment(), self._device)
        try:
            child = Child(argv, (theirs.fileno(),), env, self._log_path)
        except OSError as error:
            sock.close()
            return f"cannot be started: {error}"
        finally:
            theirs.close()
        self.pid = child.pid
        complaint = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.watch)
                try:
                    await self._serve(sock)
                except ControlError as error:
                    complaint = f"{error}; "
                child.kill()
                await child.ended.wait()
        finally:
            self._socket = None
            self.pid = None
            sock.close()
            for worker in self._workers.values():
                worker.orphaned()
            self._workers.clear()
            for wanted in self._wanted.values():
                wanted.answered.set()
        return complaint + child.epitaph()

    async def _serve(self, sock: ControlSocket) -> None:
        while True:
            raw, descriptors = await sock.receive()
            if not raw:
                return
            match decode(raw):
                case Ready():
                    self._socket = sock
                    self._settled.set()
                case Forked(number, pid):
                    self._forked(number, pid, descriptors)
                case Ended(pid, status):
                    worker = self._workers.pop(pid, None)
                    if worker is not None:
                        worker.tell(status)

    def _forked(self, number: int, pid: int, descriptors: tuple[int, ...]) -> None:
        if len(descriptors) != (pid != NOT_FORKED):
            raise ControlError("a worker and its descriptor come together")
        wanted = self._wanted.get(number)
        for pidfd in descriptors:
            if wanted is None:  # who asked was cancelled meanwhile
                _kill(pidfd)
                os.close(pidfd)
            else:
                wanted.worker = self._workers[pid] = ForkedWorker(pid, pidfd, wanted.output)
        if wanted is not None:
            wanted.answered.set()


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
