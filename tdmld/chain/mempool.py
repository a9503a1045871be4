"""Transactions that wait for a block: bounded, and each checked as if it were next.

A transaction belongs to a *group*: the owner that signed it, the job that it speaks of, the node
whose ask or return it is, or the node that it is evidence against (these one at a time). It is
admitted when it succeeds on the executed state with everything of its group that was admitted
before it; so nonces are contiguous, a node's transaction is admitted once for what it speaks of,
and a client learns the broken rule at once. Fees and amounts of all that a sender has waiting never
exceed its executed balance.

**Parking.** Nodes execute blocks a moment apart: a worker's answer to the block it just saw may
reach a validator that has not executed it. A node's transaction that fails is therefore refused
(InvalidTransaction), but kept aside for PARKED_BLOCKS if a registered node signed it; `refresh`
tries it again after each block.

Signatures are not checked here: give it verified transactions. Not consensus: limits may differ.
"""

from collections.abc import Collection
from dataclasses import dataclass

from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.genesis import Genesis, Parameters
from tdmld.chain.ledger import check_transaction
from tdmld.chain.offers import lock_of
from tdmld.chain.slashing import offender
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    EVIDENCE_KINDS,
    FREE_KINDS,
    OWNER_KINDS,
    Ask,
    Bond,
    Offer,
    Return,
    Transaction,
    Transfer,
)

PER_OWNER = 16
"""Transactions of one owner that wait at most: how far its nonces may run ahead."""
PARKED_BLOCKS = 10
"""Heights for which a node's transaction is kept although it fails."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What one pool holds at most."""

    count: int = 8000
    size_bytes: int = 8 << 20
    per_owner: int = PER_OWNER
    per_job: int = 512
    parked: int = 1024
    parked_per_node: int = 16
    evidence: int = 32
    """Free, so few: one for each node that it is against, and tried (two signatures) before."""
    age_blocks: int = 500
    """After so many heights without a block for it a transaction is forgotten."""


