"""A validator's directory, and what the product asks of it as of a `ChainStore`.

One log whose unsynced tail a crash may take, and the sign guard. Like the store: a batch is whole
or absent, syncing one makes everything before it durable, applying a block is not synced, and votes
up to the applied head are forgotten.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tdmld.chain.accounts import (
    ValidatorSet,
)
from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    Kind,
    Vote,
    beacon_mix,
    beacon_start,
    block_hash,
    ends_epoch,
    epoch_of,
)
from tdmld.chain.codec import ZERO_HASH, encode
from tdmld.chain.crypto import sha256
from tdmld.chain.epochs import set_id
from tdmld.chain.ledger import Receipt
from tdmld.chain.records import Node as Registered
from tdmld.node.store import AppliedBlock, Head
from tests.simulation.facts import CHAIN_ID, FIRST, genesis, next_root, number_of

if TYPE_CHECKING:
    from tests.simulation.node import Node

PROPOSAL = 3


class GuardTripped(AssertionError):
    """The shell was about to sign against itself: a real node would end here."""


@dataclass(frozen=True, slots=True)
class Signed:
    """One synced batch: own votes and proposals, the bodies of what was notarized, and the
    certificates that the votes rest on."""

    votes: tuple[Vote, ...]
    proposals: tuple[Block, ...]
    bodies: tuple[Block, ...]
    certificates: tuple[Certificate, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """An executed final block."""

    block: Block
    certificate: Certificate | None


class Disk:
    """What survives. `signer` is whether anything was ever signed here."""

    def __init__(self) -> None:
        self.rows: list[Signed | Applied] = []
        self.synced = 0
        self.signer = False
        self._guard: dict[tuple[int, int], bytes] = {}

    def crash(self, rng: random.Random) -> None:
        """Lose some of the unsynced tail."""
        keep = rng.randint(self.synced, len(self.rows))
        del self.rows[keep:]
        self.synced = len(self.rows)

    def wipe(self) -> None:
        """The directory is gone; the key is not."""
        self.__init__()  # type: ignore[misc]

    # ---- reading ---------------------------------------------------------------------------

    def chain(self) -> list[Applied]:
        return [row for row in self.rows if isinstance(row, Applied)]

    def votes(self) -> list[Vote]:
        """Own votes above the applied head."""
        view = self._view()
        return [v for row in self._signed() for v in row.votes if v.view > view]

    def proposals(self) -> list[Block]:
        view = self._view()
        return [b for row in self._signed() for b in row.proposals if b.header.view > view]

    def bodies(self) -> list[Block]:
        """Own proposals and the bodies of own notarizations above the applied head."""
        view = self._view()
        held = [b for row in self._signed() for b in row.bodies if b.header.view > view]
        return self.proposals() + held

    def view_certificates(self) -> list[Certificate]:
        """The certificates above the applied head that own votes rest on."""
        view = self._view()
        return [c for row in self._signed() for c in row.certificates if c.view > view]

    def _signed(self) -> list[Signed]:
        return [row for row in self.rows if isinstance(row, Signed)]

    def _view(self) -> int:
        for row in reversed(self.rows):
            if isinstance(row, Applied):
                return row.block.header.view
        return 0

    # ---- writing ---------------------------------------------------------------------------

    def record(self, batch: Signed) -> list[Vote]:
        """Sync what was signed; the votes that may be sent. Raises GuardTripped."""
        final = self._view()
        kept = [vote for vote in batch.votes if vote.view > final]
        made = tuple(block for block in batch.proposals if block.header.view > final)
        for vote in kept:
            self._check(vote.kind, vote.view, vote.hash)
        for block in made:
            self._check(PROPOSAL, block.header.view, block_hash(block.header))
        self.rows.append(Signed(tuple(kept), made, batch.bodies, batch.certificates))
        self.synced = len(self.rows)
        self.signer = True
        return kept

    def _check(self, kind: int, view: int, value: bytes) -> None:
        known = self._guard.setdefault((kind, view), value)
        both = (Kind.NULLIFY, view) in self._guard and (Kind.FINALIZE, view) in self._guard
        if known != value or both:
            raise GuardTripped(f"view {view}: kind {kind} contradicts what is stored")

    def apply(self, row: Applied) -> None:
        """Not synced: the next `record` makes it durable."""
        self.rows.append(row)


class Store:
    """The directory of a running process, opened: the part of `ChainStore` that validators use."""

    lowest = 1

    def __init__(self, node: "Node") -> None:
        self.node, self._disk = node, node.disk
        self._elections = node.world.elections
        self.genesis, self.chain_id = genesis(node.world.plan.epoch_blocks), CHAIN_ID
        self._epoch_blocks = self.genesis.parameters.epoch_blocks
        self._sets: dict[int, ValidatorSet] = dict(enumerate(self._elections.first))
        self._rows: list[Applied] = []
        self._heads = [Head(0, 0, block_hash(FIRST), beacon_start(CHAIN_ID), ZERO_HASH, FIRST)]
        self.done: set[bytes] = set()
        """Ids of executed transactions."""
        for row in self._disk.chain():
            self._advance(row)

    # ---- the chain -------------------------------------------------------------------------

    @property
    def head(self) -> Head:
        return self._heads[-1]

    @property
    def height(self) -> int:
        return len(self._rows)

    @property
    def epoch(self) -> int:
        return epoch_of(self.height + 1, self._epoch_blocks)

    def committee(self, epoch: int) -> Committee | None:
        chosen = self._sets.get(epoch)
        return None if chosen is None else self._elections.committee(chosen)

    def set_ids(self, epoch: int) -> tuple[bytes, bytes]:
        return set_id(self._sets[epoch]), set_id(self._sets[epoch + 1])

    def root_at(self, height: int) -> bytes | None:
        return self._heads[height].state_root if height <= self.height else None

    def history_root(self, height: int) -> bytes | None:
        return sha256(b"history", self._heads[height].hash) if height <= self.height else None

    def block(self, height: int) -> Block | None:
        return self._rows[height - 1].block if 0 < height <= self.height else None

    def certificate(self, height: int) -> Certificate | None:
        return self._rows[height - 1].certificate if 0 < height <= self.height else None

    def get(self, key: bytes) -> bytes | None:
        """No state but who is jailed: nothing is ever due, nobody has an account."""
        if key[:1] == b"n" and self.node.world.jailed:
            since = self.node.world.jailed.get(number_of(key[1:]), 0)
            return encode(Registered(key[1:], 0, jailed=since))
        return None

    def apply(self, block: Block, certificate: Certificate | None) -> AppliedBlock:
        """Execute a final block."""
        self.node.world.watcher.applying(self.node, block, self.head, self.set_ids(self.epoch))
        row = Applied(block, certificate)
        self._disk.apply(row)
        self._advance(row)
        receipts = tuple(Receipt(sha256(raw), True, "") for raw in block.transactions)
        return AppliedBlock(self.height, self.head.hash, block, certificate, receipts, ())

    def _advance(self, row: Applied) -> None:
        head, header, body = self.head, row.block.header, row.block.transactions
        key = block_hash(header)
        root = next_root(head.state_root, key, body)
        mix = beacon_mix(CHAIN_ID, head.mix, header)
        self._rows.append(row)
        self._heads.append(Head(header.height, header.view, key, mix, root, header))
        self.done.update(map(sha256, body))
        if ends_epoch(header.height, self._epoch_blocks):
            begins = self._sets[self.epoch]
            self._sets[begins.epoch + 1] = self._elections.after(begins, key)

    # ---- votes -----------------------------------------------------------------------------

    @property
    def signer(self) -> bytes | None:
        return self.node.key.public if self._disk.signer else None

    def bind(self, node: bytes) -> None:
        assert node == self.node.key.public, "a directory belongs to one key"

    def votes(self) -> list[Vote]:
        return self._disk.votes()

    def view_certificates(self) -> list[Certificate]:
        return self._disk.view_certificates()

    def bodies(self) -> list[Block]:
        return self._disk.bodies()

    def record(
        self,
        _: bytes,
        votes: Sequence[Vote],
        proposals: Sequence[Block],
        bodies: Sequence[Block],
        certificates: Sequence[Certificate] = (),
    ) -> list[Vote]:
        """One synced batch. Who attacks keeps no record of what it signs, only that it did: it
        never abstains (N6)."""
        node, watcher = self.node, self.node.world.watcher
        kept = list(votes)
        self._disk.signer = True
        if node.honest:
            kept = self._disk.record(
                Signed(tuple(votes), tuple(proposals), tuple(bodies), tuple(certificates))
            )
        for block in proposals:
            watcher.proposed(node, block)
        for vote in kept:
            watcher.stored(node, vote)
        return kept
