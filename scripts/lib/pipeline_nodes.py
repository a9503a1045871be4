"""A network of real nodes that runs jobs for a benchmark, and what its processes use.

Everything is as a person would have it: `tdmld run` for each node, a chain that they agree on,
carriers, workers, signatures, digests, logs on disk, synced snapshots. Times are those at which
the workers' digest lists came onto the disk, one for each segment.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio
from pipeline_job import ROOT, TOKENS
from procstat import (
    PeakMemory,
    Usage,
    command_line,
    cpu_seconds,
    descendants,
    maps_file,
    unique_bytes,
)

from tdmld import devnet
from tdmld.rpc.access import read_access
from tdmld.rpc.client import Client
from tdmld.rpc.types import FINAL_JOB_STATES, JobDetail, NodeStatus

NODES, VALIDATORS, SUBMITTER = 4, 4, 0
"""Three work (two slots and the standby), one submits; all validate."""
ASKS = range(1, NODES)
WINDOWS = {
    name: 2000 for name in ("accept_window", "activate_window", "segment_window", "standby_window")
}
"""Blocks: on a machine that is busy with something else the benchmark is slow, not broken."""
POLL_SECONDS = 0.02
LOOK_SECONDS = 3.0
PATIENCE_SECONDS = 300.0
ZYGOTE = "tdmld.node.zygote"
FRAME_MEMORY = "memfd:tdmld-frames"
"""What a live worker has mapped, and nobody else but its carrier."""


class NetworkFailed(Exception):
    """A job did not run as it should; the text says how."""


class BenchNetwork:
    """Nodes in a directory, started and stopped as a context."""

    def __init__(self, directory: Path, settings: Mapping[str, object] = {}) -> None:
        self.network = devnet.make_network(
            directory,
            nodes=NODES,
            validators=VALIDATORS,
            asks=ASKS,
            settings={"ask.standby_slots": 4, **settings},
            parameters=WINDOWS,
        )
        self._directory = directory

    def __enter__(self) -> Self:
        self.network.__enter__()
        try:
            self.network.start_all()
            self.network.wait_ready(timeout_seconds=180)
            trio.run(self._asked)
        except BaseException:
            self.network.down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.network.__exit__(kind, error, trace)

    @property
    def daemons(self) -> list[int]:
        """Process ids of the daemons."""
        found = [self.network.process(index) for index in range(NODES)]
        return [process.pid for process in found if process is not None]

    def carriers(self) -> list[int]:
        """Process ids of the carriers."""
        return [pid for pid in self._below() if "tdmld.node.carrier" in command_line(pid)]

    def workers(self) -> list[int]:
        """Process ids of the workers of live slots, in the order of the nodes."""
        carriers = set(self.carriers())
        return [
            pid for pid in self._below() if pid not in carriers and maps_file(pid, FRAME_MEMORY)
        ]

    def _below(self) -> list[int]:
        """Every process that a daemon or one of its own started."""
        return [pid for daemon in self.daemons for pid in descendants(daemon)]

    def submit(self, job_file: Path) -> str:
        """Submit a job; its id."""
        node = self.network
        command = [sys.executable, "-m", "tdmld", "job", "submit", str(job_file), "--json"]
        command += ["--data-dir", str(node.data_dir(SUBMITTER))]
        command += ["--password-file", str(node.password_file(SUBMITTER))]
        done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=False)
        if done.returncode != 0:
            raise NetworkFailed(f"the job could not be submitted (exit {done.returncode})")
        return str(json.loads(done.stdout)["job"])

    def fetch(self, job: str, out: Path) -> JobDetail:
        """Wait for a job's result and fetch it, as its submitter does; its last state."""
        self._until(job, lambda found: found.result is not None and len(found.result.holders) > 1)
        node = self.network
        command = [sys.executable, "-m", "tdmld", "job", "fetch", job, str(out), "--json"]
        command += ["--data-dir", str(node.data_dir(SUBMITTER))]
        command += ["--password-file", str(node.password_file(SUBMITTER))]
        done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=False)
        if done.returncode != 0:
            raise NetworkFailed(f"the model could not be fetched (exit {done.returncode})")
        return self._until(job, lambda found: found.summary.state in FINAL_JOB_STATES)

    def _until(self, job: str, holds: Callable[[JobDetail], bool]) -> JobDetail:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            detail = trio.run(self._call, SUBMITTER, "job_status", {"id": job}, JobDetail)
            if holds(detail):
                return detail
            if detail.summary.state in FINAL_JOB_STATES:
                raise NetworkFailed(f"the job is {detail.summary.state}: {detail.summary.reason}")
            time.sleep(0.5)
        raise NetworkFailed(f"job {job[:12]} is {detail.summary.state} and goes no further")

    def _alive(self, job: str) -> None:
        """NetworkFailed when a job came to an end that was not its own."""
        detail = trio.run(self._call, SUBMITTER, "job_status", {"id": job}, JobDetail)
        if detail.summary.state in FINAL_JOB_STATES:
            raise NetworkFailed(f"the job is {detail.summary.state}: {detail.summary.reason}")

    async def _call(self, index: int, method: str, arguments: dict[str, object], kind: Any) -> Any:
        async with Client(read_access(self.network.data_dir(index))) as client:
            return await client.call(method, arguments, kind)

    async def _asked(self) -> None:
        with trio.fail_after(180):
            for index in ASKS:
                while True:
                    status = await self._call(index, "node_status", {}, NodeStatus)
                    if status.ask is not None and status.ask.open:
                        break
                    await trio.sleep(0.5)

    # measuring -------------------------------------------------------------------------------

    def measure(
        self, job_file: Path, segments: int, segment_steps: int, warm: int
    ) -> dict[str, Any]:
        """Run the job of `segments` segments; measure those after the first `warm`.

        Gives tokens_per_second, step_seconds, cpu_s_per_1k_tokens (workers, carriers and daemons),
        *_cpu_share of the cores, busy (share of its time that each worker's compute thread
        computes), peak_bytes (unique, of each worker), zygote_bytes (unique, of the process that
        forks a node's workers, the largest), others_share, losses.
        """
        job = self.submit(job_file)
        lists = Lists(self._directory, job, lambda: self._alive(job))
        workers: list[int] = []
        with PeakMemory(lambda: workers) as memory:
            lists.wait(warm - 1)
            workers += self.workers()
            if len(workers) != lists.slots:
                raise NetworkFailed(f"{len(workers)} workers found, {lists.slots} slots")
            usage = Usage(
                {"workers": workers, "carriers": self.carriers(), "daemons": self.daemons}
            )
            before = [cpu_seconds(pid, pid) for pid in workers]
            lists.wait(segments - 1)
            found, after = usage.end(), [cpu_seconds(pid, pid) for pid in workers]
            times = lists.times()
            zygotes = [pid for pid in self._below() if ZYGOTE in command_line(pid)]
            zygote_bytes = max((unique_bytes(p) for p in zygotes if p not in workers), default=0)
        detail = self.fetch(job, job_file.parent / "model")
        ends = [max(slot[segment] for slot in times) for segment in range(segments)]
        steps = (segments - warm) * segment_steps
        wall = ends[-1] - ends[warm - 1]
        cores = os.cpu_count() or 1
        parts = ("workers", "carriers", "daemons")
        return {
            "tokens_per_second": steps * TOKENS / wall,
            "step_seconds": wall / steps,
            "segment_seconds": [b - a for a, b in zip(ends[warm - 1 :], ends[warm:], strict=False)],
            "cpu_s_per_1k_tokens": sum(found[p] for p in parts) / (steps * TOKENS / 1000),
            **{f"{p}_cpu_s_per_1k_tokens": found[p] / (steps * TOKENS / 1000) for p in parts},
            **{f"{p}_cpu_share": found[p] / found["wall"] / cores for p in parts},
            "busy": [(b - a) / found["wall"] for a, b in zip(before, after, strict=True)],
            "peak_bytes": [memory.peaks.get(pid, 0) for pid in workers],
            "zygote_bytes": zygote_bytes,
            "others_share": found["others"] / found["wall"] / cores,
            "losses": [loss.loss / 1e6 for loss in detail.losses],
        }

    def rest_cpu_share(self, seconds: float = 5.0) -> float:
        """Share of the cores that all processes of the network take between jobs."""
        usage = Usage({"all": [*self.daemons, *self._below()]})
        time.sleep(seconds)
        found = usage.end()
        return found["all"] / found["wall"] / (os.cpu_count() or 1)


