"""Runs the yardsticks of `pipeline_rank.py` and measures them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline_job import CONFIG, MICRO_BATCH, MICRO_BATCHES, ROOT, SEQUENCE, TOKENS
from procstat import PeakMemory, Usage, cpu_seconds

LIB = Path(__file__).parent
TEXT = ROOT / "data" / "shakespeare.txt"


class YardstickFailed(Exception):
    """A process of a yardstick ended before its time."""


def settings_of(steps: int, threads: int, attention: str) -> dict[str, Any]:
    """What the processes of a yardstick are told."""
    return {
        "config": CONFIG,
        "text": str(TEXT),
        "sequence": SEQUENCE,
        "micro_batches": MICRO_BATCHES,
        "micro_batch": MICRO_BATCH,
        "steps": steps,
        "threads": threads,
        "attention": attention,
    }


class Ranks:
    """Processes of one yardstick, whose lines are read as they come."""

    def __init__(self, ranks: int, steps: int, threads: int, attention: str) -> None:
        settings = settings_of(steps, threads, attention)
        argv = [sys.executable, str(LIB / "pipeline_rank.py"), json.dumps(settings)]
        base = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        group = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.processes = [
            subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                text=True,
                env=base | (group | {"RANK": str(rank)} if ranks > 1 else {}),
            )
            for rank in range(ranks)
        ]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def lines(self, rank: int) -> Any:
        """The lines of one rank."""
        stdout = self.processes[rank].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith("{"):
                yield json.loads(line)

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def run_torch(
    steps: int, warm: int, *, ranks: int = 2, threads: int = 1, attention: str = "sdpa"
) -> dict[str, Any]:
    """Run `warm` + `steps` steps, measure the latter. YardstickFailed.

    Gives tokens_per_second, cpu_s_per_1k_tokens, busy (share of its time that each rank's main
    thread computes), peak_bytes (unique, of each rank), others_share (what everybody else took of
    the cores), loss.
    """
    running = Ranks(ranks, warm + steps, threads, attention)
    try:
        with PeakMemory(lambda: running.pids) as memory:
            drains = [
                threading.Thread(target=lambda r=rank: list(running.lines(r)), daemon=True)
                for rank in range(ranks - 1)
            ]
            for drain in drains:
                drain.start()
            times, loss, before, found, after = _follow(running, warm, warm + steps)
            for drain in drains:
                drain.join()
        if loss is None or any(process.wait() for process in running.processes):
            raise YardstickFailed("a rank of torch's pipeline ended before its time")
    finally:
        running.close()
    wall = times[-1] - times[warm - 1]
    return {
        "tokens_per_second": steps * TOKENS / wall,
        "cpu_s_per_1k_tokens": found["ranks"] / (steps * TOKENS / 1000),
        "busy": [(b - a) / found["wall"] for a, b in zip(before, after, strict=True)],
        "peak_bytes": [memory.peaks.get(pid, 0) for pid in running.pids],
        "others_share": found["others"] / found["wall"] / (os.cpu_count() or 1),
        "loss": loss,
    }


def _follow(running: Ranks, warm: int, until: int) -> tuple[Any, ...]:
    """Read the last rank to its end."""
    times: list[float] = []
    loss: float | None = None
    usage, found = Usage({"ranks": running.pids}), {}
    before: Sequence[float] = ()
    after: Sequence[float] = ()
    for line in running.lines(len(running.processes) - 1):
        if "loss" in line:
            loss = line["loss"]
            continue
        times.append(line["time"])
        if len(times) == warm:
            usage = Usage({"ranks": running.pids})
            before = [cpu_seconds(pid, pid) for pid in running.pids]
        elif len(times) == until:
            found = usage.end()
            after = [cpu_seconds(pid, pid) for pid in running.pids]
    if len(times) < until:
        raise YardstickFailed(f"torch's pipeline ended after {len(times)} of {until} steps")
    return times, loss, before, found, after


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
