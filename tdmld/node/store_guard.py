"""The sign guard: own votes and proposals, on disk before anybody sees them, never contradicted."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from rocksdict import WriteBatch

from tdmld.chain.blocks import Block, Certificate, Kind, Vote, block_hash
from tdmld.chain.codec import encode
from tdmld.chain.crypto import address
from tdmld.node.chainerrors import SignGuardError, StoreMismatch
from tdmld.node.store_file import StoreFile, number

PROPOSAL = 3
"""The guard's fourth kind, beside the votes: a second proposal in a view is a fault too."""

_OPPOSITE = {int(Kind.NULLIFY): int(Kind.FINALIZE), int(Kind.FINALIZE): int(Kind.NULLIFY)}


class SignGuard(StoreFile):
    """What this node signed above the head. One `record` at a time, in any thread."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._guard_lock = threading.Lock()
        self._guard: dict[tuple[int, int], bytes] = {}
        """(kind, view) -> what was signed: a block id, or the zero hash."""

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
        raw = self._read(b"p" + number(view))
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
            batch.put(b"v" + number(vote.view) + bytes([vote.kind]), encode(vote))
        for block in proposals:
            view = block.header.view
            if view > final:
                self._guard_one(fresh, PROPOSAL, view, block_hash(block.header))
                batch.put(b"p" + number(view), encode(block))
        for block in bodies:
            if block.header.view > final:
                key = b"n" + number(block.header.view) + block_hash(block.header)
                batch.put(key, encode(block))
        for certificate in certificates:
            if certificate.view > final:
                key = b"c" + number(certificate.view) + bytes([certificate.kind])
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
            for key in self._keys(prefix + self._above(), prefix + number(view + 1)):
                batch.delete(key)

    def _above(self) -> bytes:
        """The first view that is not forgotten: where scans begin, past what was deleted."""
        return number(self._head.view + 1)

    def _scan(self, prefix: bytes) -> Iterator[bytes]:
        for key in self._keys(prefix + self._above(), bytes([prefix[0] + 1])):
            value = self._read(key)
            if value is not None:
                yield value

    def _load_guard(self) -> None:
        """Remember what was signed before, when the store is opened."""
        for vote in self.votes():
            self._guard[int(vote.kind), vote.view] = vote.hash
        for raw in self._scan(b"p"):
            block = self._decode(Block, raw, "proposal")
            self._guard[PROPOSAL, block.header.view] = block_hash(block.header)
