"""One download: its chunks, who brings which, and the partial file.

Holders take chunks from one heap, a few at a time; what a holder that fails had taken goes back.
When nothing is left to take, a chunk that another one has had for STEAL_SECONDS is asked for twice.
Each chunk is checked by its digest before it is written. The partial file is named by what it will
be, and nothing in it is believed: when a download goes on after a broken stream or a restart, every
chunk that is there is hashed again.
"""

import errno
import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import trio
from blake3 import blake3

from tdmld.files import sync_directory
from tdmld.node import contentwire as wire
from tdmld.node.errors import ContentMismatch
from tdmld.node.layout import free_bytes
from tdmld.p2p import Stream
from tdmld.train.framelog import HEADER, FrameEntry

AHEAD = 4
"""Chunks that a holder is asked for before the first of them came."""
STEAL_SECONDS = 1.0
PART_SUFFIX = ".part"
KEPT_PARTS = 3
"""Of one target: each liar that announced another content may have left one."""


class Download:
    """The state of one download; `pull` runs once for each holder. Use inside one trio loop."""

    def __init__(
        self, target: Path, located: wire.Located, digests: bytes, beside: Path | None = None
    ) -> None:
        """The partial file lies beside `target`, or beside another path and named after that."""
        self.located = located
        self._target, self._beside = target, beside or target
        self.part = part_path(self._beside, located.content)
        self._digests = digests
        self._done = bytearray(wire.chunk_count(located.size))
        self._left = len(self._done)
        self._heap: deque[int] = deque()
        self._taken: dict[int, dict[str, float]] = {}
        """Chunk -> who was asked for it, and when."""
        self._news = trio.Event()
        self._fd = -1
        self.resumed = 0
        """Chunks that were there already."""
        self.brought: Counter[str] = Counter()
        """Chunks by whom they came from."""

    @property
    def complete(self) -> bool:
        """Whether every chunk is in the partial file."""
        return not self._left

    def open(self) -> None:
        """Open the partial file and look what is in it. Blocks."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        others = [path for path in other_parts(self._beside) if path != self.part]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for stale in others[KEPT_PARTS - 1 :]:
            stale.unlink()
        self._fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        os.ftruncate(self._fd, min(os.fstat(self._fd).st_size, self.located.size))
        there = os.fstat(self._fd).st_size
        for chunk in range(len(self._done)):
            at, size = chunk * wire.CHUNK_BYTES, wire.chunk_size(self.located.size, chunk)
            if at + size <= there and self._fits(chunk, os.pread(self._fd, size, at)):
                self._done[chunk] = True
                self._left -= 1
            else:
                self._heap.append(chunk)
        self.resumed = len(self._done) - self._left

    def _fits(self, chunk: int, data: bytes | memoryview) -> bool:
        at = chunk * wire.DIGEST_BYTES
        return blake3(data).digest() == self._digests[at : at + wire.DIGEST_BYTES]

    async def pull(self, holder: str, stream: Stream) -> None:
        """Bring chunks from a stream on which the item was located, until all are there.

        ContentMismatch for a chunk that is not what was announced; ContentUnavailable,
        TooSlowError, StreamError. Whatever ends it, what it had taken is there for others.
        """
        asked: deque[int] = deque()
        try:
            while not self.complete:
                while len(asked) < AHEAD and (chunk := self._take(holder)) is not None:
                    asked.append(chunk)
                    with trio.fail_after(wire.IDLE_SECONDS):
                        await stream.send(wire.encode_request(wire.Want(chunk)))
                if not asked:
                    with trio.move_on_after(STEAL_SECONDS):
                        await self._news.wait()
                    continue
                with trio.fail_after(wire.CHUNK_SECONDS):
                    raw = await stream.receive(wire.CHUNK_MESSAGE_BYTES)
                await self._keep(asked[0], wire.decode_bytes(raw))
                self.brought[holder] += 1
                self._taken.get(asked.popleft(), {}).pop(holder, None)
        finally:
            for chunk in asked:
                self._give_back(holder, chunk)

    def _take(self, holder: str) -> int | None:
        """The next chunk for a holder; None when there is none for now."""
        now = trio.current_time()
        while self._heap:
            chunk = self._heap.popleft()
            if not self._done[chunk]:
                self._taken[chunk] = {holder: now}
                return chunk
        for chunk, askers in self._taken.items():
            if holder not in askers and now - max(askers.values(), default=now) >= STEAL_SECONDS:
                askers[holder] = now
                return chunk
        return None

    def _give_back(self, holder: str, chunk: int) -> None:
        askers = self._taken.get(chunk)
        if askers is not None:
            askers.pop(holder, None)
            if not askers:
                del self._taken[chunk]
                self._heap.appendleft(chunk)
        self._tell()

    async def _keep(self, chunk: int, data: memoryview) -> None:
        if len(data) != wire.chunk_size(self.located.size, chunk):
            raise ContentMismatch(f"chunk {chunk} has {len(data)} bytes")
        if self._done[chunk]:
            return
        if not await trio.to_thread.run_sync(self._write, chunk, data):
            raise ContentMismatch(f"chunk {chunk} does not have the announced hash")
        if not self._done[chunk]:
            self._done[chunk] = True
            self._left -= 1
        self._taken.pop(chunk, None)
        self._tell()

    def _write(self, chunk: int, data: memoryview) -> bool:
        if not self._fits(chunk, data):
            return False
        if free_bytes(self.part.parent) < len(data):
            # There was room when it began: other downloads, rings and states share the disk.
            raise OSError(errno.ENOSPC, "the disk is full; free some space", str(self.part))
        at = chunk * wire.CHUNK_BYTES
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written
        return True

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def finish(self) -> None:
        """Give the complete file its name, durably. Blocks."""
        os.fsync(self._fd)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self.part.replace(self._target)
        sync_directory(self._target.parent)
        for stale in other_parts(self._beside):
            stale.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the partial file: it is wrong, or nobody wants it any more. Blocks shortly."""
        self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the partial file, which stays. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def part_path(target: Path, content: bytes) -> Path:
    """Where the partial file of `target` lies while it is to become `content`."""
    return target.with_name(f"{target.name}.{content.hex()[:16]}{PART_SUFFIX}")


