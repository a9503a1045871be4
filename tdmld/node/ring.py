"""Frames of one live slot on disk: what was sent is retained, what came in is kept as evidence.

One log a segment, link and direction (`tdmld.train.framelog`). The frames that were sent last also
stay in memory, so that a connected peer never waits for the disk; a peer that was away is served
from the logs.

How much it is (S3, S4): the chain lets a slot have D unsettled segments, the daemon grants its
worker no more, `SlotServer` takes no frame of a segment that was not granted, and LINK-3 ties what
comes in to what was sent. So there are never more than D + 1 segments of logs; at the bound the
slot stalls, nothing is dropped. Settled segments are deleted by the daemon
(`jobfiles.discard_settled`).
"""

import errno
import mmap
from collections import OrderedDict
from pathlib import Path

import trio

from tdmld.node.errors import LinkRefused
from tdmld.node.layout import free_bytes
from tdmld.train.framelog import FrameLogWriter, frame_log_name, index_frames

INLINE_BYTES = 256 * 1024
"""Larger frames are written by a thread: the kernel may let a writer wait until the disk has taken
what came before, and other slots and links must not."""


class SlotRing:
    """Appends never sync; `take_segment` gives the logs of a finished segment to close (sync).

    A segment's logs are begun only while they fit on the disk beside what the chain needs.
    OSError (disk full) from every method that writes leaves what was written before intact.
    """

    def __init__(self, directory: Path, segment_frames: int, frame_bytes: int, recent: int) -> None:
        """`recent`: frames of each link to keep in memory, at least stages + 1."""
        self._directory = directory
        self._segment_frames = segment_frames
        self._frame_bytes = frame_bytes
        self._recent_count = recent
        self._writers: dict[tuple[int, str, str], FrameLogWriter] = {}
        self._recent: dict[str, OrderedDict[int, tuple[bytes, bytes]]] = {}

    async def append(
        self, link: str, direction: str, seq: int, signature: bytes, payload: bytes | memoryview
    ) -> None:
        """Add a frame to the log of its segment; one at a time for each log. Not cancelled in the
        middle."""
        segment = seq // self._segment_frames
        key = (segment, link, direction)
        writer = self._writers.get(key)
        if writer is None:
            path = self._directory / frame_log_name(segment, link, direction)
            if free_bytes(self._directory) < self._segment_frames * self._frame_bytes:
                raise OSError(errno.ENOSPC, "no room for the frames of another segment", str(path))
            writer = self._writers[key] = FrameLogWriter(path, self._frame_bytes)
        if len(payload) <= INLINE_BYTES:
            writer.append(seq, signature, payload)
        else:
            await trio.to_thread.run_sync(writer.append, seq, signature, payload)
        if direction == "sent":
            recent = self._recent.setdefault(link, OrderedDict())
            recent[seq] = (signature, bytes(payload))
            if len(recent) > self._recent_count:
                recent.popitem(last=False)

    def is_open(self, segment: int, link: str, direction: str) -> bool:
        """Whether this log may still grow."""
        return (segment, link, direction) in self._writers

    def read_sent(self, link: str, seq: int) -> tuple[bytes, bytes]:
        """(signature, payload) of a frame that was sent. LinkRefused when it is gone."""
        found = self._recent.get(link, OrderedDict()).get(seq)
        if found is not None:
            return found
        path = self._directory / frame_log_name(seq // self._segment_frames, link, "sent")
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as data,
            ):
                for entry in index_frames(data, self._frame_bytes, str(path)):
                    if entry.seq == seq:
                        start = entry.offset
                        return entry.signature, bytes(data[start : start + entry.length])
        except (OSError, ValueError) as error:
            raise LinkRefused(f"frame {seq} of link {link} cannot be read: {error}") from error
        raise LinkRefused(f"frame {seq} of link {link} is not kept any more")

    def take_segment(self, segment: int) -> list[FrameLogWriter]:
        """The logs of segments <= `segment`; the caller closes them (this syncs, in a thread)."""
        taken = [key for key in self._writers if key[0] <= segment]
        return [self._writers.pop(key) for key in taken]

    def close(self) -> None:
        """Sync and close everything."""
        for writer in self.take_segment(2**62):
            writer.close()
