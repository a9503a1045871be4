"""What a running segment sees of the world: numbered frames on named links.

A link is "up" (to stage - 1) or "down" (to stage + 1); in a ring the "down" of the last stage is
the "up" of the first. Its two directions are two logs, numbered seq = step * micro_batches +
micro_batch. Live, the channel is the carrier; in an audit, a recovery or a verification it is a
log. The segment runner is the same code in all of them.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from tdmld.train.digest import digest
from tdmld.train.errors import FileError
from tdmld.train.framelog import frame_log_name, index_frames


class Channel(Protocol):
    """The runner's side of a slot's links. Used from one thread, blocking."""

    def receive(self, link: str, seq: int) -> memoryview | bytes:
        """The payload of frame `seq` from the neighbour; waits for it.

        The buffer may lie in shared memory and stays valid until `release`. The runner copies it
        out, hashes it in place and releases it at once.
        """
        ...

    def release(self, link: str, seq: int) -> None:
        """The runner no longer reads the buffer of frame `seq`."""
        ...

    def send(self, link: str, seq: int, payload: memoryview) -> None:
        """Hand over frame `seq` for the neighbour; `payload` is borrowed until the call returns.

        Never waits for the neighbour; waits only when the ring on disk is full (stall at D).
        """
        ...


class LogChannel:
    """A segment's received frames from disk; what the replay sends is only hashed.

    Reads `<segment>.<link>.received` under `directory` for each link. Raises FileError when a log
    is missing or malformed, or does not have a frame that the runner asks for: it was not fetched
    whole, which says nothing about the segment.
    """

    def __init__(
        self, directory: Path, segment: int, links: Sequence[str], frame_bytes: int
    ) -> None:
        self.sent: dict[str, list[tuple[int, bytes]]] = {link: [] for link in links}
        """(seq, digest) of every frame that the replay sent, by link."""
        self._maps: dict[str, mmap.mmap] = {}
        self._views: dict[str, memoryview] = {}
        self._index: dict[str, dict[int, tuple[int, int]]] = {}
        try:
            for link in links:
                self._open(link, directory / frame_log_name(segment, link, "received"), frame_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, link: str, path: Path, frame_bytes: int) -> None:
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot replay: frame log {path}: {error}; fetch it again") from error
        self._maps[link] = mapped
        self._views[link] = memoryview(mapped)
        self._index[link] = {
            entry.seq: (entry.offset, entry.length)
            for entry in index_frames(self._views[link], frame_bytes, str(path))
        }

    def receive(self, link: str, seq: int) -> memoryview:
        """The logged payload of frame `seq`."""
        found = self._index[link].get(seq)
        if found is None:
            raise FileError(f"the log of link {link} has no frame {seq}; fetch it again")
        offset, length = found
        return self._views[link][offset : offset + length]

    def release(self, link: str, seq: int) -> None:
        """Nothing to free: the log is mapped."""

    def send(self, link: str, seq: int, payload: memoryview) -> None:
        """Keep the digest of what the replay would have sent."""
        self.sent[link].append((seq, digest(payload)))

    def close(self) -> None:
        """Unmap the logs, at once or when the last buffer that `receive` gave is dropped."""
        for view in self._views.values():
            view.release()
        for mapped in self._maps.values():
            with suppress(BufferError):
                mapped.close()
        self._views.clear()
        self._maps.clear()

    def __enter__(self) -> "LogChannel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
