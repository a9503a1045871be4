"""Lanes: every one of them, cut into stages, against one process that plays them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tdmld.train.digest import digest
from tdmld.train.errors import FileError, SegmentFault
from tests.train.support import check_equal, family_spec, going_on, published, tokens_of

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


class Sibling:
    """A channel whose other lane says one and the same thing."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def receive(self, link: str, seq: int) -> bytes:
        return self.payload

    def release(self, link: str, seq: int) -> None:
        """Nothing to free."""

    def send(self, link: str, seq: int, payload: memoryview) -> None:
        """Nobody listens."""


def slot_of(spec: Any, lane: int = 0) -> Any:
    from tdmld.train.slot import Slot

    slot = Slot.create(spec, 0, lane, tokens_of(spec))
    slot.init_from_seed()
    return slot


@pytest.mark.parametrize(
    ("payload", "reason"), [(b"short", "size"), (None, "nonfinite")], ids=["size", "nonfinite"]
)
def test_what_a_sibling_must_not_send_is_a_fault(payload: bytes | None, reason: str) -> None:
    from tdmld.train.runner import run_segment

    spec = spec_of("llama", 1, "sync", 2, "fp32")
    if payload is None:
        payload = b"\xff" * spec.link_frame_bytes(0, "lane1")
    with pytest.raises(SegmentFault) as caught:
        run_segment(slot_of(spec), 0, Sibling(payload))
    assert (caught.value.reason, caught.value.step) == (reason, 0)


def test_an_outer_step_needs_the_contributions_that_the_chain_named(tmp_path: Path) -> None:
    from tdmld.train.runner import run_segment

    spec = spec_of("llama", 1, "diloco", 2, "fp32")
    slot, told = slot_of(spec), tmp_path / "told"
    for wrong in ({"included": (0,)}, {"included": ()}, {"included": (0, 0)}):
        with pytest.raises(ValueError, match=r"lanes|directory"):
            run_segment(slot, 0, Sibling(b""), **wrong)
    record = run_segment(slot, 0, Sibling(b""), contributions=told)
    assert digest((told / "0.0").read_bytes()) == record.contribution
    assert record.end_shared == record.start_shared
    start = tmp_path / "start"
    slot.save(start)
    for wrong in ({"included": ()}, {"included": (1, 0)}, {"included": (0, 2)}):
        with pytest.raises(ValueError, match="lanes"):
            run_segment(slot, 1, Sibling(b""), contributions=told, **wrong)
    with pytest.raises(FileError, match=r"contribution .*0\.1"):
        run_segment(slot, 1, Sibling(b""), contributions=told, included=(0, 1))
    (told / "0.1").write_bytes((told / "0.0").read_bytes())  # another lane's
    slot.load(start)
    with pytest.raises(FileError, match="head is another"):
        run_segment(slot, 1, Sibling(b""), contributions=told, included=(0, 1))
    slot.load(start)
    after = run_segment(slot, 1, Sibling(b""), contributions=told, included=(0,))
    assert after.end_shared != after.start_shared
    last = run_segment(slot, 2, Sibling(b""), contributions=told, included=(0,))
    assert (last.steps, last.contribution, last.loss_micro) == ((), b"", None)
