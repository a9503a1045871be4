"""Transactions that wait for a block: bounded, and each checked as if it were next.

A transaction belongs to a *line*: the owner that signed it, the job that it speaks of, the node
whose free transaction it is (one of a kind at a time), or the node that it is evidence against (one
at a time). It is admitted when it succeeds on the executed state with everything of its line that
was admitted before it; so nonces are contiguous, a node's transaction is admitted once for what it
speaks of, and a client learns the broken rule at once. Fees and amounts of all that a sender has
waiting never exceed its executed balance.

**Order.** Who pays more for its share of a block goes first, and a full pool lets the worst go for
what pays a tenth more: see `poolorder`. Half of a block is first of all for nodes: their jobs pay
a fixed fee and cannot bid, and what they have to say has windows.

**Replacement.** A transaction with the nonce of one that waits takes its place when it pays a tenth
and at least `fee_floor` more than it, and the fees of those behind it that fail with it: whatever
was told to the whole network once is paid for by whatever is told in its stead.

**Parking.** A node's transaction that fails is refused (InvalidTransaction), but may only have come
too early: it is kept aside, and `refresh` tries it again (see `parking`).

Signatures are not checked here: give it verified transactions. Not consensus: limits may differ.
"""

from collections.abc import Collection
from dataclasses import dataclass

from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.genesis import Genesis, Parameters
from tdmld.chain.ledger import check_transaction
from tdmld.chain.limits import TRANSACTION_BYTES
from tdmld.chain.offers import lock_of
from tdmld.chain.parking import Parking
from tdmld.chain.poolorder import BUMP, Line, Package, Room, Waiting, fee_to_beat, take
from tdmld.chain.slashing import offender
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    EVIDENCE_KINDS,
    FREE_KINDS,
    OWNER_KINDS,
    Bond,
    Offer,
    Transaction,
    Transfer,
)

PER_OWNER = 16
"""Transactions of one owner that wait at most: how far its nonces may run ahead."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What one pool holds at most."""

    count: int = 8000
    """Transactions of owners."""
    size_bytes: int = 8 << 20
    node_count: int = 4000
    """Those of nodes have room of their own."""
    node_bytes: int = 4 << 20
    per_owner: int = PER_OWNER
    per_job: int = 512
    parked: int = 512
    parked_per_node: int = 16
    evidence: int = 32
    """Free, so few: one for each node that it is against, and tried (two signatures) before. Its
    room is its own: only accusations that hold keep an accusation out."""
    age_blocks: int = 500
    """After so many heights without a block for it a transaction is forgotten."""


def debit(transaction: Transaction, parameters: Parameters) -> int:
    """What a transaction can take from its signer's balance, in units."""
    payload = transaction.payload
    if isinstance(payload, (Transfer, Bond)):
        return transaction.fee + payload.amount
    if isinstance(payload, Offer):
        return transaction.fee + lock_of(payload, parameters).total
    return transaction.fee


