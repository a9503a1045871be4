"""Lanes: every one of them, cut into stages, against one process that plays them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train.support import check_equal, family_spec, going_on, published

OUTER = {
    "lr": "0.7",
    "momentum": "0.9",
    "nesterov": True,
    "density": 64,
    "bits": 2,
    "feedback": "0.95",
}
BASE: dict[str, Any] = {
    "train__steps": 4,
    "train__micro_batches": 3,
    "pipeline__segment_steps": 2,
    "train__schedule__decay_from": 4,
}
LATE = {1: (0, 2)}
"""Of three lanes the second comes too late in round 1."""


def lanes_of(mode: str, count: int, **more: Any) -> dict[str, Any]:
    outer = {"outer": OUTER} if mode == "diloco" else {}
    return {"count": count, "mode": mode, **outer, **more}


def spec_of(family: str, stages: int, mode: str, count: int, wire: str, **more: Any) -> Any:
    lanes = lanes_of(mode, count) if count > 1 else {"count": 1, "mode": "sync"}
    if mode == "sync" and count > 1 and wire == "fp32":
        lanes["wire"] = "fp32"
    return family_spec(
        family, stages, **(BASE | {"pipeline__lanes": lanes, "train__wire": wire} | more)
    )


FAMILIES = ("llama", "gpt2", "qwen3_moe", "gemma3", "resnet")
CASES = [
    (family, stages, mode, count, wire, start)
    for number, family in enumerate(FAMILIES)
    for stages in (2, 3, 4)
    for mode, count in (("sync", 2), ("diloco", 2), ("sync", 1))
    for wire in ("fp32", "bf16")
    for start in ("seed", "given")
    # Every pair of values stands in some case; `scripts/lib/matrix.py` has them all.
    if (number + stages + count + (wire == "bf16") + (start == "given") + (mode == "sync")) % 4 == 0
]


@pytest.mark.parametrize(("family", "stages", "mode", "count", "wire", "start"), CASES)
def test_all_lanes_equal_the_unsplit_model_bit_for_bit(
    family: str, stages: int, mode: str, count: int, wire: str, start: str, tmp_path: Path
) -> None:
    spec = spec_of(family, stages, mode, count, wire)
    given = None
    if start == "given":
        given = published(spec, tmp_path / "published")
        spec = going_on(spec, given)
    check_equal(spec, tmp_path, given, replay=True)


@pytest.mark.parametrize("family", ["llama", "resnet"])
@pytest.mark.parametrize("late", [{}, LATE, {0: (1,), 1: (2,)}])
def test_a_lane_that_is_late_keeps_its_delta(
    family: str, late: Mapping[int, Sequence[int]], tmp_path: Path
) -> None:
    lanes = lanes_of("diloco", 3, weights=[1, 2, 1])
    spec = spec_of(family, 2, "diloco", 3, "bf16", pipeline__lanes=lanes, pipeline__segment_steps=1)
    check_equal(spec, tmp_path, replay=True, included=late)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["llama", "resnet"])
def test_lanes_of_different_weight_meet_at_every_step(
    family: str, wire: str, tmp_path: Path
) -> None:
    lanes = {"count": 3, "mode": "sync", "weights": [2, 1, 3]}
    spec = family_spec(
        family,
        2,
        **(BASE | {"pipeline__lanes": lanes if wire == "bf16" else lanes | {"wire": wire}}),
    )
    check_equal(spec, tmp_path, replay=True)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "resnet"])
@pytest.mark.parametrize("stages", [2, 3])
def test_a_split_job_of_an_untied_model_runs_in_a_ring(
    family: str, stages: int, tmp_path: Path
) -> None:
    spec = family_spec(family, stages, **(BASE | {"privacy": "split"}))
    assert spec.is_ring
    assert [spec.reads_text(stage) for stage in range(stages)] == [True] + [False] * (stages - 1)
    check_equal(spec, tmp_path, replay=True)
