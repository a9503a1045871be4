"""An aiming coalition against the beacon: what it reaches, beside the documented bound.

Exit 1 when a coalition loses less often than docs/spec/chain.md, section 8, says it must (beyond
five sigma), or when a game does not come out as its exact value.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.lib.report import Report, say  # noqa: E402
from tests.simulation.beacon import NETWORKS, Game, Network, Row, play_all  # noqa: E402
from tests.simulation.beacon_aims import AIMS, RATE  # noqa: E402

THIRD_PPM = 333_333


def seeds(text: str) -> int:
    """Draws a row."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def stake_ppm(text: str) -> int:
    """The most stake of a coalition, in millionths."""
    number = int(text)
    if not 0 < number <= THIRD_PPM:
        raise argparse.ArgumentTypeError(f"1 to {THIRD_PPM}: a coalition has less than a third")
    return number


def beacon(options: argparse.Namespace) -> int:
    report, began = Report("scripts/sim beacon"), time.monotonic()
    networks, broken, odd, draws = [], [], [], 0
    print(f"{'aim':21} {'policy':7} {'from':6} {'lost':>8} {'95 %':>17} {'exact':>8} {'bound':>8}")
    for name, stakes in NETWORKS:
        network = Network(name, stakes, options.stake)
        about = describe(network)
        print(
            f"{name}: coalition {about['coalition_ppm'] / 1e4:.1f} %, at most {network.run} turns"
            f" on end, {network.edge_run} over an edge; safe window {network.safe_window}"
        )
        for aim in AIMS:
            for row in play_all(Game(network, aim), options.seeds):
                shown = document(row)
                about["rows"].append(shown)
                print(line(row), flush=True)
                draws += row.trials
                where = f"{name}, {aim.name}, {row.policy}, {row.start}"
                if not row.holds:
                    broken.append(where)
                    say(f"below the bound: {where}: {row.measured:.5f}, bound {row.bound:.5f}")
                if not row.as_computed:
                    odd.append(where)
                    say(f"not as computed: {where}: {row.measured:.5f}, exact {shown['exact']:.5f}")
        networks.append(about)
    report.document |= {
        "seeds": options.seeds,
        "stake_ppm": options.stake,
        "audit_rate_ppm": RATE,
        "draws": draws,
        "draws_per_second": round(draws / (time.monotonic() - began)),
        "below_bound": broken,
        "not_as_computed": odd,
    }
    report.finish(None)
    if options.json is not None:
        report.document["networks"] = networks
        options.json.write_text(json.dumps(report.document, indent=2) + "\n")
    return 1 if broken or odd else 0


def describe(network: Network) -> dict[str, Any]:
    weight = network.weight(network.coalition)
    return {
        "network": network.name,
        "validators": len(network.stakes),
        "coalition": sorted(network.coalition),
        "coalition_ppm": weight * 10**6 // sum(network.stakes),
        "longest_run": network.run,
        "longest_edge_run": network.edge_run,
        "safe_window": network.safe_window,
        "rows": [],
    }


def document(row: Row) -> dict[str, Any]:
    low, high = row.interval()
    return {
        "aim": row.aim,
        "policy": row.policy,
        "start": row.start,
        "draws": row.trials,
        "lost": row.measured,
        "low": low,
        "high": high,
        "exact": row.expected / row.trials,
        "bound": row.bound,
        "withheld_per_draw": row.withheld / row.trials,
        "holds": row.holds,
        "as_computed": row.as_computed,
    }


def line(row: Row) -> str:
    low, high = row.interval()
    exact = row.expected / row.trials
    return (
        f"{row.aim:21} {row.policy:7} {row.start:6} {row.measured:8.5f} [{low:.5f}, {high:.5f}]"
        f" {exact:8.4g} {row.bound:8.4g}  {row.withheld / row.trials:.2f} turns withheld"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim beacon", description=__doc__)
    parser.add_argument("--seeds", type=seeds, default=2000, help="draws a row (default 2000)")
    parser.add_argument("--stake", type=stake_ppm, default=THIRD_PPM, metavar="PPM")
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    return beacon(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
