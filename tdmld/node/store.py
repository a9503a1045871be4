"""The chain on disk: one RocksDB, one function that applies a finalized block, one sign guard.

RocksDB's log is sequential and a crash loses at most an unsynced tail of it. Votes are written
synced before anybody sees them; applied blocks are not: the next vote makes them durable, and what
a crash takes away is fetched again. A batch is atomic, so head, state, tree and receipts agree.

    V        format version          s key    ledger state         b height  block
    C        chain id                t path   tree page            f height  its finalization, if
    K        node key that signs     x id     receipt                        it has one of its own
    H        head                    r height state root    e height  outcomes of its transactions
    B        base                             and beacon    q height  leaf of the history
    v view kind   own vote           p view   own proposal  n view hash   notarized body
    o id          spec               L        lowest block  m level index  node of the history
    c view kind   certificate stored with own votes         Z  a snapshot is being taken over
    T epoch       its last header and the finalization, for ever

The rooms: `store_file` (reads and writes), `store_guard` (own votes), `store_state` (the live
version and its tree, `store_views`: what it was), `store_history` (and turns of epochs),
`store_types`; here they come together, with the blocks.

A store that began with a snapshot has the base above 0: no block up to it, and of the history its
peaks there. Blocks go, oldest first, when `keep` says so; the state, receipts, history and turns
stay.
"""

from collections.abc import Sequence
from pathlib import Path

from rocksdict import WriteBatch

from tdmld.chain import epochs, history
from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    Header,
    beacon_mix,
    beacon_start,
    block_hash,
    epoch_of,
    first_header,
    view_epoch,
)
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import ZERO_HASH, encode
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import ChainError, InvariantViolation
from tdmld.chain.genesis import Genesis, chain_id, protocol_at
from tdmld.chain.ledger import BlockContext, Receipt, apply_block, genesis_changes
from tdmld.chain.limits import SPEC_BYTES
from tdmld.chain.state import State, owners_of
from tdmld.chain.transactions import decode_transaction
from tdmld.node.chainerrors import ProtocolUnknown, StoreCorrupt, StoreError, StoreMismatch
from tdmld.node.store_file import number
from tdmld.node.store_guard import SignGuard
from tdmld.node.store_history import StoredHistory, node_key
from tdmld.node.store_types import (
    PROTOCOLS,
    AppliedBlock,
    EpochEnd,
    Head,
    Outcome,
    Passed,
    StoredReceipt,
    check_checkpoint,
)
from tdmld.node.store_views import StoreCopy, StoreView

__all__ = [
    "PROTOCOLS",
    "AppliedBlock",
    "ChainStore",
    "EpochEnd",
    "Head",
    "Outcome",
    "Passed",
    "StoreCopy",
    "StoreView",
    "StoredReceipt",
    "check_checkpoint",
]

FORMAT = b"tdmld-chain-5"
PRUNE_AT_ONCE = 16
"""Blocks deleted beside one that is applied, so that turning pruning on stalls nothing."""


