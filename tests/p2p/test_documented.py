"""docs/p2p.md says what the code does."""

import dataclasses
import re
from pathlib import Path

from tdmld.p2p import Limits
from tdmld.p2p.accounting import Offence

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "p2p.md").read_text()


def test_every_limit_stands_there_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([0-9.]+) \|", TEXT, re.MULTILINE))
    assert {name: float(value) for name, value in rows.items()} == {
        field.name: float(field.default)  # type: ignore[arg-type]
        for field in dataclasses.fields(Limits)
    }


def test_every_offence_stands_there_with_its_weight() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([0-9.]+) \| (.+) \|$", TEXT, re.MULTILINE)
    assert {(name, float(weight), meaning) for name, weight, meaning in rows} == {
        (offence.name, offence.weight, offence.meaning) for offence in Offence
    }


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", TEXT))
    written = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        written |= set(re.findall(r"def (test_\w+)", path.read_text()))
    assert len(named) > 40
    assert named <= written, named - written
