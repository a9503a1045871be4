"""Every family, cut in every way, over every wire, drawn or given: bit for bit its unsplit model?

    .venv/bin/python scripts/lib/matrix.py [--families llama,resnet] [--stages 1,2,3,4]
        [--wires all] [--starts seed,given] [--seeds N] [--json F]

Each case runs the job of `tests/train/support.py` as a pipeline of threads, runs the reference in
one process on the unsplit Hugging Face model, and compares every state root at every boundary,
every loss and every byte of the result; then it runs each segment again from its logs and compares
the records. About 1 s a case, and nearly 600 of them. Exits 1 when one differs.
"""

import argparse
import sys
import tempfile
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


def spec_of(family: str, stages: int, wire: str, seed: int) -> Spec | None:
    """The spec of a case; None where it would be another one again."""
    changes: dict[str, Any] = SHORT | {"seed": seed}
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
    parser.add_argument("--starts", default="seed,given")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("scripts/lib/matrix.py")
    pin_process()
    check_torch()
    wires = WIRES if arguments.wires == "all" else arguments.wires.split(",")
    equal, wrong = 0, []
    for family in arguments.families.split(","):
        before = equal
        for stages in map(int, arguments.stages.split(",")):
            for wire in wires:
                for start in arguments.starts.split(","):
                    for seed in range(arguments.seeds):
                        spec = spec_of(family, stages, wire, seed)
                        if spec is None:
                            continue
                        name = f"{family}, {stages} stages, {wire}, {start}, seed {seed}"
                        if (fault := differs(spec, start)) is None:
                            equal += 1
                        else:
                            wrong.append(name)
                            say(f"DIFFERS {name}: {fault}")
        say(f"{family}: {equal - before} cases equal")
    report.document |= {"cases_equal": equal, "cases_different": len(wrong), "different": wrong}
    report.finish(arguments.json)
    return 1 if wrong else 0


def differs(spec: Spec, start: str) -> str | None:
    """Why a case is not equal, or None."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        try:
            if start == "given":
                directory = published(spec, root / "published")
                check_equal(going_on(spec, directory), root, directory, replay=True)
            else:
                check_equal(spec, root, replay=True)
        except Exception as error:  # Boundary: whatever a case raises, the others still run
            return f"{type(error).__name__}: {str(error)[:300]}"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
