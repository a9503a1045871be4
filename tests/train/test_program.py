"""Data order, schedules, the initial draw and the optimizer: the program's own arithmetic."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.train import limits
from tdmld.train.data import Tokens, step_indices, window_index
from tdmld.train.draw import draw_normal, draw_weight
from tdmld.train.errors import FileError, NumericsError
from tdmld.train.numerics import check_environment, pinned_environment, program_hash
from tdmld.train.schedule import learning_rate, one_f_one_b, step_frames, step_scalars
from tests.train.support import TEXT, make_spec, spec_document, tokens_of


def test_a_window_never_reads_held_out_text() -> None:
    spec = make_spec()
    found = [i for step in range(200) for i in step_indices(spec, 0, step)]
    assert min(found) >= 0
    assert max(found) + spec.data.sequence + 1 <= spec.train_tokens
    assert len(set(found)) > len(found) // 2


def test_window_indices_are_those_of_the_annex() -> None:
    spec = make_spec()
    seed = blake3(b"tdmld data 1" + struct.pack("!5Q", 7, 0, 3, 1, 1)).digest()
    expected = int.from_bytes(seed[:8], "big") % (spec.train_tokens - 12)
    assert window_index(spec, 0, 3, 1, 1) == expected


def test_windows_cross_shard_borders(tmp_path: Path) -> None:
    text = bytes(range(256)) * 5000
    document = spec_document(text)
    spec = make_spec(data=document["data"])
    whole = tmp_path / "text"
    whole.write_bytes(text)
    edge = limits.SHARD_BYTES
    with whole.open("rb") as file:
        mapped = Tokens.from_memory(spec, file.fileno())
    for tokens in (mapped, Tokens.from_text(spec, whole)):
        assert tokens.window(edge - 5, 12) == text[edge - 5 : edge + 7]
        assert tokens.root.hex() == spec.data.root
        with pytest.raises(IndexError):
            tokens.window(len(text) - 5, 6)


@pytest.mark.parametrize("text", [TEXT[:-1], TEXT[:-1] + b"x", TEXT * 40])
def test_other_data_than_the_spec_names_is_refused(text: bytes) -> None:
    with pytest.raises(FileError):
        tokens_of(make_spec(), text)


@given(st.integers(1, 6), st.integers(1, 12), st.data())
@settings(max_examples=60)
def test_1f1b_runs_each_micro_batch_forward_then_backward(
    stages: int, micro_batches: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    order = one_f_one_b(stages, stage, micro_batches)
    for kind in "FB":
        assert [n for k, n in order if k == kind] == list(range(micro_batches))
    open_now = 0
    for kind, _ in order:
        open_now += 1 if kind == "F" else -1
        assert 0 <= open_now <= min(stages - stage, micro_batches)


def test_a_middle_stage_meets_four_frames_a_micro_batch() -> None:
    spec = make_spec(pipeline__cuts=[0, 1, 2, 4])
    frames = step_frames(spec, 0, 1, 2)
    assert len(set(frames)) == len(frames) == 16
    assert {frame.seq for frame in frames} == {8, 9, 10, 11}
    assert frames[0] == ("up", "received", 8)
    assert len(step_frames(spec, 0, 0, 2)) == 8


def test_the_learning_rate_warms_up_holds_and_decays_to_its_floor() -> None:
    spec = make_spec()
    rates = [learning_rate(spec, step) / Fraction("0.01") for step in range(6)]
    assert rates == [Fraction(1, 2), 1, 1, 1, Fraction(55, 100), Fraction(1, 10)]


def test_optimizer_scalars_are_correctly_rounded() -> None:
    spec = make_spec()
    for step in range(6):
        found, left = step_scalars(spec, step), 1 - Fraction("0.9") ** (step + 1)
        assert found.step_size == float(learning_rate(spec, step) / left)
        assert found.decay == float(1 - learning_rate(spec, step) * Fraction("0.1"))
        assert found.root_correction == pytest.approx((1 - 0.95 ** (step + 1)) ** 0.5, rel=1e-15)


def test_the_draw_is_the_one_of_the_annex() -> None:
    key = blake3(b"tdmld init 1" + (7).to_bytes(8, "big") + b"some.weight").digest()
    stream = blake3(b"", key=key).digest(length=8 * 5)
    sums = [sum(struct.unpack_from("<4H", stream, 8 * n)) for n in range(5)]
    scale = np.float32(0.02 / 37837.23)
    expected = [np.float32(value - 131070) * scale for value in sums]
    assert draw_normal(7, "some.weight", 5, 0.02).tolist() == [float(v) for v in expected]


def test_the_draw_depends_on_seed_and_name_alone_and_is_nearly_normal() -> None:
    many = draw_normal(7, "w", 300_000, 1.0)
    assert np.array_equal(draw_normal(7, "w", 1000, 1.0), many[:1000])
    assert not np.array_equal(draw_normal(8, "w", 1000, 1.0), many[:1000])
    assert not np.array_equal(draw_normal(7, "v", 1000, 1.0), many[:1000])
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01


def test_norms_start_at_one() -> None:
    spec = make_spec()
    by_name = {weight.name: weight for weight in spec.weights(1)}
    assert (draw_weight(spec, by_name["model.norm.weight"]) == 1).all()
    assert draw_weight(spec, by_name["lm_head.weight"]).shape == (256, 16)


def test_adamw_agrees_with_torch() -> None:
    import torch

    from tdmld.train.optimizer import adamw_step, clip_gradients, gradient_norm

    spec = make_spec(train__schedule__warmup=0, train__schedule__decay_from=6)
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(40, 7, generator=generator)
    theirs = torch.nn.Parameter(ours.clone())
    other = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    first, second = torch.zeros(40, 7), torch.zeros(40, 7)
    for step in range(6):
        gradient = torch.randn(40, 7, generator=generator)
        theirs.grad = gradient.clone()
        other.step()
        adamw_step([ours], [gradient], [first], [second], step_scalars(spec, step))
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)

    gradients = [torch.full((3,), 3.0), torch.full((1,), 6.0)]
    norm = gradient_norm(gradients)
    assert norm == pytest.approx(63**0.5)
    clip_gradients(gradients, norm, 100.0)
    assert float(gradients[1]) == 6.0
    clip_gradients(gradients, norm, 1.0)
    assert gradient_norm(gradients) == pytest.approx(1.0)


def test_the_environment_is_pinned_and_checked() -> None:
    environment = pinned_environment({"HOME": "/x", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "8"})
    assert environment["HOME"] == "/x"
    check_environment(environment)
    for wrong in ({"OMP_NUM_THREADS": "2"}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        with pytest.raises(NumericsError, match=next(iter(wrong))):
            check_environment(environment | wrong)


def test_the_program_hash_names_zlib_where_frames_are_deflated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    specs = [make_spec(train__wire=wire) for wire in ("bf16", "bf16+zlib")]
    before = [program_hash(spec) for spec in specs]
    monkeypatch.setattr("zlib.ZLIB_RUNTIME_VERSION", "9")
    after = [program_hash(spec) for spec in specs]
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


def test_the_program_hash_names_the_spec() -> None:
    assert program_hash(make_spec()) == program_hash(make_spec())
    assert program_hash(make_spec()) != program_hash(make_spec(seed=8))
