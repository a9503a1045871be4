"""Pipeline training on real nodes against torch.distributed.pipelining, hivemind and one process.

The model of 14.36 million parameters, 8 micro-batches of 2 x 128 tokens, fp32 wire, two slots of
one thread each. Ours: four nodes on this machine (`tdmld run`, each with a carrier; all four
validate, three work), everything on: signatures, digests, logs, synced snapshots, commitments.
Audits are off and the standby copies no state while it is measured (`--standby`: as often as
usual), since both are other machines' work that would take these two cores. Theirs: Schedule1F1B
over gloo, two ranks of one thread, as torch has it. Pairs run one after the other in alternating
order; each run is one job, or one group of ranks, of which the first steps are not counted.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline_job import MICRO_BATCHES, ROOT, TOKENS, write_job
from pipeline_nodes import BenchNetwork, NetworkFailed
from pipeline_torch import YardstickFailed, run_torch, settings_of
from procstat import descendants
from report import Report, say

from tdmld.errors import UserError

LIB = Path(__file__).parent
SEGMENT_STEPS = 4
WARM_SEGMENTS, WARM_STEPS = 2, 3
SINGLE_STEPS, HIVEMIND_STEPS, HIVEMIND_WARM = 12, 8, 2
DAEMONS_SHARE = 0.08
"""At most so much of the daemons' share is taken out of `ratio_engine`."""
HIVEMIND_VENV = ROOT / "build" / "hivemind"
HIVEMIND_SECONDS = 400.0
INSTALL_SECONDS = 900.0


