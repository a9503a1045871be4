"""kill -9 of workers and carriers at named points of the schedule; every job ends with its bits.

A network of real nodes trains two kinds of jobs (K = 4, R = 2, D = 8): three stages in one lane,
and two stages in two lanes that synchronise at every step. Every other segment a worker, at a point
of its schedule that the plan names, kills itself, its carrier or a neighbour
(`tests/faults/die_at.py` puts the points into it; nothing of the product knows). Points:

    forward, backward        in the middle of a micro-batch
    between                  between two steps of a segment
    synchronisation          after the first part of the gradients went to the other lane
    snapshot                 when half of the state after a segment is written
    commitment               when the digest list is written and nobody was told
    replay                   again, while the first kill is being made good
    both ends                both workers of a link, or one and the other's carrier, at once

Every job must be closed with all state roots and the model of the reference, a single process
that was never disturbed. `microbatches_lost`: done again by a slot that did not die, or never done.
A kill's stall is the longest step of a slot that lived, less its median step; beside it stands what
the replay itself took: from the first step of the new worker to where the dead one had been.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio
from jobrun import (
    RunFailed,
    same_files,
    same_roots,
    submitter,
    tdmld,
    wait_for_asks,
    watch,
)
from report import ROOT, Report, percentile, say

from tdmld import devnet
from tdmld.errors import UserError
from tdmld.node.provenance import check
from tdmld.rpc.types import JobDetail
from tdmld.train.jobfile import load_job_file
from tdmld.train.spec import spec_id

FAULT = ROOT / "tests" / "faults" / "die_at.py"
NODES, VALIDATORS, SUBMITTER = 7, 4, 0
K, R, D = 4, 2, 8
MICRO_BATCHES = 4
FIRST_KILL, APART = 2, 2
"""Segments before the first kill of a job, and from one kill to the next."""
KILLS_A_JOB = 12
PATIENCE_SECONDS = 900.0
SYNCHRONISATION = "synchronisation"


@dataclass(frozen=True)
class Shape:
    """How a job is cut."""

    name: str
    cuts: tuple[int, ...]
    lanes: int

    @property
    def slots(self) -> list[str]:
        return [f"{lane}.{stage}" for lane in range(self.lanes) for stage in range(self.stages)]

    @property
    def stages(self) -> int:
        return len(self.cuts) - 1


STAGES = Shape("stages", (0, 2, 4, 6), 1)
LANES = Shape("lanes", (0, 3, 6), 2)
SCENARIOS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("forward", ("worker",)),
    ("backward", ("worker",)),
    ("between", ("worker",)),
    ("snapshot", ("worker",)),
    ("commitment", ("worker",)),
    ("replay", ("worker", "worker")),
    ("both ends", ("worker", "worker")),
    (SYNCHRONISATION, ("worker",)),
    ("forward", ("carrier",)),
    ("backward", ("carrier",)),
    ("between", ("carrier",)),
    ("snapshot", ("carrier",)),
    ("commitment", ("carrier",)),
    ("replay", ("worker", "carrier")),
    ("both ends", ("worker", "carrier")),
    (SYNCHRONISATION, ("carrier",)),
)
"""(point, who is killed); a replay is hit by the second of its kills."""


@dataclass
class Plan:
    """The kills of one job."""

    shape: Shape
    entries: list[dict[str, Any]] = field(default_factory=list)
    points: Counter[str] = field(default_factory=Counter)
    segments: int = FIRST_KILL

    @property
    def kills(self) -> int:
        return sum(self.points.values())

    def add(self, number: int, point: str, victims: tuple[str, ...]) -> None:
        """One scenario, in a segment of its own, on a slot that the number picks."""
        slots = self.shape.slots
        slot = slots[number % len(slots)]
        lane, stage = map(int, slot.split("."))
        step, name = self.segments * K, f"{self.shape.name}-{len(self.entries)}"
        entry = {"name": name, "slot": slot, "after": None}
        if point == "replay":
            first = entry | {"point": "between", "step": step + 3, "victims": [f"worker:{slot}"]}
            again = {"name": f"{name}-again", "point": "forward", "step": step + 1, "after": name}
            self.entries += [first, entry | again | {"victims": [f"{victims[1]}:{slot}"]}]
        elif point == "both ends":
            other = f"{lane}.{stage + 1 if stage + 1 < self.shape.stages else stage - 1}"
            both = [f"{victims[0]}:{slot}", f"{victims[1]}:{other}"]
            self.entries.append(entry | {"point": "backward", "step": step + 2, "victims": both})
        else:
            at_end = point in ("snapshot", "commitment")
            at = step + K if at_end else step + 2
            found = {"point": point, "step": at, "victims": [f"{victims[0]}:{slot}"]}
            self.entries.append(entry | found)
        self.points[point] += len(victims)
        self.segments += APART

    @property
    def rounds(self) -> int:
        """The job goes on for a while after the last kill."""
        return self.segments + APART


def plans(kills: int) -> list[Plan]:
    """Jobs whose kills are together at least so many; each kind of kill in turn."""
    open_plans: dict[str, Plan] = {}
    full: list[Plan] = []
    number = done = 0
    while done < kills or number < len(SCENARIOS):
        point, victims = SCENARIOS[number % len(SCENARIOS)]
        odd = (number + number // len(SCENARIOS)) % 2
        shape = LANES if point == SYNCHRONISATION or odd else STAGES
        plan = open_plans.setdefault(shape.name, Plan(shape))
        plan.add(number // 2 + number // len(SCENARIOS), point, victims)
        if plan.kills >= KILLS_A_JOB:
            full.append(open_plans.pop(shape.name))
        number, done = number + 1, done + len(victims)
    return [*full, *open_plans.values()]


def write_job(directory: Path, number: int, plan: Plan) -> Path:
    """The job file of a plan; each job has a seed of its own."""
    steps = plan.rounds * K
    config = json.loads((ROOT / "examples" / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6}
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / f"job{number}.toml"
    path.write_text(
        f"""version = 1