class ChainStore(SignGuard, StoredHistory):
    """An open chain database. Reads and `apply` may run in any thread, one `apply` and one
    `record` at a time; a context manager closes it.

    Raises StoreLocked, StoreCorrupt, StoreMismatch or StoreError at opening.
    """

    def __init__(
        self,
        path: Path,
        genesis: Genesis,
        *,
        keep: int = 0,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`keep` blocks stay, at least those of the unbonding period; 0 keeps all. A chain that
        contradicts `checkpoint` raises CheckpointMismatch, here or in `apply`."""
        super().__init__(path)
        self.checkpoint = checkpoint
        self._keep = max(keep, genesis.parameters.unbonding[0]) if keep else 0
        self._lowest = 1
        self._taking = False
        self.genesis = genesis
        self.chain_id = chain_id(genesis)
        self._committees: dict[int, Committee] = {}
        self._set_ids: dict[int, tuple[bytes, bytes]] = {}
        try:
            self._load()
        except BaseException:  # whatever it was: the database's lock must not outlive it
            self.close()
            raise

    def __enter__(self) -> "ChainStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the chain -------------------------------------------------------------------------

    @property
    def height(self) -> int:
        return self._head.height

    @property
    def state_root(self) -> bytes:
        """The root after the head."""
        return self._head.state_root

    @property
    def closed(self) -> bool:
        """Whether a final header commits the present state root."""
        return self._head.header.state_root == self._head.state_root

    @property
    def lowest(self) -> int:
        """The lowest height whose block is held, when there is one."""
        return self._lowest

    @property
    def epoch(self) -> int:
        """The epoch of the block after the head."""
        return epoch_of(self._head.height + 1, self.genesis.parameters.epoch_blocks)

    def committee(self, epoch: int) -> Committee | None:
        """Who validates in an epoch; None before it is fixed by what is executed here, and while a
        snapshot is taken over, of which nothing is believed yet."""
        known = self._committees.get(epoch)
        if known is None:
            chosen = None if self._taking else State(self.get).validator_set(epoch)
            if chosen is None:
                return None
            known = self._committees[epoch] = epochs.committee(self.chain_id, chosen)
        return known

    def set_ids(self, epoch: int) -> tuple[bytes, bytes]:
        """What headers of an epoch name: its validators and the next ones. Both are fixed once the
        block before the epoch is executed; raises InvariantViolation before that."""
        known = self._set_ids.get(epoch)
        if known is not None:
            return known
        state = State(self.get)
        now, after = state.validator_set(epoch), state.validator_set(epoch + 1)
        if now is None or after is None:
            raise InvariantViolation(f"the validators of epoch {epoch} are not known here yet")
        found = self._set_ids[epoch] = epochs.set_id(now), epochs.set_id(after)
        return found

    def root_at(self, height: int) -> bytes | None:
        """The state root after executing `height`; None when it has not been executed."""
        passed = self.passed(height)
        return None if passed is None else passed.state_root

    def passed(self, height: int) -> Passed | None:
        """What executing `height` left; None when it has not been executed here, or long ago."""
        raw = self._read(b"r" + number(height))
        return None if raw is None else self._decode(Passed, raw, f"root of height {height}")

    def block(self, height: int) -> Block | None:
        """The final block of a height from 1."""
        raw = self._read(b"b" + number(height))
        return None if raw is None else self._decode(Block, raw, f"block {height}")

    def certificate(self, height: int) -> Certificate | None:
        """The finalization of exactly this block; one finalized by a descendant has none."""
        raw = self._read(b"f" + number(height))
        return None if raw is None else self._decode(Certificate, raw, f"certificate {height}")

    def outcomes(self, height: int) -> tuple[Outcome, ...] | None:
        """What became of the transactions of a block, in its order; None when none are stored."""
        raw = self._read(b"e" + number(height))
        if raw is None:
            return None
        return self._decode(tuple[Outcome, ...], raw, f"outcomes of block {height}")

    def receipt(self, transaction: bytes) -> StoredReceipt | None:
        """What became of a transaction, by id: where it succeeded, else where it stood last."""
        raw = self._read(b"x" + transaction)
        return None if raw is None else self._decode(StoredReceipt, raw, "receipt")

    def apply(self, block: Block, certificate: Certificate | None) -> AppliedBlock:
        """Execute a final block, live or in catch-up: beacon, ledger, tree, one atomic write.

        The caller vouches for finality. `certificate` is the block's own; the last block of an
        epoch always has one (EPOCH-6), which is kept for whoever follows the validators. Raises
        ProtocolUnknown, and InvariantViolation when the block does not follow the head or
        contradicts what was executed here; then nothing was written, and the node must stop: a
        quorum says otherwise than we compute.
        """
        head, header, key = self._head, block.header, block_hash(block.header)
        self._check(head, header)
        try:
            mix = beacon_mix(self.chain_id, head.mix, header)
            transactions = [decode_transaction(raw, self.chain_id) for raw in block.transactions]
        except ChainError as error:
            raise InvariantViolation(
                f"a quorum finalized block {header.height}, but {error}"
            ) from error
        context = BlockContext(
            height=header.height,
            view=header.view,
            parent_view=header.parent_view,
            time_ms=header.time_ms,
            proposer=header.proposer,
            beacon=mix,
        )
        result = apply_block(self.get, self.genesis, context, transactions)
        batch = WriteBatch(raw_mode=True)
        root = self._write_state(batch, result.changes) if result.changes else head.state_root
        self._write_receipts(batch, header.height, result.receipts)
        new = Head(header.height, header.view, key, mix, root, header)
        at = number(header.height)
        batch.put(b"b" + at, encode(block))
        batch.put(b"r" + at, encode(Passed(root, mix)))
        batch.put(b"H", encode(new))
        outcomes = history.outcomes_root([(receipt.id, receipt.ok) for receipt in result.receipts])
        self._write_history(batch, header.height, history.leaf(key, outcomes))
        lowest = self._prune(batch, header)
        if certificate is not None:
            batch.put(b"f" + at, encode(certificate))
            self._write_turn(batch, header, certificate)
        self._forget_votes(batch, header.view)
        self._write(batch, self._unsynced)
        self._head, self._lowest = new, lowest
        return AppliedBlock(
            header.height,
            key,
            block,
            certificate,
            tuple(result.receipts),
            tuple(result.events),
            frozenset(owners_of(result.changes)),
        )

    def _check(self, head: Head, header: Header) -> None:
        if header.height != head.height + 1 or header.parent != head.hash:
            raise InvariantViolation(
                f"block {header.height} does not follow the head {head.height}"
            )
        if view_epoch(header.view) != self.epoch:
            raise InvariantViolation(f"block {header.height} has a view of another epoch")
        if (header.validators, header.next_validators) != self.set_ids(self.epoch):
            raise InvariantViolation(
                f"block {header.height} names other validators than this node computed: stop, keep "
                f"{self.path} for a report, start again from an empty directory"
            )
        version = protocol_at(self.genesis, header.height)
        if version not in PROTOCOLS or header.protocol != version:
            raise ProtocolUnknown(
                f"height {header.height} follows protocol {header.protocol}, and this program "
                f"knows {sorted(PROTOCOLS)}: install a newer version and start again"
            )
        check_checkpoint(self.checkpoint, header.height, block_hash(header))
        if header.state_height < self._base:
            return  # committed before this store began, and certified
        if (
            self.root_at(header.state_height) != header.state_root
            or self.history_root(header.state_height) != header.history_root
        ):
            raise InvariantViolation(
                f"the network executed height {header.state_height} to another state than this "
                f"node: stop, keep {self.path} for a report, start again from an empty directory"
            )

    def _prune(self, batch: WriteBatch, header: Header) -> int:
        """Delete blocks that are older than `keep` and than the unbonding period, within which an
        offence can be punished and a stranger can be shown what happened; the new lowest."""
        lowest, seconds = self._lowest, self.genesis.parameters.unbonding[1]
        if not self._keep:
            return lowest
        for _ in range(PRUNE_AT_ONCE):
            block = self.block(lowest) if lowest <= header.height - self._keep else None
            if block is None or block.header.time_ms + 1000 * seconds > header.time_ms:
                break
            for prefix in (b"b", b"f", b"e", b"r"):
                batch.delete(prefix + number(lowest))
            lowest += 1
        if lowest != self._lowest:
            batch.put(b"L", number(lowest))
        return lowest

    # ---- beginning with a snapshot ------------------------------------------------------------

    def begin_snapshot(self) -> None:
        """Make room for another's state. Only at height 0. Until `finish_snapshot` the store holds
        no state; a crash in between, or `drop_snapshot`, goes back to genesis."""
        if self.height != 0:
            raise StoreError(
                f"{self.path} holds a chain already: a snapshot begins with an empty one"
            )
        batch = WriteBatch(raw_mode=True)
        batch.put(b"Z", b"")
        self._forget_chain(batch)
        self._write(batch, self._synced)
        self._taking = True

    def finish_snapshot(self, head: Head, peaks: Sequence[bytes]) -> None:
        """Begin the chain at `head`, whose state was taken. The caller vouches for finality and
        has checked the history's `peaks`; InvariantViolation when the root is another one."""
        if self.taken_root() != head.state_root:
            raise InvariantViolation("the state that was taken is not that of the head")
        batch = WriteBatch(raw_mode=True)
        for (level, index), node in zip(history.peaks(head.height + 1), peaks, strict=True):
            batch.put(node_key(level, index), node)
        at = number(head.height)
        batch.put(b"r" + at, encode(Passed(head.state_root, head.mix)))
        batch.put(b"H", encode(head))
        batch.put(b"B", at)
        self._forget_turns(batch, epoch_of(head.height + 1, self.genesis.parameters.epoch_blocks))
        batch.put(b"L", number(head.height + 1))
        batch.delete(b"Z")
        self._write(batch, self._synced)
        self._head, self._base, self._lowest = head, head.height, head.height + 1
        self._taking = False

    def drop_snapshot(self) -> None:
        """Go back to genesis."""
        batch = WriteBatch(raw_mode=True)
        self._forget_chain(batch)
        self._write(batch, self._synced)
        self._found()
        self._taking = False

    def _forget_chain(self, batch: WriteBatch) -> None:
        for prefix in (b"m", b"q", b"r", b"s", b"t"):
            batch.delete_range(prefix, bytes([prefix[0] + 1]))

    def _write_receipts(self, batch: WriteBatch, height: int, receipts: Sequence[Receipt]) -> None:
        """Nothing succeeds twice, but a leader may put it into a block again: it then fails
        there, and its receipt still says that it succeeded."""
        done = set[bytes]()
        for receipt in receipts:
            known = None if receipt.ok else self.receipt(receipt.id)
            if receipt.id in done or (known is not None and known.ok):
                continue
            if receipt.ok:
                done.add(receipt.id)
            stored = StoredReceipt(height, receipt.ok, receipt.reason)
            batch.put(b"x" + receipt.id, encode(stored))
        if receipts:
            outcomes = tuple(Outcome(receipt.ok, receipt.reason) for receipt in receipts)
            batch.put(b"e" + number(height), encode(outcomes))

    # ---- specs -------------------------------------------------------------------------------

    def put_spec(self, raw: bytes) -> bytes:
        """Keep a spec's bytes; its id. StoreError when it is too large."""
        if len(raw) > SPEC_BYTES:
            raise StoreError(f"a spec has at most {SPEC_BYTES} bytes, not {len(raw)}")
        spec = sha256(raw)
        if self._read(b"o" + spec) is None:
            batch = WriteBatch(raw_mode=True)
            batch.put(b"o" + spec, raw)
            self._write(batch, self._unsynced)
        return spec

    def get_spec(self, spec: bytes) -> bytes | None:
        return self._read(b"o" + spec)

    # ---- opening -----------------------------------------------------------------------------

    def _load(self) -> None:
        version = self._read(b"V")
        if version is None:
            if self._read(b"H") is not None:
                raise StoreCorrupt(f"{self.path} has a head but no version: it is damaged")
            self._found()
        elif version != FORMAT:
            raise StoreMismatch(
                f"{self.path} was written by another version of tdmld ({version!r}): "
                "use that version, or start from an empty directory"
            )
        if self._read(b"C") != self.chain_id:
            raise StoreMismatch(
                f"{self.path} belongs to another chain than {self.chain_id.hex()[:16]}: check "
                "genesis.json, or choose another data directory"
            )
        if self._read(b"Z") is not None:
            self.drop_snapshot()
        raw = self._read(b"H")
        if raw is None:
            raise StoreCorrupt(f"{self.path} has no head: it is damaged")
        self._head = self._decode(Head, raw, "head")
        self._base = int.from_bytes(self._read(b"B") or b"", "big")
        self._lowest = int.from_bytes(self._read(b"L") or b"\1", "big")
        if self.checkpoint is not None and self.checkpoint.height <= self.height:
            self._check_held(self.checkpoint)
        self._load_guard()

    def _found(self) -> None:
        batch = WriteBatch(raw_mode=True)
        root = self._write_state(batch, dict(genesis_changes(self.genesis)))
        version = protocol_at(self.genesis, 0)
        header = first_header(self.chain_id, version, self.genesis.time_ms, root)
        head = Head(0, 0, block_hash(header), beacon_start(self.chain_id), root, header)
        batch.put(b"V", FORMAT)
        batch.put(b"C", self.chain_id)
        batch.delete(b"Z")
        batch.put(b"H", encode(head))
        batch.put(b"r" + number(0), encode(Passed(root, head.mix)))
        self._write_history(batch, 0, history.leaf(head.hash, ZERO_HASH))
        self._write(batch, self._synced)
        self._head = head

    def _check_held(self, checkpoint: Checkpoint) -> None:
        """Compare with what this store has; a block before its base was checked when it began."""
        if checkpoint.height == self.height:
            check_checkpoint(checkpoint, self.height, self._head.hash)
        block = self.block(checkpoint.height + 1)
        if block is not None:
            check_checkpoint(checkpoint, checkpoint.height, block.header.parent)
