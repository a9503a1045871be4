"""Block bodies above the final head, and which of them a validator may notarize.

A body is checked alone when it comes (`check`), kept in a tree, and judged once its parent is valid
and the state that its header names is executed here; until then it waits (N3, N4 in `validator`).
"""

import logging
from collections.abc import Callable, Collection, Sequence

from tdmld.chain.blocks import (
    Block,
    BlockLimits,
    Committee,
    Header,
    beacon_mix,
    block_hash,
    check_block,
    check_child,
    check_proposer,
    turn,
)
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import InvalidBlock
from tdmld.chain.genesis import protocol_at
from tdmld.chain.leader import Rotation
from tdmld.chain.pending import BlockTree
from tdmld.chain.transactions import Transaction, decode_transaction
from tdmld.node.finality import Finality
from tdmld.node.store import AppliedBlock

log = logging.getLogger(__name__)

MAX_TRIES = 4
"""Bodies of one view that are checked: a good one may come from several peers at once."""


class Bodies:
    """The bodies of one validator in one epoch. `latest_ms`: the greatest header time that is no
    future now."""

    def __init__(
        self,
        finality: Finality,
        committee: Committee,
        rotation: Rotation,
        latest_ms: Callable[[], int],
    ) -> None:
        self._finality, self._store = finality, finality.store
        self._committee, self._rotation = committee, rotation
        self._latest_ms = latest_ms
        self._epoch_blocks = self._store.genesis.parameters.epoch_blocks
        self._sets = self._store.set_ids(committee.epoch)
        head = self._store.head
        self.tree = BlockTree(head.height, head.hash, head.view)
        self._mixes: dict[bytes, bytes] = {head.hash: head.mix}
        """Valid blocks above the head, and the head itself -> beacon mix."""
        self._rejected: set[bytes] = set()
        self._tries: dict[int, int] = {}
        self._ids: dict[bytes, frozenset[bytes]] = {}
        """Transactions root of a held body -> their ids, once somebody asked."""

    # ---- one body ----------------------------------------------------------------------------

    def check(
        self, block: Block, known: Callable[[bytes], bool], *, wanted: bool = False
    ) -> list[Transaction]:
        """Form, leader and signature of a body; its transactions whose ids are not `known`.

        Raises InvalidBlock, DecodeError or InvalidTransaction. The transactions' signatures are
        left to the caller. Of one view no more than a few bodies are looked at, good or bad, unless
        they are `wanted`: each costs as much as a full block.
        """
        genesis, header = self._store.genesis, block.header
        leader = self._rotation.leader(turn(header.view))
        check_proposer(self._committee, leader, header, block.signature)
        tries = self._tries.get(header.view, 0)
        if not wanted and tries >= MAX_TRIES:
            raise InvalidBlock("its leader has made up enough blocks for this view")
        self._tries[header.view] = tries + 1
        limits = BlockLimits(
            genesis.parameters.block_bytes,
            genesis.parameters.block_transactions,
            protocol_at(genesis, header.height),
        )
        check_block(self._committee, leader, block, limits)
        return [
            decode_transaction(raw, self._store.chain_id)
            for raw in block.transactions
            if not known(sha256(raw))
        ]

    def header(self, key: bytes) -> Header | None:
        """The header of a held body or of the final head."""
        if key == self._finality.hash:
            return self._finality.header
        block = self.tree.get(key)
        return None if block is None else block.header

    def mix(self, key: bytes) -> bytes | None:
        """The beacon after a valid block; None while it is not known to be valid."""
        return self._mixes.get(key)

    def missing(self, *wanted: bytes) -> bytes | None:
        """The first body that lacks on the way to one of the `wanted` blocks."""
        for key in wanted:
            lacking = None if key == self._finality.hash else self.tree.missing(key)
            if lacking is not None:
                return lacking
        return None

    def held(self, tip: bytes) -> Collection[bytes]:
        """Ids of the transactions between the final head and `tip`."""
        held = [self._ids_of(block) for block in self.tree.path(tip) or () if block.transactions]
        return held[0] if len(held) == 1 else frozenset().union(*held)

    def _ids_of(self, block: Block) -> frozenset[bytes]:
        root = block.header.tx_root
        found = self._ids.get(root)
        if found is None:
            found = self._ids[root] = frozenset(map(sha256, block.transactions))
        return found

    # ---- judging -----------------------------------------------------------------------------

    @property
    def undecided(self) -> list[tuple[bytes, Block]]:
        """Bodies that wait for their parent, for execution here, or for their time."""
        return [
            (key, block)
            for key, block in self.tree.items()
            if key not in self._mixes and key not in self._rejected
        ]

    def next_valid(self) -> tuple[bytes, Block] | None:
        """A body that has become valid since the last call; call it until None."""
        for key, block in self.undecided:
            try:
                mix = self._verdict(block.header)
            except InvalidBlock as error:
                log.warning("a bad block of view %d: %s", block.header.view, error)
                self._rejected.add(key)
                continue
            if mix is not None:
                self._mixes[key] = mix
                return key, block
        return None

    def _verdict(self, header: Header) -> bytes | None:
        """The block's beacon mix when it may be notarized, None while something is not known yet.
        Raises InvalidBlock."""
        parent, mix = self.header(header.parent), self._mixes.get(header.parent)
        if parent is None or mix is None:
            return None
        check_child(parent, header.parent, header, self._epoch_blocks)
        if (header.validators, header.next_validators) != self._sets:
            raise InvalidBlock("the validator sets are others here")
        root = self._store.root_at(header.state_height)
        history = self._store.history_root(header.state_height)
        if root is None or history is None or header.time_ms > self._latest_ms():
            return None
        if root != header.state_root:
            raise InvalidBlock(f"the state root of {header.state_height} is another one here")
        if history != header.history_root:
            raise InvalidBlock(f"the history up to {header.state_height} is another one here")
        return beacon_mix(self._committee.chain_id, mix, header)

    # ---- the head moves ----------------------------------------------------------------------

    def finalize(self, blocks: Sequence[Block]) -> None:
        """These are final now."""
        header = blocks[-1].header
        head = block_hash(header)
        self.tree.finalize(header.height, head, header.view)
        self._prune(head)

    def make_room(self, view: int, notarized: Collection[bytes]) -> None:
        """When too many bodies are held, forget those that failed before `view`."""
        self.tree.make_room(view, notarized)
        self._prune(self.tree.head)

    def _prune(self, head: bytes) -> None:
        self._mixes = {
            key: mix for key, mix in self._mixes.items() if key in self.tree or key == head
        }
        view = self._finality.header.view
        self._tries = {v: tries for v, tries in self._tries.items() if v > view}
        self._rejected = {key for key in self._rejected if key in self.tree}
        roots = {block.header.tx_root for _, block in self.tree.items()}
        self._ids = {root: ids for root, ids in self._ids.items() if root in roots}

    def executed(self, applied: AppliedBlock) -> None:
        """The beacon of a head that came by sync is known after its execution."""
        if applied.hash == self._finality.hash:
            self._mixes[applied.hash] = self._store.head.mix
