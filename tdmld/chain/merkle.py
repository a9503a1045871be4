"""The plain Merkle tree over a list: transactions of a block. RFC 6962's shape, SHA-256.

A leaf is H(0 ‖ data), an inner node H(1 ‖ left ‖ right), an odd node moves up. The count of leaves
is part of what a proof is checked against, so a proof says nothing about another list's length.
"""

from collections.abc import Sequence

from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import sha256


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf."""
    return sha256(b"\0", data)


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return sha256(b"\1", left, right)


def _next_row(row: list[bytes]) -> list[bytes]:
    above = [node_hash(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
    if len(row) % 2:
        above.append(row[-1])
    return above


def root(leaves: Sequence[bytes]) -> bytes:
    """The root of the list; ZERO_HASH of the empty one."""
    row = [leaf_hash(data) for data in leaves]
    if not row:
        return ZERO_HASH
    while len(row) > 1:
        row = _next_row(row)
    return row[0]


def proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The siblings from leaf `index` up to the root; IndexError when there is no such leaf."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    row = [leaf_hash(data) for data in leaves]
    siblings = []
    while len(row) > 1:
        if index ^ 1 < len(row):
            siblings.append(row[index ^ 1])
        row = _next_row(row)
        index >>= 1
    return tuple(siblings)


def verify_proof(
    root: bytes, leaf: bytes, index: int, count: int, siblings: Sequence[bytes]
) -> bool:
    """Whether `leaf` is number `index` of the `count` leaves under `root`."""
    if not 0 <= index < count:
        return False
    node, width, rest = leaf_hash(leaf), count, iter(siblings)
    while width > 1:
        if index ^ 1 < width:
            sibling = next(rest, None)
            if sibling is None or len(sibling) != 32:
                return False
            node = node_hash(sibling, node) if index & 1 else node_hash(node, sibling)
        index >>= 1
        width = (width + 1) // 2
    return next(rest, None) is None and node == root
