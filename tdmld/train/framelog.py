"""The log of one direction of a link in one segment: the frames as they crossed the wire.

    record = seq u64 ‖ length u32 ‖ signature (64 bytes) ‖ BLAKE3 of the payload ‖ payload
                                                                                 (big-endian)

File name `<segment>.<link>.<direction>`, direction sent or received. Sequence numbers ascend.
A process that dies leaves at most one torn record at the end; readers ignore it, the writer cuts
it off. A machine that loses power may leave anything after what was synced: who goes on with such a
log gives the number that it begins with, and everything from the first record that does not follow
without a gap, or is not what its digest says, is cut off. An empty payload cannot exist, so blocks
of zeros after a crash end the log as well.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tdmld.train.digest import digest
from tdmld.train.errors import FileError

HEADER = struct.Struct("!QI64s32s")
SIGNATURE_BYTES = 64
DIRECTIONS = ("sent", "received")


class FrameEntry(NamedTuple):
    """Where a frame's payload lies in its log; `digest` is what the log says of it."""

    seq: int
    signature: bytes
    digest: bytes
    offset: int
    length: int


class Frame(NamedTuple):
    """A frame read from a log."""

    seq: int
    signature: bytes
    payload: bytes


def frame_log_name(segment: int, link: str, direction: str) -> str:
    """The file name of one direction of one link in one segment."""
    return f"{segment}.{link}.{direction}"


def index_frames(data: memoryview, limit: int, source: str) -> Iterator[FrameEntry]:
    """The frames of a whole log in memory, without copying; a torn tail is ignored.

    `limit` is the frame size of the spec, `source` names the log in errors. FileError when a
    length exceeds the limit or the numbers do not ascend.
    """
    at, last = 0, -1
    while at + HEADER.size <= len(data):
        seq, length, signature, value = HEADER.unpack_from(data, at)
        if length == 0 or (length <= limit and at + HEADER.size + length > len(data)):
            return
        _check(seq, length, last, limit, source)
        yield FrameEntry(seq, signature, value, at + HEADER.size, length)
        at, last = at + HEADER.size + length, seq


def scan_frames(file: int, limit: int, source: str) -> Iterator[FrameEntry]:
    """The frames of the log open as `file`, header by header; as `index_frames`."""
    size = os.fstat(file).st_size
    at, last = 0, -1
    while at + HEADER.size <= size:
        seq, length, signature, value = HEADER.unpack(os.pread(file, HEADER.size, at))
        if length == 0 or (length <= limit and at + HEADER.size + length > size):
            return
        _check(seq, length, last, limit, source)
        yield FrameEntry(seq, signature, value, at + HEADER.size, length)
        at, last = at + HEADER.size + length, seq


def _check(seq: int, length: int, last: int, limit: int, source: str) -> None:
    if length > limit:
        raise FileError(f"{source}: frame {seq} of {length} bytes, the spec allows {limit}")
    if seq <= last:
        raise FileError(f"{source}: frame {seq} after frame {last}; the log is corrupt")


def read_frames(path: Path, limit: int) -> Iterator[Frame]:
    """The frames of a log one by one; at most one frame is in memory. Errors as `index_frames`."""
    last = -1
    with path.open("rb") as file:
        while len(head := file.read(HEADER.size)) == HEADER.size:
            seq, length, signature, _ = HEADER.unpack(head)
            if length == 0:
                return
            _check(seq, length, last, limit, str(path))
            payload = file.read(length)
            if len(payload) < length:
                return
            yield Frame(seq, signature, payload)
            last = seq


class FrameLogWriter:
    """Appends frames to a log; opening an existing one cuts off a torn tail.

    `last` is the number of the last frame in the log or -1. `append` does not sync; `close` and
    leaving the context do.
    """

    def __init__(self, path: Path, limit: int, first: int | None = None) -> None:
        """With `first`, the log begins with that number or is cut: see the head of this file;
        `kept` is what stays of it. FileError, without `first`, when it is corrupt; OSError."""
        self.path = path
        self.last = -1
        self.kept: list[FrameEntry] = []
        self._limit = limit
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._open = True
        try:
            self.size = self._scan() if first is None else self._resume(first)
            os.ftruncate(self._file, self.size)
            os.lseek(self._file, self.size, os.SEEK_SET)
        except BaseException:
            os.close(self._file)
            raise

    def fileno(self) -> int:
        """The descriptor of the log, which can be read from as well."""
        return self._file

    def _scan(self) -> int:
        end = 0
        for entry in scan_frames(self._file, self._limit, str(self.path)):
            end, self.last = entry.offset + entry.length, entry.seq
        return end

    def _resume(self, first: int) -> int:
        end = 0
        buffer = memoryview(bytearray(self._limit))
        try:
            for number, entry in enumerate(
                scan_frames(self._file, self._limit, str(self.path)), first
            ):
                payload = buffer[: entry.length]
                read = os.preadv(self._file, [payload], entry.offset)
                if entry.seq != number or read < entry.length or digest(payload) != entry.digest:
                    break
                end, self.last = entry.offset + entry.length, entry.seq
                self.kept.append(entry)
        except FileError:
            pass  # what comes here is no record: the log ends
        return end

    def append(
        self,
        seq: int,
        signature: bytes,
        payload: bytes | memoryview,
        value: bytes | None = None,
    ) -> int:
        """Add frame `seq`, with the digest of its payload if that is known; gives where in the log
        the payload lies. ValueError when it does not ascend or has a wrong size."""
        if seq <= self.last:
            raise ValueError(f"frame {seq} after frame {self.last}")
        length = len(payload)
        if not 0 < length <= self._limit or len(signature) != SIGNATURE_BYTES:
            raise ValueError(f"frame {seq}: {length} bytes, signature {len(signature)}")
        header = HEADER.pack(seq, length, signature, digest(payload) if value is None else value)
        at = self.size + HEADER.size
        parts = [memoryview(header), memoryview(payload)]
        while parts:
            written = os.writev(self._file, parts)
            self.size += written
            while parts and written >= parts[0].nbytes:
                written -= parts.pop(0).nbytes
            if parts and written:
                parts[0] = parts[0].cast("B")[written:]
        self.last = seq
        return at

    def sync(self) -> None:
        """Make everything appended durable."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if self._open:
            self._open = False
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)

    def __enter__(self) -> "FrameLogWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
