"""The log of one direction of a link in one segment: the frames as they crossed the wire.

    record = seq u64 ‖ length u32 ‖ signature (64 bytes) ‖ payload        (big-endian)

File name `<segment>.<link>.<direction>`, direction sent or received. Sequence numbers ascend.
A process that dies leaves at most one torn record at the end; readers ignore it, the writer cuts
it off. An empty payload cannot exist, so blocks of zeros after a crash end the log as well.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tdmld.train.errors import FileError

HEADER = struct.Struct("!QI64s")
SIGNATURE_BYTES = 64
DIRECTIONS = ("sent", "received")


class FrameEntry(NamedTuple):
    """Where a frame's payload lies in its log."""

    seq: int
    signature: bytes
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
        seq, length, signature = HEADER.unpack_from(data, at)
        if length == 0 or (length <= limit and at + HEADER.size + length > len(data)):
            return
        _check(seq, length, last, limit, source)
        yield FrameEntry(seq, signature, at + HEADER.size, length)
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
            seq, length, signature = HEADER.unpack(head)
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

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.last = -1
        self._limit = limit
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._open = True
        try:
            end = self._scan()
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
        except BaseException:
            os.close(self._file)
            raise
        self.size = end

    def _scan(self) -> int:
        size = os.fstat(self._file).st_size
        at = 0
        while at + HEADER.size <= size:
            seq, length, _ = HEADER.unpack(os.pread(self._file, HEADER.size, at))
            if length == 0 or (length <= self._limit and at + HEADER.size + length > size):
                break
            _check(seq, length, self.last, self._limit, str(self.path))
            at, self.last = at + HEADER.size + length, seq
        return at

    def append(self, seq: int, signature: bytes, payload: bytes | memoryview) -> None:
        """Add frame `seq`; ValueError when it does not ascend or has a wrong size."""
        if seq <= self.last:
            raise ValueError(f"frame {seq} after frame {self.last}")
        if not 0 < len(payload) <= self._limit or len(signature) != SIGNATURE_BYTES:
            raise ValueError(f"frame {seq}: {len(payload)} bytes, signature {len(signature)}")
        parts = [memoryview(HEADER.pack(seq, len(payload), signature)), memoryview(payload)]
        while parts:
            written = os.writev(self._file, parts)
            self.size += written
            while parts and written >= parts[0].nbytes:
                written -= parts.pop(0).nbytes
            if parts and written:
                parts[0] = parts[0].cast("B")[written:]
        self.last = seq

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
