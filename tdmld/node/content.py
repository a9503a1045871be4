"""Bringing content from those who hold it, from several at once.

Everybody named is asked at the same time whether an item is there; those whose list of chunks has
the same hash form a group, and a group brings one download (`download`). A group that ends without
it, or with something else than was meant, leaves the place to the next one, the largest first.
That proves an honest copy; whether a state, log or result is the *right* one is decided by its
root, by whoever asked. Data shards are checked here: an open one is its own hash, a sealed one must
open to it. Content keys come the same way, each in a box for this session (`seal`).
"""

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import trio

from tdmld.files import write_file
from tdmld.node import contentwire as wire
from tdmld.node.contentstore import ContentStore
from tdmld.node.control import Blob, ContributionFile, FrameFile, Item
from tdmld.node.download import Download, Sources, check_content, take_frame
from tdmld.node.errors import ContentMismatch, ContentUnavailable, MachineError
from tdmld.node.layout import Layout
from tdmld.node.seal import ContentKeys, KeyName, sealed_size, unseal
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import DialFailed, P2PError, StreamError
from tdmld.train.framelog import FrameEntry
from tdmld.train.limits import SHARD_BYTES

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.2, 1.0)
"""Pauses before a holder is asked again after a broken stream."""
SETTLE_SECONDS = 0.5
"""So long after the first holder answered the others may still join it."""
DOWNLOADS_AT_ONCE = 4
"""Of one job: when its holders stall, another one still gets its turn."""
ALL_DOWNLOADS = 8
"""Of all jobs together: no more than one holder gives to one peer (`DOWNLOADS_PER_PEER`)."""
PATIENCE_SECONDS = 30.0
"""And a second for each chunk: a group that needs longer makes room for others who have it."""
_FAILURES = (P2PError, ContentUnavailable, ContentMismatch, trio.TooSlowError)

Place = Callable[[wire.Located], tuple[Path, Path]]
"""Where it is to lie, and beside which path its partial file does."""
Check = Callable[[Download, Sequence[str]], Awaitable[None]]
"""Given a complete download and who had it."""


