"""What a slot that is opened again takes up of its logs (LINK-8)."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from tdmld.node.control import Link
from tdmld.node.errors import LinkRefused
from tdmld.node.ring import INLINE_BYTES, SlotRing
from tdmld.train.digest import digest
from tdmld.train.framelog import HEADER, frame_log_name

SEGMENT, SEGMENTS = 3, 4
LINK = Link("down", "peer", 0, 1, "up", SEGMENTS, SEGMENT, 64, 2, 4)
RECORD = HEADER.size + 7


def payload(seq: int, direction: str = "sent") -> bytes:
    return f"{direction[:4]}{seq:03}".encode()


def signature(seq: int) -> bytes:
    return bytes([seq]) * 64


async def write(ring: SlotRing, direction: str, numbers: range) -> None:
    for seq in numbers:
        data = payload(seq, direction)
        await ring.append("down", direction, seq, signature(seq), memoryview(data), digest(data))


async def filled(directory: Path, sent: int, received: int) -> None:
    ring = SlotRing(directory, [LINK])
    await write(ring, "sent", range(sent))
    await write(ring, "received", range(received))
    ring.close()


def log(directory: Path, segment: int, direction: str = "sent") -> Path:
    return directory / frame_log_name(segment, "down", direction)


def taken(directory: Path, start: int) -> tuple[int, int, int]:
    """(first, sent, received) frames that a slot which begins at `start` takes up."""
    ring = SlotRing(directory, [LINK])
    found = ring.restore(start)["down"]
    ring.close()
    for numbers, direction in ((found.sent, "sent"), (found.received, "received")):
        assert numbers == [digest(payload(found.first + n, direction)) for n in range(len(numbers))]
    return found.first, len(found.sent), len(found.received)


def test_nothing_is_taken_up_from_an_empty_directory(tmp_path: Path) -> None:
    assert taken(tmp_path, 0) == (0, 0, 0)
    assert taken(tmp_path, 2) == (2 * SEGMENT, 0, 0)
    assert taken(tmp_path, SEGMENTS + 1) == (SEGMENTS * SEGMENT, 0, 0)


@pytest.mark.parametrize("start", range(3))
async def test_everything_is_taken_up_whatever_boundary_the_worker_begins_at(
    tmp_path: Path, start: int
) -> None:
    await filled(tmp_path, 8, 7)
    assert taken(tmp_path, start) == (0, 8, 7)
    assert taken(tmp_path, start) == (0, 8, 7)


async def test_a_log_that_tore_anywhere_keeps_its_whole_records(tmp_path: Path) -> None:
    await filled(tmp_path, 6, 6)
    whole = log(tmp_path, 1).read_bytes()
    borders = [record * RECORD for record in range(SEGMENT + 1)]
    inside = [border + at for border in borders[:-1] for at in (1, HEADER.size, RECORD - 1)]
    for length in (*borders, *inside):
        log(tmp_path, 1).write_bytes(whole[:length])
        assert taken(tmp_path, 0) == (0, 3 + length // RECORD, 6)
        assert log(tmp_path, 1).stat().st_size == length // RECORD * RECORD


async def test_what_lies_behind_a_gap_is_removed(tmp_path: Path) -> None:
    """A machine that lost power may have kept a later log and lost the end of an earlier one."""
    await filled(tmp_path, 8, 8)
    os.truncate(log(tmp_path, 1), RECORD + 5)
    assert taken(tmp_path, 0) == (0, 4, 8)
    assert not log(tmp_path, 2).exists()
    assert log(tmp_path, 2, "received").exists()


async def test_a_spoiled_payload_ends_the_log_before_it(tmp_path: Path) -> None:
    await filled(tmp_path, 6, 6)
    raw = bytearray(log(tmp_path, 1).read_bytes())
    raw[RECORD + HEADER.size] ^= 1
    log(tmp_path, 1).write_bytes(raw)
    assert taken(tmp_path, 1) == (0, 4, 6)


async def test_below_the_worker_only_whole_segments_count(tmp_path: Path) -> None:
    """For peers that begin earlier; older logs may have been removed."""
    await filled(tmp_path, 12, 12)
    log(tmp_path, 0).unlink()
    assert taken(tmp_path, 3) == (3, 9, 9)
    os.truncate(log(tmp_path, 1, "received"), 2 * RECORD)
    assert taken(tmp_path, 3) == (6, 6, 6)
    assert log(tmp_path, 1, "received").stat().st_size == 2 * RECORD


async def test_a_ring_that_was_taken_up_reads_and_goes_on(tmp_path: Path) -> None:
    await filled(tmp_path, 7, 5)
    ring = SlotRing(tmp_path, [LINK])
    ring.restore(1)
    await write(ring, "sent", range(7, 10))
    await write(ring, "received", range(5, 9))
    buffer = memoryview(bytearray(64))
    for seq in range(10):
        found, data = await ring.read_sent("down", seq, buffer)
        assert (found, data) == (signature(seq), payload(seq))
    for seq in range(9):
        place = buffer[: ring.length("down", "received", seq)]
        await ring.read_received("down", seq, place)
        assert place == payload(seq, "received")
    ring.close()
    assert taken(tmp_path, 0) == (0, 10, 9)


async def test_what_was_forgotten_or_removed_cannot_be_read(tmp_path: Path) -> None:
    await filled(tmp_path, 6, 6)
    ring = SlotRing(tmp_path, [LINK])
    ring.restore(2)
    buffer = memoryview(bytearray(64))
    ring.forget("down", 4)
    with pytest.raises(LinkRefused, match="not kept"):
        await ring.read_sent("down", 3, buffer)
    assert (await ring.read_sent("down", 4, buffer))[1] == payload(4)
    log(tmp_path, 1).unlink()
    with pytest.raises(LinkRefused, match="cannot be read"):
        await ring.read_sent("down", 5, buffer)


async def test_a_large_frame_that_is_not_in_the_page_cache_is_read_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * INLINE_BYTES
    link = msgspec.structs.replace(LINK, frame_bytes=size)
    ring = SlotRing(tmp_path, [link])
    data = os.urandom(size)
    await ring.append("down", "sent", 0, signature(0), memoryview(data), digest(data))
    buffer = memoryview(bytearray(size))
    assert (await ring.read_sent("down", 0, buffer))[1] == data
    preadv = os.preadv
    for refusal in (errno.EAGAIN, errno.EOPNOTSUPP):

        def cold(
            file: int, into: list[memoryview], at: int, flags: int = 0, refusal: int = refusal
        ) -> int:
            if flags:
                raise OSError(refusal, os.strerror(refusal))
            return preadv(file, into, at)

        monkeypatch.setattr(os, "preadv", cold)
        buffer[:] = bytes(size)
        assert (await ring.read_sent("down", 0, buffer))[1] == data
    ring.close()


async def test_segments_that_are_taken_up_whole_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A carrier that was killed had not synced them, and they are committed to next."""
    await filled(tmp_path, 6, 6)
    synced, fsync = set(), os.fsync

    def note(file: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    SlotRing(tmp_path, [LINK]).restore(2)
    assert synced == {log(tmp_path, n, way).name for n in (0, 1) for way in ("sent", "received")}


async def test_a_log_that_is_closed_while_it_is_read_gives_no_other_files_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * INLINE_BYTES
    ring = SlotRing(tmp_path, [msgspec.structs.replace(LINK, frame_bytes=size)])
    data = os.urandom(size)
    await ring.append("down", "sent", 0, signature(0), memoryview(data), digest(data))
    (tmp_path / "secret").write_bytes(bytes(2 * size))
    preadv, others = os.preadv, []

    def cold(file: int, into: list[memoryview], at: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EAGAIN, "not now")
        ring.close()
        others.append(os.open(tmp_path / "secret", os.O_RDONLY))  # takes the number of the log
        return preadv(file, into, at)

    monkeypatch.setattr(os, "preadv", cold)
    assert (await ring.read_sent("down", 0, memoryview(bytearray(size))))[1] == data
    os.close(others[0])
