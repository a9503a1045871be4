"""A job that loses a worker, a carrier, a daemon and a whole node ends with the reference's bits.

Real daemons, one network, one small job; what dies is killed with -9 while the job runs. All four
happen to the same job, one after the other: each kill waits until the slot it hits goes on after
the one before.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tdmld import devnet
from tdmld.node.provenance import check
from tdmld.rpc.access import read_access
from tdmld.rpc.client import Client
from tdmld.rpc.types import FINAL_JOB_STATES, JobDetail, NodeStatus

JOBS = Path(__file__).resolve().parents[1] / "jobs"
NODES, SUBMITTER = 6, 0
ASKS = range(1, NODES)
WINDOWS = {
    "interval_ms": 200,
    "accept_window": 50,
    "activate_window": 400,
    "segment_window": 200,
    "audit_window": 300,
    "standby_window": 600,
}
"""Blocks of a fifth of a second: a node that is gone is accused by its neighbour long before the
window is over."""
STEPS = 40
PATIENCE_SECONDS = 500.0

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # the demo's tests kill all but the daemon


class Run:
    """One network and one job on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.network = devnet.make_network(
            directory / "network",
            nodes=NODES,
            validators=1,
            asks=ASKS,
            settings={"ask.standby_slots": 4},
            parameters=WINDOWS,
        )
        self.deadline = time.monotonic() + PATIENCE_SECONDS

    def job_file(self) -> Path:
        """The small job, long enough to be hit four times, without audits."""
        toml = (JOBS / "tiny.toml").read_text()
        for old, new in (
            ("../../data/shakespeare.txt", str(JOBS.parents[1] / "data" / "shakespeare.txt")),
            ("config.json", str(JOBS / "config.json")),
            ("steps = 16", f"steps = {STEPS}"),
            ('audit_rate = "0.5"', 'audit_rate = "0"'),
        ):
            assert old in toml
            toml = toml.replace(old, new)
        path = self.directory / "job.toml"
        path.write_text(toml)
        return path

    def tdmld(self, *arguments: str | Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "tdmld", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    @property
    def submitter(self) -> tuple[str | Path, ...]:
        return (
            *("--data-dir", self.network.data_dir(SUBMITTER)),
            *("--password-file", self.network.password_file(SUBMITTER)),
        )

    def ask(self, method: str, parameters: dict[str, str], kind: type[Any], index: int = 0) -> Any:
        assert time.monotonic() < self.deadline, "it takes too long"

        async def call() -> Any:
            async with Client(read_access(self.network.data_dir(index))) as client:
                return await client.call(method, parameters, kind)

        return trio.run(call)

    def look(self, job: str) -> JobDetail:
        found: JobDetail = self.ask("job_status", {"id": job}, JobDetail)
        return found

    def until(self, job: str, holds: Callable[[JobDetail], bool]) -> JobDetail:
        """Look at the job until something holds of it."""
        while True:
            detail = self.look(job)
            if holds(detail):
                return detail
            assert detail.summary.state not in FINAL_JOB_STATES, detail.summary
            time.sleep(0.2)

    def wait_for_asks(self) -> None:
        for index in ASKS:
            while self.ask("node_status", {}, NodeStatus, index).ask is None:
                time.sleep(0.2)

    def index(self, node: str) -> int:
        return [one.node for one in self.network.nodes].index(node)

    def kill(self, node: str, kind: str) -> None:
        """kill -9 of a node's carrier, or of its workers."""
        daemon = self.network.process(self.index(node))
        assert daemon is not None
        victims = list(processes(daemon.pid, kind))
        assert victims, f"no {kind} to kill"
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes(daemon: int, kind: str) -> Iterator[int]:
    """A daemon's carrier, or its workers; these are forked by a process of its own."""
    parents, words = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
                words[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
    children = {pid for pid, parent in parents.items() if parent == daemon}
    if kind == "carrier":
        yield from (pid for pid in children if b"tdmld.node.carrier" in words[pid])
        return
    zygotes = {pid for pid in children if b"tdmld.node.zygote" in words[pid]}
    yield from (pid for pid, parent in parents.items() if parent in zygotes)
    yield from (pid for pid in children if b"tdmld.node.worker" in words[pid])


def past(stage: int, segments: int) -> Callable[[JobDetail], bool]:
    """A stage has committed so many segments, and all others go on, too."""
    return lambda detail: (
        detail.summary.state == "active"
        and all(slot.segment >= segments + (slot.stage == stage) for slot in detail.slots)
    )


def test_whatever_dies_the_job_ends_with_the_reference_s_bits(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.network as network:
        network.start_all()
        network.wait_ready(timeout_seconds=120)
        run.wait_for_asks()
        job = str(run.tdmld("job", "submit", run.job_file(), *run.submitter)["job"])

        detail = run.until(job, past(0, 2))
        run.kill(detail.slots[0].worker, "worker")

        detail = run.until(job, past(1, detail.slots[0].segment + 2))
        run.kill(detail.slots[1].worker, "carrier")

        detail = run.until(job, past(0, detail.slots[0].segment + 2))
        assert detail.former == (), "a worker or carrier that dies costs nobody a place"
        restarted = run.index(detail.slots[0].worker)
        network.kill(restarted)
        network.start(restarted)

        detail = run.until(job, past(1, detail.slots[0].segment + 2))
        gone = detail.slots[1].worker
        network.kill(run.index(gone))

        detail = run.until(job, lambda seen: seen.result is not None)
        lost = {former.node for former in detail.former}
        # On a machine that is slow to start processes the restarted node may have lost its own.
        assert {gone} <= lost <= {gone, network.nodes[restarted].node}
        assert detail.slots[1].worker != gone
        model = tmp_path / "model"
        run.tdmld("job", "fetch", job, model, *run.submitter)
    made = run.tdmld("reference", run.job_file(), "--out", tmp_path / "reference")
    for name in ("model.safetensors", "config.json"):
        assert (model / name).read_bytes() == (Path(made["export_dir"]) / name).read_bytes()
    record = check((model / "provenance.json").read_bytes())
    assert same_roots(record, json.loads(Path(made["roots"]).read_bytes()))
    slots: Any = record["slots"]
    assert gone in [former["worker"] for former in slots[1]["former"]]


def same_roots(record: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Whether every root that the chain has of every segment is the reference's."""
    boundaries = reference["boundaries"]
    return all(
        boundaries[segment["segment"] + 1][f"{slot['lane']}.{slot['stage']}"]
        == [segment["end_shared"], segment["end_lane"]]
        for slot in record["slots"]
        for segment in slot["segments"]
    ) and all(len(slot["segments"]) == len(boundaries) - 1 for slot in record["slots"])