class ContentClient:
    """Brings items for one session. Methods may be cancelled: then they leave nothing behind."""

    def __init__(
        self, host: Host, protocol: str, layout: Layout, store: ContentStore, keys: ContentKeys
    ) -> None:
        self._host = host
        self._protocol = protocol
        self._layout = layout
        self._store = store
        self._keys = keys
        self._slots = trio.Semaphore(ALL_DOWNLOADS)
        self._job_slots = WeakValueDictionary[bytes, trio.Semaphore]()
        self._busy: dict[object, trio.Event] = {}

    # what is asked for -----------------------------------------------------------------------

    async def fetch_file(
        self, item: Item, limit: int, holders: Sequence[str], target: Path
    ) -> tuple[str, ...]:
        """Bring an item to `target`, whole and synced; gives those who had it, all of whom said the
        same of it.

        ContentUnavailable names each holder's answer, ContentRefused when there is no room here.
        What a broken download has brought stays beside `target`, and the next call goes on there.
        """
        answers: dict[str, str] = {}
        async with self._alone(target):
            if self._host.peer_id in holders:
                try:
                    await trio.to_thread.run_sync(self._copy, item, limit, target)
                    return (self._host.peer_id,)
                except (ContentUnavailable, ContentMismatch) as error:
                    answers[self._host.peer_id] = str(error)
            return await self._bring(
                item, limit, holders, lambda _: (target, target), _check_of(item), answers
            )

    async def probe(
        self, item: FrameFile, limit: int, holder: str, check: Callable[[FrameEntry], None]
    ) -> None:
        """Take one frame, of at most `limit` bytes, from a holder, and keep nothing of it; `check`
        is given what is true of it. ContentUnavailable, ContentMismatch."""
        try:
            stream, located = await self._open_patiently(holder, item)
            async with stream:
                with _blaming(stream):
                    check(await take_frame(stream, located, limit, item.seq))
        except ContentMismatch:
            raise
        except _FAILURES as error:
            raise ContentUnavailable(str(error) or "too slow") from error

    async def fetch_data(
        self,
        job: bytes,
        sealed: bytes | None,
        shards: Sequence[tuple[bytes, int]],
        holders: Sequence[str],
    ) -> None:
        """Bring the shards [(content id, size)] of a job that are not here; `sealed` is the spec id
        when they are sealed. Errors as `fetch_file`, of the first shard that could not be had."""
        waiting = list(reversed(shards))
        failure: Exception | None = None

        async def work() -> None:
            nonlocal failure
            while waiting:
                content, size = waiting.pop()
                try:
                    await self._fetch_shard(job, sealed, content, size, holders)
                except (MachineError, OSError) as error:
                    # Raised below: the nursery would put it into a group.
                    failure = failure or error
                    waiting.clear()

        async with trio.open_nursery() as nursery:
            for _ in range(DOWNLOADS_AT_ONCE):
                nursery.start_soon(work)
        if failure is not None:
            raise failure

    async def _fetch_shard(
        self, job: bytes, sealed: bytes | None, content: bytes, size: int, holders: Sequence[str]
    ) -> None:
        item = Blob(job, content)

        async def check(download: Download, group: Sequence[str]) -> None:
            if sealed is not None:
                asked = list(dict.fromkeys([*group, *holders]))
                await self._check_opens(job, sealed, content, download, asked)
            elif download.located.digests != content:
                raise ContentMismatch("another content than was asked for")

        def place(located: wire.Located) -> tuple[Path, Path]:
            if sealed is None:
                return self._layout.blob(content), self._layout.blob(content)
            # Aside: a key that somebody made up shall not even leave a directory.
            aside = self._layout.sealed(sealed) / content.hex()
            return self._layout.sealed_blob(sealed, *_key_of(located), content), aside

        async with self._alone((sealed, content)):
            if not await trio.to_thread.run_sync(self._store.has, sealed, content, size):
                stored = size if sealed is None else sealed_size(size)
                await self._bring(item, stored, holders, place, check, {}, blob=True)

    async def list_result(self, job: bytes, holders: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """The files of a result at the first holder that has one. ContentUnavailable."""
        answers = []
        for holder in holders:
            try:
                if holder == self._host.peer_id:
                    return await trio.to_thread.run_sync(self._store.result_files, job)
                reply = await self._ask_once(holder, wire.ListFiles(job))
                if isinstance(reply, wire.Files):
                    return reply.files
                answers.append(f"{holder}: an answer to something else")
            except _FAILURES as error:
                answers.append(f"{holder}: {str(error) or 'too slow'}")
        raise ContentUnavailable("; ".join(answers) or "no holder is known")

    # keys ------------------------------------------------------------------------------------

    async def _check_opens(
        self, job: bytes, spec: bytes, content: bytes, download: Download, holders: Sequence[str]
    ) -> None:
        """A sealed shard must open to its content, with the key that it names: ours, or a holder's.
        The key that opened it is kept. ContentMismatch, ContentUnavailable."""
        name = _key_of(download.located)
        epoch = name.epoch
        sealed = await trio.to_thread.run_sync(_read_sealed, download.part)
        key = await trio.to_thread.run_sync(self._keys.get, spec, name)
        if key is not None:
            await trio.to_thread.run_sync(unseal, key, spec, epoch, content, sealed)
            return
        answers = []
        for holder in holders:
            if holder == self._host.peer_id:
                continue
            try:
                reply = await self._ask_once(holder, wire.AskKey(job, *name))
                if not isinstance(reply, wire.KeyBox):
                    raise ContentUnavailable("an answer to something else")
                key = self._keys.open(spec, name, reply.box)
                await trio.to_thread.run_sync(unseal, key, spec, epoch, content, sealed)
            except _FAILURES as error:
                answers.append(f"{holder}: {str(error) or 'too slow'}")
            else:
                await trio.to_thread.run_sync(self._keys.keep, spec, epoch, key)
                return
        raise ContentUnavailable(f"nobody gave the content key: {'; '.join(answers)}")

    # downloads -------------------------------------------------------------------------------

    async def _bring(
        self,
        item: Item,
        limit: int,
        holders: Sequence[str],
        place: Place,
        check: Check,
        answers: dict[str, str],
        *,
        blob: bool = False,
    ) -> tuple[str, ...]:
        """Locate, group, download, check. `answers` collects what each holder said instead."""
        others = [h for h in dict.fromkeys(holders) if h != self._host.peer_id]
        asked = set[str]()
        job = wire.job_of(item)
        alike = self._job_slots.setdefault(job, trio.Semaphore(DOWNLOADS_AT_ONCE))
        async with alike, self._slots:
            while left := [h for h in others if h not in asked and h not in answers]:
                sources = Sources()
                try:
                    await self._locate(item, limit, left, sources, answers)
                    asked |= sources.located.keys()
                    unasked = any(h not in asked and h not in answers for h in others)
                    groups = sources.groups()
                    for number, (located, group) in enumerate(groups, 1):
                        patience = math.inf
                        if unasked or number < len(groups):
                            patience = PATIENCE_SECONDS + wire.chunk_count(located.size)
                        try:
                            await self._download(
                                item,
                                place(located),
                                located,
                                group,
                                sources,
                                check,
                                answers,
                                blob,
                                patience,
                            )
                        except _FAILURES as error:
                            for holder in group:
                                answers.setdefault(holder, str(error) or "too slow")
                        else:
                            return tuple(group)
                finally:
                    await sources.close()
        told = (f"{holder}: {answer}" for holder, answer in answers.items())
        raise ContentUnavailable("; ".join(told) or "no holder is known")

    async def _locate(
        self,
        item: Item,
        limit: int,
        holders: Sequence[str],
        sources: Sources,
        answers: dict[str, str],
    ) -> None:
        """Ask all at once; ends when all have answered, or soon after the first that has it."""

        async def ask(holder: str) -> None:
            try:
                stream, located = await self._open_patiently(holder, item)
                if located.size > limit:
                    await stream.reset()
                    raise ContentMismatch(
                        f"{located.size} bytes where at most {limit} are possible"
                    )
            except _FAILURES as error:
                answers[holder] = str(error) or "too slow"
            else:
                sources.add(holder, stream, located)
                soon = trio.current_time() + SETTLE_SECONDS
                nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, soon)

        async with trio.open_nursery() as nursery:
            for holder in holders:
                nursery.start_soon(ask, holder)

    async def _open_patiently(self, holder: str, item: Item) -> tuple[Stream, wire.Located]:
        """As `_open`, again after a broken stream: when two peers dial each other at the same time
        one of the connections is dropped, and streams on it with it."""
        for pause in RETRY_SECONDS:
            try:
                return await self._open(holder, item)
            except (StreamError, DialFailed) as error:
                log.info("content from %s: %s; again", holder, error)
            await trio.sleep(pause)
        return await self._open(holder, item)

    async def _open(self, holder: str, item: Item) -> tuple[Stream, wire.Located]:
        """A stream on which the item is located."""
        stream = await self._host.open_stream(holder, self._protocol)
        try:
            with trio.fail_after(wire.IDLE_SECONDS):
                await stream.send(wire.encode_request(wire.Locate(item)))
                reply = wire.decode_reply(await stream.receive(wire.REPLY_BYTES))
            if not isinstance(reply, wire.Located):
                raise ContentUnavailable("an answer to something else")
            if wire.chunk_count(reply.size) <= wire.LIST_CHUNKS:
                with _blaming(stream):
                    wire.check_digests(reply, reply.digests)
        except BaseException:  # also cancellation: nobody else knows the stream
            await stream.reset()
            raise
        return stream, reply

    async def _ask_once(self, holder: str, request: wire.Request) -> object:
        """One small question on a stream of its own."""
        with trio.fail_after(wire.IDLE_SECONDS):
            async with await self._host.open_stream(holder, self._protocol) as stream:
                await stream.send(wire.encode_request(request))
                return wire.decode_reply(await stream.receive(wire.REPLY_BYTES))

    async def _download(
        self,
        item: Item,
        where: tuple[Path, Path],
        located: wire.Located,
        group: Sequence[str],
        sources: Sources,
        check: Check,
        answers: dict[str, str],
        blob: bool,
        patience: float,
    ) -> None:
        digests = await self._all_digests(located, group, sources, answers)
        await trio.to_thread.run_sync(lambda: self._store.make_room(located.size, blob=blob))
        target, beside = where
        download = Download(target, located, digests, beside)
        failure: OSError | None = None
        wrong = True
        """Whether what is there is of no use: a broken download is, and stays."""
        try:
            await trio.to_thread.run_sync(download.open)
            if download.resumed:
                count = wire.chunk_count(located.size)
                log.info("%s goes on: %d of %d chunks are here", target, download.resumed, count)
            with trio.move_on_after(patience):
                async with trio.open_nursery() as nursery:

                    async def pull(holder: str) -> None:
                        nonlocal failure
                        try:
                            reason = await self._pull(holder, item, download, sources)
                        except OSError as error:
                            # Our disk, raised below: the nursery would put it into a group.
                            failure = error
                        else:
                            if reason:
                                answers[holder] = reason
                        if failure is not None or download.complete:
                            nursery.cancel_scope.cancel()

                    for holder in group:
                        nursery.start_soon(pull, holder)
            if failure is not None:
                raise failure
            if not download.complete:
                wrong = False
                raise ContentUnavailable("all who had it failed, or were too slow")
            await check(download, group)
            await trio.to_thread.run_sync(download.finish)
            wrong = False
        finally:
            download.close()
            if wrong:
                download.discard()

    async def _pull(self, holder: str, item: Item, download: Download, sources: Sources) -> str:
        """Bring chunks from one holder, over new streams when one breaks; gives why it ended."""
        pauses = list(RETRY_SECONDS)
        while True:
            before = download.brought[holder]
            try:
                stream = sources.streams.pop(holder, None)
                if stream is None:
                    stream, located = await self._open(holder, item)
                    if located.content != download.located.content:
                        await stream.reset()
                        raise ContentMismatch("it has something else now")
                async with stream:
                    with _blaming(stream):
                        await download.pull(holder, stream)
                return ""
            except (StreamError, DialFailed) as error:
                log.info("content from %s: %s", holder, error)
                if download.brought[holder] > before:
                    pauses = list(RETRY_SECONDS)
                if not pauses:
                    return str(error)
                await trio.sleep(pauses.pop(0))
            except ContentMismatch as error:
                log.warning("content from %s is not taken: %s", holder, error)
                return str(error)
            except _FAILURES as error:
                return str(error) or "too slow"

    async def _all_digests(
        self,
        located: wire.Located,
        group: Sequence[str],
        sources: Sources,
        answers: dict[str, str],
    ) -> bytes:
        """The whole list of chunk digests, checked; from the first of the group that gives it."""
        count = wire.chunk_count(located.size)
        if count <= wire.LIST_CHUNKS:
            return located.digests
        for holder in group:
            stream, found = sources.streams[holder], bytearray(sources.located[holder].digests)
            try:
                while len(found) < count * wire.DIGEST_BYTES:
                    first = len(found) // wire.DIGEST_BYTES
                    with trio.fail_after(wire.IDLE_SECONDS):
                        await stream.send(wire.encode_request(wire.MoreDigests(first)))
                        raw = await stream.receive(wire.REPLY_BYTES)
                    piece = wire.decode_bytes(raw)
                    if len(piece) < min(wire.LIST_CHUNKS, count - first) * wire.DIGEST_BYTES:
                        raise ContentMismatch("its list of chunks is too short")
                    found += piece
                wire.check_digests(located, bytes(found))
            except _FAILURES as error:
                answers[holder] = str(error) or "too slow"
                await stream.reset()
                del sources.streams[holder]
            else:
                return bytes(found)
        raise ContentUnavailable("nobody gave the list of its chunks")

    def _copy(self, item: Item, limit: int, target: Path) -> None:
        """The holder is this machine: copy the file."""
        path, _ = self._store.path(item)
        if isinstance(item, ContributionFile):
            check_content(path, item.content)
        with path.open("rb") as file:
            size = path.stat().st_size
            if size > limit:
                raise ContentMismatch(f"{size} bytes where at most {limit} are possible")
            self._store.make_room(size, blob=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, iter(lambda: file.read(wire.CHUNK_BYTES), b""))

    @asynccontextmanager
    async def _alone(self, what: object) -> AsyncIterator[None]:
        """One task at a time brings the same thing: a second one waits and then looks again."""
        while (busy := self._busy.get(what)) is not None:
            await busy.wait()
        ended = self._busy[what] = trio.Event()
        try:
            yield
        finally:
            del self._busy[what]
            ended.set()


@contextmanager
def _blaming(stream: Stream) -> Iterator[None]:
    """Bytes that are not what their sender announced are counted against it."""
    try:
        yield
    except ContentMismatch as error:
        stream.blame(str(error))
        raise


def _check_of(item: Item) -> Check:
    """A contribution is known by its hash; of the others whoever asked checks the root."""

    async def check(download: Download, group: Sequence[str]) -> None:
        if isinstance(item, ContributionFile):
            await trio.to_thread.run_sync(check_content, download.part, item.content)

    return check


def _key_of(located: wire.Located) -> KeyName:
    """The key that sealed data names; ContentMismatch."""
    if len(located.key) != wire.KEY_ID_BYTES:
        raise ContentMismatch("sealed data that names no key")
    return KeyName(located.epoch, located.key)


def _read_sealed(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(sealed_size(SHARD_BYTES))
