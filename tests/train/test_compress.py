"""Contributions: what is kept, what comes back, and that rubbish is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.train.compress import Place, decode_contribution, encode_contribution, read_contribution
from tdmld.train.contribution import HEAD
from tdmld.train.digest import digest
from tdmld.train.errors import FileError
from tdmld.train.outer import clip_factors, combine, outer_step, robustness
from tdmld.train.spec import Spec, stage_parameters
from tests.train.support import family_spec, make_spec
from tests.train.test_spec import DILOCO, OUTER

PLACE = Place(1, 0, 3)


def spec_of(density: int = 64, bits: int = 2, family: str = "llama") -> Spec:
    outer = OUTER | {"density": density, "bits": bits}
    return family_spec(family, 2, pipeline__lanes=DILOCO | {"outer": outer})


def delta_of(spec: Spec, seed: int = 0) -> Any:
    values = stage_parameters(spec, PLACE.stage)
    return np.random.default_rng(seed).standard_normal(values).astype(np.float32)


def buffers_of(spec: Spec) -> Any:
    return np.arange(spec.float_buffers(PLACE.stage), dtype=np.float32)


def dense(spec: Spec, raw: bytes) -> Any:
    found = decode_contribution(spec, PLACE, raw)
    whole = np.zeros(stage_parameters(spec, PLACE.stage), np.float32)
    whole[found.places] = found.values
    return whole


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("density", [1, 3, 64, 4095, 4096])
@pytest.mark.parametrize("family", ["llama", "resnet"])
def test_the_greatest_values_come_back_rounded(family: str, density: int, bits: int) -> None:
    spec = spec_of(density, bits, family)
    delta = delta_of(spec)
    raw = encode_contribution(spec, PLACE, delta, buffers_of(spec))
    assert len(raw) == spec.contribution_bytes(0)
    found = decode_contribution(spec, PLACE, raw)
    assert found.identity == digest(raw)
    assert (found.buffers == buffers_of(spec)).all()
    for at in range(0, delta.size, 4096):
        chunk = delta[at : at + 4096]
        kept = found.places[(found.places >= at) & (found.places < at + 4096)] - at
        expected = sorted(np.argsort(-np.abs(chunk), kind="stable")[:density])
        assert list(kept) == expected
    picked = delta[found.places]
    error = np.linalg.norm(found.values - picked) / np.linalg.norm(picked)
    assert error < (0.01 if bits == 8 else 0.5)
    assert found.norm == pytest.approx(float(np.linalg.norm(found.values)), rel=1e-5)


def test_among_equals_the_first_are_kept() -> None:
    spec = spec_of(density=5)
    delta = np.ones_like(delta_of(spec))
    delta[10] = -2.0
    delta[1:4] = -1.0
    found = decode_contribution(
        spec, PLACE, encode_contribution(spec, PLACE, delta, buffers_of(spec))
    )
    assert list(found.places[:5]) == [0, 1, 2, 3, 10]
    assert list(found.values[:5]) == [1.0, -1.0, -1.0, -1.0, -2.0]


@pytest.mark.parametrize("bits", [2, 8])
def test_nothing_and_next_to_nothing_survive(bits: int) -> None:
    spec = spec_of(bits=bits)
    for value in (0.0, -0.0, 1e-45, -3e38):
        delta = np.full_like(delta_of(spec), value)
        back = dense(spec, encode_contribution(spec, PLACE, delta, buffers_of(spec)))
        assert np.isfinite(back).all()
        assert back[0] == pytest.approx(value, rel=1e-2)


def test_the_bytes_are_as_many_times_fewer_as_the_format_says() -> None:
    spec = spec_of()
    whole, rest = divmod(stage_parameters(spec, 0), 4096)
    assert spec.contribution_bytes(0) == HEAD.size + (whole + bool(rest)) * (
        8 + (64 * 6 + 64 + 64) // 8 + 16
    )


def test_a_delta_that_is_not_finite_or_of_another_size_is_no_contribution() -> None:
    spec = spec_of()
    delta = delta_of(spec)
    with pytest.raises(ValueError, match="values"):
        encode_contribution(spec, PLACE, delta[1:], buffers_of(spec))
    delta[7] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        encode_contribution(spec, PLACE, delta, buffers_of(spec))


@settings(max_examples=200)
@given(st.data())
def test_changed_bytes_are_refused_or_another_contribution(data: st.DataObject) -> None:
    """Whatever passes is finite, in order, and known by another id."""
    spec = spec_of(bits=data.draw(st.sampled_from([2, 8])))
    good = encode_contribution(spec, PLACE, delta_of(spec), buffers_of(spec))
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    try:
        found = decode_contribution(spec, PLACE, bytes(raw[: len(raw) - cut]))
    except FileError:
        return
    assert not cut
    assert (np.diff(found.places) > 0).all()
    assert found.places[-1] < stage_parameters(spec, 0)
    assert np.isfinite(found.values).all()
    assert (found.identity == digest(good)) == (bytes(raw) == good)


def test_what_an_attacker_would_write_is_refused(tmp_path: Any) -> None:
    spec = spec_of(bits=2)
    raw = encode_contribution(spec, PLACE, delta_of(spec), buffers_of(spec))

    def changed(at: int, value: bytes) -> bytes:
        return raw[:at] + value + raw[at + len(value) :]

    infinite, negative = np.float32(np.inf).tobytes(), np.float32(-1).tobytes()
    indices = HEAD.size + 8 * -(-stage_parameters(spec, 0) // 4096)
    for bad, why in (
        (b"", "0 bytes"),
        (raw + b"\0", "bytes"),
        (changed(8, b"\0\0\0\0"), "head"),
        (changed(HEAD.size, infinite), "scales"),
        (changed(HEAD.size, negative), "scales"),
        (changed(HEAD.size, np.float32(1e30).tobytes()), "scales"),  # above the high one
        (changed(indices, bytes(48) + b"\xff" * 8 + bytes(8)), "order"),  # all of them 0
        (changed(indices + 48, b"\xff" * 16), "wrong indices"),
    ):
        with pytest.raises(FileError, match=why):
            decode_contribution(spec, PLACE, bad)
    eight = spec_of(bits=8)
    wide = bytearray(encode_contribution(eight, PLACE, delta_of(eight), buffers_of(eight)))
    wide[HEAD.size : HEAD.size + 4] = np.float32(3e38).tobytes()
    with pytest.raises(FileError, match="too large"):
        decode_contribution(eight, PLACE, bytes(wide))
    with pytest.raises(FileError, match="No such file"):
        read_contribution(spec, PLACE, tmp_path / "none")
    (tmp_path / "long").write_bytes(raw + bytes(100))
    with pytest.raises(FileError, match="bytes"):
        read_contribution(spec, PLACE, tmp_path / "long")
    with pytest.raises(FileError, match="head"):
        decode_contribution(spec, Place(0, 0, 3), raw)


def test_no_minority_of_three_lanes_moves_the_mean_far() -> None:
    assert clip_factors([1.0]) == (1.0,)
    assert clip_factors([1.0, 1.5]) == (1.0, 1.0)
    assert clip_factors([1.0, 100.0]) == (1.0, 0.02)
    assert clip_factors([1.0, 100.0, 2.0]) == (1.0, 0.02, 1.0)
    assert clip_factors([4.0, 1.0, 2.0, 8.0]) == (0.5, 1.0, 1.0, 0.25)
    assert clip_factors([0.0, 5.0]) == (1.0, 0.0)
    assert "median" in robustness(3)
    assert "needs three" in robustness(2)


def test_the_mean_is_weighted_and_the_step_is_nesterovs() -> None:
    import torch

    spec = make_spec(pipeline__lanes=DILOCO | {"outer": OUTER | {"density": 4096, "bits": 8}})
    values = stage_parameters(spec, 0)
    made = []
    for lane, level in enumerate((1.0, -2.0)):
        place = Place(lane, 0, 0)
        raw = encode_contribution(
            spec, place, np.full(values, level, np.float32), np.zeros(0, np.float32)
        )
        made.append(decode_contribution(spec, place, raw))
    mean, _ = combine(made, (3, 1), values)
    assert mean == pytest.approx(np.full(values, 0.25))
    weight, moment = torch.zeros(values), torch.ones(values)
    outer_step([weight], [moment], mean, spec.outer)
    assert moment.numpy() == pytest.approx(np.full(values, 0.9 + 0.25))
    assert weight.numpy() == pytest.approx(np.full(values, -0.7 * (0.25 + 0.9 * 1.15)))
