"""Files that exist whole or not at all, and bounded reads of files that somebody else wrote."""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

Buffer = bytes | bytearray | memoryview

_serial = itertools.count()
"""Names of files being written: two writers of one process never share one."""


class FileTooLarge(OSError):
    """A file has more bytes than its reader is willing to look at."""


class Aside:
    """A file that is written beside its place, not yet synced: `settle` or `discard` it."""

    def __init__(self, path: Path, aside: Path, descriptor: int) -> None:
        """Internal; use `write_aside`. Takes the descriptor."""
        self.path = path
        self._aside = aside
        self._descriptor = descriptor

    def settle(self, *, exclusive: bool = False) -> None:
        """Sync the file, move it into place, sync the directory. May be called in a thread.

        With `exclusive`, FileExistsError when `path` is there already. OSError leaves what was
        there.
        """
        try:
            os.fsync(self._descriptor)
            if exclusive:
                os.link(self._aside, self.path)
                self._aside.unlink()
            else:
                self._aside.replace(self.path)
        except BaseException:  # whatever it was: no half file stays beside the whole
            self.discard()
            raise
        self._close()
        sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove what was written; nothing after `settle`."""
        if self._descriptor >= 0:
            self._close()
            self._aside.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


def settle_all(files: Sequence[Aside]) -> None:
    """Settle the files in this order. OSError: the remaining ones are discarded."""
    try:
        for file in files:
            file.settle()
    finally:
        for file in files:
            file.discard()


def write_aside(path: Path, data: Buffer | Iterable[Buffer], *, mode: int = 0o644) -> Aside:
    """Write `data` (or its pieces, one after another) beside `path`, which stays as it is.

    What the pieces are views of may change as soon as this returns. OSError.
    """
    pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    aside = path.with_name(f".{path.name}.{os.getpid()}.{next(_serial)}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    found = Aside(path, aside, descriptor)
    try:
        os.fchmod(descriptor, mode)
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            for piece in pieces:
                file.write(piece)
    except BaseException:  # whatever it was, and an interrupt
        found.discard()
        raise
    return found


def write_file(
    path: Path,
    data: Buffer | Iterable[Buffer],
    *,
    mode: int = 0o644,
    exclusive: bool = False,
) -> None:
    """Write `data` (or its pieces, one after another) aside, sync, move into place, sync the
    directory.

    After a power cut the old or the new file is there, never a part. `mode` is set before the
    first byte is written. With `exclusive`, FileExistsError when `path` is there already, also
    when two writers try at once. Several writers of one path do not disturb each other: the last
    one to finish wins. OSError (a full disk) leaves what was there.
    """
    write_aside(path, data, mode=mode).settle(exclusive=exclusive)


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path, limit: int) -> bytes:
    """All bytes of `path`; FileTooLarge when there are more than `limit`."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileTooLarge(f"{path} has more than {limit} bytes")
    return data
