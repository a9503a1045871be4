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

A store that began with a snapshot has the base above 0: no block up to it, and of the history its
peaks there. Blocks go, oldest first, when `keep` says so; the state, receipts and history stay.
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rocksdict import AccessType, Options, Rdict, WriteBatch, WriteOptions
from rocksdict import Checkpoint as RocksCheckpoint

from tdmld.chain import epochs, history
from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    Header,
    Kind,
    Vote,
    beacon_mix,
    beacon_start,
    block_hash,
    epoch_of,
    first_header,
    view_epoch,
)
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import ZERO_HASH, Hash, Record, decode, encode
from tdmld.chain.crypto import address, sha256
from tdmld.chain.errors import ChainError, DecodeError, InvariantViolation
from tdmld.chain.events import Event
from tdmld.chain.genesis import Genesis, chain_id, protocol_at
from tdmld.chain.ledger import BlockContext, Receipt, apply_block, genesis_changes
from tdmld.chain.limits import SPEC_BYTES
from tdmld.chain.state import State, owners_of
from tdmld.chain.transactions import decode_transaction
from tdmld.chain.tree import Item, Tree, TreeProof
from tdmld.node.chainerrors import (
    CheckpointMismatch,
    ProtocolUnknown,
    SignGuardError,
    StoreCorrupt,
    StoreError,
    StoreMismatch,
)
from tdmld.node.rocks import open_database, translated

T = TypeVar("T")

FORMAT = b"tdmld-chain-2"
PROTOCOLS = frozenset({1})
"""Protocol versions that this program implements."""
MAX_RECORD_BYTES = 64 << 20
"""Bound for decoding what we wrote ourselves; larger than any block that genesis may allow."""
PROPOSAL = 3
"""The guard's fourth kind, beside the votes: a second proposal in a view is a fault too."""
PRUNE_AT_ONCE = 16
"""Blocks deleted beside one that is applied, so that turning pruning on stalls nothing."""

_OPPOSITE = {int(Kind.NULLIFY): int(Kind.FINALIZE), int(Kind.FINALIZE): int(Kind.NULLIFY)}


class Head(Record, frozen=True):
    """The highest applied block."""

    height: int
    view: int
    hash: Hash
    mix: Hash
    state_root: Hash
    header: Header


class Passed(Record, frozen=True):
    """What executing a height left: the state root and the beacon mix."""

    state_root: Hash
    mix: Hash


class StoredReceipt(Record, frozen=True):
    """What became of a transaction, and in which block."""

    height: int
    ok: bool
    reason: str


class Outcome(Record, frozen=True):
    """What became of one transaction where it stands; `reason` is empty when `ok`."""

    ok: bool
    reason: str


@dataclass(frozen=True, slots=True)
class AppliedBlock:
    """What applying a final block did. `certificate` finalizes this very block, if there is one;
    `touched` are the owners whose accounts it changed."""

    height: int
    hash: bytes
    block: Block
    certificate: Certificate | None
    receipts: tuple[Receipt, ...]
    events: tuple[Event, ...]
    touched: frozenset[bytes] = frozenset()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def _node_key(level: int, index: int) -> bytes:
    return b"m" + bytes([level]) + _number(index)


def check_checkpoint(checkpoint: Checkpoint | None, height: int, found: bytes) -> None:
    """Raise CheckpointMismatch when `found`, final at `height`, is not the operator's block."""
    if checkpoint is not None and height == checkpoint.height and found != checkpoint.hash:
        raise CheckpointMismatch(
            f"the network's final block {height} is {found.hex()}, and the checkpoint in "
            f"tdmld.toml says {checkpoint.hash.hex()}: either the checkpoint is wrong, or these "
            "peers follow a false chain. Compare it with a source that you trust before going on"
        )


