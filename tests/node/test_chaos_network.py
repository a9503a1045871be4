"""`scripts/chaos network`, small; and what it would notice."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "lib"))

import chaos_network  # found by the line before
from chaos_network import ChaosFailed, check, components, missing


def options(**changes: Any) -> argparse.Namespace:
    usual = {"nodes": 20, "kills": 2, "seed": 1, "spread": 60.0, "period": 8.0, "quiet": 60.0}
    return argparse.Namespace(**usual | changes)


async def test_five_nodes_killed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_network, "FRESH_SECONDS", 2.0)
    monkeypatch.setattr(chaos_network, "SAMPLES", 1)
    monkeypatch.setattr(chaos_network, "STABLE", 2)
    monkeypatch.setattr(chaos_network, "DOWN_SECONDS", (0.0, 0.5))
    found: dict[str, Any] = {}
    small = options(nodes=4, kills=1, spread=2.0, period=1.0, quiet=0.0)
    await chaos_network.run(small, tmp_path, found)
    assert found["kills"] == 4
    assert found["messages_checked"] > 5


@pytest.mark.slow
async def test_twenty_nodes_killed_twice(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    await chaos_network.run(options(), tmp_path, found)
    assert found["kills"] == 40


def test_a_part_that_only_one_end_knows_is_no_part() -> None:
    assert components({"a": ["b"], "b": ["a", "c"], "c": ["b"]}) == 1
    assert components({"a": ["b"], "b": ["a"], "c": ["b"]}) == 2
    assert components({"a": [], "b": [], "c": ["gone"]}) == 3


def test_a_message_is_missing_where_somebody_else_has_it() -> None:
    heard = {
        0: {"1.0.1": 10.0, "1.0.2": 99.0},
        1: {"0.0.1": 10.0, "2.0.1": 5.0},
        2: {"0.0.1": 10.0, "1.0.1": 10.0},
    }
    assert missing(heard, 8, 20) == []  # the rest was said by itself
    assert missing(heard, 0, 20) == ["0: 2.0.1"]
    assert missing(heard, 8, 100) == ["2: 1.0.2"]


SOUND: dict[str, Any] = {
    "component_s": 1.0,
    "components": 1,
    "messages_missing": 0,
    "messages_checked": 9,
    "tasks_growth": 0,
    "descriptors_growth": 0,
    "rss_slope": 0.1,
    "observer": {"tasks_growth": 0, "descriptors_growth": 0, "rss_growth_mb": 1.0},
}


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"component_s": None}, "one component"),
        ({"components": 2}, "one component"),
        ({"messages_missing": 1}, "no message missing"),
        ({"messages_checked": 0}, "no message missing"),
        ({"tasks_growth": 5}, "tasks flat"),
        ({"descriptors_growth": 5}, "descriptors flat"),
        ({"rss_slope": 2.1}, "memory flat"),
        ({"observer": SOUND["observer"] | {"tasks_growth": 5}}, "observer's tasks"),
        ({"observer": SOUND["observer"] | {"rss_growth_mb": 9.0}}, "observer's memory"),
    ],
)
def test_each_claim_is_checked(change: dict[str, Any], claim: str) -> None:
    check(SOUND, weighed=True)
    with pytest.raises(ChaosFailed, match=claim):
        check(SOUND | change, weighed=True)
