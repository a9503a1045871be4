"""Every family, cut in every way, against its own unsplit model, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from tdmld.train.export import merge_states
from tdmld.train.families import FAMILIES
from tdmld.train.spec import Spec
from tdmld.train.statefile import part_file
from tests.train.support import FAMILY_CONFIGS, family_spec, run_pipeline, text_of, tokens_of

SHORT: dict[str, Any] = {
    "train__steps": 2,
    "pipeline__segment_steps": 1,
    "train__schedule__decay_from": 2,
}


def check_equal(spec: Spec, root: Path, given: Path | None = None) -> None:
    """Run the job cut and whole; every root, loss and byte of the result must be the same."""
    from tdmld.train.reference import run_reference

    data = tokens_of(spec, text_of(spec.family))
    records = run_pipeline(spec, data, root / "live")
    reference = run_reference(spec, data, root / "reference", given=given)
    for stage, own in enumerate(records):
        for segment, record in enumerate(own):
            before, after = reference.boundaries[segment : segment + 2]
            assert (record.start_shared, record.start_lane) == before[f"0.{stage}"]
            assert (record.end_shared, record.end_lane) == after[f"0.{stage}"]
    told = [own for own in records if own[0].has_loss]
    assert [loss for own in told for record in own for loss in record.losses or ()] == list(
        reference.losses
    )
    final = [root / "live" / str(n) / "state" / str(spec.rounds) for n in range(spec.stages)]
    merged = merge_states(spec, [place / part_file("shared") for place in final], root / "out")
    assert merged.result_id == reference.result.result_id


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cut_family_equals_its_unsplit_model_bit_for_bit(
    family: str, stages: int, tmp_path: Path
) -> None:
    check_equal(family_spec(family, stages, **SHORT), tmp_path)


def test_every_family_is_tried() -> None:
    assert set(FAMILY_CONFIGS) == set(FAMILIES)
