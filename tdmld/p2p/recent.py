"""The gossip of the last minute and a half, as it was signed: what a host can be asked for.

Pure: no clock, no network. Messages stand in the order in which they came here and are numbered, so
that whoever asks again needs only what is new. A message carries its age along from host to host:
all drop it at nearly the same time, and well before any of them forgets having seen it, so that no
message goes round for ever.

Whatever happens, the store is bounded; when it is full, the source that has most in it loses its
oldest message, and so one that floods loses its own.
"""

import os
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

WINDOW_SECONDS = 90.0
"""From the first publication. Shorter than a host remembers what it has seen (120 s)."""
SETTLE_SECONDS = 2.0
"""Younger messages are on their way to everybody as it is, and are not offered."""
MAX_BYTES = 32 << 20
MAX_MESSAGES = 8192
_SOURCE_SHARE = 4
"""No source holds more than one part in so many."""
_OVERHEAD_BYTES = 256
"""Of an entry, so that empty messages cost something."""


@dataclass(frozen=True, slots=True)
class Held:
    """A message that passed every check."""

    key: bytes
    topic: str
    source: bytes
    raw: bytes
    """As its source signed it."""
    number: int
    born: float
    """When it was first published, in this host's time."""
    ready: float
    """When it may be offered."""

    @property
    def cost(self) -> int:
        return len(self.raw) + _OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Page:
    """What came after a number: messages to offer, and the number to go on from."""

    messages: tuple[Held, ...]
    upto: int
    more: bool


@dataclass(slots=True)
class _Share:
    numbers: OrderedDict[int, None] = field(default_factory=OrderedDict)
    cost: int = 0


class Recent:
    """The messages that a host can be asked for."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_messages: int = MAX_MESSAGES) -> None:
        self.life = os.urandom(8)
        """Numbers mean nothing in another life of this host."""
        self.top = 0
        """Number of the newest message."""
        self.size = 0
        """Bytes held."""
        self._max_bytes, self._max_messages = max_bytes, max_messages
        self._log: OrderedDict[int, Held] = OrderedDict()
        self._numbers: dict[bytes, int] = {}
        self._shares: dict[bytes, _Share] = {}

    def __len__(self) -> int:
        return len(self._log)

    def __contains__(self, key: bytes) -> bool:
        return key in self._numbers

    def hold(
        self, key: bytes, topic: str, source: bytes, raw: bytes, now: float, age: float | None
    ) -> None:
        """Keep a message that was published `age` seconds ago; None: it has just come by gossip."""
        self._expire(now)
        if key in self._numbers or (age or 0.0) >= WINDOW_SECONDS:
            return
        self.top += 1
        ready = now + SETTLE_SECONDS if age is None else now
        held = Held(key, topic, source, raw, self.top, now - (age or 0.0), ready)
        self._log[held.number] = held
        self._numbers[key] = held.number
        share = self._shares.setdefault(source, _Share())
        share.numbers[held.number] = None
        share.cost += held.cost
        self.size += held.cost
        while (
            share.cost * _SOURCE_SHARE > self._max_bytes
            or len(share.numbers) * _SOURCE_SHARE > self._max_messages
        ):
            self._drop(next(iter(share.numbers)))
        while self.size > self._max_bytes or len(self._log) > self._max_messages:
            largest = max(self._shares.values(), key=lambda share: share.cost)
            self._drop(next(iter(largest.numbers)))

    def get(self, key: bytes, now: float) -> Held | None:
        """A message that may still be passed on."""
        number = self._numbers.get(key)
        held = self._log[number] if number is not None else None
        return held if held is not None and now < held.born + WINDOW_SECONDS else None

    def since(self, number: int, topics: Collection[str], now: float, most: int) -> Page:
        """At most `most` messages on `topics` that came after the one of `number`."""
        self._expire(now)
        newer: list[Held] = []
        for held in reversed(self._log.values()):
            if held.number <= number:
                break
            newer.append(held)
        newer.reverse()
        found: list[Held] = []
        unready: int | None = None
        for held in newer:
            if held.topic not in topics or now >= held.born + WINDOW_SECONDS:
                continue
            if now < held.ready:
                unready = unready or held.number
            elif len(found) == most:
                upto = found[-1].number
                return Page(tuple(found), min(upto, unready - 1) if unready else upto, True)
            else:
                found.append(held)
        return Page(tuple(found), unready - 1 if unready else self.top, False)

    def _expire(self, now: float) -> None:
        """Drop what is too old. What came late may stay behind what came early for a while."""
        while self._log:
            number, held = next(iter(self._log.items()))
            if now < held.born + WINDOW_SECONDS:
                return
            self._drop(number)

    def _drop(self, number: int) -> None:
        held = self._log.pop(number)
        del self._numbers[held.key]
        self.size -= held.cost
        share = self._shares[held.source]
        del share.numbers[number]
        share.cost -= held.cost
        if not share.numbers:
            del self._shares[held.source]