@dataclass(slots=True)
class _Waiting:
    transaction: Transaction
    group: bytes
    since: int


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
        self._limits = PoolLimits() if limits is None else limits
        self._waiting: dict[bytes, _Waiting] = {}
        self._groups: dict[bytes, dict[bytes, None]] = {}
        self._after: dict[bytes, State] = {}
        """Group -> the state after all of it: at self._height or, while the group is steady, since
        a block last touched its owner's account."""
        self._parked: dict[bytes, _Waiting] = {}
        self._height = -1
        self.time_ms = 0
        """Time of the executed head, for what waits for a time; set it after each block."""
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, transaction_id: bytes) -> bool:
        return transaction_id in self._waiting

    def get(self, transaction_id: bytes) -> Transaction | None:
        """A waiting transaction."""
        found = self._waiting.get(transaction_id)
        return None if found is None else found.transaction

    def has_rival(self, transaction: Transaction) -> bool:
        """Whether another transaction with the same nonce of the same owner waits."""
        return transaction.by_owner and any(
            key != transaction.id and self._waiting[key].transaction.nonce == transaction.nonce
            for key in self._groups.get(transaction.signer, ())
        )

    def admit(self, transaction: Transaction, state: State, height: int) -> None:
        """Take a verified transaction in; one that waits already is taken as it is.

        `state` is the executed state of `height`; the transaction is tried as part of the next
        block. Raises InvalidTransaction with the rule that it breaks (see Parking above).
        """
        if transaction.id in self._waiting:
            return
        self._at(height)
        group = _group(transaction)
        try:
            self._check_room(transaction, group)
            self._check_balance(transaction, state)
            before = self._state_of(group, state)
            after = self._try(before, height, transaction)
        except InvalidTransaction:
            self._park(transaction, group, state, height)
            raise
        self._parked.pop(transaction.id, None)
        self._waiting[transaction.id] = _Waiting(transaction, group, height)
        self._groups.setdefault(group, {})[transaction.id] = None
        before.merge(after)
        self._after[group] = before
        self._bytes += len(transaction.raw)

    def refresh(
        self, state: State, height: int, touched: Collection[bytes] | None = None
    ) -> tuple[Transaction, ...]:
        """After a block was executed: forget what can no longer succeed, retry what is parked.

        `touched`: the owners whose accounts the block changed (None: perhaps all). Transfers and
        bonds of other owners are not tried again. Returns parked transactions that are admitted
        now.
        """
        self.expire(height)
        for group in list(self._after) if touched is None else touched:
            self._after.pop(group, None)
        for group in list(self._groups):
            self._state_of(group, state)
        admitted = []
        for parked in list(self._parked.values()):
            try:
                self.admit(parked.transaction, state, height)
            except InvalidTransaction:
                continue
            admitted.append(parked.transaction)
        return tuple(admitted)

    def select(
        self, max_bytes: int, max_count: int, exclude: Collection[bytes] = ()
    ) -> tuple[Transaction, ...]:
        """What a leader proposes: oldest first, in order within a group, without `exclude` (those
        in blocks that are not executed yet)."""
        chosen: list[Transaction] = []
        room = max_bytes
        full: set[bytes] = set()
        for waiting in self._waiting.values():
            if len(chosen) == max_count:
                break
            transaction = waiting.transaction
            if waiting.group in full or transaction.id in exclude:
                continue
            if len(transaction.raw) > room:
                full.add(waiting.group)  # nothing of a group may overtake
                continue
            room -= len(transaction.raw)
            chosen.append(transaction)
        return tuple(chosen)

    def waits_besides(self, *excluded: Collection[bytes]) -> bool:
        """Whether something waits that is in none of `excluded`."""
        if len(self._waiting) > sum(map(len, excluded)):
            return True
        return any(not any(key in ids for ids in excluded) for key in self._waiting)

    def remove(self, ids: Collection[bytes]) -> None:
        """Forget transactions, because they are in a block that was executed.

        Between finality and execution name them in `exclude` instead: without them those that wait
        behind would be tried on a state that lacks them. Then call `refresh` with the new state.
        """
        for transaction_id in ids:
            self._parked.pop(transaction_id, None)
            waiting = self._waiting.pop(transaction_id, None)
            if waiting is None:
                continue
            self._bytes -= len(waiting.transaction.raw)
            self._after.pop(waiting.group, None)
            group = self._groups[waiting.group]
            del group[transaction_id]
            if not group:
                del self._groups[waiting.group]

    def expire(self, height: int) -> None:
        """Forget what may not stand in a block after `height`, and what has waited too long."""
        self._at(height)
        oldest = height - self._limits.age_blocks
        self.remove(
            [
                key
                for key, waiting in self._waiting.items()
                if 0 < waiting.transaction.expiry <= height or waiting.since < oldest
            ]
        )
        for key, parked in list(self._parked.items()):
            if parked.since < height - PARKED_BLOCKS:
                del self._parked[key]

    def _at(self, height: int) -> None:
        if height != self._height:
            self._height = height
            self._after = {key: after for key, after in self._after.items() if self._steady(key)}

    def _steady(self, group: bytes) -> bool:
        """Whether a group depends on its owner's account alone: not on the height, nor on jobs."""
        waiting = self._groups.get(group)
        return waiting is not None and all(
            isinstance(self._waiting[key].transaction.payload, (Transfer, Bond)) for key in waiting
        )

    def _try(self, state: State, height: int, transaction: Transaction) -> State:
        return check_transaction(state, self._genesis, height + 1, transaction, self.time_ms)

    def _check_room(self, transaction: Transaction, group: bytes) -> None:
        limits = self._limits
        most = limits.per_owner if transaction.by_owner else limits.per_job
        if isinstance(transaction.payload, FREE_KINDS):
            most = 1
        if isinstance(transaction.payload, EVIDENCE_KINDS):
            held = sum(
                isinstance(waiting.transaction.payload, EVIDENCE_KINDS)
                for waiting in self._waiting.values()
            )
            if held >= limits.evidence:
                raise InvalidTransaction("this node's pool holds enough evidence: try later")
        if len(self._groups.get(group, ())) >= most:
            raise InvalidTransaction(f"{most} transactions of this sender wait already: try later")
        if (
            len(self._waiting) >= limits.count
            or self._bytes + len(transaction.raw) > limits.size_bytes
        ):
            raise InvalidTransaction("this node's pool is full: try later, or at another node")

    def _check_balance(self, transaction: Transaction, state: State) -> None:
        if not transaction.by_owner:
            return
        parameters = self._genesis.parameters
        waiting = self._groups.get(transaction.signer, ())
        owed = sum(debit(self._waiting[key].transaction, parameters) for key in waiting)
        balance = state.account(transaction.signer).balance
        missing = owed + debit(transaction, parameters) - balance
        if owed and missing > 0:  # alone, the rule that it breaks says it better
            raise InvalidTransaction(
                f"with what waits, {missing} more than the balance of {balance}: wait for a block"
            )

    def _state_of(self, group: bytes, state: State) -> State:
        """The state after all that waits in a group; what fails on the way is forgotten."""
        found = self._after.get(group)
        if found is not None:
            return found
        found, failed = state.fork(), []
        for key in self._groups.get(group, ()):
            transaction = self._waiting[key].transaction
            try:
                after = self._try(found, self._height, transaction)
            except InvalidTransaction:
                failed.append(key)
            else:
                found.merge(after)
        self.remove(failed)
        if group in self._groups:
            self._after[group] = found
        return found

    def _park(self, transaction: Transaction, group: bytes, state: State, height: int) -> None:
        if (
            transaction.by_owner
            or isinstance(transaction.payload, FREE_KINDS)
            or transaction.id in self._parked
            or len(self._parked) >= self._limits.parked
            or state.node(transaction.signer) is None
        ):
            return
        of_node = sum(p.transaction.signer == transaction.signer for p in self._parked.values())
        if of_node < self._limits.parked_per_node:
            self._parked[transaction.id] = _Waiting(transaction, group, height)


def _group(transaction: Transaction) -> bytes:
    payload = transaction.payload
    if isinstance(payload, (OWNER_KINDS, Ask)):
        return transaction.signer
    if isinstance(payload, EVIDENCE_KINDS):
        return b"evidence" + offender(payload)[0]
    if isinstance(payload, Return):
        return b"return" + transaction.signer
    return payload.job
