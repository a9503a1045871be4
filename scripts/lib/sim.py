"""Simulated consensus: seeded schedules with faults and attackers, and the table of mutants.

Consensus, the validator's shell and the succession of epochs are the product's; disks, links and
time are simulated. Exit 0 when nothing was found, every average reaches its floor, and no mutant
survives.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.lib.report import Report, say  # noqa: E402
from tests.simulation.mutants import MUTANTS, Mutant, killer  # noqa: E402
from tests.simulation.node import Node  # noqa: E402
from tests.simulation.runner import FLOORS, Summary, WorkerDied, run_many  # noqa: E402

SHOWN = 10
"""Findings that are printed in full."""


def replay(seed: int, validators: int | None, count: int = 1) -> str:
    """The command that runs schedules again."""
    size = f" --validators {validators}" if validators else ""
    return f"scripts/sim consensus --seeds {count} --first-seed {seed}{size}"


def consensus(options: argparse.Namespace) -> int:
    report, summary = Report("scripts/sim"), Summary()
    began = time.monotonic()
    try:
        for outcome in run_many(options.first_seed, options.seeds, options.validators):
            summary.add(outcome)
            if outcome.found and len(summary.findings) <= SHOWN:
                say(f"seed {outcome.seed}: {outcome.kind}: {outcome.found}")
                say(f"    again: {replay(outcome.seed, options.validators)}")
            if summary.seeds % 1000 == 0:
                say(f"{summary.seeds} schedules, {len(summary.findings)} findings")
    except WorkerDied as died:
        say(f"{died}; {summary.seeds} schedules before them are done")
        again = replay(died.first, options.validators, died.last - died.first + 1)
        say(f"    again: {again}")
        return 1
    seconds = time.monotonic() - began
    below = summary.below_floor()
    report.document |= {
        "seeds": summary.seeds,
        "first_seed": options.first_seed,
        "disagreements": summary.disagreements,
        "double_signs": summary.double_signs,
        "stuck": summary.stuck,
        "crashes": summary.crashes,
        "per_schedule": summary.per_schedule(),
        "floors": FLOORS,
        "below_floor": below,
        "heights_least": summary.least_height,
        "schedules_with_a_set_change": summary.changed,
        "heights_average": round(summary.heights / summary.seeds, 2),
        "crash_points": dict(sorted(summary.points.items())),
        "schedules_with": dict(sorted(summary.strategies.items())),
        "failing_seeds": [outcome.seed for outcome in summary.findings],
        "schedules_per_second": round(summary.seeds / seconds, 1),
    }
    report.finish(options.json)
    return 1 if summary.findings or below else 0


def mutants(options: argparse.Namespace) -> int:
    report, rows, stale = Report("scripts/sim"), [], False
    for mutant in MUTANTS:
        found = killer(mutant)
        shown = found.__name__ if callable(found) else found
        if found != mutant.killer:
            stale = True
            say(f"{mutant.name}: {mutant.killer} does not kill it; {shown} does")
        what = mutant.killed(found) if found is not None else ""
        doc = (mutant.broken.__doc__ or "").partition("\n")[0]
        print(f"{mutant.rule:7} {mutant.name:24} {shown!s:32} {what[:72]}")
        rows.append(
            {
                "rule": mutant.rule,
                "mutant": mutant.name,
                "breaks": doc,
                "killed": found is not None,
                "first_seed_or_trace": shown,
                "seen": what,
            }
        )
    unsound = [mutant.name for mutant in MUTANTS if Mutant("", Node, mutant.killer).killed()]
    survivors = [row["mutant"] for row in rows if not row["killed"]]
    report.document |= {"survivors": survivors, "killers_that_fail_the_product": unsound}
    report.finish(None)
    if options.json is not None:
        report.document["mutants"] = rows
        options.json.write_text(json.dumps(report.document, indent=2) + "\n")
    return 1 if survivors or unsound or stale else 0


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("consensus", help="seeded schedules; prints how to replay a finding")
    one.add_argument("--seeds", type=at_least_one, default=300, help="how many (default 300)")
    one.add_argument("--first-seed", type=int, default=0)
    one.add_argument(
        "--validators",
        type=int,
        choices=range(4, 33),
        metavar="4..32",
        help="members of the first set",
    )
    one.add_argument("--json", type=Path, help="write one JSON document there")
    one.set_defaults(run=consensus)
    two = commands.add_parser("mutants", help="every rule, mutants that break it, what kills them")
    two.add_argument("--json", type=Path, help="write one JSON document there")
    two.set_defaults(run=mutants)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
