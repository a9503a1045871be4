"""Child processes: started with few descriptors and variables, watched, ended with their group."""

import contextlib
import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from tdmld.node.errors import FailureCause
from tdmld.node.layout import tail
from tdmld.node.worker_task import CAUSES

LOG_BYTES = 16 << 20
"""A log that is longer when a child starts is begun anew (the old one is kept as .old)."""
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
_VMSTAT_BYTES = 64 << 10


def minimal_environment() -> dict[str, str]:
    """Of our own environment, what a child may know."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


class ChildLog:
    """The file that takes what one child says; closes its descriptor with the block."""

    def __init__(self, path: Path) -> None:
        """OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name(path.name + ".old"))
        self.path = path
        self._file = path.open("ab")
        self._start = self._file.tell()

    def fileno(self) -> int:
        """The descriptor to write to, while the block is open."""
        return self._file.fileno()

    def words(self) -> str:
        """The last things that this child said."""
        return tail(self.path, self._start)

    def __enter__(self) -> "ChildLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Process(ABC):
    """A running process in its own session and group: what is common to those that were started
    here (`Child`) and those that were forked for us (`tdmld.node.zygoteclient`)."""

    def __init__(self, pid: int, log: ChildLog) -> None:
        self.pid = pid
        self.ended = trio.Event()
        self.status: int | None = None
        """Exit status once it ended; negative: the signal."""
        self.log = log
        self._memory_kills = memory_kills()

    @abstractmethod
    async def watch(self) -> None:
        """Wait for the end. Cancelled, kills the process. Run it in one task."""

    @abstractmethod
    def kill(self) -> None:
        """Kill it now with whatever it started; nothing when it has ended."""

    async def stop(self, grace_seconds: float) -> None:
        """Wait `grace_seconds` for the end, then kill it; needs a running `watch`."""
        with trio.move_on_after(grace_seconds):
            await self.ended.wait()
        if not self.ended.is_set():
            self.kill()
            with trio.CancelScope(shield=True):
                await self.ended.wait()

    def epitaph(self) -> str:
        """How it ended, with its last words."""
        words = self.log.words()
        ending = "is running" if self.status is None else describe_status(self.status)
        if self.cause is FailureCause.OUT_OF_MEMORY and self.status == -signal.SIGKILL:
            ending += " when the machine was out of memory"
        return ending + (f"; it said: {words}" if words else "")

    @property
    def cause(self) -> FailureCause:
        """Why it ended, as far as its status tells and what the kernel did meanwhile."""
        if self.status == -signal.SIGKILL and memory_kills() > self._memory_kills:
            return FailureCause.OUT_OF_MEMORY
        if self.status is not None and self.status < 0:
            return FailureCause.KILLED
        return CAUSES.get(self.status or 0, FailureCause.DIED)


class Child(Process):
    """A process that this one started. Start it from the main thread (see `parentdeath`)."""

    def __init__(
        self, argv: Sequence[str], descriptors: Sequence[int], env: Mapping[str, str], log: Path
    ) -> None:
        """Start `argv`. stdout and stderr go to `log`. OSError when it cannot be started."""
        with ChildLog(log) as output:
            # Started here and not in a thread: the parent-death signal belongs to the thread.
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output.fileno(),
                stderr=output.fileno(),
                close_fds=True,
                pass_fds=tuple(descriptors),
                env=dict(env),
                start_new_session=True,
            )
        super().__init__(self._process.pid, output)

    async def watch(self) -> None:
        """Wait for the end. Cancelled, kills the child."""
        pidfd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
            # Not reaped yet, so the number still names this child's group and nobody else's.
            self.kill()
            self.status = self._process.wait()
            self.ended.set()

    def kill(self) -> None:
        """Kill the whole group now; nothing when it has ended."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def memory_kills() -> int:
    """How often the kernel has killed a process for want of memory since it started; 0 where it
    does not say."""
    try:
        with open("/proc/vmstat", "rb") as file:
            words = file.read(_VMSTAT_BYTES).split()
        return int(words[words.index(b"oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = str(-status)
        return f"was killed by signal {name}"
    return f"ended with status {status}"
