"""Conformance vectors: what goes in, what must come out, in JSON (docs/spec/chain.md, section 18).

Deterministic: the same code writes the same bytes. tests/chain/test_vectors.py replays the files
and fails when they are not what this program would write now.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.lib.vectors_audits import ledger_audits, ledger_settle  # noqa: E402
from scripts.lib.vectors_crypto import crypto  # noqa: E402
from scripts.lib.vectors_formats import blocks, encoding, genesis  # noqa: E402
from scripts.lib.vectors_jobs import ledger_match, ledger_segments  # noqa: E402
from scripts.lib.vectors_lanes import ledger_lanes  # noqa: E402
from scripts.lib.vectors_ledger import ledger_money  # noqa: E402
from scripts.lib.vectors_repairs import ledger_repairs  # noqa: E402
from scripts.lib.vectors_stakes import ledger_stakes  # noqa: E402

DIRECTORY = ROOT / "tests" / "vectors"
LINES = 4
FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "encoding": encoding,
    "genesis": genesis,
    "blocks": blocks,
    "crypto": crypto,
    "ledger-money": ledger_money,
    "ledger-stakes": ledger_stakes,
    "ledger-match": ledger_match,
    "ledger-segments": ledger_segments,
    "ledger-audits": ledger_audits,
    "ledger-settle": ledger_settle,
    "ledger-lanes": ledger_lanes,
    "ledger-repairs": ledger_repairs,
}


def render(name: str) -> bytes:
    """The bytes of one file."""
    document = {"format": "tdmld-vectors-1", "spec": "docs/spec/chain.md", **FILES[name]()}
    return (_layout(document, 0) + "\n").encode()


def _layout(value: Any, depth: int) -> str:
    """Canonical JSON, spread over lines down to LINES levels: a case is a line."""
    inner = "\n" + " " * (depth + 1)
    if depth < LINES and isinstance(value, dict) and value:
        items = (f"{json.dumps(key)}:{_layout(value[key], depth + 1)}" for key in sorted(value))
        return "{" + inner + f",{inner}".join(items) + inner[:-1] + "}"
    if depth < LINES and isinstance(value, list) and value:
        return (
            "[" + inner + f",{inner}".join(_layout(v, depth + 1) for v in value) + inner[:-1] + "]"
        )
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def stale() -> list[str]:
    """Names of files that are missing or are not what would be written now."""
    names = []
    for name in FILES:
        path = DIRECTORY / f"{name}.json"
        if not path.is_file() or path.read_bytes() != render(name):
            names.append(name)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/vectors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when stale")
    if parser.parse_args().check:
        names = stale()
        print(f"stale: {', '.join(names)}; run scripts/vectors" if names else "up to date")
        return 1 if names else 0
    DIRECTORY.mkdir(exist_ok=True)
    for name in FILES:
        raw = render(name)
        (DIRECTORY / f"{name}.json").write_bytes(raw)
        print(f"{name + '.json':<24}{len(raw):>9,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
