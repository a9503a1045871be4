"""What processes use, read from /proc: CPU seconds, memory that is theirs alone, descendants."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
_PRIVATE = re.compile(rb"^Private_(?:Clean|Dirty): +(\d+) kB", re.MULTILINE)


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    """User and system seconds of a process, or of one thread of it; 0 when it is gone."""
    where = f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat"
    try:
        fields = Path(where).read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def machine_seconds() -> float:
    """CPU seconds that everybody on this machine has used since it started."""
    with Path("/proc/stat").open() as file:
        values = [int(word) for word in file.readline().split()[1:9]]
    return (sum(values) - values[3] - values[4]) / TICKS


def unique_bytes(pid: int) -> int:
    """The unique set size: memory that would be free if the process ended; 0 when it is gone."""
    try:
        found = _PRIVATE.findall(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
    except OSError:
        return 0
    return 1024 * sum(map(int, found))


def command_line(pid: int) -> list[str]:
    """The words of a process's command line; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, children before theirs."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            below.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        children = below.get(todo.pop(0), [])
        found += children
        todo += children
    return found


def maps_file(pid: int, name: str) -> bool:
    """Whether a process has mapped a file of this name."""
    try:
        return name.encode() in Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return False


class PeakMemory:
    """Samples the unique set size of processes in a thread of its own: the greatest of each."""

    def __init__(self, pids: Callable[[], Iterable[int]], seconds: float = 0.25) -> None:
        """`pids` is asked before each sample, every `seconds`."""
        self.peaks: dict[int, int] = {}
        self._pids = pids
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            for pid in self._pids():
                self.peaks[pid] = max(self.peaks.get(pid, 0), unique_bytes(pid))

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Usage:
    """CPU seconds of groups of processes over a window: made at its beginning, `end` at its end."""

    def __init__(self, groups: dict[str, list[int]]) -> None:
        self._groups = groups
        self._began = self._now()
        self._machine = machine_seconds()
        self._time = time.time()

    def _now(self) -> dict[str, list[float]]:
        return {name: [cpu_seconds(p) for p in pids] for name, pids in self._groups.items()}

    def end(self) -> dict[str, float]:
        """Seconds by group, `others` (everybody else on the machine) and `wall`."""
        wall, machine, now = (
            time.time() - self._time,
            machine_seconds() - self._machine,
            self._now(),
        )
        found = {
            name: sum(after - before for before, after in zip(self._began[name], ends, strict=True))
            for name, ends in now.items()
        }
        return found | {"others": machine - sum(found.values()), "wall": wall}