class Lists:
    """The digest lists of a job's slots as they come onto the disk."""

    def __init__(self, directory: Path, job: str, look: Callable[[], None], slots: int = 2) -> None:
        """`look` is called now and then while waiting; what it raises ends the wait."""
        self.slots = slots
        self._look = look
        self._directory = directory
        self._job = job

    def _found(self) -> list[Path]:
        """The lists' directories, stage by stage."""
        where = f"node*/jobs/{self._job}/slot-*/list"
        return sorted(self._directory.glob(where), key=lambda path: path.parent.name)

    def wait(self, segment: int) -> None:
        """Return when every slot has finished `segment`. NetworkFailed when that takes too long."""
        began = looked = time.monotonic()
        while time.monotonic() - began < PATIENCE_SECONDS:
            found = self._found()
            if len(found) == self.slots and all((d / str(segment)).exists() for d in found):
                return
            if time.monotonic() - looked > LOOK_SECONDS:
                self._look()
                looked = time.monotonic()
            time.sleep(POLL_SECONDS)
        raise NetworkFailed(f"segment {segment} did not end in {PATIENCE_SECONDS:.0f} s")

    def times(self) -> list[list[float]]:
        """When each segment's list was written, slot by slot."""
        found = []
        for directory in self._found():
            written = {int(p.name): p for p in directory.iterdir() if p.name.isdecimal()}
            found.append([written[number].stat().st_mtime for number in sorted(written)])
        return found
