"""Giving content to the members of a job, so that nobody takes more than a share.

Chunks wait for their peer's allowance; what is asked beside them (where an item is, which files, a
key) does not, and has streams that downloads cannot take.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from tdmld.chain.crypto import public_key
from tdmld.node import contentwire as wire
from tdmld.node.contentstore import ChunkList, ContentStore, chunks_of
from tdmld.node.control import (
    Blob,
    ContributionFile,
    FrameFile,
    GivenFile,
    Item,
    ResultFile,
    StateFile,
)
from tdmld.node.errors import ContentError, ContentRefused, ContentUnavailable
from tdmld.node.seal import ContentKeys, KeyName, key_box
from tdmld.p2p import Stream
from tdmld.p2p.errors import StreamClosed

STREAMS_PER_PEER = 16
DOWNLOADS_PER_PEER = 8
"""Of its streams; the others are for small requests."""
STREAMS = 256
DOWNLOADS = 64
"""Of all peers. Each has one chunk in memory at most."""
FILES_AT_ONCE = 2
"""Hashed at the same time; the first question about a large file takes a while."""
PEER_BYTES_PER_SECOND = 128 << 20
PEER_BURST_BYTES = 512 << 20
"""What one peer may take at once after a rest. Above it, it waits."""


@dataclass(frozen=True, slots=True)
class JobContent:
    """Who may have a job's content, and the spec id under which its data is sealed (None: open).

    private  nobody gets the text and the result, nor states and contributions of stage 0
    given    roots of the given weights that belong to the job
    """

    sessions: frozenset[str]
    sealed: bytes | None = None
    private: bool = False
    given: frozenset[bytes] = frozenset()

    def check(self, item: Item | wire.ListFiles) -> None:
        """ContentRefused when no member may have it."""
        match item:
            case GivenFile(_, root):
                if root not in self.given:
                    raise ContentRefused("these weights are not given to this job")
            case StateFile(slot) | ContributionFile(slot):
                if self.private and slot.stage == 0:
                    raise ContentRefused(
                        "the submitter of this job keeps its first stage to itself"
                    )
            case Blob():
                if self.private:
                    raise ContentRefused("the submitter of this job keeps its text to itself")
            case ResultFile() | wire.ListFiles():
                if self.private:
                    raise ContentRefused("the submitter of this job keeps its result to itself")


class Allowance:
    """A bucket of bytes a peer, that fills again at a fixed rate."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._paid_until: dict[str, float] = {}
        """Peer -> when all that it took would have been given at the fixed rate."""

    def take(self, peer: str, size: int, now: float) -> float:
        """Charge `size` bytes; gives the time until which the peer shall wait."""
        begun = max(self._paid_until.get(peer, 0.0), now)
        self._paid_until[peer] = begun + size / self._rate
        if len(self._paid_until) > STREAMS:
            # Peers whose bucket is full again: nothing needs to be remembered of them.
            self._paid_until = {p: at for p, at in self._paid_until.items() if at > now}
        return begun - self._burst / self._rate


_NOTHING = ChunkList(b"", 0, b"")