name = "recovery-{number}"
family = "llama"
config = "config.json"
seed = {number + 1}
init = "seed"
class = "any"

[data]
text = "{ROOT / "data" / "shakespeare.txt"}"
tokenizer = "bytes"
sequence = 64
heldout = "0.1"

[train]
steps = {steps}
micro_batches = {MICRO_BATCHES}
micro_batch_size = 2
precision = "fp32"
wire = "bf16"
schedule = {{ kind = "linear", warmup = 4, decay_from = {steps}, floor = "0.1" }}
clip = {{ kind = "stage", norm = "1.0" }}

[train.optimizer]
name = "adamw"
lr = "1e-3"
betas = ["0.9", "0.95"]
eps = "1e-8"
weight_decay = "0.1"

[pipeline]
cuts = {list(plan.shape.cuts)}
lanes = {{ count = {plan.shape.lanes}, mode = "sync" }}
segment_steps = {K}
unsettled = {D}
state_every = {R}

[money]
slot_price_max = 400000
standby_price = 4000
audit_rate = "0"
audit_price = 0
deadline_blocks = 20000
"""
    )
    return path


# -- what the workers wrote


@dataclass
class Life:
    """One worker process of a slot: when each of its steps began and ended."""

    slot: str
    began: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    kills: list[float] = field(default_factory=list)
    """Times at which it let somebody die."""


def lives(place: Path) -> dict[str, list[Life]]:
    """Of each slot its processes in the order in which they lived."""
    found: dict[str, list[Life]] = defaultdict(list)
    for path in place.glob("log.*"):
        _, lane, stage, _ = path.name.split(".")
        life = Life(f"{lane}.{stage}")
        for line in path.read_text().splitlines():
            kind, step, moment = line.split()
            if kind == "kill":
                life.kills.append(float(moment))
            else:
                (life.began if kind == "begin" else life.ended)[int(step)] = float(moment)
        found[life.slot].append(life)
    for mine in found.values():
        mine.sort(key=lambda life: min(life.began.values()))
    return found


def lost(found: dict[str, list[Life]], steps: int, hits: Counter[str]) -> int:
    """Micro-batches never done, or done again by more lives than deaths explain."""
    count = 0
    for slot, mine in found.items():
        done = Counter(step for life in mine for step in life.ended)
        missing = sum(step not in done for step in range(steps))
        needless = 0
        if len(mine) - 1 > hits[slot]:
            needless = sum(times - 1 for times in done.values())
        count += (missing + needless) * MICRO_BATCHES
    return count


def stalls(found: dict[str, list[Life]], deaths: dict[float, set[str]]) -> Iterator[float]:
    """Of each killing: the longest step around it of a slot that lived, less its median step."""
    for moment, dead in deaths.items():
        longest = []
        for slot, mine in found.items():
            spans = [(life.began[step], end) for life in mine for step, end in life.ended.items()]
            usual = statistics.median(end - begin for begin, end in spans)
            after = [end - begin - usual for begin, end in spans if end > moment]
            if slot not in dead and after:
                longest.append(after[0])
        if longest:
            yield max(0.0, max(longest))


def replays(found: dict[str, list[Life]]) -> Iterator[float]:
    """What each later life took to come to where the one before it had been."""
    for mine in found.values():
        for before, after in pairwise(mine):
            again = [step for step in after.ended if step in before.ended]
            if again:
                yield after.ended[max(again)] - after.began[min(again)]


# -- the run


class Bench:
    """One network, and the jobs on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.faults = directory / "faults"
        self.faults.mkdir()
        self.network = devnet.make_network(
            directory / "network",
            nodes=NODES,
            validators=VALIDATORS,
            asks=range(1, NODES),
            settings={
                "launcher": [sys.executable, str(FAULT), str(self.faults)],
                "ask.standby_slots": 8,
            },
            parameters={"segment_window": 400, "activate_window": 400},
        )
        self.lost = 0
        self.bitwise = True
        self.finished = 0
        self.kills = 0
        self.stalls: list[float] = []
        self.replays: list[float] = []

    def job(self, number: int, plan: Plan) -> None:
        """Run one job to its end and compare."""
        home = self.directory / f"job{number}"
        home.mkdir()
        job_file = write_job(home, number, plan)
        spec = load_job_file(job_file)
        (self.faults / "plan.json").write_text(json.dumps(plan.entries))
        place = self.faults / spec_id(spec.raw).hex()[:16]
        said = submitter(self.network, SUBMITTER)
        job = str(tdmld("job", "submit", job_file, *said)["job"])
        say(f"job {number}: {plan.shape.name}, {plan.rounds} segments, {plan.kills} kills")
        shown = [0]

        def show(detail: JobDetail) -> None:
            done = min((slot.segment for slot in detail.slots), default=0)
            if done >= shown[0] + 5:
                shown[0] = done
                say(f"  {done} of {plan.rounds} segments, {self._killed()} deeds done")

        detail = trio.run(watch, self.network, SUBMITTER, job, PATIENCE_SECONDS, show)
        if detail.result is None:
            say(f"  it ended {detail.summary.state}: {detail.summary.reason}")
            self.bitwise = False
            return
        tdmld("job", "fetch", job, home / "model", *said)
        made = tdmld("reference", job_file, "--out", home / "reference")
        record = check((home / "model" / "provenance.json").read_bytes())
        roots = json.loads(Path(made["roots"]).read_bytes())
        equal = same_roots(record, roots) and same_files(home / "model", Path(made["export_dir"]))
        self.bitwise = self.bitwise and equal
        self.finished += 1
        self._measure(place, plan)
        say(f"  closed; bit for bit the reference: {equal}; lost so far: {self.lost}")

    def _killed(self) -> int:
        return len(list(self.faults.glob("done.*")))

    def _measure(self, place: Path, plan: Plan) -> None:
        missed = [
            e["name"] for e in plan.entries if not (self.faults / f"done.{e['name']}").exists()
        ]
        if missed:
            raise RunFailed(f"these kills never happened: {', '.join(missed)}")
        self.kills += plan.kills
        hits: Counter[str] = Counter()
        for entry in plan.entries:
            hits.update(victim.partition(":")[2] for victim in entry["victims"])
        found = lives(place)
        self.lost += lost(found, plan.rounds * K, hits)
        deaths: dict[float, set[str]] = {}
        by_slot: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in plan.entries:
            by_slot[entry["slot"]].append(entry)
        for slot, mine in found.items():
            moments = sorted(moment for life in mine for moment in life.kills)
            for entry, moment in zip(by_slot[slot], moments, strict=True):
                deaths[moment] = {victim.partition(":")[2] for victim in entry["victims"]}
        self.stalls += stalls(found, deaths)
        self.replays += replays(found)
        for done in self.faults.glob("done.*"):
            done.unlink()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    parser.add_argument("--keep", type=Path, help="keep the nodes' directories here when it fails")
    options = parser.parse_args(arguments)
    report = Report("scripts/bench recovery")
    todo = plans(options.kills)
    with tempfile.TemporaryDirectory(prefix="tdmld-recovery-", ignore_cleanup_errors=True) as where:
        bench = Bench(Path(where))
        failed = ""
        try:
            with bench.network:
                bench.network.start_all()
                bench.network.wait_ready(timeout_seconds=120)
                trio.run(wait_for_asks, bench.network, range(1, NODES))
                for number, plan in enumerate(todo):
                    bench.job(number, plan)
        except (RunFailed, UserError) as error:
            failed = str(error)
            say(f"the benchmark failed: {failed}")
        sound = not failed and bench.finished == len(todo) and bench.bitwise and not bench.lost
        if not sound and options.keep is not None:
            shutil.copytree(where, options.keep, ignore=shutil.ignore_patterns("LOCK"))
    points: Counter[str] = Counter()
    for plan in todo:
        points.update(plan.points)
    report.document |= {
        "kills": bench.kills,
        "jobs": len(todo),
        "finished": bench.finished,
        "points": dict(points),
        "microbatches_lost": bench.lost,
        "bitwise_reference": bench.bitwise and bench.finished == len(todo),
    }
    if bench.stalls and bench.replays:
        report.document |= {
            "stall_s_p50": statistics.median(bench.stalls),
            "stall_s_max": max(bench.stalls),
            "replay_s_p50": statistics.median(bench.replays),
            "replay_s_p90": percentile(bench.replays, 0.9),
        }
    report.finish(options.json)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