def other_parts(target: Path) -> Sequence[Path]:
    """Partial files of `target`, whatever they were to become."""
    return list(target.parent.glob(f"{target.name}.{'?' * 16}{PART_SUFFIX}"))


class Sources:
    """Those who have an item, with the streams on which they said so."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.located: dict[str, wire.Located] = {}

    def add(self, holder: str, stream: Stream, located: wire.Located) -> None:
        self.streams[holder], self.located[holder] = stream, located

    def groups(self) -> list[tuple[wire.Located, list[str]]]:
        """Those who agree, the largest group first; among equals the newest key epoch."""
        found: dict[tuple[bytes, int, int, bytes], list[str]] = {}
        for holder, at in self.located.items():
            found.setdefault((at.content, at.size, at.epoch, at.key), []).append(holder)
        ordered = sorted(found.items(), key=lambda entry: (-len(entry[1]), -entry[0][2]))
        return [(self.located[group[0]], group) for _, group in ordered]

    async def close(self) -> None:
        """End the streams that no download took."""
        with trio.CancelScope(shield=True):
            for stream in self.streams.values():
                await stream.reset()
        self.streams.clear()


async def take_frame(stream: Stream, located: wire.Located, limit: int, seq: int) -> FrameEntry:
    """Bring the one frame that was located on a stream and keep nothing of it: what it says of
    itself, with the digest that its payload has. ContentMismatch; others as `Download.pull`."""
    size = located.size - HEADER.size
    if not 0 < size <= limit:
        raise ContentMismatch(f"a record of {located.size} bytes is no frame of this link")
    head, hasher = b"", blake3()
    for chunk in range(wire.chunk_count(located.size)):
        with trio.fail_after(wire.CHUNK_SECONDS):
            await stream.send(wire.encode_request(wire.Want(chunk)))
            data = wire.decode_bytes(await stream.receive(wire.CHUNK_MESSAGE_BYTES))
        if len(data) != wire.chunk_size(located.size, chunk):
            raise ContentMismatch(f"chunk {chunk} has {len(data)} bytes")
        if chunk == 0:
            head, data = bytes(data[: HEADER.size]), data[HEADER.size :]
        hasher.update(data)
    number, length, signature, _ = HEADER.unpack(head)
    if (number, length) != (seq, size):
        raise ContentMismatch(f"a record of frame {number} instead of {seq}")
    return FrameEntry(seq, signature, hasher.digest(), 0, size)


def check_content(path: Path, content: bytes) -> None:
    """ContentMismatch when a file has not this BLAKE3. Blocks."""
    hasher = blake3()
    with path.open("rb") as file:
        while piece := file.read(wire.CHUNK_BYTES):
            hasher.update(piece)
    if hasher.digest() != content:
        raise ContentMismatch("another contribution than was asked for")
