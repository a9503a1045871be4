"""Content between carriers: shards, states, frames and results, by name or by hash.

One stream `/tdmld/<n>/content/1` serves one item at a time:

    asker: Locate(item)             holder: Located(id, size) | Refuse(why)
    asker: Want(offset, length)     holder: the bytes, <= CHUNK_BYTES a message
    asker: ListFiles(job)           holder: Files([(name, size)]) | Refuse(why)

`id` is the BLAKE3 of the whole file: the asker hashes what it gets and refuses anything else. That
proves an honest copy; whether the file is the *right* one is decided by its root, by whoever asked.
Only members of a job are answered. Everything is bounded: messages, chunks, size (by the asker),
streams a peer and in all (by the holder), time without progress, bytes kept.
"""

import logging
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import trio
from blake3 import blake3

from tdmld.files import sync_directory, write_file
from tdmld.node.control import (
    Blob,
    FileName,
    FramesFile,
    Id32,
    Item,
    ResultFile,
    Size,
    StateFile,
)
from tdmld.node.errors import ContentError, ContentMismatch, ContentRefused, ContentUnavailable
from tdmld.node.layout import Layout, free_bytes, is_file_name
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import DialFailed, P2PError, StreamClosed, StreamError
from tdmld.train.data import cut_shards
from tdmld.train.digest import digest
from tdmld.train.framelog import frame_log_name
from tdmld.train.limits import SHARD_BYTES, TEXT_BYTES
from tdmld.train.statefile import part_file

log = logging.getLogger(__name__)

REQUEST_BYTES = 4096
REPLY_BYTES = 16 * 1024
CHUNK_BYTES = 1 << 20
STREAMS_PER_PEER = 8
STREAMS = 64
IDLE_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 16 * 1024
"""A holder that is slower on the whole is left for another one: a byte now and then is no gift."""
RETRY_SECONDS = (0.2, 1.0)
"""Pauses before a holder is asked again after a broken stream."""
MAX_RESULT_FILES = 32
_KNOWN_HASHES = 1024


