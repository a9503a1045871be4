"""The history: a Merkle mountain range over every executed height.

Leaf number h is `block id ‖ outcomes root` of height h, height 0 included; so one path from a
recent header shows an old block, and which of its transactions succeeded. The shape is RFC 6962's:
the root of n leaves equals `merkle.root`, and `merkle.verify_proof` checks the proofs.

A node is named (level, index): the complete subtree over leaves [index << level, (index + 1) <<
level). Complete nodes never change, so an append writes one or a few and the root over any earlier
count can still be computed. A store that began in the middle has only the peaks of where it began:
it goes on from there, and proves what came later.
"""

from collections.abc import Callable, Iterator, Sequence

from tdmld.chain import merkle
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.merkle import leaf_hash, node_hash

Get = Callable[[int, int], bytes | None]
Node = tuple[int, int, bytes]
"""(level, index, hash)"""


class NotHeld(LookupError):
    """A node of the range was never stored here: the store began after it."""


def leaf(block: bytes, outcomes: bytes) -> bytes:
    """What stands at a height."""
    return block + outcomes


def outcome_leaf(transaction: bytes, ok: bool, count: int) -> bytes:
    """One transaction (by id) of the `count` of a block, and whether it succeeded there."""
    return transaction + (b"\1" if ok else b"\0") + count.to_bytes(4, "big")


def outcome_leaves(outcomes: Sequence[tuple[bytes, bool]]) -> list[bytes]:
    """The leaves of a block's (transaction id, ok), in the block's order."""
    return [outcome_leaf(transaction, ok, len(outcomes)) for transaction, ok in outcomes]


def outcomes_root(outcomes: Sequence[tuple[bytes, bool]]) -> bytes:
    """The Merkle root over them; ZERO_HASH of an empty block."""
    return merkle.root(outcome_leaves(outcomes))


def append(get: Get, count: int, data: bytes) -> Iterator[Node]:
    """The nodes that leaf number `count` completes, itself first. NotHeld: a peak is missing."""
    level, index, node = 0, count, leaf_hash(data)
    yield level, index, node
    while index & 1:
        node = node_hash(_held(get, level, index - 1), node)
        level, index = level + 1, index >> 1
        yield level, index, node


def peaks(count: int) -> list[tuple[int, int]]:
    """The names of the greatest complete nodes that together hold `count` leaves, left to right."""
    found, start = [], 0
    for level in reversed(range(count.bit_length())):
        if count >> level & 1:
            found.append((level, start >> level))
            start += 1 << level
    return found


def bag(hashes: Sequence[bytes]) -> bytes:
    """The root of the range with these peaks, left to right; ZERO_HASH when there are none."""
    if not hashes:
        return ZERO_HASH
    *rest, node = hashes
    for peak in reversed(rest):
        node = node_hash(peak, node)
    return node


def root(get: Get, count: int) -> bytes:
    """The root over the first `count` leaves. NotHeld when they end before this store began."""
    return bag([_held(get, level, index) for level, index in peaks(count)])


def proof(get: Get, count: int, index: int) -> tuple[bytes, ...]:
    """The siblings from leaf `index` up to the root over the first `count` leaves.

    IndexError when there is no such leaf, NotHeld when the store began after it.
    """
    if not 0 <= index < count:
        raise IndexError(f"leaf {index} of {count}")
    siblings, level, width = [], 0, count
    while width > 1:
        if index ^ 1 < width:
            siblings.append(_subtree(get, count, level, index ^ 1))
        level, index, width = level + 1, index >> 1, (width + 1) >> 1
    return tuple(siblings)


def _subtree(get: Get, count: int, level: int, index: int) -> bytes:
    """A node over the first `count` leaves, also one on the right edge that is not complete."""
    if (index + 1) << level <= count:
        return _held(get, level, index)
    left, right = 2 * index, 2 * index + 1
    width_below = -(-count >> (level - 1))
    node = _subtree(get, count, level - 1, left)
    if right < width_below:
        node = node_hash(node, _subtree(get, count, level - 1, right))
    return node


def _held(get: Get, level: int, index: int) -> bytes:
    node = get(level, index)
    if node is None:
        raise NotHeld(f"the node {index} of level {level} of the history is not held here")
    return node