class Mempool:
    """See the head of this module. Every method is quick and free of I/O."""

    def __init__(self, genesis: Genesis, limits: PoolLimits | None = None) -> None:
        self._genesis = genesis
        self._limits = limits = PoolLimits() if limits is None else limits
        parameters = genesis.parameters
        self._least_weight = max(1, parameters.block_bytes // parameters.block_transactions)
        self._owners = Room(limits.count, limits.size_bytes)
        self._nodes = Room(limits.node_count, limits.node_bytes)
        self._evidence = Room(limits.evidence, limits.evidence * TRANSACTION_BYTES)
        self._rooms = (self._owners, self._nodes, self._evidence)
        self._lines: dict[bytes, Line] = {}
        self._parking = Parking(limits.parked, limits.parked_per_node)
        self._serial = 0
        self._height = -1
        self.time_ms = 0
        """Time of the executed head, for what waits for a time; set it after each block."""

    def __len__(self) -> int:
        return sum(len(room.waiting) for room in self._rooms)

    def __contains__(self, transaction_id: bytes) -> bool:
        return self._waiting(transaction_id) is not None

    def get(self, transaction_id: bytes) -> Transaction | None:
        """A waiting transaction."""
        found = self._waiting(transaction_id)
        return None if found is None else found.transaction

    def rival(self, transaction: Transaction) -> Transaction | None:
        """The other transaction with the same nonce of the same owner that waits."""
        if not transaction.by_owner:
            return None
        line = self._lines.get(transaction.signer)
        if line is None:
            return None
        place = transaction.nonce - line.waiting[0].transaction.nonce
        if not 0 <= place < len(line.waiting):
            return None
        found = line.waiting[place].transaction
        return found if found.nonce == transaction.nonce and found.id != transaction.id else None

    def fee_to_replace(self, rival: Transaction) -> int:
        """The least fee of what takes the place of a waiting transaction, if nothing fails with
        it."""
        floor = self._genesis.parameters.fee_floor
        return rival.fee + max(1, floor, -(-rival.fee // BUMP))

    # ---- in ----------------------------------------------------------------------------------

    def glance(self, transaction: Transaction, state: State) -> None:
        """Refuse what can be seen to be refused by `admit` without trying it, or its signature.

        Raises InvalidTransaction.
        """
        if transaction.id in self:
            return
        rival = self.rival(transaction)
        if rival is not None:
            self._check_price(transaction, rival)
            return
        line = self._line(transaction)
        if transaction.by_owner:
            account = state.account(transaction.signer)
            following = (
                account.nonce if not line.waiting else line.waiting[-1].transaction.nonce + 1
            )
            if transaction.nonce != following:
                raise InvalidTransaction(
                    f"nonce: {transaction.nonce}; the signer's next one is {following}"
                )
        self._check_room(transaction, line)
        self._make_room(transaction, line)
        if line.waiting and transaction.by_owner:
            self._check_balance(transaction, line.owed, state)

    def admit(self, transaction: Transaction, state: State, height: int) -> None:
        """Take a verified transaction in; one that waits already is taken as it is.

        `state` is the executed state of `height`; the transaction is tried as part of the next
        block. Raises InvalidTransaction with the rule that it breaks (see Parking above).
        """
        if transaction.id in self:
            return
        self._at(height)
        rival = self.rival(transaction)
        if rival is not None:
            self._check_price(transaction, rival)
            self._replace(transaction, rival, state)
            return
        try:
            line, leaving, before, after = self._tried(transaction, state)
        except InvalidTransaction:
            self._parking.park(transaction, state, height)
            raise
        for other in leaving:
            self._let_go(other)
        self._parking.remove((transaction.id,))
        before.merge(after)
        self._lines[line.key] = line
        waiting = self._wait(transaction, line)
        line.room.add(waiting)
        line.append(waiting)
        line.state = before

    def check(self, transaction: Transaction, state: State, height: int) -> None:
        """Raise InvalidTransaction where `admit` would; nothing is taken in. Of a replacement only
        the price is judged."""
        if transaction.id in self:
            return
        self._at(height)
        rival = self.rival(transaction)
        if rival is None:
            self._tried(transaction, state)
        else:
            self._check_price(transaction, rival)

    def _tried(
        self, transaction: Transaction, state: State
    ) -> tuple[Line, list[Line], State, State]:
        """Its line, whose last ones leave for it, and the states before and after it."""
        line = self._line(transaction)
        self._check_room(transaction, line)
        leaving = self._make_room(transaction, line)
        if line.waiting and transaction.by_owner:
            self._check_balance(transaction, line.owed, state)
        before = self._state_of(line, state)
        return line, leaving, before, self._try(before, transaction)

    def _replace(self, transaction: Transaction, rival: Transaction, state: State) -> None:
        """Put a transaction in the place of another one, and let go what fails with it."""
        line = self._lines[rival.signer]
        place = next(n for n, each in enumerate(line.waiting) if each.transaction is rival)
        old, owed, after = line.waiting[place], 0, state.fork()
        for each in line.waiting[:place]:
            after.merge(self._try(after, each.transaction))
            owed += each.owed
        if place:
            self._check_balance(transaction, owed, state)
        after.merge(self._try(after, transaction))
        new = self._wait(transaction, line, old.serial)
        owed += new.owed
        kept = [*line.waiting[:place], new]
        balance = state.account(transaction.signer).balance
        for each in line.waiting[place + 1 :]:
            owed += each.owed
            try:
                if owed > balance:
                    break
                after.merge(self._try(after, each.transaction))
            except InvalidTransaction:
                break
            kept.append(each)
        gone = line.waiting[len(kept) :]
        asked = self.fee_to_replace(rival) + sum(each.fee for each in gone)
        if transaction.fee < asked:
            raise InvalidTransaction(
                f"fee: {transaction.fee}; in the place of the one with nonce {rival.nonce} it lets "
                f"{len(gone)} behind that fail, and to replace them all takes a fee of {asked}"
            )
        if not line.room.fits(len(transaction.raw), [old, *gone]):
            raise InvalidTransaction(_FULL.format("try later, or at another node"))
        for each in (old, *gone):
            line.room.discard(each)
        line.room.add(new)
        line.put(kept)
        line.state = after

    def refresh(
        self, state: State, height: int, touched: Collection[bytes] | None = None
    ) -> tuple[Transaction, ...]:
        """After a block was executed: forget what can no longer succeed, retry what is parked.

        `touched`: the owners whose accounts the block changed (None: perhaps all). Transfers and
        bonds of other owners are not tried again. Returns parked transactions that are admitted
        now.
        """
        self.expire(height)
        for key in list(self._lines) if touched is None else touched:
            line = self._lines.get(key)
            if line is not None:
                line.sound, line.state = False, None
        for line in list(self._lines.values()):
            if not line.sound:
                self._state_of(line, state)
        for room in self._rooms:
            room.forget_bids()
        admitted = []
        for parked in self._parking.ready(state):
            try:
                self.admit(parked, state, height)
            except InvalidTransaction:
                continue
            admitted.append(parked)
        return tuple(admitted)

    # ---- out ---------------------------------------------------------------------------------

    def select(
        self, max_bytes: int, max_count: int, exclude: Collection[bytes] = ()
    ) -> tuple[Transaction, ...]:
        """What a leader proposes: evidence and nodes' transactions for up to half of it, owners' by
        what they pay, then the rest; in order within a line, without `exclude` (those in blocks
        that are not executed yet)."""
        chosen: list[Transaction] = []
        nodes = [*self._evidence.in_order(), *self._nodes.in_order()]
        half_bytes, half_count = -(-max_bytes // 2), -(-max_count // 2)
        left, room = take(nodes, chosen, half_bytes, half_count, exclude)
        room += max_bytes - half_bytes
        _, room = take(self._owners.in_order(), chosen, room, max_count, exclude)
        take(left, chosen, room, max_count, exclude)
        return tuple(chosen)

    def waits_besides(self, *excluded: Collection[bytes]) -> bool:
        """Whether something waits that is in none of `excluded`."""
        if len(self) > sum(map(len, excluded)):
            return True
        return any(
            not any(key in ids for ids in excluded) for room in self._rooms for key in room.waiting
        )

    def remove(self, ids: Collection[bytes]) -> None:
        """Forget transactions, because they are in a block that was executed.

        Between finality and execution name them in `exclude` instead: without them those that wait
        behind would be tried on a state that lacks them. Then call `refresh` with the new state.
        """
        self._parking.remove(ids)
        lines: dict[bytes, Line] = {}
        for transaction_id in ids:
            waiting = self._waiting(transaction_id)
            if waiting is not None:
                waiting.line.room.discard(waiting)
                lines[waiting.line.key] = waiting.line
        for line in lines.values():
            line.keep(line.room.waiting)
            line.sound, line.state = False, None
            self._tidy(line)

    def expire(self, height: int) -> None:
        """Forget what may not stand in a block after `height`, and what has waited too long."""
        self._at(height)
        oldest = height - self._limits.age_blocks
        self.remove(
            [
                key
                for room in self._rooms
                for key, waiting in room.waiting.items()
                if 0 < waiting.transaction.expiry <= height or waiting.since < oldest
            ]
        )
        self._parking.expire(height)

    # ---- lines -------------------------------------------------------------------------------

    def _waiting(self, transaction_id: bytes) -> Waiting | None:
        for room in self._rooms:
            if (found := room.waiting.get(transaction_id)) is not None:
                return found
        return None

    def _line(self, transaction: Transaction) -> Line:
        """The line of a transaction, which may be a new one that is not kept yet."""
        payload = transaction.payload
        if isinstance(payload, OWNER_KINDS):
            key, room = transaction.signer, self._owners
        elif isinstance(payload, EVIDENCE_KINDS):
            key, room = b"evidence" + offender(payload)[0], self._evidence
        elif isinstance(payload, FREE_KINDS):
            key, room = type(payload).__name__.encode() + transaction.signer, self._nodes
        else:
            key, room = payload.job, self._nodes
        return self._lines.get(key) or Line(key, room)

    def _wait(self, transaction: Transaction, line: Line, serial: int | None = None) -> Waiting:
        """`serial`: that of the one in whose place it comes."""
        if serial is None:
            self._serial = serial = self._serial + 1
        fee, weight = self._bid(transaction)
        owed, steady = 0, False
        if transaction.by_owner:
            owed = debit(transaction, self._genesis.parameters)
            steady = isinstance(transaction.payload, (Transfer, Bond))
        return Waiting(transaction, line, fee, weight, owed, steady, serial, self._height)

    def _bid(self, transaction: Transaction) -> tuple[int, int]:
        """Fee and weight. Nodes do not bid: what a job pays for comes before what is free."""
        if transaction.by_owner:
            return transaction.fee, max(len(transaction.raw), self._least_weight)
        return (0 if isinstance(transaction.payload, FREE_KINDS) else 1), 1

    def _at(self, height: int) -> None:
        if height != self._height:
            self._height = height
            for line in self._lines.values():
                if line.shaky:
                    line.sound, line.state = False, None

    def _try(self, state: State, transaction: Transaction) -> State:
        return check_transaction(state, self._genesis, self._height + 1, transaction, self.time_ms)

    def _state_of(self, line: Line, state: State) -> State:
        """The state after all that waits in a line; what fails on the way is forgotten."""
        if line.state is not None:
            return line.state
        found, good = state.fork(), []
        for waiting in line.waiting:
            try:
                found.merge(self._try(found, waiting.transaction))
            except InvalidTransaction:
                line.room.discard(waiting)
            else:
                good.append(waiting)
        if len(good) < len(line.waiting):
            line.put(good)
        line.sound, line.state = True, found
        self._tidy(line)
        return found

    def _let_go(self, line: Line) -> None:
        """Somebody pays more."""
        for waiting in line.cut():
            line.room.discard(waiting)
        self._tidy(line)

    def _tidy(self, line: Line) -> None:
        if not line.waiting:
            self._lines.pop(line.key, None)

    # ---- limits ------------------------------------------------------------------------------

    def _check_room(self, transaction: Transaction, line: Line) -> None:
        limits = self._limits
        most = limits.per_owner if transaction.by_owner else limits.per_job
        if isinstance(transaction.payload, FREE_KINDS):
            most = 1
        if len(line.waiting) >= most:
            raise InvalidTransaction(f"{most} transactions of this sender wait already: try later")

    def _make_room(self, transaction: Transaction, line: Line) -> list[Line]:
        """Whose last packages must go (see Room.outbid), mostly nobody's."""
        room, size = line.room, len(transaction.raw)
        if room.fits(size):
            return []
        fee, weight = self._bid(transaction)
        package, _ = Package.of(fee, weight, 1).behind(line.packages)
        leaving = room.outbid(size, package.rate, line)
        if leaving is None:
            remedy = "try later, or at another node"
            rate = room.cheapest(line)
            if transaction.by_owner and rate is not None:
                least = max(fee_to_beat(rate, weight), fee + 1)
                remedy = f"a fee of {least} or more may find a place; or {remedy}"
            raise InvalidTransaction(_FULL.format(remedy))
        return leaving

    def _check_price(self, transaction: Transaction, rival: Transaction) -> None:
        least = self.fee_to_replace(rival)
        if transaction.fee < least:
            raise InvalidTransaction(
                f"nonce: one with {rival.nonce} waits already and pays {rival.fee}: to replace it "
                f"pay at least {least}, to send another use a later nonce or wait for a block"
            )

    def _check_balance(self, transaction: Transaction, owed: int, state: State) -> None:
        """`owed`: what those before it can take; alone, the rule that it breaks says it better."""
        balance = state.account(transaction.signer).balance
        missing = owed + debit(transaction, self._genesis.parameters) - balance
        if missing > 0:
            raise InvalidTransaction(
                f"with what waits, {missing} more than the balance of {balance}: wait for a block"
            )


_FULL = "this node's pool is full of transactions that pay as much: {}"