class StoreView:
    """The ledger's state as it was at one moment, while the chain goes on."""

    def __init__(self, path: Path, read: Callable[[bytes], bytes | None]) -> None:
        self._path = path
        self._read = read
        self.head = decode(Head, read(b"H") or b"", MAX_RECORD_BYTES)

    def close(self) -> None:
        """Give up what the view holds."""

    def get(self, key: bytes) -> bytes | None:
        """The ledger's state then."""
        return self._read(b"s" + key)

    def prove(self, key: bytes) -> TreeProof:
        """A proof of the state key's value, or of its absence, under the view's state root."""
        return Tree(lambda path: self._read(b"t" + path)).prove(sha256(key))


class StoreCopy(StoreView):
    """A view that can also be walked: a directory of hard links to the database's files, which
    `close` removes. rocksdict's own snapshots are no snapshots under an iterator."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = Rdict(str(path), Options(raw_mode=True), access_type=AccessType.read_only())
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(path, "open", error) from error
        super().__init__(path, self._db.get)

    def close(self) -> None:
        self._db.close()
        shutil.rmtree(self._path, ignore_errors=True)

    def state_after(self, after: bytes, limit: int) -> tuple[list[Item], bool]:
        """State items above the key `after` in order, up to the one that passes `limit` bytes;
        whether there are more."""
        found, size = list[Item](), 0
        try:
            for key, value in self._db.items(from_key=b"s" + after):
                if not isinstance(key, bytes) or key >= b"t":
                    break
                if key[1:] == after:
                    continue
                if size > limit:
                    return found, True
                found.append((key[1:], bytes(value)))
                size += len(key) + len(value)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self._path, "read", error) from error
        return found, False


class ChainStore:
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
        self.path = path
        self.checkpoint = checkpoint
        self._keep = max(keep, genesis.parameters.unbonding[0]) if keep else 0
        self._base = 0
        self._lowest = 1
        self.genesis = genesis
        self.chain_id = chain_id(genesis)
        self._synced = WriteOptions()
        self._synced.sync = True
        self._unsynced = WriteOptions()
        self._guard_lock = threading.Lock()
        self._guard: dict[tuple[int, int], bytes] = {}
        """(kind, view) -> what was signed: a block id, or the zero hash."""
        self._committees: dict[int, Committee] = {}
        self._set_ids: dict[int, tuple[bytes, bytes]] = {}
        self._head: Head
        self._db = open_database(path)
        try:
            self._load()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> "ChainStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close; reads after it fail."""
        self._db.close()

    # ---- the chain -------------------------------------------------------------------------

    @property
    def head(self) -> Head:
        """The highest applied block; height 0 is genesis."""
        return self._head

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
    def base(self) -> int:
        """The height whose state this store began with; 0: genesis."""
        return self._base

    @property
    def lowest(self) -> int:
        """The lowest height whose block is held, when there is one."""
        return self._lowest

    def get(self, key: bytes) -> bytes | None:
        """The ledger's state at the head."""
        return self._read(b"s" + key)

    def state_items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of the ledger's state at the head, ascending."""
        try:
            for key, value in self._db.items(from_key=b"s"):
                if not isinstance(key, bytes) or key >= b"t":
                    break
                yield key[1:], bytes(value)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "read", error) from error

    @property
    def epoch(self) -> int:
        """The epoch of the block after the head."""
        return epoch_of(self._head.height + 1, self.genesis.parameters.epoch_blocks)

    def committee(self, epoch: int) -> Committee | None:
        """Who validates in an epoch; None before it is fixed by what is executed here."""
        known = self._committees.get(epoch)
        if known is None:
            chosen = State(self.get).validator_set(epoch)
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
        raw = self._read(b"r" + _number(height))
        return None if raw is None else self._decode(Passed, raw, f"root of height {height}")

    def history_root(self, height: int) -> bytes | None:
        """The root of the history up to and with `height`; None when that is not known here."""
        if not self._base <= height <= self.height:
            return None
        return history.root(self._node, height + 1)

    def history_proof(self, height: int, top: int) -> tuple[bytes, ...]:
        """The path of `height`'s leaf under `history_root(top)`. Raises IndexError when it is
        not up to `top`, history.NotHeld when this store began above it."""
        return history.proof(self._node, top + 1, height)

    def history_peaks(self, height: int) -> tuple[bytes, ...]:
        """The peaks of the history up to and with `height`, left to right."""
        found = [self._node(level, index) for level, index in history.peaks(height + 1)]
        return tuple(node for node in found if node is not None)

    def history_leaf(self, height: int) -> tuple[bytes, bytes] | None:
        """A height's block id and outcomes root, also when the block was pruned."""
        raw = self._read(b"q" + _number(height))
        return None if raw is None else (raw[:32], raw[32:])

    def view(self) -> StoreView:
        """The state as it is now."""
        frozen, path = self._db.snapshot(), self.path

        def read(key: bytes) -> bytes | None:
            try:
                value: bytes = frozen[key]
            except Exception as error:  # rocksdict raises bare Exception for every cause
                if str(error) == "key not found":
                    return None
                raise translated(path, "read", error) from error
            return value

        return StoreView(self.path, read)

    def copy(self, directory: Path) -> StoreCopy:
        """The state as it is now, in `directory`, which is removed first. Takes a few
        milliseconds and holds disk space until it is closed."""
        shutil.rmtree(directory, ignore_errors=True)
        try:
            RocksCheckpoint(self._db).create_checkpoint(str(directory))
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(directory, "make", error) from error
        return StoreCopy(directory)

    def block(self, height: int) -> Block | None:
        """The final block of a height from 1."""
        raw = self._read(b"b" + _number(height))
        return None if raw is None else self._decode(Block, raw, f"block {height}")

    def certificate(self, height: int) -> Certificate | None:
        """The finalization of exactly this block; one finalized by a descendant has none."""
        raw = self._read(b"f" + _number(height))
        return None if raw is None else self._decode(Certificate, raw, f"certificate {height}")

    def outcomes(self, height: int) -> tuple[Outcome, ...] | None:
        """What became of the transactions of a block, in its order; None when none are stored."""
        raw = self._read(b"e" + _number(height))
        if raw is None:
            return None
        return self._decode(tuple[Outcome, ...], raw, f"outcomes of block {height}")

    def receipt(self, transaction: bytes) -> StoredReceipt | None:
        """What became of a transaction, by id: where it succeeded, else where it stood last."""
        raw = self._read(b"x" + transaction)
        return None if raw is None else self._decode(StoredReceipt, raw, "receipt")

    def apply(self, block: Block, certificate: Certificate | None) -> AppliedBlock:
        """Execute a final block, live or in catch-up: beacon, ledger, tree, one atomic write.

        The caller vouches for finality. Raises ProtocolUnknown, and InvariantViolation when the
        block does not follow the head or contradicts what was executed here; then nothing was
        written, and the node must stop: a quorum says otherwise than we compute.
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
        number = _number(header.height)
        batch.put(b"b" + number, encode(block))
        batch.put(b"r" + number, encode(Passed(root, mix)))
        batch.put(b"H", encode(new))
        outcomes = history.outcomes_root([(receipt.id, receipt.ok) for receipt in result.receipts])
        self._write_history(batch, header.height, history.leaf(key, outcomes))
        lowest = self._prune(batch, header)
        if certificate is not None:
            batch.put(b"f" + number, encode(certificate))
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

    def _write_state(self, batch: WriteBatch, changes: dict[bytes, bytes | None]) -> bytes:
        tree = Tree(lambda path: self._read(b"t" + path))
        items = []
        for key, value in changes.items():
            items.append((sha256(key), b"" if value is None else sha256(value)))
            if value is None:
                batch.delete(b"s" + key)
            else:
                batch.put(b"s" + key, value)
        root = tree.update(sorted(items))
        for path, page in tree.pages().items():
            if page is None:
                batch.delete(b"t" + path)
            else:
                batch.put(b"t" + path, page)
        return root

    def _node(self, level: int, index: int) -> bytes | None:
        return self._read(_node_key(level, index))

    def _write_history(self, batch: WriteBatch, height: int, leaf: bytes) -> None:
        for level, index, node in history.append(self._node, height, leaf):
            batch.put(_node_key(level, index), node)
        batch.put(b"q" + _number(height), leaf)

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
                batch.delete(prefix + _number(lowest))
            lowest += 1
        if lowest != self._lowest:
            batch.put(b"L", _number(lowest))
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

    def take_state(self, items: Sequence[Item]) -> None:
        """Add state items (key, value)."""
        batch = WriteBatch(raw_mode=True)
        self._write_state(batch, dict(items))
        self._write(batch, self._unsynced)

    def taken_root(self) -> bytes:
        """The root over everything taken so far."""
        return Tree(lambda path: self._read(b"t" + path)).root

    def finish_snapshot(self, head: Head, peaks: Sequence[bytes]) -> None:
        """Begin the chain at `head`, whose state was taken. The caller vouches for finality and
        has checked the history's `peaks`; InvariantViolation when the root is another one."""
        if self.taken_root() != head.state_root:
            raise InvariantViolation("the state that was taken is not that of the head")
        batch = WriteBatch(raw_mode=True)
        for (level, index), node in zip(history.peaks(head.height + 1), peaks, strict=True):
            batch.put(_node_key(level, index), node)
        number = _number(head.height)
        batch.put(b"r" + number, encode(Passed(head.state_root, head.mix)))
        batch.put(b"H", encode(head))
        batch.put(b"B", number)
        batch.put(b"L", _number(head.height + 1))
        batch.delete(b"Z")
        self._write(batch, self._synced)
        self._head, self._base, self._lowest = head, head.height, head.height + 1

    def drop_snapshot(self) -> None:
        """Go back to genesis."""
        batch = WriteBatch(raw_mode=True)
        self._forget_chain(batch)
        self._write(batch, self._synced)
        self._found()

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
            batch.put(b"e" + _number(height), encode(outcomes))

    # ---- votes: the sign guard ---------------------------------------------------------------

    @property
    def signer(self) -> bytes | None:
        """The node key that votes were stored for; None when this directory never voted."""
        return self._read(b"K")

    def bind(self, node: bytes) -> None:
        """Tie the directory to a validator's key; StoreMismatch when it is another's."""
        known = self.signer
        if known is not None and known != node:
            raise StoreMismatch(
                f"{self.path} holds the votes of {address(known)}, not of {address(node)}: "
                "give this key its own data directory"
            )

    def votes(self) -> tuple[Vote, ...]:
        """Own votes above the head, as they were signed."""
        return tuple(self._decode(Vote, raw, "vote") for raw in self._scan(b"v"))

    def view_certificates(self) -> tuple[Certificate, ...]:
        """The certificates above the head that own votes rest on."""
        rows = self._scan(b"c")
        return tuple(self._decode(Certificate, raw, "certificate of a view") for raw in rows)

    def proposal(self, view: int) -> Block | None:
        """Own proposal in a view above the head, as it was signed."""
        raw = self._read(b"p" + _number(view))
        return None if raw is None else self._decode(Block, raw, "proposal")

    def bodies(self) -> tuple[Block, ...]:
        """Own proposals and the bodies of own notarizations above the head."""
        rows = [*self._scan(b"p"), *self._scan(b"n")]
        return tuple(self._decode(Block, raw, "body") for raw in rows)

    def record(
        self,
        node: bytes,
        votes: Sequence[Vote],
        proposals: Sequence[Block],
        bodies: Sequence[Block],
        certificates: Sequence[Certificate] = (),
    ) -> list[Vote]:
        """Make own votes and proposals durable, in one synced batch, before they are sent.

        `bodies` are the blocks notarized by `votes`, `certificates` what was seen before them and
        is not stored yet. Returns the votes that may be sent: all but
        those of views that became final meanwhile. Raises SignGuardError, writing nothing, when
        something contradicts what was recorded before; the same thing again is no contradiction.
        Blocks for a disk's sync: call it in a thread.
        """
        batch = WriteBatch(raw_mode=True)
        fresh: dict[tuple[int, int], bytes] = {}
        final = self._head.view
        kept = [vote for vote in votes if vote.view > final]
        for vote in kept:
            self._guard_one(fresh, int(vote.kind), vote.view, vote.hash)
            batch.put(b"v" + _number(vote.view) + bytes([vote.kind]), encode(vote))
        for block in proposals:
            view = block.header.view
            if view > final:
                self._guard_one(fresh, PROPOSAL, view, block_hash(block.header))
                batch.put(b"p" + _number(view), encode(block))
        for block in bodies:
            if block.header.view > final:
                key = b"n" + _number(block.header.view) + block_hash(block.header)
                batch.put(key, encode(block))
        for certificate in certificates:
            if certificate.view > final:
                key = b"c" + _number(certificate.view) + bytes([certificate.kind])
                batch.put(key, encode(certificate))
        batch.put(b"K", node)
        self._write(batch, self._synced)
        with self._guard_lock:
            self._guard |= fresh
        return kept

    def _guard_one(
        self, fresh: dict[tuple[int, int], bytes], kind: int, view: int, value: bytes
    ) -> None:
        with self._guard_lock:
            known = fresh.get((kind, view), self._guard.get((kind, view)))
            opposite = (_OPPOSITE.get(kind, -1), view)
            if (known is not None and known != value) or opposite in self._guard | fresh:
                raise SignGuardError(
                    f"view {view}: another vote of this node is already stored; two nodes may run "
                    "with one key, or the directory was altered. Stop both and ask for help"
                )
        fresh[kind, view] = value

    def _forget_votes(self, batch: WriteBatch, view: int) -> None:
        """Everything up to a final view can no longer be voted on."""
        with self._guard_lock:
            self._guard = {key: value for key, value in self._guard.items() if key[1] > view}
        for prefix in (b"v", b"p", b"n", b"c"):
            for key in self._keys(prefix + self._above(), prefix + _number(view + 1)):
                batch.delete(key)

    def _above(self) -> bytes:
        """The first view that is not forgotten: where scans begin, past what was deleted."""
        return _number(self._head.view + 1)

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
        for vote in self.votes():
            self._guard[int(vote.kind), vote.view] = vote.hash
        for raw in self._scan(b"p"):
            block = self._decode(Block, raw, "proposal")
            self._guard[PROPOSAL, block.header.view] = block_hash(block.header)

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
        batch.put(b"r" + _number(0), encode(Passed(root, head.mix)))
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

    # ---- rocksdict, behind four functions ------------------------------------------------------

    def _read(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "read", error) from error
        return value

    def _write(self, batch: WriteBatch, how: WriteOptions) -> None:
        try:
            self._db.write(batch, how)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "write", error) from error

    def _scan(self, prefix: bytes) -> Iterator[bytes]:
        for key in self._keys(prefix + self._above(), bytes([prefix[0] + 1])):
            value = self._read(key)
            if value is not None:
                yield value

    def _keys(self, start: bytes, end: bytes) -> list[bytes]:
        found: list[bytes] = []
        try:
            for key in self._db.keys(from_key=start):
                if not isinstance(key, bytes) or key >= end:
                    break
                found.append(key)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "read", error) from error
        return found

    def _decode(self, kind: type[T], raw: bytes, what: str) -> T:
        try:
            return decode(kind, raw, MAX_RECORD_BYTES)
        except DecodeError as error:
            raise StoreCorrupt(
                f"{self.path}: the stored {what} is damaged ({error}): move the directory away "
                "and start again; the node fetches the chain from its peers"
            ) from error
