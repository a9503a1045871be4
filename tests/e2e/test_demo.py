"""Every promise of the demo, with real processes: seven nodes, a small job, and what can go wrong.

The job is tiny and the chain's windows are short; everything else is what `scripts/demo` runs.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = {"interval_ms": 200, "segment_window": 400, "activate_window": 400, "audit_window": 300}
"""Short enough for a test, long enough for a loaded machine."""

pytestmark = pytest.mark.e2e


def demo(tmp_path: Path, *options: str) -> dict[str, Any]:
    out = tmp_path / "demo.json"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "lib" / "demo.py"),
        *("--json", str(out), "--out", str(tmp_path / "out")),
        *("--job", str(ROOT / "tests" / "jobs" / "tiny.toml")),
        *("--parameters", json.dumps(WINDOWS)),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(out.read_text()))


def test_a_job_is_trained_audited_paid_and_equals_the_reference(tmp_path: Path) -> None:
    found = demo(tmp_path)
    assert found["state"] == "closed"
    assert found["bitwise_reference"] is True
    assert found["supply_conserved"] is True
    assert found["spent_is_paid_plus_burned"] is True
    assert found["audits_passed"] >= 2
    assert found["loss_heldout"] == found["loss_heldout_reference"]
    assert found["sample"]


@pytest.mark.slow
def test_a_validator_that_is_killed_and_comes_back_changes_nothing(tmp_path: Path) -> None:
    found = demo(tmp_path, "--kill", "validator", "--kill-round", "1")
    assert found["bitwise_reference"] is True
    assert found["supply_conserved"] is True


@pytest.mark.parametrize(
    "victim",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("worker", "carrier")), "node"],
)
def test_a_killed_process_of_a_slot_is_made_good(tmp_path: Path, victim: str) -> None:
    found = demo(tmp_path, "--kill", victim, "--kill-round", "2")
    assert found["state"] == "closed"
    assert found["bitwise_reference"] is True
    assert found["supply_conserved"] is True
    assert found["convicted"] == [] or victim == "node"  # it could not open its seals


def test_one_flipped_bit_is_found_its_author_named_unpaid_and_replaced(tmp_path: Path) -> None:
    found = demo(tmp_path, "--cheater")
    assert found["state"] == "closed"
    assert found["convicted"] == [found["liar"]]
    assert found["liar_settled"] <= 2  # it lied in its third segment
    assert found["replacement"] == found["first_standby"]
    assert found["bitwise_reference"] is True
    assert found["supply_conserved"] is True
    assert found["spent_is_paid_plus_burned"] is True
