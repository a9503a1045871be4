"""Long-running processes that outlive the command which starts them: start, find again, stop.

A process is remembered by its id *and* the time at which it started: ids are used again, and a
stale file must never make us signal a stranger. Waiting is by pidfd where the system has it.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tdmld.files import read_file, write_file

_RECORD_BYTES_MAX = 4096
_POLL_SECONDS = 0.05
"""Only where there are no pidfds (macOS)."""

Ending = Literal["gone", "stopped", "killed"]


@dataclass(frozen=True)
class Process:
    """A process that runs or ran: its id and the mark of its start."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        return start_mark(self.pid) == self.started


def start_mark(pid: int) -> str | None:
    """What tells process `pid` from an earlier one of the same id; None when it does not run."""
    if sys.platform != "linux":
        return _start_mark_from_ps(pid)
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _start_mark_from_ps(pid: int) -> str | None:
    command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    state, _, mark = answer.stdout.strip().partition(" ")
    return None if not mark or state.startswith("Z") else mark.strip()


def start(
    command: Sequence[str], *, record: Path, output: Path, environment: Mapping[str, str]
) -> tuple[Process, "subprocess.Popen[bytes]"]:
    """Start `command` in a session of its own, its output appended to `output`.

    Writes `record`, so that another command finds it again. The caller that stays keeps the
    Popen and reaps it. OSError when the command cannot be started.
    """
    for path in (record, output):
        path.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as sink:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=dict(environment),
            start_new_session=True,
        )
    process = Process(child.pid, start_mark(child.pid) or "")
    write_file(record, json.dumps(asdict(process)).encode(), mode=0o600)
    return process, child


def recorded(record: Path) -> Process | None:
    """The process that `record` names, if it still runs. A damaged record names none."""
    try:
        found = json.loads(read_file(record, _RECORD_BYTES_MAX))
        process = Process(int(found["pid"]), str(found["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return process if process.alive else None


def terminate(process: Process) -> bool:
    """SIGTERM; False when the process is gone. Does not wait."""
    return _signal(process, signal.SIGTERM)


def stop(process: Process, grace_seconds: float, *, told: bool = False) -> Ending:
    """SIGTERM, and after the grace SIGKILL to its whole session; returns when it is gone.

    `told`: SIGTERM was sent before (a second one would ask for a stop at once).
    """
    if not told and not terminate(process):
        return "gone"
    if _wait(process, grace_seconds):
        return "stopped"
    kill(process, session=True)
    return "killed"


def kill(process: Process, *, session: bool = False) -> None:
    """SIGKILL to the process, with `session` to all of its session; returns when it is gone."""
    if session and process.alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    _signal(process, signal.SIGKILL)
    _wait(process, 10.0)


def _signal(process: Process, number: signal.Signals) -> bool:
    """Send a signal; False when the process is gone. With a pidfd it cannot meet a stranger."""
    descriptor = _pidfd(process)
    if descriptor is None:
        if not process.alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        return True
    with os.fdopen(descriptor, closefd=True):
        if not process.alive:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
    return True


def _wait(process: Process, seconds: float) -> bool:
    """Whether the process has gone within `seconds`."""
    descriptor = _pidfd(process)
    if descriptor is not None:
        with os.fdopen(descriptor, closefd=True):
            if not process.alive:
                return True
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(seconds * 1000))
    deadline = time.monotonic() + seconds
    while process.alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _pidfd(process: Process) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(process.pid)
    except OSError:  # gone, or a kernel without it
        return None
