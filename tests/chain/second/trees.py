"""The second ledger's trees: the state's, a block's, the history's (TREE, BLK-2, HIST)."""

from collections.abc import Sequence

from tests.chain.second.formats import ZERO, H


def state_root(state: dict[bytes, bytes]) -> bytes:
    """TREE-1, TREE-3."""
    return page([(H(key), H(value)) for key, value in state.items()], 0)


def page(leaves: Sequence[tuple[bytes, bytes]], depth: int) -> bytes:
    """TREE-2."""
    slots: list[list[tuple[bytes, bytes]]] = [[] for _ in range(16)]
    for key, value in leaves:
        byte = key[depth // 2]
        slots[byte & 15 if depth % 2 else byte >> 4].append((key, value))
    row = [ZERO if not slot else below(slot, depth) for slot in slots]
    while len(row) > 1:
        pairs = zip(row[::2], row[1::2], strict=True)
        row = [ZERO if left == right == ZERO else H(b"\1", left, right) for left, right in pairs]
    return row[0]


def below(leaves: list[tuple[bytes, bytes]], depth: int) -> bytes:
    return H(b"\0", *leaves[0]) if len(leaves) == 1 else page(leaves, depth + 1)


def merkle(leaves: Sequence[bytes]) -> bytes:
    """BLK-2."""
    row = [H(b"\0", leaf) for leaf in leaves]
    while len(row) > 1:
        odd = row[len(row) & ~1 :]
        row = [H(b"\1", row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)] + odd
    return row[0] if row else ZERO


class History:
    """HIST-1 to HIST-3, kept as the roots of complete trees, the largest first."""

    def __init__(self) -> None:
        self.trees: list[tuple[int, bytes]] = []

    def append(self, leaf: bytes) -> None:
        size, root = 1, H(b"\0", leaf)
        while self.trees and self.trees[-1][0] == size:
            size, root = 2 * size, H(b"\1", self.trees.pop()[1], root)
        self.trees.append((size, root))

    @property
    def root(self) -> bytes:
        *rest, (_, root) = self.trees
        for _, left in reversed(rest):
            root = H(b"\1", left, root)
        return root
