"""Whose frame is next on a connection, and how large it may be.

Small messages and control frames overtake bulk; bulk is never kept waiting for ever; and no frame
is so large that those behind it notice.
"""

from trio.lowlevel import ParkingLot

FRAME_LEAST_BYTES = 16 * 1024
"""One TLS record: smaller ones cost more than they help."""
FRAME_MOST_BYTES = 128 * 1024
"""Beyond that a frame saves no more time, and leaves the cache of the processor."""
_FRAME_SECONDS = 0.003
"""A bulk frame shall leave in this time: 37 KB on a line of 100 Mbit/s."""
_WEIGHT = 0.25
_OVERTAKING = 16
"""Urgent frames in a row while bulk waits; then one bulk frame goes."""


class Turns:
    """One holder at a time; handed on to the next one waiting, first come first served."""

    def __init__(self) -> None:
        self._held = False
        self._urgent = ParkingLot()
        self._bulk = ParkingLot()
        self._overtaken = 0

    async def take(self, *, urgent: bool) -> None:
        """Wait for the turn; `release` it. Cancelled, it was not given. A free one is taken
        without yielding, which would cost more than a small frame does."""
        if self._held:
            await (self._urgent if urgent else self._bulk).park()
        self._held = True

    def release(self) -> None:
        """Give the turn to whom it is due."""
        if self._urgent and not (self._bulk and self._overtaken >= _OVERTAKING):
            self._overtaken += 1
            self._urgent.unpark()
        elif self._bulk:
            self._overtaken = 0
            self._bulk.unpark()
        else:
            self._overtaken = 0
            self._held = False


class FrameSize:
    """Bytes of a bulk frame, from how fast the last ones left. Begins small: the line may be."""

    def __init__(self) -> None:
        self.bytes = FRAME_LEAST_BYTES
        self._sent = 0.0
        self._seconds = 0.0

    def sent(self, size: int, seconds: float) -> None:
        """A bulk frame took so long; at most twice as large ones from now on."""
        self._sent += _WEIGHT * (size - self._sent)
        self._seconds += _WEIGHT * (seconds - self._seconds)
        fitting = _FRAME_SECONDS * self._sent / max(self._seconds, 1e-6)
        fitting = min(fitting, 2 * self.bytes, FRAME_MOST_BYTES)
        self.bytes = max(int(fitting) // FRAME_LEAST_BYTES * FRAME_LEAST_BYTES, FRAME_LEAST_BYTES)
