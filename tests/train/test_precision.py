"""bfloat16 products and recomputed activations: the same bits, cut or whole."""

from pathlib import Path

import pytest

from tdmld.train.errors import SpecError
from tests.train.support import (
    FAMILY_CONFIGS,
    SHORT,
    check_equal,
    family_spec,
    make_spec,
    run_pipeline,
    tokens_of,
)

MIXED = {**SHORT, "train__precision": "bf16"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "resnet"])
def test_bf16_cut_and_whole_are_equal(family: str, tmp_path: Path) -> None:
    check_equal(family_spec(family, 3, **MIXED), tmp_path, replay=True)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_bf16_is_exact_for_every_family(family: str, stages: int, tmp_path: Path) -> None:
    check_equal(family_spec(family, stages, **MIXED, train__wire="fp32"), tmp_path)


def test_bf16_rounds(tmp_path: Path) -> None:
    spec = make_spec(**SHORT)
    exact = run_pipeline(spec, tokens_of(spec), tmp_path / "exact")
    spec = make_spec(**MIXED)
    mixed = run_pipeline(spec, tokens_of(spec), tmp_path / "mixed")
    first, second = (found[-1][0].losses for found in (exact, mixed))
    assert first is not None
    assert second is not None
    assert first != second
    assert first[0] == pytest.approx(second[0], abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_recomputed_activations_change_no_bit(family: str, precision: str, tmp_path: Path) -> None:
    kept = family_spec(family, 2, **SHORT, train__precision=precision)
    again = family_spec(family, 2, **SHORT, train__precision=precision, train__recompute=True)
    data = tokens_of(kept)
    first, second = (
        run_pipeline(spec, data, tmp_path / name)
        for spec, name in ((kept, "kept"), (again, "again"))
    )
    assert first == second  # every record: roots of states, gradients, frames, losses


def test_batch_norms_are_not_computed_twice() -> None:
    with pytest.raises(SpecError, match=r"train\.recompute"):
        family_spec("resnet", 2, train__recompute=True)
