"""Child processes: started with few descriptors and variables, watched, ended with their group."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from tdmld.node.layout import tail

LOG_BYTES = 16 << 20
"""A log that is longer when a child starts is begun anew (the old one is kept as .old)."""
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


def minimal_environment() -> dict[str, str]:
    """Of our own environment, what a child may know."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


class Child:
    """A running child in its own session and process group.

    Start it from the main thread (see `parentdeath`); run `watch` in one task.
    """

    def __init__(
        self, argv: Sequence[str], descriptors: Sequence[int], env: Mapping[str, str], log: Path
    ) -> None:
        """Start `argv`. stdout and stderr go to `log`. OSError when it cannot be started."""
        self.ended = trio.Event()
        self.status: int | None = None
        """Exit status once it ended; negative: the signal."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_name(log.name + ".old"))
        with log.open("ab") as output:
            self._log_start = output.tell()
            # Started here and not in a thread: the parent-death signal belongs to the thread.
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                close_fds=True,
                pass_fds=tuple(descriptors),
                env=dict(env),
                start_new_session=True,
            )
        self.pid = self._process.pid

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
        words = tail(self.log, self._log_start)
        ending = "is running" if self.status is None else describe_status(self.status)
        return ending + (f"; it said: {words}" if words else "")


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = str(-status)
        return f"was killed by signal {name}"
    return f"ended with status {status}"
