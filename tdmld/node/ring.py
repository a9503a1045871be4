"""Frames of one live slot on disk: what was sent is retained, what came in is kept as evidence.

One log a segment, link and direction (`tdmld.train.framelog`). Nothing is kept in memory but where
each frame lies: a peer that is connected, one that was away, and a worker that begins again are all
served from the logs. What was written a moment ago is in the page cache, and reading it costs less
than keeping a copy would.

How much it is (S3, S4): the daemon grants a worker no more segments than D behind what is settled
and D + 2 R behind what anybody may still ask for; `SlotServer` takes no frame of a segment that was
not granted, and LINK-3 ties what comes in to what was sent. So there are never more than D + 2 R +
1 segments of logs; at the bound the slot stalls, nothing is dropped. Logs that nobody needs any
more are deleted by the daemon (`jobfiles`).

A slot that is opened again takes its logs up (`restore`): from the boundary where its worker begins
whatever follows without a gap, each frame compared with its digest; below it whole segments, for
peers that begin earlier.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from tdmld.node.control import Link
from tdmld.node.errors import LinkRefused
from tdmld.node.layout import free_bytes
from tdmld.train.errors import FileError
from tdmld.train.framelog import (
    DIRECTIONS,
    HEADER,
    FrameEntry,
    FrameLogWriter,
    frame_log_name,
    scan_frames,
)

INLINE_BYTES = 256 * 1024
"""Larger frames are written by a thread: the kernel may let a writer wait until the disk has taken
what came before, and other slots and links must not."""
_NOT_NOW = (errno.EAGAIN, errno.EOPNOTSUPP)


class Restored(NamedTuple):
    """What the logs of a link hold: digests of both directions, each without a gap from `first`."""

    first: int
    sent: list[bytes]
    received: list[bytes]


class _Lies(NamedTuple):
    """Where a payload lies in the log of its segment."""

    offset: int
    length: int


class SlotRing:
    """Appends never sync; `take_segment` gives the logs of a finished segment to close (sync).

    A segment's logs are begun only while they fit on the disk beside what the chain needs.
    OSError (disk full) from every method that writes leaves what was written before intact.
    """

    def __init__(self, directory: Path, links: Sequence[Link]) -> None:
        self._directory = directory
        self._links = {link.name: link for link in links}
        self._writers: dict[tuple[int, str, str], FrameLogWriter] = {}
        self._frames: dict[tuple[str, str], dict[int, _Lies]] = {
            (link.name, direction): {} for link in links for direction in DIRECTIONS
        }

    # --- writing

    async def append(
        self,
        link: str,
        direction: str,
        seq: int,
        signature: bytes,
        payload: memoryview,
        value: bytes,
    ) -> None:
        """Add a frame to the log of its segment; `value` is its digest. One at a time for each log.
        Not cancelled in the middle."""
        dims = self._links[link]
        segment = seq // dims.segment_frames
        key = (segment, link, direction)
        writer = self._writers.get(key)
        if writer is None:
            path = self._directory / frame_log_name(*key)
            if free_bytes(self._directory) < dims.segment_frames * dims.frame_bytes:
                raise OSError(errno.ENOSPC, "no room for the frames of another segment", str(path))
            writer = self._writers[key] = FrameLogWriter(path, dims.frame_bytes)
        if len(payload) <= INLINE_BYTES:
            at = writer.append(seq, signature, payload, value)
        else:
            at = await trio.to_thread.run_sync(writer.append, seq, signature, payload, value)
        self._frames[link, direction][seq] = _Lies(at, len(payload))

    def is_open(self, segment: int, link: str, direction: str) -> bool:
        """Whether this log may still grow."""
        return (segment, link, direction) in self._writers

    def take_segment(self, segment: int) -> list[FrameLogWriter]:
        """The logs of segments <= `segment`; the caller closes them (this syncs, in a thread)."""
        taken = [key for key in self._writers if key[0] <= segment]
        return [self._writers.pop(key) for key in taken]

    def close(self) -> None:
        """Sync and close everything."""
        for writer in self.take_segment(2**62):
            writer.close()

    # --- reading

    async def read_sent(self, link: str, seq: int, buffer: memoryview) -> tuple[bytes, memoryview]:
        """(signature, payload) of a frame that was sent; the payload lies in `buffer`. LinkRefused
        when it is gone."""
        header = bytearray(HEADER.size)
        payload = buffer[: self.length(link, "sent", seq)]
        await self._read(link, "sent", seq, [header, payload], HEADER.size)
        _, _, signature, _ = HEADER.unpack(header)
        return signature, payload

    async def read_received(self, link: str, seq: int, place: memoryview) -> None:
        """Read the payload of a frame that came in, of `length`, into `place`. LinkRefused."""
        await self._read(link, "received", seq, [place], 0)

    def length(self, link: str, direction: str, seq: int) -> int:
        """Bytes of a frame's payload. LinkRefused when it is gone."""
        found = self._frames[link, direction].get(seq)
        if found is None:
            raise LinkRefused(f"frame {seq} of link {link} is not kept any more")
        return found.length

    async def _read(
        self,
        link: str,
        direction: str,
        seq: int,
        buffers: list[bytearray | memoryview],
        before: int,
    ) -> None:
        """Fill `buffers`, beginning `before` bytes before the payload."""
        key = (seq // self._links[link].segment_frames, link, direction)
        at = self._frames[link, direction][seq].offset - before
        size = sum(len(buffer) for buffer in buffers)
        writer = self._writers.get(key)
        path = self._directory / frame_log_name(*key)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if writer is None else writer.fileno()
            try:
                if not _read_now(file, buffers, at, size):
                    # From the disk, or large: other slots and links must not wait for it.
                    if size <= INLINE_BYTES:
                        read = os.preadv(file, buffers, at)
                    else:
                        read = await _read_in_thread(file, buffers, at)
                    if read != size:
                        raise LinkRefused(f"frame {seq} of link {link}: its log was cut off")
            finally:
                if writer is None:
                    os.close(file)
        except OSError as error:
            raise LinkRefused(f"frame {seq} of link {link} cannot be read: {error}") from error

    # --- going on

    def restore(self, start: int) -> dict[str, Restored]:
        """Take up the logs of a slot whose worker begins at boundary `start`, by link. Blocks.
        Once, before anything else. OSError."""
        names = set(os.listdir(self._directory))
        return {link: self._restore_link(dims, start, names) for link, dims in self._links.items()}

    def forget(self, link: str, keep_from: int) -> None:
        """Frames below number `keep_from` are not asked for any more."""
        for direction in DIRECTIONS:
            frames = self._frames[link, direction]
            for seq in [seq for seq in frames if seq < keep_from]:
                del frames[seq]

    def _restore_link(self, dims: Link, start: int, names: set[str]) -> Restored:
        start = min(start, dims.segments)
        below: dict[str, list[FrameEntry]] = {direction: [] for direction in DIRECTIONS}
        first = start
        while first > 0:
            both = {
                direction: self._whole(dims, first - 1, direction, names)
                for direction in DIRECTIONS
            }
            if not all(both.values()):
                break
            first -= 1
            for direction, entries in both.items():
                below[direction] = entries + below[direction]
        digests = {}
        for direction in DIRECTIONS:
            entries = [*below[direction], *self._following(dims, start, direction, names)]
            self._frames[dims.name, direction].update(
                (entry.seq, _Lies(entry.offset, entry.length)) for entry in entries
            )
            digests[direction] = [entry.digest for entry in entries]
        return Restored(first * dims.segment_frames, digests["sent"], digests["received"])

    def _whole(self, dims: Link, segment: int, direction: str, names: set[str]) -> list[FrameEntry]:
        """The frames of a log that has all of its segment's frames, else nothing."""
        name = frame_log_name(segment, dims.name, direction)
        if name not in names:
            return []
        try:
            file = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                entries = list(scan_frames(file, dims.frame_bytes, name))
                os.fsync(file)  # whoever wrote it may have died before that
            finally:
                os.close(file)
        except (FileError, FileNotFoundError):
            return []
        begin = segment * dims.segment_frames
        expected = range(begin, begin + dims.segment_frames)
        return entries if [entry.seq for entry in entries] == list(expected) else []

    def _following(
        self, dims: Link, start: int, direction: str, names: set[str]
    ) -> Iterator[FrameEntry]:
        """The frames from boundary `start` on; the log in which they end stays open. What lies
        behind a gap is removed: it comes again."""
        due = start
        for segment in sorted(_segments(names, dims.name, direction)):
            path = self._directory / frame_log_name(segment, dims.name, direction)
            if segment > due:
                path.unlink(missing_ok=True)
            elif segment == due:
                writer = FrameLogWriter(path, dims.frame_bytes, segment * dims.segment_frames)
                yield from writer.kept
                if len(writer.kept) == dims.segment_frames:
                    writer.close()  # whoever wrote it may have died before it was synced
                    due += 1
                else:
                    self._writers[segment, dims.name, direction] = writer


def cause_of(error: OSError) -> str:
    """What SlotBroken calls an error of the disk."""
    return "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


def _segments(names: set[str], link: str, direction: str) -> Iterator[int]:
    """Segments of which there is a log."""
    for name in names:
        number, _, rest = name.partition(".")
        if number.isdecimal() and rest == f"{link}.{direction}":
            yield int(number)


async def _read_in_thread(file: int, buffers: list[bytearray | memoryview], at: int) -> int:
    """Read in a thread. The segment may be closed meanwhile, and its number be another file's."""
    own = os.dup(file)
    try:
        return await trio.to_thread.run_sync(os.preadv, own, buffers, at)
    finally:
        os.close(own)


def _read_now(file: int, buffers: list[bytearray | memoryview], at: int, size: int) -> bool:
    """Read what the page cache holds, without waiting for the disk; False when that is not all."""
    try:
        return os.preadv(file, buffers, at, os.RWF_NOWAIT) == size
    except OSError as error:
        if error.errno in _NOT_NOW:
            return False
        raise
