"""Content on this machine's disk: by name, by hash, and sealed. Methods block: use a thread."""

import fcntl
import logging
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from tdmld.files import Buffer, write_file
from tdmld.node.contentwire import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    MAX_RESULT_FILES,
    chunk_count,
    content_of,
)
from tdmld.node.control import (
    MAX_FRAME_BYTES,
    Blob,
    ContributionFile,
    FrameFile,
    FramesFile,
    GivenFile,
    Item,
    ResultFile,
    StateFile,
)
from tdmld.node.errors import ContentError, ContentMismatch, ContentRefused, ContentUnavailable
from tdmld.node.jobfiles import remove_tree
from tdmld.node.layout import Layout, free_bytes, is_file_name
from tdmld.node.seal import ContentKeys, KeyName, seal, sealed_size, unseal
from tdmld.train.digest import digest
from tdmld.train.errors import FileError
from tdmld.train.framelog import HEADER, frame_log_name, scan_frames
from tdmld.train.limits import SHARD_BYTES, TEXT_BYTES
from tdmld.train.statefile import part_file

log = logging.getLogger(__name__)

KNOWN_LISTS_BYTES = 64 << 20
"""Of digests of served files, kept so that a file is hashed once."""
_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class ChunkList:
    """What is said of a file: its size, the digests of its chunks, and their hash."""

    content: bytes
    size: int
    digests: bytes


