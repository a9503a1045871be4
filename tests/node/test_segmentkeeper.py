"""A worker goes on while what it finished is synced; nothing is said before it is on disk."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdmld import files
from tdmld.node.channel import Segment, WorkerChannel, decode_packet
from tdmld.node.layout import list_file, state
from tdmld.node.segmentkeeper import SegmentKeeper, keep_list
from tdmld.train.data import Tokens, cut_shards
from tdmld.train.errors import FileError
from tdmld.train.segment import SegmentRecord, read_list
from tdmld.train.slot import Slot
from tdmld.train.spec import decode_spec
from tdmld.train.statefile import read_manifest
from tests.train.support import TEXT, encode_document, spec_document

SPEC = decode_spec(encode_document(spec_document()))


@pytest.fixture
def ends() -> Iterator[tuple[WorkerChannel, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        yield WorkerChannel(ours, None), theirs


@pytest.fixture
def slot() -> Slot:
    made = Slot.create(SPEC, 0, 0, Tokens(SPEC, list(cut_shards(TEXT))))
    made.init_from_seed()
    return made


def record_of(slot: Slot, number: int) -> SegmentRecord:
    shared, lane = slot.roots()
    return SegmentRecord(number, shared, lane, shared, lane, (), False, ())


def heard(end: socket.socket) -> list[int]:
    found = []
    while True:
        try:
            packet = decode_packet(end.recv(256))
        except BlockingIOError:
            return found
        assert isinstance(packet, Segment)
        found.append(packet.segment)


def test_the_slot_changes_meanwhile_and_the_state_is_the_one_that_was(
    tmp_path: Path,
    slot: Slot,
    ends: tuple[WorkerChannel, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is slow: until it is done there is no state, no list and no word."""
    list_file(tmp_path, 0).parent.mkdir(parents=True)
    may, real = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert may.wait(60)
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", slow)
    channel, told = ends
    place, record = state(tmp_path, 1), record_of(slot, 0)
    with SegmentKeeper(tmp_path, channel) as keeper:
        keeper.wait()
        keeper.keep(record, slot.begin_save(place))
        for weight in slot.weights:
            weight.data.add_(1)
        slot.touch()
        assert slot.roots()[0] != record.end_shared
        assert not (place / "shared.safetensors").exists()
        assert not list_file(tmp_path, 0).exists()
        assert heard(told) == []
        may.set()
        keeper.wait()
        assert heard(told) == [0]
    assert read_manifest(place / "shared.safetensors").root == record.end_shared
    assert read_manifest(place / "lane.safetensors").root == record.end_lane
    stored = read_list(list_file(tmp_path, 0))
    assert stored.record == record
    assert len(stored.salt) == 32
    assert sorted(path.name for path in place.iterdir()) == [
        "lane.safetensors",
        "shared.safetensors",
    ]


def test_a_full_disk_comes_out_of_the_next_wait_and_leaves_no_half_files(
    tmp_path: Path,
    slot: Slot,
    ends: tuple[WorkerChannel, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    channel, told = ends
    place = state(tmp_path, 1)
    with SegmentKeeper(tmp_path, channel) as keeper:
        begun = slot.begin_save(place)
        monkeypatch.setattr(files.os, "fsync", full)
        keeper.keep(record_of(slot, 0), begun)
        with pytest.raises(OSError, match="No space"):
            keeper.wait()
        keeper.wait()  # said once
    assert heard(told) == []
    assert list(place.iterdir()) == []
    assert not list_file(tmp_path, 0).exists()


def test_a_segment_that_is_run_again_keeps_its_list_or_ends_the_worker(
    tmp_path: Path, slot: Slot, ends: tuple[WorkerChannel, socket.socket]
) -> None:
    list_file(tmp_path, 0).parent.mkdir(parents=True)
    channel, told = ends
    with SegmentKeeper(tmp_path, channel) as keeper:
        keeper.keep(record_of(slot, 0), slot.begin_save(state(tmp_path, 1)))
        keeper.wait()
        before = list_file(tmp_path, 0).read_bytes()
        keeper.keep(record_of(slot, 0), slot.begin_save(state(tmp_path, 1)))
        keeper.wait()
        assert list_file(tmp_path, 0).read_bytes() == before
        other = SegmentRecord(0, bytes(32), bytes(32), bytes(32), bytes(32), (), False, ())
        keeper.keep(other, slot.begin_save(state(tmp_path, 1)))
        with pytest.raises(FileError, match="not reliable"):
            keeper.wait()
    assert heard(told) == [0, 0]


def test_a_list_that_cannot_be_read_now_is_not_written_anew(
    tmp_path: Path, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The salt of its seal may be on the chain."""
    path, opened = tmp_path / "0", Path.open
    keep_list(path, record_of(slot, 0))
    before = path.read_bytes()

    def broken(self: Path, *arguments: object) -> object:
        if self == path:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(self, *arguments)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        with pytest.raises(FileError, match="Too many"):
            keep_list(path, record_of(slot, 0))
    assert path.read_bytes() == before
    path.write_bytes(b"spoilt")
    keep_list(path, record_of(slot, 0))
    assert read_list(path).record == record_of(slot, 0)


def test_files_that_are_begun_and_given_up_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    begun = files.write_aside(path, [b"new", b"er"])
    assert path.read_bytes() == b"old"
    begun.discard()
    begun.discard()
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    files.write_aside(path, b"newer").settle()
    assert path.read_bytes() == b"newer"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
