"""Which waiting transaction goes first, and which one leaves when the pool is full.

**Rate.** A block is full when its bytes are used up or its places are, so a transaction takes the
greater of two shares of it: `weight` is its size, at least `block_bytes / block_transactions`. Its
*rate* is fee / weight. By the fee alone an offer of 8 KiB would cost what a transfer costs; by the
byte alone the shortest transactions would take all places for little.

**Packages.** Transactions of one line work only in their order, so one that pays well lifts those
that it needs: a line is cut into packages of falling rates (each the best average of what is next),
and every transaction has its package's rate. The last package is the worst of its line and the only
one that can leave without breaking another.

**Rooms.** Owners' transactions, which bid, and nodes', whose jobs pay a fixed fee, do not compete:
each kind has a room that the other cannot fill.

Not consensus: nodes may order their pools as they like.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from tdmld.chain.state import State
from tdmld.chain.transactions import Transaction

BUMP = 10
"""Who takes another's place pays a tenth more: so rounds of outbidding are few."""


class Package(NamedTuple):
    """Transactions of a line that are worth taking together only. `rate`: 2^32 x fees / weight."""

    fees: int
    weight: int
    members: int
    rate: int

    @classmethod
    def of(cls, fees: int, weight: int, members: int) -> "Package":
        return cls(fees, weight, members, (fees << 32) // weight)

    def behind(self, packages: list["Package"]) -> tuple["Package", int]:
        """This one after `packages`: with those of them that it lifts, and how many these are."""
        found, lifted = self, 0
        while lifted < len(packages) and packages[-1 - lifted].rate < found.rate:
            before = packages[-1 - lifted]
            found = Package.of(
                before.fees + found.fees,
                before.weight + found.weight,
                before.members + found.members,
            )
            lifted += 1
        return found, lifted


@dataclass(slots=True, eq=False)
class Waiting:
    """A transaction in the pool. `fee`, `weight`: what it bids with; `owed`: what it can take from
    its signer's balance; `serial`: older ones go first among equals."""

    transaction: Transaction
    line: "Line"
    fee: int
    weight: int
    owed: int
    steady: bool
    """Whether it depends on its owner's account alone: not on the height, nor on jobs."""
    serial: int
    since: int
    rank: tuple[int, int] = (0, 0)
    """Ascending in the order of selection."""


@dataclass(slots=True, eq=False)
class Line:
    """Transactions that work only in this order."""

    key: bytes
    room: "Room"
    waiting: list[Waiting] = field(default_factory=list)
    packages: list[Package] = field(default_factory=list)
    state: State | None = None
    """The state after all of it, when it is known."""
    sound: bool = True
    """Whether all of it succeeds on the executed state, as far as is known."""
    owed: int = 0
    shaky: int = 0
    """How many of it are not steady."""
    version: int = 0
    """Grows with every change: what was noted of an earlier one is void."""

    def append(self, waiting: Waiting) -> None:
        self.waiting.append(waiting)
        self._rank(waiting)
        self._changed()

    def _rank(self, waiting: Waiting) -> None:
        """Take the next one into the packages and sums."""
        alone = Package.of(waiting.fee, waiting.weight, 1)
        package, lifted = alone.behind(self.packages)
        if lifted:
            del self.packages[-lifted:]
            place = sum(before.members for before in self.packages)
            for member in self.waiting[place : place + package.members]:
                member.rank = (-package.rate, member.serial)
        else:
            waiting.rank = (-package.rate, waiting.serial)
        self.packages.append(package)
        self.owed += waiting.owed
        self.shaky += not waiting.steady

    def put(self, waiting: Iterable[Waiting]) -> None:
        """Let the line be these, in this order."""
        self.waiting = []
        self.packages, self.owed, self.shaky = [], 0, 0
        for each in waiting:
            self.waiting.append(each)
            self._rank(each)
        self._changed()

    def keep(self, ids: Collection[bytes]) -> None:
        """Drop all that are not in `ids`: mostly the first ones, since a block has them."""
        gone = 0
        while gone < len(self.waiting) and self.waiting[gone].transaction.id not in ids:
            gone += 1
        left = self.waiting[gone:]
        whole = packages = 0
        while whole < gone:
            whole += self.packages[packages].members
            packages += 1
        if whole != gone or any(each.transaction.id not in ids for each in left):
            self.put([each for each in left if each.transaction.id in ids])
            return
        for each in self.waiting[:gone]:
            self.owed -= each.owed
            self.shaky -= not each.steady
        self.waiting = left
        del self.packages[:packages]
        self._changed()

    def cut(self) -> list[Waiting]:
        """Take the last package off. What is before it stays as sound as it was."""
        package = self.packages.pop()
        gone = self.waiting[-package.members :]
        del self.waiting[-package.members :]
        self.owed -= sum(waiting.owed for waiting in gone)
        self.shaky -= sum(not waiting.steady for waiting in gone)
        self.state = None
        self._changed()
        return gone

    def _changed(self) -> None:
        self.version += 1
        self.room.note(self)


class _Bid(NamedTuple):
    """A package as it may leave: the cheapest first, and of equals the youngest."""

    rate: int
    youth: int
    depth: int
    """How many packages of its line leave before it."""
    version: int
    line: Line


@dataclass(slots=True, eq=False)
class Room:
    """What waits of one kind, and how much of it there may be."""

    count: int
    size_bytes: int
    waiting: dict[bytes, Waiting] = field(default_factory=dict)
    held_bytes: int = 0
    _bids: list[_Bid] | None = None
    """A heap of all last packages, and of void notes; made when the room is full for the first
    time after a block."""

    def fits(self, size: int, freed: Collection[Waiting] = ()) -> bool:
        """Whether one more of `size` bytes fits once `freed` have left."""
        left = sum(len(waiting.transaction.raw) for waiting in freed) if freed else 0
        return (
            len(self.waiting) - len(freed) < self.count
            and self.held_bytes - left + size <= self.size_bytes
        )

    def add(self, waiting: Waiting) -> None:
        self.waiting[waiting.transaction.id] = waiting
        self.held_bytes += len(waiting.transaction.raw)

    def discard(self, waiting: Waiting) -> None:
        del self.waiting[waiting.transaction.id]
        self.held_bytes -= len(waiting.transaction.raw)

    def in_order(self) -> list[Waiting]:
        """Everything, the best first; in order within a line."""
        return sorted(self.waiting.values(), key=_rank_of)

    # ---- who leaves --------------------------------------------------------------------------

    def note(self, line: Line) -> None:
        """A line has changed."""
        if self._bids is not None and line.packages:
            heappush(self._bids, _bid(line, 0))

    def forget_bids(self) -> None:
        """A block was executed: most of what was noted is void."""
        self._bids = None

    def outbid(self, size: int, rate: int, but: Line) -> list[Line] | None:
        """Whose last packages must leave (a line as often as it must) for a newcomer of `size`
        bytes that pays `rate`; None when some of them pay as much. `but`: the newcomer's line."""
        leaving: list[Line] = []
        freed: list[Waiting] = []
        bids = self._cheapest(but)
        while not self.fits(size, freed):
            bid = next(bids, None)
            if bid is None or not beats(rate, bid.rate):
                bids.close()
                return None
            package = bid.line.packages[-1 - bid.depth]
            end = len(bid.line.waiting) - sum(
                after.members for after in bid.line.packages[len(bid.line.packages) - bid.depth :]
            )
            freed += bid.line.waiting[end - package.members : end]
            leaving.append(bid.line)
        bids.close()
        return leaving

    def cheapest(self, but: Line) -> int | None:
        """The lowest rate that somebody else pays here."""
        bids = self._cheapest(but)
        bid = next(bids, None)
        bids.close()
        return None if bid is None else bid.rate

    def _cheapest(self, but: Line) -> "_Bids":
        """Packages that may leave, ascending by rate; the heap is as before at the end."""
        if self._bids is None:
            lines = {id(waiting.line): waiting.line for waiting in self.waiting.values()}
            self._bids = [_bid(line, 0) for line in lines.values()]
            heapify(self._bids)
        return _Bids(self._bids, but)


class _Bids(Iterator[_Bid]):
    """See Room._cheapest."""

    def __init__(self, heap: list[_Bid], but: Line) -> None:
        self._heap, self._but = heap, but
        self._seen: list[_Bid] = []
        self._deeper: list[_Bid] = []
        """Packages that may leave once those behind them have."""

    def __next__(self) -> _Bid:
        while self._heap or self._deeper:
            if self._deeper and (not self._heap or self._deeper[0] < self._heap[0]):
                bid = heappop(self._deeper)
            else:
                bid = heappop(self._heap)
                if bid.version != bid.line.version:
                    continue
                self._seen.append(bid)
                if bid.line is self._but:
                    continue
            if bid.depth + 1 < len(bid.line.packages):
                heappush(self._deeper, _bid(bid.line, bid.depth + 1))
            return bid
        raise StopIteration

    def close(self) -> None:
        """Put back what was looked at."""
        for bid in self._seen:
            heappush(self._heap, bid)
        self._seen, self._deeper = [], []


def beats(rate: int, other: int) -> bool:
    """Whether a bid is so much higher that it may take the other's place."""
    return rate > other and rate * BUMP >= other * (BUMP + 1)


def fee_to_beat(rate: int, weight: int) -> int:
    """The least fee whose rate beats another."""
    wanted = max(rate + 1, -(-rate * (BUMP + 1) // BUMP))
    return -(-wanted * weight >> 32)


def take(
    candidates: list[Waiting],
    chosen: list[Transaction],
    max_bytes: int,
    max_count: int,
    exclude: Collection[bytes],
) -> tuple[list[Waiting], int]:
    """Append to `chosen` what fits, until it has `max_count`; the rest, and the bytes left."""
    left: list[Waiting] = []
    closed: set[bytes] = set()
    for place, waiting in enumerate(candidates):
        if len(chosen) == max_count:
            left += candidates[place:]
            break
        transaction = waiting.transaction
        if transaction.id in exclude:
            continue
        if closed and waiting.line.key in closed:
            left.append(waiting)
            continue
        if len(transaction.raw) > max_bytes:
            closed.add(waiting.line.key)  # nothing of a line may overtake
            left.append(waiting)
            continue
        max_bytes -= len(transaction.raw)
        chosen.append(transaction)
    return left, max_bytes


def _bid(line: Line, depth: int) -> _Bid:
    last = (
        len(line.waiting) - 1 - sum(p.members for p in line.packages[len(line.packages) - depth :])
    )
    return _Bid(
        line.packages[-1 - depth].rate, -line.waiting[last].serial, depth, line.version, line
    )


def _rank_of(waiting: Waiting) -> tuple[int, int]:
    return waiting.rank