class Locate(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What is asked for."""

    item: Item


class Want(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Bytes of the item that was located."""

    offset: Size
    length: Size


class ListFiles(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The files of a job's result."""

    job: Id32


class Located(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The item is here."""

    content: Id32
    size: Size


class Refuse(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """It is not, or not for you."""

    reason: Annotated[str, msgspec.Meta(max_length=300)]


class Files(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Names and sizes."""

    files: Annotated[tuple[tuple[FileName, Size], ...], msgspec.Meta(max_length=MAX_RESULT_FILES)]


_request = msgspec.msgpack.Decoder(Locate | Want | ListFiles)
_reply = msgspec.msgpack.Decoder(Located | Refuse | Files)


class ContentStore:
    """Files below a data directory by name and by hash. Methods block: call them in a thread."""

    def __init__(self, layout: Layout, quota: int) -> None:
        self._layout = layout
        self._quota = quota
        self._held = quota
        """Bytes in content/, or more: measured when it seems to be full."""
        self._hashes: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()

    def path(self, item: Item) -> Path:
        """Where an item lies if it is here; ContentUnavailable if not."""
        candidates: tuple[Path, ...]
        match item:
            case Blob(_, content):
                candidates = (self._layout.blob(content),)
            case ResultFile(job, name):
                if not is_file_name(name):
                    raise ContentUnavailable(f"{name!r} is no file of a result")
                candidates = (self._layout.result(job) / name,)
            case FramesFile(slot, segment, link):
                owner = self._layout.slot(slot.job, slot.lane, slot.stage)
                candidates = (owner / "ring" / frame_log_name(segment, link, "sent"),)
            case StateFile(slot, boundary, part):
                candidates = tuple(
                    directory / part_file(part)
                    for directory in self._layout.states(slot.job, slot.lane, slot.stage, boundary)
                )
        for path in candidates:
            if path.is_file():
                return path
        raise ContentUnavailable("not here")

    def identify(self, fd: int, path: Path) -> tuple[bytes, int]:
        """(BLAKE3, size) of an open file; remembered as long as it does not change."""
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise ContentUnavailable("not a file")
        key = (str(path), facts.st_mtime_ns, facts.st_size)
        known = self._hashes.get(key)
        if known is None:
            hasher = blake3()
            at = 0
            while piece := os.pread(fd, CHUNK_BYTES, at):
                hasher.update(piece)
                at += len(piece)
            known = self._hashes[key] = hasher.digest()
            while len(self._hashes) > _KNOWN_HASHES:
                self._hashes.popitem(last=False)
        return known, facts.st_size

    def result_files(self, job: bytes) -> tuple[tuple[str, int], ...]:
        """(name, size) of a result; ContentUnavailable."""
        directory = self._layout.result(job)
        if not directory.is_dir():
            raise ContentUnavailable("no result of this job is here")
        found = sorted(path for path in directory.iterdir() if path.is_file())
        return tuple((path.name, path.stat().st_size) for path in found if is_file_name(path.name))[
            :MAX_RESULT_FILES
        ]

    def has(self, content: bytes, size: int) -> bool:
        """Whether a blob is here. Its bytes were checked when it was stored."""
        path = self._layout.blob(content)
        return path.is_file() and path.stat().st_size == size

    def make_room(self, size: int, *, blob: bool) -> None:
        """ContentRefused when `size` more bytes may not or cannot be kept."""
        directory = self._layout.data_dir
        if free_bytes(directory) < size:
            raise ContentRefused(f"the disk of {directory} is full; {size} bytes are needed")
        if blob:
            if self._held + size > self._quota:
                self._held = self._measure()
            if self._held + size > self._quota:
                raise ContentRefused(
                    f"content/ holds {self._held} of {self._quota} bytes; {size} more do not fit"
                )
            self._held += size

    def _measure(self) -> int:
        """Bytes in content/ now. Files go without notice: the daemon removes what jobs left."""
        held = 0
        for path in self._layout.content.glob("*/*"):
            with suppress(FileNotFoundError):
                held += path.stat().st_size
        return held

    def import_text(self, path: Path) -> list[tuple[bytes, int]]:
        """Cut a text file into shards and keep each. ContentRefused, OSError."""
        # Without waiting for the writer of a pipe that somebody named by mistake.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise ContentRefused(f"{path} is not a regular file")
            if not 0 < facts.st_size <= TEXT_BYTES:
                raise ContentRefused(
                    f"{path} has {facts.st_size} bytes; a text has 1 to {TEXT_BYTES}"
                )
            self.make_room(facts.st_size, blob=True)
            shards = []
            while block := file.read(SHARD_BYTES):
                for shard in cut_shards(block):
                    content = digest(shard)
                    shards.append((content, len(shard)))
                    if not self.has(content, len(shard)):
                        target = self._layout.blob(content)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        write_file(target, shard)
            return shards


class ContentServer:
    """Answers peers. `is_open(item)` says that a file still grows and cannot be given yet."""

    def __init__(
        self,
        store: ContentStore,
        members: Mapping[bytes, frozenset[str]],
        is_open: Callable[[Item], bool],
    ) -> None:
        self._store = store
        self._members = members
        self._is_open = is_open
        self._streams: Counter[str] = Counter()

    async def handle(self, stream: Stream) -> None:
        """Serve one stream until the peer closes it."""
        peer = stream.peer_id
        if self._streams[peer] >= STREAMS_PER_PEER or self._streams.total() >= STREAMS:
            await self._answer(stream, Refuse("too many streams; try again later"))
            return
        self._streams[peer] += 1
        try:
            await self._serve(stream)
        except StreamClosed:
            return
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _serve(self, stream: Stream) -> None:
        fd, size = -1, 0
        try:
            while True:
                with trio.fail_after(IDLE_SECONDS):
                    raw = await stream.receive(REQUEST_BYTES)
                try:
                    request = _request.decode(raw)
                    if isinstance(request, Want):
                        if fd < 0 or request.offset + request.length > size:
                            raise ContentRefused("nothing was located, or not so many bytes")
                        await self._send_bytes(stream, fd, request)
                        continue
                    if isinstance(request, ListFiles):
                        self._check_member(stream.peer_id, request.job)
                        files = await trio.to_thread.run_sync(self._store.result_files, request.job)
                        reply: Located | Files = Files(files)
                    else:
                        self._check_member(stream.peer_id, _job_of(request.item))
                        if fd >= 0:
                            os.close(fd)
                            fd = -1
                        if self._is_open(request.item):
                            raise ContentUnavailable("not finished yet")
                        path = self._store.path(request.item)
                        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                        content, size = await trio.to_thread.run_sync(
                            self._store.identify, fd, path
                        )
                        reply = Located(content, size)
                except ContentError as error:
                    await self._answer(stream, Refuse(str(error)[:300]))
                except OSError as error:
                    await self._answer(stream, Refuse(f"cannot be read: {error.strerror}"))
                except msgspec.MsgspecError as error:
                    await self._answer(stream, Refuse(f"malformed request: {error}"[:300]))
                    return
                else:
                    await self._answer(stream, reply)
        finally:
            if fd >= 0:
                os.close(fd)

    async def _send_bytes(self, stream: Stream, fd: int, want: Want) -> None:
        at, end = want.offset, want.offset + want.length
        while at < end:
            piece = await trio.to_thread.run_sync(os.pread, fd, min(CHUNK_BYTES, end - at), at)
            if not piece:
                raise ContentUnavailable("the file became shorter")
            with trio.fail_after(IDLE_SECONDS):
                await stream.send(piece)
            at += len(piece)

    async def _answer(self, stream: Stream, reply: Located | Files | Refuse) -> None:
        with trio.fail_after(IDLE_SECONDS):
            await stream.send(msgspec.msgpack.encode(reply))

    def _check_member(self, peer: str, job: bytes) -> None:
        if peer not in self._members.get(job, frozenset()):
            raise ContentRefused("you are not a member of this job here")


def _job_of(item: Item) -> bytes:
    if isinstance(item, StateFile | FramesFile):
        return item.slot.job
    return item.job


class ContentClient:
    """Brings items from holders, tried in order."""

    def __init__(self, host: Host, protocol: str, store: ContentStore) -> None:
        self._host = host
        self._protocol = protocol
        self._store = store

    async def fetch(
        self, item: Item, limit: int, holders: Sequence[str], target: Path, *, blob: bool = False
    ) -> str:
        """Bring an item to `target`, whole, hashed, synced; gives the holder that had it.

        With `blob` the item's own id must be the hash. ContentUnavailable names each holder's
        answer, ContentRefused when there is no room here. Cancelled, it leaves nothing behind.
        """
        answers = []
        for holder in holders:
            try:
                if holder == self._host.peer_id:
                    await trio.to_thread.run_sync(self._copy, item, limit, target)
                    return holder
                await self._from_patiently(holder, item, limit, target, blob)
            except (P2PError, ContentUnavailable, ContentMismatch, trio.TooSlowError) as error:
                answers.append(f"{holder}: {str(error) or 'too slow'}")
            else:
                return holder
        raise ContentUnavailable("; ".join(answers) or "no holder is known")

    def _copy(self, item: Item, limit: int, target: Path) -> None:
        """The holder is this machine: copy the file."""
        with self._store.path(item).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise ContentMismatch(f"{size} bytes where at most {limit} are possible")
            self._store.make_room(size, blob=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, iter(lambda: file.read(CHUNK_BYTES), b""))

    async def list_result(self, job: bytes, holders: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """The files of a result at the first holder that has one. ContentUnavailable."""
        answers = []
        for holder in holders:
            try:
                if holder == self._host.peer_id:
                    return await trio.to_thread.run_sync(self._store.result_files, job)
                with trio.fail_after(IDLE_SECONDS):
                    async with await self._host.open_stream(holder, self._protocol) as stream:
                        reply = await self._ask(stream, ListFiles(job))
                        if isinstance(reply, Files):
                            return reply.files
                        answers.append(f"{holder}: an answer to something else")
            except (P2PError, ContentUnavailable, trio.TooSlowError) as error:
                answers.append(f"{holder}: {str(error) or 'too slow'}")
        raise ContentUnavailable("; ".join(answers) or "no holder is known")

    async def _ask(self, stream: Stream, request: Locate | ListFiles) -> Located | Files:
        await stream.send(msgspec.msgpack.encode(request))
        try:
            reply: Located | Refuse | Files = _reply.decode(await stream.receive(REPLY_BYTES))
        except msgspec.MsgspecError as error:
            raise ContentUnavailable(f"malformed answer: {error}") from error
        if isinstance(reply, Refuse):
            raise ContentUnavailable(reply.reason)
        return reply

    async def _from_patiently(
        self, holder: str, item: Item, limit: int, target: Path, blob: bool
    ) -> None:
        """As `_from`, again after a broken stream: when two peers dial each other at the same time
        one of the connections is dropped, and streams on it with it."""
        for pause in RETRY_SECONDS:
            try:
                return await self._from(holder, item, limit, target, blob)
            except (StreamError, DialFailed) as error:
                log.info("content from %s: %s; again", holder, error)
            await trio.sleep(pause)
        await self._from(holder, item, limit, target, blob)

    async def _from(self, holder: str, item: Item, limit: int, target: Path, blob: bool) -> None:
        async with await self._host.open_stream(holder, self._protocol) as stream:
            with trio.fail_after(IDLE_SECONDS):
                reply = await self._ask(stream, Locate(item))
            if not isinstance(reply, Located):
                raise ContentUnavailable("an answer to something else")
            if reply.size > limit:
                raise ContentMismatch(f"{reply.size} bytes where at most {limit} are possible")
            if blob and isinstance(item, Blob) and reply.content != item.content:
                raise ContentMismatch("another content than was asked for")
            await trio.to_thread.run_sync(lambda: self._store.make_room(reply.size, blob=blob))
            with trio.fail_after(IDLE_SECONDS + reply.size / MIN_BYTES_PER_SECOND):
                await self._download(stream, reply, target)

    async def _download(self, stream: Stream, located: Located, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
        hasher = blake3()
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            try:
                await stream.send(msgspec.msgpack.encode(Want(0, located.size)))
                missing = located.size
                while missing:
                    with trio.fail_after(IDLE_SECONDS):
                        piece = await stream.receive(min(CHUNK_BYTES, missing))
                    if not piece:
                        raise ContentMismatch("an empty chunk")
                    hasher.update(piece)
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(fd, view) :]
                    missing -= len(piece)
                if hasher.digest() != located.content:
                    raise ContentMismatch("the bytes do not have the announced hash")
                await trio.to_thread.run_sync(os.fsync, fd)
            finally:
                os.close(fd)
            aside.replace(target)
        except BaseException:  # also cancellation: no half file stays
            aside.unlink(missing_ok=True)
            raise
        await trio.to_thread.run_sync(sync_directory, target.parent)
