"""Blocks above the finalized head, by id.

A body is judged by its height, never by the current view: a finalization certificate may overtake
it. Only the view of the finalized head itself says more: views grow from parent to child, so
nothing of that view or an earlier one can ever stand above the head.
"""

from collections.abc import Collection

from tdmld.chain.blocks import Block, block_hash

MAX_BLOCKS = 256
"""Bodies held above the head."""
VARIANTS = 2
"""Blocks kept per view unless asked for by id; an equivocating leader gets no more memory."""


class BlockTree:
    """The bodies that are not final yet, and the finalized head on which they stand."""

    def __init__(self, height: int, head: bytes, view: int = 0) -> None:
        self.height = height
        self.head = head
        self.view = view
        self._blocks: dict[bytes, Block] = {}
        self._views: dict[int, int] = {}

    def __contains__(self, block: bytes) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, block: bytes) -> Block | None:
        return self._blocks.get(block)

    def items(self) -> list[tuple[bytes, Block]]:
        """All bodies with their ids, as they came."""
        return list(self._blocks.items())

    def add(self, block: Block, *, wanted: bool = False) -> bool:
        """Keep a body; False when it is old, known, or beyond the bounds and not `wanted`."""
        key, view = block_hash(block.header), block.header.view
        if not self._above(block) or key in self._blocks:
            return False
        if not wanted and (self._views.get(view, 0) >= VARIANTS or len(self._blocks) >= MAX_BLOCKS):
            return False
        self._blocks[key] = block
        self._views[view] = self._views.get(view, 0) + 1
        return True

    def path(self, block: bytes) -> list[Block] | None:
        """Blocks above the head up to `block`, oldest first; None when one is missing or the
        chain does not meet the head. The head's own id gives the empty path."""
        way: list[Block] = []
        while block != self.head:
            body = self._blocks.get(block)
            if body is None:
                return None
            way.append(body)
            block = body.header.parent
        return way[::-1]

    def missing(self, block: bytes) -> bytes | None:
        """The nearest ancestor of `block` (or itself) whose body is not held; None when whole."""
        while block != self.head:
            body = self._blocks.get(block)
            if body is None:
                return block
            block = body.header.parent
        return None

    def finalize(self, height: int, head: bytes, view: int = 0) -> None:
        """Move the head, the block of `view`, and forget what cannot stand above it."""
        self.height, self.head, self.view = height, head, view
        self._keep({key: body for key, body in self._blocks.items() if self._above(body)})

    def make_room(self, view: int, notarized: Collection[bytes]) -> None:
        """When full, forget what earlier views than `view` proposed in vain; after a long time
        without finality nothing new could be kept otherwise."""
        if len(self._blocks) >= MAX_BLOCKS:
            self._keep(
                {
                    key: body
                    for key, body in self._blocks.items()
                    if body.header.view >= view or key in notarized
                }
            )

    def _above(self, block: Block) -> bool:
        return block.header.height > self.height and block.header.view > self.view

    def _keep(self, blocks: dict[bytes, Block]) -> None:
        self._blocks, self._views = blocks, {}
        for body in blocks.values():
            self._views[body.header.view] = self._views.get(body.header.view, 0) + 1
