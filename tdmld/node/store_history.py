"""What stays for ever beside the state: the history (every height's leaf, and the range's complete
nodes), and how every epoch ended."""

from collections.abc import Sequence

from rocksdict import WriteBatch

from tdmld.chain import history
from tdmld.chain.blocks import Certificate, Header, ends_epoch, epoch_of
from tdmld.chain.codec import encode
from tdmld.chain.genesis import Genesis
from tdmld.chain.history import NotHeld
from tdmld.chain.state import State
from tdmld.chain.turns import Turn
from tdmld.node.store_file import number
from tdmld.node.store_state import StoredState
from tdmld.node.store_types import EpochEnd


def node_key(level: int, index: int) -> bytes:
    """Where a node of the range stands."""
    return b"m" + bytes([level]) + number(index)


class StoredHistory(StoredState):
    """The history of the heights from `base` on (`chain.history`), the turns of all epochs
    (`chain.turns`). A turn's set of validators stands in the state."""

    genesis: Genesis
    _base = 0

    @property
    def base(self) -> int:
        """The height whose state this store began with; 0: genesis."""
        return self._base

    def history_root(self, height: int) -> bytes | None:
        """The root of the history up to and with `height`; None when that is not known here.

        It asks the database alone, as `root_at` does: while another thread applies a block the head
        in memory is behind for a moment, and a height known to one is known to the other.
        """
        try:
            return history.root(self._node, height + 1)
        except NotHeld:
            return None

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

    # ---- turns -------------------------------------------------------------------------------

    def epoch_end(self, epoch: int) -> EpochEnd | None:
        """The last header of an epoch and its finalization; None while the epoch is not over."""
        if (epoch + 1) * self.genesis.parameters.epoch_blocks > self._head.height:
            return None
        raw = self._read(b"T" + number(epoch))
        return None if raw is None else self._decode(EpochEnd, raw, f"end of epoch {epoch}")

    def turn(self, epoch: int) -> Turn | None:
        """How an epoch ended and who validates after it; None while it is not over."""
        end, chosen = self.epoch_end(epoch), State(self.get).validator_set(epoch + 1)
        return None if end is None or chosen is None else Turn(end.header, end.certificate, chosen)

    def take_turns(self, turns: Sequence[Turn]) -> None:
        """Keep turns of epochs before a snapshot, which the caller has checked. They are given out
        when the head is past them."""
        batch = WriteBatch(raw_mode=True)
        for turn in turns:
            self._write_turn(batch, turn.header, turn.certificate)
        self._write(batch, self._unsynced)

    def _forget_turns(self, batch: WriteBatch, epoch: int) -> None:
        """From an epoch on: perhaps of a peer whose snapshot did not hold."""
        batch.delete_range(b"T" + number(epoch), b"U")

    def _write_turn(self, batch: WriteBatch, header: Header, certificate: Certificate) -> None:
        epoch_blocks = self.genesis.parameters.epoch_blocks
        if ends_epoch(header.height, epoch_blocks):
            epoch = number(epoch_of(header.height, epoch_blocks))
            batch.put(b"T" + epoch, encode(EpochEnd(header, certificate)))
