"""Files that exist whole or not at all, and bounded reads of files that somebody else wrote."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

Buffer = bytes | bytearray | memoryview

_serial = itertools.count()
"""Names of files being written: two writers of one process never share one."""


class FileTooLarge(OSError):
    """A file has more bytes than its reader is willing to look at."""


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
    pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    aside = path.with_name(f".{path.name}.{os.getpid()}.{next(_serial)}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(descriptor)
        if exclusive:
            os.link(aside, path)
            aside.unlink()
        else:
            aside.replace(path)
    except BaseException:  # whatever it was, and an interrupt: no half file stays beside the whole
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


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
