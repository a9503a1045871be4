"""The history in the database: every height's leaf, and the range's complete nodes."""

from rocksdict import WriteBatch

from tdmld.chain import history
from tdmld.node.store_file import StoreFile, number


def node_key(level: int, index: int) -> bytes:
    """Where a node of the range stands."""
    return b"m" + bytes([level]) + number(index)


class StoredHistory(StoreFile):
    """The heights from `base` on; see `chain.history`."""

    _base = 0

    @property
    def base(self) -> int:
        """The height whose state this store began with; 0: genesis."""
        return self._base

    def history_root(self, height: int) -> bytes | None:
        """The root of the history up to and with `height`; None when that is not known here."""
        if not self._base <= height <= self._head.height:
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
        raw = self._read(b"q" + number(height))
        return None if raw is None else (raw[:32], raw[32:])

    def _node(self, level: int, index: int) -> bytes | None:
        return self._read(node_key(level, index))

    def _write_history(self, batch: WriteBatch, height: int, leaf: bytes) -> None:
        for level, index, node in history.append(self._node, height, leaf):
            batch.put(node_key(level, index), node)
        batch.put(b"q" + number(height), leaf)