class Runs:
    """What was measured, pair by pair."""

    def __init__(self) -> None:
        self.ours: list[dict[str, Any]] = []
        self.torch: list[dict[str, Any]] = []

    def pairs(self, options: argparse.Namespace) -> None:
        """Run them."""
        segments = WARM_SEGMENTS + options.steps // SEGMENT_STEPS
        standby = {"unsettled": 8, "state_every": 2} if options.standby else {}
        with tempfile.TemporaryDirectory(prefix="tdmld-bench-", ignore_cleanup_errors=True) as at:
            directory = Path(at)
            with BenchNetwork(directory / "network") as network:
                self.rest = network.rest_cpu_share()
                for number in range(options.pairs):
                    job = write_job(
                        directory / f"job{number}",
                        steps=segments * SEGMENT_STEPS,
                        segment_steps=SEGMENT_STEPS,
                        seed=number,
                        **standby,
                    )
                    turns = [
                        lambda job=job: self.ours.append(
                            network.measure(job, segments, SEGMENT_STEPS, WARM_SEGMENTS)
                        ),
                        lambda: self.torch.append(
                            run_torch(options.steps, WARM_STEPS, attention=options.attention)
                        ),
                    ]
                    for turn in turns if number % 2 == 0 else reversed(turns):
                        turn()
                    a, b = self.ours[-1], self.torch[-1]
                    say(
                        f"pair {number + 1}: ours {a['tokens_per_second']:.0f} tokens/s, torch "
                        f"{b['tokens_per_second']:.0f}, others took {a['others_share']:.1%} and "
                        f"{b['others_share']:.1%} of the cores"
                    )

    def document(self) -> dict[str, Any]:
        """The keys."""
        ours, torch = self.ours, self.torch
        ratios = _ratios(ours, torch, "tokens_per_second")
        daemons = _median(ours, "daemons_cpu_share")
        engine = [
            ratio / (1 - min(run["daemons_cpu_share"], DAEMONS_SHARE))
            for ratio, run in zip(ratios, ours, strict=True)
        ]
        memory = [
            max(a["peak_bytes"]) / max(b["peak_bytes"]) for a, b in zip(ours, torch, strict=True)
        ]
        return {
            "repeats": len(ours),
            "tokens_per_second": _median(ours, "tokens_per_second"),
            "torch_1f1b_tokens_per_second": _median(torch, "tokens_per_second"),
            **_spread("ratio_to_torch_1f1b", ratios),
            "daemons_cpu_share": daemons,
            **_spread("ratio_engine", engine),
            "cpu_s_per_1k_tokens": _median(ours, "cpu_s_per_1k_tokens"),
            "torch_cpu_s_per_1k_tokens": _median(torch, "cpu_s_per_1k_tokens"),
            **{
                f"{part}_cpu_s_per_1k_tokens": _median(ours, f"{part}_cpu_s_per_1k_tokens")
                for part in ("workers", "carriers", "daemons")
            },
            "busy_share": _medians(ours, "busy"),
            "torch_busy_share": _medians(torch, "busy"),
            **_spread("peak_memory_ratio", memory),
            "peak_memory_mb": [round(b / 1e6, 1) for b in _medians(ours, "peak_bytes")],
            "torch_peak_memory_mb": [round(b / 1e6, 1) for b in _medians(torch, "peak_bytes")],
            "zygotes_mb": round(_median(ours, "zygote_bytes") / 1e6, 1),
            "network_at_rest_cpu_share": self.rest,
            "others_cpu_share": _median(ours, "others_share"),
            "others_cpu_share_torch": _median(torch, "others_share"),
            "step_seconds": _median(ours, "step_seconds"),
            "loss": ours[0]["losses"][-1],
            "torch_loss": torch[0]["loss"],
        }


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def _medians(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [float(statistics.median(v)) for v in zip(*(run[key] for run in runs), strict=True)]


def _ratios(a: list[dict[str, Any]], b: list[dict[str, Any]], key: str) -> list[float]:
    return [float(x[key] / y[key]) for x, y in zip(a, b, strict=True)]


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        name: float(statistics.median(values)),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def hivemind(options: argparse.Namespace) -> dict[str, Any]:
    """hivemind's pipeline, in an environment of its own that is made where that can be done."""
    python = options.hivemind_venv / "bin" / "python"
    why = None if python.exists() else _install(options.hivemind_venv)
    best = 0.0
    for in_flight in (4, MICRO_BATCHES) if why is None else ():
        try:
            best = max(best, _run_hivemind(python, in_flight))
        except (subprocess.SubprocessError, ValueError, OSError) as error:
            why = f"{in_flight} micro-batches in flight: {str(error)[-300:]}"
    if best:
        return {"hivemind_tokens_per_second": best}
    return {"hivemind_tokens_per_second": None, "hivemind_why_not": why or "it gave no step"}


def _install(where: Path) -> str | None:
    """Make the environment; why not, if that fails."""
    from importlib.metadata import version

    say(f"installing hivemind into {where}")
    packages = ["hivemind", *(f"{name}=={version(name)}" for name in ("torch", "transformers"))]
    commands = [
        [sys.executable, "-m", "venv", str(where)],
        [str(where / "bin" / "pip"), "install", "--quiet", "--prefer-binary", *packages],
    ]
    for command in commands:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"it cannot be installed: {error}"
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["pip failed"]
            return f"it cannot be installed: {lines[-1][:300]}"
    return None


def _run_hivemind(python: Path, in_flight: int) -> float:
    """Tokens a second, the first steps not counted."""
    settings = settings_of(HIVEMIND_WARM + HIVEMIND_STEPS, 1, "sdpa") | {"in_flight": in_flight}
    child = subprocess.Popen(
        [str(python), str(LIB / "pipeline_hivemind.py"), json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        said, complaint = child.communicate(timeout=HIVEMIND_SECONDS)
    finally:
        # Its servers are sessions of their own and outlive a client that was ended.
        for pid in [*descendants(child.pid), child.pid] if child.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()
    if child.returncode != 0:
        raise ValueError(f"exit {child.returncode}: {complaint.strip()}")
    times = [json.loads(line)["time"] for line in said.splitlines() if line[:1] == "{"]
    return HIVEMIND_STEPS * TOKENS / (times[-1] - times[HIVEMIND_WARM - 1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench pipeline", description=__doc__)
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="counted steps of a run")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="torch's")
    parser.add_argument("--standby", action="store_true", help="the standby copies every 2nd state")
    parser.add_argument("--no-hivemind", action="store_true")
    parser.add_argument("--hivemind-venv", type=Path, default=HIVEMIND_VENV)
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.steps < SEGMENT_STEPS or options.steps % SEGMENT_STEPS:
        parser.error(f"--steps is a multiple of {SEGMENT_STEPS}, --pairs at least 1")
    report = Report("scripts/bench pipeline")
    runs = Runs()
    try:
        runs.pairs(options)
        report.document |= runs.document()
        single = run_torch(SINGLE_STEPS, WARM_STEPS, ranks=1, threads=2, attention="sdpa")
    except (NetworkFailed, YardstickFailed, UserError) as error:
        say(f"the benchmark failed: {error}")
        return 1
    report.document["single_process_tokens_per_second"] = single["tokens_per_second"]
    if options.no_hivemind:
        found: dict[str, Any] = {
            "hivemind_tokens_per_second": None,
            "hivemind_why_not": "it was not asked for",
        }
    else:
        found = hivemind(options)
    report.document |= found
    if found["hivemind_tokens_per_second"]:
        rate = report.document["tokens_per_second"] / found["hivemind_tokens_per_second"]
        report.document["ratio_to_hivemind"] = rate
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