@dataclass(slots=True)
class _Opened:
    """What one stream speaks of."""

    job: bytes = b""
    fd: int = -1
    begin: int = 0
    """Where in the file the item begins."""
    chunks: ChunkList = _NOTHING
    downloads: bool = False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ContentServer:
    """Answers peers. `is_open(item)` says that a file still grows and cannot be given yet."""

    def __init__(
        self,
        store: ContentStore,
        keys: ContentKeys,
        jobs: Mapping[bytes, JobContent],
        is_open: Callable[[Item], bool],
        *,
        rate: float = PEER_BYTES_PER_SECOND,
        burst: float = PEER_BURST_BYTES,
    ) -> None:
        """`rate`, `burst`: bytes (a second) that one peer is given."""
        self._store = store
        self._keys = keys
        self._jobs = jobs
        self._is_open = is_open
        self._streams: Counter[str] = Counter()
        self._downloads: Counter[str] = Counter()
        self._allowance = Allowance(rate, burst)
        self._hashing = trio.CapacityLimiter(FILES_AT_ONCE)

    async def handle(self, stream: Stream) -> None:
        """Serve one stream until the peer closes it, or says nothing for IDLE_SECONDS."""
        peer = stream.peer_id
        if not any(peer in content.sessions for content in self._jobs.values()):
            # Not even a place among the streams: those are for members.
            await self._answer(stream, wire.Refuse("you are not a member of any job here"))
            return
        if self._streams[peer] >= STREAMS_PER_PEER or self._streams.total() >= STREAMS:
            await self._answer(stream, wire.Refuse("too many streams; try again later"))
            return
        self._streams[peer] += 1
        opened = _Opened()
        try:
            await self._serve(stream, opened)
        except (StreamClosed, trio.TooSlowError):
            return
        finally:
            opened.close()
            for counter, counted in ((self._streams, True), (self._downloads, opened.downloads)):
                counter[peer] -= counted
                if not counter[peer]:
                    del counter[peer]

    async def _serve(self, stream: Stream, opened: _Opened) -> None:
        while True:
            with trio.fail_after(wire.IDLE_SECONDS):
                raw = await stream.receive(wire.REQUEST_BYTES)
            try:
                request = wire.decode_request(raw)
                match request:
                    case wire.Want(chunk):
                        await self._send_chunk(stream, opened, chunk)
                    case wire.MoreDigests(first):
                        at = first * wire.DIGEST_BYTES
                        end = at + wire.LIST_CHUNKS * wire.DIGEST_BYTES
                        await self._send(stream, opened.chunks.digests[at:end])
                    case _:
                        await self._answer(
                            stream, await self._reply(stream.peer_id, request, opened)
                        )
            except ContentError as error:
                await self._answer(stream, wire.Refuse(str(error)[:300]))
            except OSError as error:
                await self._answer(stream, wire.Refuse(f"cannot be read: {error.strerror}"))
            except msgspec.MsgspecError as error:
                stream.blame(str(error))
                await self._answer(stream, wire.Refuse(f"malformed request: {error}"[:300]))
                return

    async def _reply(
        self, peer: str, request: wire.Locate | wire.ListFiles | wire.AskKey, opened: _Opened
    ) -> wire.Reply:
        match request:
            case wire.ListFiles(job):
                self._content(peer, job).check(request)
                return wire.Files(await trio.to_thread.run_sync(self._store.result_files, job))
            case wire.AskKey(job, epoch, key):
                content = self._content(peer, job)
                spec = None if content.private else content.sealed
                if spec is None:
                    raise ContentUnavailable("the data of this job is not sealed")
                box = await trio.to_thread.run_sync(self._box, peer, spec, KeyName(epoch, key))
                return wire.KeyBox(box)
            case wire.Locate(item):
                return await self._locate(peer, item, opened)

    def _box(self, peer: str, spec: bytes, name: KeyName) -> bytes:
        key = self._keys.get(spec, name)
        if key is None:
            raise ContentUnavailable("that key is not here")
        return key_box(public_key(peer), spec, name.epoch, key)

    async def _locate(self, peer: str, item: Item, opened: _Opened) -> wire.Located:
        content = self._content(peer, wire.job_of(item))
        content.check(item)
        opened.close()
        opened.job = wire.job_of(item)
        opened.chunks, opened.begin = _NOTHING, 0
        name = None
        if isinstance(item, FrameFile):
            path, opened.begin, size = await trio.to_thread.run_sync(self._store.frame, item)
            opened.fd = _open(path)
            found = await trio.to_thread.run_sync(
                chunks_of, opened.fd, opened.begin, size, limiter=self._hashing
            )
        else:
            if self._is_open(item):
                raise ContentUnavailable("not finished yet")
            path, name = await trio.to_thread.run_sync(self._store.path, item, content.sealed)
            opened.fd = _open(path)
            found = await trio.to_thread.run_sync(
                self._store.identify, opened.fd, path, limiter=self._hashing
            )
        opened.chunks = found
        first = found.digests[: wire.LIST_CHUNKS * wire.DIGEST_BYTES]
        epoch, key = name or (0, b"")
        return wire.Located(found.content, found.size, epoch, key, first)

    async def _send_chunk(self, stream: Stream, opened: _Opened, chunk: int) -> None:
        peer, size = stream.peer_id, opened.chunks.size
        if opened.fd < 0 or chunk >= wire.chunk_count(size):
            raise ContentRefused("nothing was located, or not so many bytes")
        self._content(peer, opened.job)  # it may have ceased to be a member meanwhile
        if not opened.downloads:
            if self._downloads[peer] >= DOWNLOADS_PER_PEER or self._downloads.total() >= DOWNLOADS:
                raise ContentRefused("too many downloads at once; try again later")
            opened.downloads = True
            self._downloads[peer] += 1
        length = wire.chunk_size(size, chunk)
        await trio.sleep_until(self._allowance.take(peer, length, trio.current_time()))
        at = opened.begin + chunk * wire.CHUNK_BYTES
        piece = await trio.to_thread.run_sync(os.pread, opened.fd, length, at)
        if len(piece) != length:
            raise ContentUnavailable("the file became shorter")
        await self._send(stream, piece)

    async def _send(self, stream: Stream, data: bytes) -> None:
        with trio.fail_after(wire.CHUNK_SECONDS):
            await stream.send(wire.BYTES, data)

    async def _answer(self, stream: Stream, reply: wire.Reply) -> None:
        with trio.fail_after(wire.IDLE_SECONDS):
            await stream.send(wire.encode_reply(reply))

    def _content(self, peer: str, job: bytes) -> JobContent:
        content = self._jobs.get(job)
        if content is None or peer not in content.sessions:
            raise ContentRefused("you are not a member of this job here")
        return content


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
