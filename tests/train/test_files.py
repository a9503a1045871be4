"""Frame logs, snapshots and digest lists: what survives, and what is refused."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tdmld.train.errors import FileError
from tdmld.train.framelog import HEADER, FrameLogWriter, read_frames
from tdmld.train.segment import (
    LinkRoots,
    SegmentRecord,
    StepDigests,
    bits_loss,
    loss_bits,
    read_list,
    write_list,
)
from tdmld.train.statefile import (
    StateFile,
    TensorData,
    keyed_state_hash,
    read_manifest,
    write_safetensors,
)

LIMIT = 64
FRAMES = [(4, b"a" * 10), (5, b"b" * 64), (9, b"c")]


def write_log(path: Path) -> bytes:
    with FrameLogWriter(path, LIMIT) as log:
        for seq, payload in FRAMES:
            log.append(seq, bytes([seq]) * 64, payload)
    return path.read_bytes()


def frames(path: Path) -> list[tuple[int, bytes]]:
    return [(frame.seq, frame.payload) for frame in read_frames(path, LIMIT)]


def test_a_log_gives_back_its_frames(tmp_path: Path) -> None:
    write_log(tmp_path / "log")
    assert frames(tmp_path / "log") == FRAMES
    assert next(read_frames(tmp_path / "log", LIMIT)).signature == bytes([4]) * 64


def test_a_torn_tail_is_ignored_and_cut_off_wherever_it_tore(tmp_path: Path) -> None:
    raw = write_log(tmp_path / "log")
    for length in range(len(raw)):
        (tmp_path / "torn").write_bytes(raw[:length])
        kept = frames(tmp_path / "torn")
        assert kept == FRAMES[: len(kept)]
        with FrameLogWriter(tmp_path / "torn", LIMIT) as log:
            assert log.last == (kept[-1][0] if kept else -1)
            log.append(10, bytes(64), b"new")
        assert frames(tmp_path / "torn") == [*kept, (10, b"new")]


def test_zeros_after_a_crash_end_the_log(tmp_path: Path) -> None:
    raw = write_log(tmp_path / "log")
    (tmp_path / "log").write_bytes(raw + bytes(4096))
    assert frames(tmp_path / "log") == FRAMES


@pytest.mark.parametrize(
    "tail",
    [HEADER.pack(10, LIMIT + 1, b"", b""), HEADER.pack(9, 1, b"", b"") + b"x"],
    ids=["oversized", "repeated"],
)
def test_an_oversized_or_repeated_frame_is_refused(tmp_path: Path, tail: bytes) -> None:
    raw = write_log(tmp_path / "log")
    (tmp_path / "log").write_bytes(raw + tail)
    with pytest.raises(FileError):
        frames(tmp_path / "log")
    with pytest.raises(FileError):
        FrameLogWriter(tmp_path / "log", LIMIT)


def resumed(path: Path, first: int) -> list[int]:
    with FrameLogWriter(path, LIMIT, first) as log:
        assert log.last == (log.kept[-1].seq if log.kept else -1)
        return [entry.seq for entry in log.kept]


def test_who_goes_on_with_a_log_keeps_what_follows_without_a_gap_and_is_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    raw = write_log(path)
    assert resumed(path, 4) == [4, 5]
    assert frames(path) == FRAMES[:2]
    path.write_bytes(raw)
    assert resumed(path, 3) == []
    assert path.stat().st_size == 0
    for at in range(HEADER.size, HEADER.size + 10):
        spoiled = bytearray(raw)
        spoiled[at] ^= 1
        path.write_bytes(spoiled)
        assert resumed(path, 4) == []
    path.write_bytes(raw + HEADER.pack(6, LIMIT + 1, b"", b""))
    assert resumed(path, 4) == [4, 5]


@pytest.mark.parametrize(("seq", "payload"), [(9, b"x"), (10, b""), (10, b"x" * 65)])
def test_the_writer_refuses_what_a_reader_would(tmp_path: Path, seq: int, payload: bytes) -> None:
    write_log(tmp_path / "log")
    with FrameLogWriter(tmp_path / "log", LIMIT) as log, pytest.raises(ValueError, match="frame"):
        log.append(seq, bytes(64), payload)


TENSORS = [
    TensorData("b.weight", "F32", (2, 3), struct.pack("<6f", *range(6))),
    TensorData("a.weight", "F32", (4,), struct.pack("<4f", *range(4))),
    TensorData("step", "I64", (), (7).to_bytes(8, "little")),
]


def test_a_snapshot_is_a_safetensors_file_and_the_same_whenever_written(tmp_path: Path) -> None:
    path = tmp_path / "lane.safetensors"
    write_safetensors(path, TENSORS)
    again = tmp_path / "again"
    write_safetensors(again, TENSORS[::-1])
    assert again.read_bytes() == path.read_bytes()
    loaded = load_file(path)
    assert loaded["b.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert int(loaded["step"]) == 7
    with StateFile(path) as file:
        assert [tensor.name for tensor in file] == ["a.weight", "b.weight", "step"]


def test_the_keyed_hash_covers_every_leaf_byte(tmp_path: Path) -> None:
    path = tmp_path / "lane.safetensors"
    write_safetensors(path, TENSORS)
    data = b"".join(bytes(t.data) for t in sorted(TENSORS))
    assert keyed_state_hash(b"k" * 32, [path]) == blake3(data, key=b"k" * 32).digest()
    assert keyed_state_hash(b"k" * 32, [path]) != keyed_state_hash(b"l" * 32, [path])


def test_a_changed_byte_changes_the_root_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lane.safetensors"
    write_safetensors(path, TENSORS)
    raw, root = path.read_bytes(), read_manifest(path).root
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        path.write_bytes(changed)
        with suppress(FileError):
            assert read_manifest(path).root != root
        path.write_bytes(raw[:at])
        with pytest.raises(FileError):
            read_manifest(path)


def hostile(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 16,
        hostile(b"[" * 10_000),
        hostile({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"x" * 8),
        hostile({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
        hostile({"w": {"dtype": "PICKLE", "shape": [0], "data_offsets": [0, 0]}}),
        hostile({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"x" * 8),
        hostile({"w" * 300: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        hostile({"w": 3}),
    ],
)
def test_a_hostile_snapshot_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "shared.safetensors").write_bytes(raw)
    with pytest.raises(FileError):
        read_manifest(tmp_path / "shared.safetensors")


def test_a_snapshot_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "lane.safetensors", TENSORS)
    with pytest.raises(FileError, match="at most 100"):
        read_manifest(tmp_path / "lane.safetensors", 100)


RECORD = SegmentRecord(
    segment=3,
    start_shared=bytes(32),
    start_lane=b"\1" * 32,
    end_shared=b"\2" * 32,
    end_lane=b"\3" * 32,
    link_roots=(LinkRoots("up", b"\4" * 32, b"\5" * 32),),
    has_loss=True,
    steps=(StepDigests(9, (b"\6" * 32,), b"\7" * 32, b"\x08" * 32, loss_bits(2.5)),),
)


def test_a_digest_list_survives_the_disk(tmp_path: Path) -> None:
    write_list(tmp_path / "3", RECORD, b"salt")
    stored = read_list(tmp_path / "3")
    assert (stored.record, stored.salt) == (RECORD, b"salt")
    assert stored.record.losses == (2.5,)
    assert stored.record.loss_micro == 2_500_000


def test_a_corrupt_missing_or_oversized_list_is_refused(tmp_path: Path) -> None:
    write_list(tmp_path / "3", RECORD)
    raw = (tmp_path / "3").read_bytes()
    with pytest.raises(FileError, match="at most 10"):
        read_list(tmp_path / "3", 10)
    for bad in (raw[:-1], raw + b"\0", b"\x92\xc4\x00\x93", b"\x91" * 5000, b""):
        (tmp_path / "3").write_bytes(bad)
        with pytest.raises(FileError):
            read_list(tmp_path / "3")
    with pytest.raises(FileError):
        read_list(tmp_path / "none")


@given(st.floats(width=32, allow_nan=False))
@settings(max_examples=50)
def test_loss_bits_are_exact(loss: float) -> None:
    assert bits_loss(loss_bits(loss)) == loss
