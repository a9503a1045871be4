"""What one peer may cost us, and whose turn it is: so that a flood from one keeps nobody else out.

Identities are free for whoever connects, so a budget by itself protects only from a few: turns go
round whatever the budgets say, and what is refused costs its sender many times what it cost us, so
that a new identity buys less work here than its handshake did.
"""

from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

MAX_METERED = 1024
"""Peers whose spending is remembered: four times the connections that a host takes."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a peer may use of us for ever, in a second; and `burst` seconds of it at once."""

    work: float
    """Seconds of one core."""
    size: float
    """Bytes."""
    burst: float = 2.0


@dataclass(slots=True)
class _Account:
    work: float
    size: float
    at: float


class Meter:
    """A token bucket of work and one of bytes for each peer; time is trio's.

    Who has overdrawn one of them waits until it is above zero again.
    """

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def open(self, peer: str, size: int) -> bool:
        """Whether to look at `size` bytes of a peer: takes them from its bytes, if it is heard."""
        account = self._account(peer)
        if account.work <= 0 or account.size <= 0:
            return False
        account.size -= size
        return True

    def charge(self, peer: str, seconds: float) -> bool:
        """Something of a peer has made us work; whether it has work left now."""
        account = self._account(peer)
        account.work -= seconds
        return account.work > 0

    def _account(self, peer: str) -> _Account:
        now, allowance = trio.current_time(), self._allowance
        most_work, most_size = allowance.work * allowance.burst, allowance.size * allowance.burst
        account = self._accounts.get(peer)
        if account is None:
            account = self._accounts[peer] = _Account(most_work, most_size, now)
            if len(self._accounts) > MAX_METERED:
                self._accounts.popitem(last=False)
            return account
        self._accounts.move_to_end(peer)
        passed = now - account.at
        account.at = now
        account.work = min(most_work, account.work + passed * allowance.work)
        account.size = min(most_size, account.size + passed * allowance.size)
        return account


class Turns:
    """A lock that goes round among its sources: one that waits many times at once is let in no
    oftener than one that waits once. `first` goes before all others."""

    def __init__(self, first: str) -> None:
        self._first = first
        self._held = False
        self._waiting: OrderedDict[str, deque[trio.Event]] = OrderedDict()

    @asynccontextmanager
    async def of(self, source: str) -> AsyncIterator[None]:
        """Hold the lock. A cancellation while waiting gives the place up."""
        await self._take(source)
        try:
            yield
        finally:
            self._pass_on()

    async def _take(self, source: str) -> None:
        if not self._held:
            self._held = True
            return
        turn = trio.Event()
        self._waiting.setdefault(source, deque()).append(turn)
        try:
            await turn.wait()
        except trio.Cancelled:
            if turn.is_set():
                self._pass_on()
            else:
                self._leave(source, turn)
            raise

    def _leave(self, source: str, turn: trio.Event) -> None:
        queue = self._waiting[source]
        queue.remove(turn)
        if not queue:
            del self._waiting[source]

    def _pass_on(self) -> None:
        if not self._waiting:
            self._held = False
            return
        source = self._first if self._first in self._waiting else next(iter(self._waiting))
        turn = self._waiting[source][0]
        self._leave(source, turn)
        if source in self._waiting:
            self._waiting.move_to_end(source)
        turn.set()
