"""Keeping what a segment leaves behind while the next one runs.

The state was written aside already, into the page cache; syncing it takes as long as the disk
needs, and the slot does not wait for that. In this order: state synced and in its place, list
synced, packet. One segment at a time; what went wrong comes out of `wait`, which a live worker
calls before it keeps another one and before it waits for a grant.
"""

import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from tdmld.files import Aside, settle_all
from tdmld.node.channel import Segment, WorkerChannel
from tdmld.node.layout import list_file
from tdmld.train.errors import FileError
from tdmld.train.segment import SegmentRecord, read_list, write_list

SALT_BYTES = 32


class SegmentKeeper:
    """For one live slot; leaving the context waits for the thread."""

    def __init__(self, directory: Path, channel: WorkerChannel) -> None:
        """`directory` is the slot's."""
        self._directory = directory
        self._channel = channel
        self._thread = ThreadPoolExecutor(1, "segment-keeper")
        self._pending: Future[None] | None = None

    def keep(self, record: SegmentRecord, state: Sequence[Aside]) -> None:
        """Settle the state after a segment, write its list, report it. Returns at once; `wait`
        must have been called since the last one."""
        assert self._pending is None
        self._pending = self._thread.submit(self._keep, record, state)

    def wait(self) -> None:
        """Return when nothing is being kept. OSError, FileError, ControlError of what was."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _keep(self, record: SegmentRecord, state: Sequence[Aside]) -> None:
        settle_all(state)
        keep_list(list_file(self._directory, record.segment), record)
        self._channel.report(Segment(record.segment))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()


def keep_list(path: Path, record: SegmentRecord) -> None:
    """Write the list of a segment, unless it is there from a time before. FileError when that one
    has another record, or cannot be read now: the salt in it may be on the chain."""
    try:
        before = read_list(path).record
    except FileError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise
        write_list(path, record, secrets.token_bytes(SALT_BYTES))
        return
    if before != record:
        raise FileError(
            f"segment {record.segment} came out otherwise than before; memory or disk of this"
            " machine is not reliable"
        )
