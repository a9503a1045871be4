"""A job whose tokens have two or four bytes."""

from pathlib import Path

import numpy as np
import pytest

from tdmld.train.data import cut_shards, step_indices, window_index
from tdmld.train.errors import SegmentFault, SpecError
from tdmld.train.evaluate import heldout_starts
from tdmld.train.families import FAMILIES
from tdmld.train.spec import Spec, decode_spec
from tests.train.support import (
    CONFIG,
    SHORT,
    TEXT,
    encode_document,
    make_spec,
    run_pipeline,
    spec_document,
    tokens_of,
)

VOCABULARY = 70_000
NUMBERS = np.random.default_rng(3).integers(0, VOCABULARY, 3000)


def token_spec(width: int, vocabulary: int = VOCABULARY, **changes: object) -> tuple[Spec, bytes]:
    raw = (NUMBERS % vocabulary).astype(f"<u{width}").tobytes()
    more: dict[str, object] = {
        "config": FAMILIES["llama"].canonical(CONFIG | {"vocab_size": vocabulary}),
        "data__tokenizer": "tokens",
        "data__width": width,
    }
    return decode_spec(encode_document(spec_document(raw, **more, **changes))), raw


@pytest.mark.parametrize(("width", "vocabulary"), [(2, 600), (4, VOCABULARY)])
def test_tokens_give_the_bits_of_the_reference(width: int, vocabulary: int, tmp_path: Path) -> None:
    from tdmld.train.reference import run_reference

    spec, raw = token_spec(width, vocabulary, **SHORT)
    data = tokens_of(spec, raw)
    records = run_pipeline(spec, data, tmp_path / "live")
    found = run_reference(spec, data, tmp_path / "reference")
    for stage, own in enumerate(records):
        for segment, record in enumerate(own):
            roots = found.boundaries[segment + 1][f"0.{stage}"]
            assert (record.end_shared, record.end_lane) == roots


def test_windows_are_whole_tokens_before_the_held_out_part() -> None:
    spec, raw = token_spec(4)
    data = tokens_of(spec, raw)
    for start in step_indices(spec, 0, 3):
        window = np.frombuffer(data.window(start, spec.window_bytes), dtype="<u4")
        assert start % 4 == 0
        assert list(window) == list(NUMBERS[start // 4 : start // 4 + 13])
        assert start + spec.window_bytes <= spec.train_tokens
    assert spec.heldout_tokens == 4 * 300
    assert heldout_starts(spec.train_tokens, spec.heldout_tokens, 12, 4)[:2] == [10_800, 10_848]


def test_every_window_of_the_training_part_can_be_drawn() -> None:
    spec, _ = token_spec(2, 600)
    assert spec.window(0) == 0
    last = (spec.train_tokens - spec.window_bytes) // 2
    assert spec.window(last) == 2 * last
    assert spec.window(last + 1) == 0


def test_windows_of_bytes_are_where_they_always_were() -> None:
    spec = make_spec()
    assert [window_index(spec, 0, 1, 2, n) for n in range(3)] == [20069, 12861, 25736]


def test_a_token_beyond_the_vocabulary_is_a_fault(tmp_path: Path) -> None:
    from tdmld.train.reference import run_reference

    spec, _ = token_spec(2, 600, **SHORT)
    raw = NUMBERS.astype("<u2").tobytes()
    document = spec_document(
        raw, config=spec.config, data__tokenizer="tokens", data__width=2, **SHORT
    )
    spec = decode_spec(encode_document(document))
    with pytest.raises(SegmentFault, match="token"):
        run_pipeline(spec, tokens_of(spec, raw), tmp_path / "live")
    with pytest.raises(SegmentFault, match="token"):
        run_reference(spec, tokens_of(spec, raw), tmp_path / "reference")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data__tokenizer": "bytes"}, "data.width"),
        ({"data__tokenizer": "images"}, "data.tokenizer"),
        ({"data__width": 3}, "data.width"),
        ({"data__tokens": 6001}, "data.tokens"),
    ],
)
def test_widths_that_do_not_fit_are_refused(changes: dict[str, object], field: str) -> None:
    raw = NUMBERS.astype("<u2").tobytes()
    base = {"data__tokenizer": "tokens", "data__width": 2} | changes
    with pytest.raises(SpecError) as caught:
        decode_spec(encode_document(spec_document(raw, **base)))
    assert caught.value.field == field


def test_a_model_of_bytes_may_know_more_than_bytes() -> None:
    config = FAMILIES["llama"].canonical(CONFIG | {"vocab_size": 300})
    assert make_spec(config=config).data.width == 1
    assert len(list(cut_shards(TEXT))) == 1
