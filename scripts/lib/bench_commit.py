"""What evidence costs: digests, roots, signatures and logs, as a share of a step's time.

Two machines (a carrier and a worker each, as a node has them; no daemon and no chain, so that
nothing else runs) train the model of 14.36 million parameters in two stages, 2,048 tokens a step,
fp32 wire; snapshots are written in every run. Pairs of runs in alternating order: one as it is, one
in which `commit_bare.py` has replaced the functions that make evidence. The share is (a - b) / b of
the mean step time; beside it the same of CPU seconds, which other work disturbs less.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio
from pipeline_job import ROOT, TOKENS, write_job
from procstat import Usage
from report import Report, say

from tdmld.node.errors import MachineError
from tdmld.node.machine import Machine, open_machine
from tdmld.node.machine_types import (
    LinkPeer,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotId,
    StepDone,
)
from tdmld.p2p import PeerInfo
from tdmld.train.jobfile import JobFile, load_job_file

LIB = Path(__file__).parent
JOB, CHAIN = bytes(32), bytes(32)
SEGMENT_STEPS, WARM_SEGMENTS = 4, 1
SECONDS_A_STEP = 60.0


class RunFailed(Exception):
    """A slot of a run failed."""


class Run:
    """One run: two machines that train together."""

    def __init__(self, job: JobFile, directory: Path, segments: int) -> None:
        self._job = job
        self._directory = directory
        self._segments = segments
        self._ends: list[dict[int, float]] = [{}, {}]
        self._steps: list[list[StepDone]] = [[], []]
        self._usage: Usage | None = None

    async def measure(self) -> dict[str, float]:
        """step_seconds, cpu_s_per_step, and of them what the workers say of hashing and waiting."""
        with trio.fail_after(SECONDS_A_STEP * self._segments * SEGMENT_STEPS):
            async with self._machines() as machines:
                async with trio.open_nursery() as nursery:
                    for stage in range(2):
                        nursery.start_soon(self._open, machines, stage)
                async with trio.open_nursery() as nursery:
                    for stage, machine in enumerate(machines):
                        nursery.start_soon(self._follow, machines, machine, stage)
                    for stage, machine in enumerate(machines):
                        await machine.grant(JOB, SlotId(0, stage), self._segments)
                assert self._usage is not None
                found = self._usage.end()
        steps = (self._segments - WARM_SEGMENTS) * SEGMENT_STEPS
        first, last = (
            max(ends[segment] for ends in self._ends)
            for segment in (WARM_SEGMENTS - 1, self._segments - 1)
        )
        told = [s for side in self._steps for s in side if s.step >= WARM_SEGMENTS * SEGMENT_STEPS]
        return {
            "step_seconds": (last - first) / steps,
            "cpu_s_per_step": found["slots"] / steps,
            "hashing_s": sum(step.timings["verifying"] for step in told) / len(told),
            "waiting_s": sum(step.timings["waiting"] for step in told) / len(told),
            "others_share": found["others"] / found["wall"] / (os.cpu_count() or 1),
        }

    @contextlib.asynccontextmanager
    async def _machines(self) -> AsyncIterator[list[Machine]]:
        async with contextlib.AsyncExitStack() as stack:
            machines = [
                await stack.enter_async_context(
                    open_machine(self._directory / str(stage), chain_id=CHAIN)
                )
                for stage in range(2)
            ]
            everybody = frozenset(machine.session for machine in machines)
            peers = [PeerInfo(machine.session, machine.addresses) for machine in machines]
            for machine in machines:
                await machine.import_text(self._job.text_path)
                await machine.set_peers([p for p in peers if p.peer_id != machine.session])
                await machine.set_members(JOB, everybody)
            yield machines

    async def _open(self, machines: list[Machine], stage: int) -> None:
        other = machines[1 - stage].session
        (link,) = self._job.spec.links(0, stage)
        await machines[stage].open_slot(
            SlotAssignment(
                job=JOB,
                spec=self._job.raw,
                slot=SlotId(0, stage),
                epoch=0,
                incarnation=0,
                links=(LinkPeer(link, other),),
                members=frozenset(machine.session for machine in machines),
            )
        )

    async def _follow(self, machines: list[Machine], machine: Machine, stage: int) -> None:
        async for event in machine.events:
            match event:
                case StepDone():
                    self._steps[stage].append(event)
                case SegmentDone(record=record):
                    self._ends[stage][record.segment] = self._written(stage, record.segment)
                    if all(WARM_SEGMENTS - 1 in ends for ends in self._ends) and not self._usage:
                        self._usage = Usage({"slots": self._processes(machines)})
                    if record.segment == self._segments - 1:
                        return
                case SlotFailed(reason=reason):
                    raise RunFailed(reason)

    def _written(self, stage: int, segment: int) -> float:
        slot = f"jobs/{JOB.hex()}/slot-0.{stage}/list/{segment}"
        return (self._directory / str(stage) / slot).stat().st_mtime

    @staticmethod
    def _processes(machines: list[Machine]) -> list[int]:
        found = []
        for stage, machine in enumerate(machines):
            found += [machine.worker_pid(JOB, SlotId(0, stage)), machine.carrier_pid]
        return [pid for pid in found if pid is not None]


@contextlib.contextmanager
def interpreter(path: Path) -> Any:
    """Processes of the product are started with `path` instead of this interpreter."""
    before, sys.executable = sys.executable, str(path)
    try:
        yield
    finally:
        sys.executable = before


def bare_interpreter(directory: Path) -> Path:
    """A program that looks like Python and runs modules without evidence."""
    path = directory / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{LIB / "commit_bare.py"}" "$@"\n')
    path.chmod(0o755)
    return path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench commit", description=__doc__)
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="counted steps of a run")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.steps < SEGMENT_STEPS or options.steps % SEGMENT_STEPS:
        parser.error(f"--steps is a multiple of {SEGMENT_STEPS}, --pairs at least 1")
    report = Report("scripts/bench commit")
    segments = WARM_SEGMENTS + options.steps // SEGMENT_STEPS
    full: list[dict[str, float]] = []
    bare: list[dict[str, float]] = []
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="tdmld-bench-", ignore_cleanup_errors=True) as at:
        directory = Path(at)
        steps = segments * SEGMENT_STEPS
        path = write_job(directory, steps=steps, segment_steps=SEGMENT_STEPS, privacy="open")
        job, ordinary, without = (
            load_job_file(path),
            Path(sys.executable),
            bare_interpreter(directory),
        )
        for number in range(options.pairs):
            turns = [(full, ordinary), (bare, without)]
            for where, program in turns if number % 2 == 0 else reversed(turns):
                place = directory / f"{number}-{program is without}"
                with interpreter(program):
                    problem: Exception | None = None
                    try:
                        where.append(trio.run(Run(job, place, segments).measure))
                    except* (MachineError, RunFailed, trio.TooSlowError) as group:
                        problem = group.exceptions[0]
                    if problem is not None:
                        say(f"the benchmark failed: {problem or 'it took too long'}")
                        return 1
            say(
                f"pair {number + 1}: {full[-1]['step_seconds']:.4f} s a step, without evidence "
                f"{bare[-1]['step_seconds']:.4f} s; CPU {full[-1]['cpu_s_per_step']:.3f} and "
                f"{bare[-1]['cpu_s_per_step']:.3f} s; others took {full[-1]['others_share']:.1%} "
                f"and {bare[-1]['others_share']:.1%} of the cores"
            )
    shares = _shares(full, bare, "step_seconds")
    in_cpu = _shares(full, bare, "cpu_s_per_step")
    report.document |= {
        "repeats": len(full),
        "tokens_per_step": TOKENS,
        **_spread("share_of_step", shares),
        **_spread("share_of_cpu", in_cpu),
        "step_seconds": _median(full, "step_seconds"),
        "step_seconds_without": _median(bare, "step_seconds"),
        "cpu_s_per_step": _median(full, "cpu_s_per_step"),
        "cpu_s_per_step_without": _median(bare, "cpu_s_per_step"),
        "hashing_share_of_step": _median(full, "hashing_s") / _median(full, "step_seconds"),
        "waiting_share_of_step": _median(full, "waiting_s") / _median(full, "step_seconds"),
        "others_cpu_share": _median(full, "others_share"),
        "others_cpu_share_without": _median(bare, "others_share"),
    }
    report.finish(options.json)
    return 0


def _shares(a: list[dict[str, float]], b: list[dict[str, float]], key: str) -> list[float]:
    return [(x[key] - y[key]) / y[key] for x, y in zip(a, b, strict=True)]


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
