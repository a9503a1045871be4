"""Which process belongs to which node, for hooks that run inside a worker."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def processes() -> Iterator[tuple[int, int, list[bytes]]]:
    """(pid, parent, command line) of every process that can be seen."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                yield int(entry.name), parent, (entry / "cmdline").read_bytes().split(b"\0")


def daemon() -> int:
    """The daemon above this process, whatever stands between them."""
    known = {pid: (parent, words) for pid, parent, words in processes()}
    pid = os.getpid()
    while pid in known and b"run" not in known[pid][1]:
        pid = known[pid][0]
    return pid