class ContentStore:
    """Files below a data directory. Sealed data is named by spec id, key and content id."""

    def __init__(self, layout: Layout, quota: int, keys: ContentKeys) -> None:
        self._layout = layout
        self._quota = quota
        self._keys = keys
        self._held = quota
        """Bytes in content/, or more: measured when it seems to be full."""
        self._lists: OrderedDict[tuple[str, int, int], ChunkList] = OrderedDict()
        self._lists_bytes = 0
        self._remembering = threading.Lock()

    # what is here ----------------------------------------------------------------------------

    def path(self, item: Item, sealed: bytes | None = None) -> tuple[Path, KeyName | None]:
        """Where an item lies, and the name of the key that it is sealed under.

        `sealed`: the spec id of the item's job when its data is sealed. ContentUnavailable.
        """
        candidates: tuple[Path, ...]
        match item:
            case Blob(_, content):
                path, name, _ = self._shard(sealed, content)
                return path, name
            case ResultFile(job, name):
                if not is_file_name(name):
                    raise ContentUnavailable(f"{name!r} is no file of a result")
                candidates = (self._layout.result(job) / name,)
            case GivenFile(_, root):
                candidates = (self._layout.given(root),)
            case ContributionFile(slot, number, _):
                candidates = tuple(
                    self._layout.contributions(slot.job, slot.lane, slot.stage, number)
                )
            case FrameFile():
                raise ContentUnavailable("a frame is no file")
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
                return path, None
        raise ContentUnavailable("not here")

    def _shard(self, sealed: bytes | None, content: bytes) -> tuple[Path, KeyName | None, bytes]:
        """A shard's file, the newest of a sealed one whose key is here, and name and key of that.
        ContentUnavailable."""
        if sealed is None:
            if (path := self._layout.blob(content)).is_file():
                return path, None, b""
        else:
            for name in self._keys.names(sealed):
                path = self._layout.sealed_blob(sealed, *name, content)
                if path.is_file() and (key := self._keys.get(sealed, name)) is not None:
                    return path, name, key
        raise ContentUnavailable("not here")

    def identify(self, fd: int, path: Path) -> ChunkList:
        """The chunks of an open file; remembered as long as it does not change."""
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise ContentUnavailable("not a file")
        key = (str(path), facts.st_mtime_ns, facts.st_size)
        known = self._lists.get(key)
        if known is None:
            known = chunks_of(fd, 0, facts.st_size)
            self._remember(key, known)
        return known

    def frame(self, item: FrameFile) -> tuple[Path, int, int]:
        """Log of a frame that a slot here sent, where its record begins and how long it is; the log
        may still grow. ContentUnavailable."""
        owner = self._layout.slot(item.slot.job, item.slot.lane, item.slot.stage)
        logs = []
        for path in owner.glob(f"ring/*.{item.link}.sent"):
            number = path.name.partition(".")[0]
            if number.isdecimal():
                logs.append((int(number), path))
        for _, path in sorted(logs, reverse=True):
            with suppress(OSError, FileError), path.open("rb") as file:
                for entry in scan_frames(file.fileno(), MAX_FRAME_BYTES, path.name):
                    if entry.seq > item.seq:
                        break
                    if entry.seq == item.seq:
                        return path, entry.offset - HEADER.size, HEADER.size + entry.length
        raise ContentUnavailable("that frame was not sent, or is not kept any more")

    def _remember(self, key: tuple[str, int, int], found: ChunkList) -> None:
        with self._remembering:
            if key in self._lists:
                return  # two streams asked for the same file at the same time
            self._lists[key] = found
            self._lists_bytes += DIGEST_BYTES + len(found.digests)
            while self._lists_bytes > KNOWN_LISTS_BYTES:
                _, oldest = self._lists.popitem(last=False)
                self._lists_bytes -= DIGEST_BYTES + len(oldest.digests)

    def result_files(self, job: bytes) -> tuple[tuple[str, int], ...]:
        """(name, size) of a result; ContentUnavailable."""
        directory = self._layout.result(job)
        if not directory.is_dir():
            raise ContentUnavailable("no result of this job is here")
        found = sorted(path for path in directory.iterdir() if path.is_file())
        return tuple((path.name, path.stat().st_size) for path in found if is_file_name(path.name))[
            :MAX_RESULT_FILES
        ]

    def has(self, sealed: bytes | None, content: bytes, size: int) -> bool:
        """Whether a shard is here, sealed or not. Its bytes were checked when it was stored."""
        try:
            path, _, _ = self._shard(sealed, content)
            return path.stat().st_size == (size if sealed is None else sealed_size(size))
        except (ContentError, FileNotFoundError):
            return False

    # room ------------------------------------------------------------------------------------

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
        for path in self._layout.content.rglob("*"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                held += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
        return held

    # data ------------------------------------------------------------------------------------

    def import_text(self, path: Path, sealed: bytes | None = None) -> list[tuple[bytes, int]]:
        """Cut a text file into shards and keep each, sealed under the newest key of the spec
        `sealed` (the first one is made here) when one is given. ContentRefused, OSError."""
        if sealed is not None:
            name, key = self._keys.newest(sealed) or self._keys.make(sealed, 0)
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
            # Twice: what is there already needs no room, and what has none is not begun with.
            sizes = {digest(shard): len(shard) for shard in _shards_of(file)}
            missing = {c: size for c, size in sizes.items() if not self.has(sealed, c, size)}
            stored = missing.values() if sealed is None else map(sealed_size, missing.values())
            self.make_room(sum(stored), blob=True)
            file.seek(0)
            shards = []
            for shard in _shards_of(file):
                content = digest(shard)
                shards.append((content, len(shard)))
                if missing.pop(content, None) is None:
                    continue
                if sealed is None:
                    _keep(self._layout.blob(content), shard)
                else:
                    target = self._layout.sealed_blob(sealed, *name, content)
                    _keep(target, seal(key, sealed, name.epoch, content, memoryview(shard)))
            return shards

    def rekey(self, spec: bytes) -> int:
        """Begin the next key epoch of a spec that was published here, and seal its data anew, so
        that who comes later needs no older key; gives the epoch. ContentUnavailable."""
        last = self._keys.newest(spec)
        if last is None:
            raise ContentUnavailable("this node holds no content key of that spec")
        older = self._keys.names(spec)
        name, key = self._keys.make(spec, last[0].epoch + 1)
        for content in sorted({content for was in older for content in self._shards(spec, was)}):
            try:
                data = self.read(spec, content)
            except ContentError as error:
                log.warning("a shard of a sealed text cannot be sealed anew: %s", error)
                continue
            self.make_room(sealed_size(len(data)), blob=True)
            target = self._layout.sealed_blob(spec, *name, content)
            _keep(target, seal(key, spec, name.epoch, content, memoryview(data)))
        for gone in older:
            remove_tree(self._layout.sealed_under(spec, *gone))
        return name.epoch

    def _shards(self, spec: bytes, name: KeyName) -> Iterator[bytes]:
        for path in self._layout.sealed_under(spec, *name).iterdir():
            if len(path.name) == 2 * DIGEST_BYTES:
                yield bytes.fromhex(path.name)

    def read(self, sealed: bytes | None, content: bytes) -> bytes:
        """A shard's plaintext, in memory alone. ContentUnavailable; ContentMismatch when the disk
        spoiled it, which then is here no longer and can be fetched again."""
        path, name, key = self._shard(sealed, content)
        data = path.read_bytes()
        try:
            if sealed is not None and name is not None:
                return unseal(key, sealed, name.epoch, content, data)
            if digest(data) != content:
                raise ContentMismatch("it is not what its name says")
        except ContentMismatch:
            path.unlink(missing_ok=True)
            raise
        return data

    def text_memory(self, sealed: bytes | None, shards: Sequence[tuple[bytes, int]]) -> int:
        """A memory file with the whole text, which nobody can change any more; the caller closes
        the descriptor. It is on no disk. ContentUnavailable, ContentMismatch name the shard."""
        fd = os.memfd_create("tdmld-text", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for number, (content, _) in enumerate(shards):
                try:
                    view = memoryview(self.read(sealed, content))
                except ContentUnavailable as error:
                    raise ContentUnavailable(
                        f"data shard {number}: {error}; fetch_data first"
                    ) from error
                except ContentMismatch as error:
                    raise ContentMismatch(
                        f"shard {number} is not the one that the spec names: {error}"
                    ) from error
                while view:
                    view = view[os.write(fd, view) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _ALL_SEALS)
        except BaseException:  # whatever it was, cancellation too: nobody else knows the descriptor
            os.close(fd)
            raise
        return fd


def chunks_of(fd: int, begin: int, size: int) -> ChunkList:
    """The chunks of a piece of an open file."""
    digests = bytearray()
    for chunk in range(chunk_count(size)):
        at = chunk * CHUNK_BYTES
        digests += blake3(os.pread(fd, min(CHUNK_BYTES, size - at), begin + at)).digest()
    found = bytes(digests)
    return ChunkList(content_of(size, found), size, found)


def _shards_of(file: BinaryIO) -> Iterator[bytes]:
    while shard := file.read(SHARD_BYTES):
        yield shard


def _keep(path: Path, data: Buffer | Iterator[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
