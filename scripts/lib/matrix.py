"""Every family, cut in every way, over every wire, drawn or given: bit for bit its unsplit model?

    .venv/bin/python scripts/lib/matrix.py [--families llama,resnet] [--stages 1,2,3,4]
        [--lanes 1,sync-2,diloco-3-late]
        [--wires all] [--starts seed,given] [--seeds N] [--json F]

Each case runs the job of `tests/train/support.py` as pipelines of threads, runs the reference in
one process on the unsplit Hugging Face model, and compares every state root at every boundary,
every loss and every byte of the result; then it runs each segment again from its logs and compares
the records. About 1 s a case, and some 4,000 of them. Exits 1 when one differs.
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from report import Report, say

from tdmld.train.families import FAMILIES
from tdmld.train.numerics import check_torch, pin_process
from tdmld.train.spec import Spec
from tdmld.train.wireformat import Wire
from tests.train.support import (
    SHORT,
    check_equal,
    family_spec,
    going_on,
    published,
)

MIXED = "mixed"
"""Each link another format, where there is more than one."""
WIRES = (*get_args(Wire), MIXED)
OUTER = {
    "lr": "0.7",
    "momentum": "0.9",
    "nesterov": True,
    "density": 64,
    "bits": 2,
    "feedback": "0.95",
}
LANES: dict[str, dict[str, Any]] = {
    "1": {"count": 1, "mode": "sync"},
    "sync-2": {"count": 2, "mode": "sync"},
    "sync-2-fp32": {"count": 2, "mode": "sync", "wire": "fp32"},
    "sync-3-int8": {"count": 3, "mode": "sync", "wire": "int8", "weights": [1, 3, 2]},
    "diloco-2": {"count": 2, "mode": "diloco", "outer": OUTER},
    "diloco-2-8bit": {
        "count": 2,
        "mode": "diloco",
        "outer": OUTER | {"bits": 8, "density": 9, "nesterov": False},
    },
    "diloco-3-late": {"count": 3, "mode": "diloco", "weights": [2, 1, 1], "outer": OUTER},
}
"""Lanes and how they meet. Of three in `diloco` the second is late in round 0."""
LATE = {0: (0, 2)}


def spec_of(family: str, stages: int, wire: str, lanes: str, seed: int) -> Spec | None:
    """The spec of a case; None where it would be another one again."""
    changes: dict[str, Any] = SHORT | {"seed": seed, "pipeline__lanes": LANES[lanes]}
    links = family_spec(family, stages, **changes).link_count
    if wire == MIXED and links > 1:
        return family_spec(family, stages, **changes, train__wire=list(WIRES[1 : links + 1]))
    if wire == MIXED or (links == 0 and wire != WIRES[0]):
        return None
    return family_spec(family, stages, **changes, train__wire=wire)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(sorted(FAMILIES)))
    parser.add_argument("--stages", default="1,2,3,4")
    parser.add_argument("--wires", default="all")
    parser.add_argument("--lanes", default="all", help=", ".join(LANES))
    parser.add_argument("--starts", default="seed,given")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("scripts/lib/matrix.py")
    pin_process()
    check_torch()
    wires = WIRES if arguments.wires == "all" else arguments.wires.split(",")
    lanes = tuple(LANES) if arguments.lanes == "all" else arguments.lanes.split(",")
    equal, wrong = 0, []
    for family in arguments.families.split(","):
        before = equal
        cases = product(
            map(int, arguments.stages.split(",")),
            wires,
            lanes,
            arguments.starts.split(","),
            range(arguments.seeds),
        )
        for stages, wire, meet, start, seed in cases:
            spec = spec_of(family, stages, wire, meet, seed)
            if spec is None:
                continue
            name = f"{family}, {stages} stages, {wire}, lanes {meet}, {start}, seed {seed}"
            if (fault := differs(spec, start, LATE if "late" in meet else {})) is None:
                equal += 1
            else:
                wrong.append(name)
                say(f"DIFFERS {name}: {fault}")
        say(f"{family}: {equal - before} cases equal")
    report.document |= {"cases_equal": equal, "cases_different": len(wrong), "different": wrong}
    report.finish(arguments.json)
    return 1 if wrong else 0


def differs(spec: Spec, start: str, late: dict[int, tuple[int, ...]]) -> str | None:
    """Why a case is not equal, or None."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        try:
            if start == "given":
                directory = published(spec, root / "published")
                spec = going_on(spec, directory)
                check_equal(spec, root, directory, replay=True, included=late)
            else:
                check_equal(spec, root, replay=True, included=late)
        except Exception as error:  # Boundary: whatever a case raises, the others still run
            return f"{type(error).__name__}: {str(error)[:300]}"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
