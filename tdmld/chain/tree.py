"""The authenticated state: a sparse Merkle tree over 32-byte keys, kept in pages of 16 slots.

A key's nibbles, most significant first, are its path. A slot of a page is empty, a leaf, or the
root of the page below. **A leaf stands in the shallowest slot whose path only it has**, and a page
that is left with one leaf disappears; so pages and root depend on the present contents alone, never
on the order of updates and deletes (history independence; tests/chain/test_tree.py).

    slot hash: ZERO_HASH if empty, H(0 ‖ key ‖ value) for a leaf, the page's root otherwise
    page root: four rows of binary hashing H(1 ‖ left ‖ right); two empty children are empty

Pure: pages are read through a function and handed back to be written. One live version; finality
is instant, so nothing is ever rolled back.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from tdmld.chain.codec import ZERO_HASH, Record, encode
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import InvariantViolation

_WIDTH = 16
_ROWS = 4
_LEAF_BYTES = 64
_SLOT_SIZES = frozenset((0, 32, _LEAF_BYTES))
_page = msgspec.msgpack.Decoder(list[bytes])
"""For pages that this program wrote: what is wrong with one shows in the root."""
_DEPTH_MAX = 64
"""Nibbles in a key: no path is longer."""

Item = tuple[bytes, bytes]
"""(key of 32 bytes, value of 32 bytes); an empty value deletes the key."""


class TreeProof(Record, frozen=True):
    """What stands where a key belongs, and the way from there to the root.

    `leaf` is the 64 bytes key ‖ value found in the slot, or empty. `siblings` go from the slot to
    the root, four a page; an empty one is written as no bytes.
    """

    leaf: bytes
    siblings: tuple[bytes, ...]


def _nibble(key: bytes, depth: int) -> int:
    return key[depth >> 1] & 15 if depth & 1 else key[depth >> 1] >> 4


def _slot_hash(slot: bytes) -> bytes:
    if not slot:
        return ZERO_HASH
    return slot if len(slot) == 32 else sha256(b"\0", slot)


def _node(left: bytes, right: bytes) -> bytes:
    if left == ZERO_HASH and right == ZERO_HASH:
        return ZERO_HASH
    return sha256(b"\1", left, right)


def _rows(slots: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The rows of a page from its 16 slot hashes to its root."""
    row = [_slot_hash(slot) for slot in slots]
    yield row
    while len(row) > 1:
        row = [_node(row[i], row[i + 1]) for i in range(0, len(row), 2)]
        yield row


def _page_root(slots: Sequence[bytes]) -> bytes:
    """The last of `_rows`, spelled out: half of the time of a block goes through here. Most pages
    are at the bottom and hold two or three leaves, so only what is there is looked at."""
    digest, zero = hashlib.sha256, ZERO_HASH
    row = {
        index: slot if len(slot) == 32 else digest(b"\0" + slot).digest()
        for index, slot in enumerate(slots)
        if slot
    }
    if not row:
        return zero
    for _ in range(_ROWS):
        above: dict[int, bytes] = {}
        for index, node in row.items():
            if index & 1:
                left = row.get(index - 1)
                if left is None:
                    above[index >> 1] = digest(b"\1" + zero + node).digest()
            else:
                above[index >> 1] = digest(b"\1" + node + row.get(index + 1, zero)).digest()
        row = above
    return row[0]


class Tree:
    """The tree over the pages that `get` reads. A page's name is its path: one byte a nibble,
    empty for the root page.

    Not safe for use from several threads.
    """

    def __init__(self, get: Callable[[bytes], bytes | None]) -> None:
        self._get = get
        self._dirty: dict[bytes, list[bytes] | None] = {}

    @property
    def root(self) -> bytes:
        """The root of the present contents; ZERO_HASH when there are none."""
        return _page_root(self._load(b""))

    def update(self, items: Sequence[Item]) -> bytes:
        """Set and delete keys; the new root. `items` ascend strictly by key, else ValueError."""
        last = b""
        for key, value in items:
            if len(key) != 32 or len(value) not in (0, 32):
                raise ValueError("a key has 32 bytes, a value 32 or none")
            if key <= last:
                raise ValueError("keys must ascend strictly")
            last = key
        if not items:
            return self.root
        return _slot_hash(self._update_page(b"", items))

    def pages(self) -> Mapping[bytes, bytes | None]:
        """The pages to write (None: delete) since the last `commit`, encoded."""
        return {
            path: None if slots is None else encode(slots) for path, slots in self._dirty.items()
        }

    def commit(self) -> None:
        """Forget the dirty pages: from now on `get` must give what `pages` said."""
        self._dirty = {}

    def prove(self, key: bytes) -> TreeProof:
        """A proof of `key`'s value, or of its absence."""
        path, siblings = b"", list[bytes]()
        while True:
            slots = self._load(path)
            index = _nibble(key, len(path))
            slot, level = slots[index], list[bytes]()
            for row in _rows(slots):
                if len(row) > 1:
                    sibling = row[index ^ 1]
                    level.append(b"" if sibling == ZERO_HASH else sibling)
                    index >>= 1
            siblings[:0] = level
            if len(slot) != 32:
                return TreeProof(slot, tuple(siblings))
            path += bytes((_nibble(key, len(path)),))

    def _load(self, path: bytes) -> list[bytes]:
        if path in self._dirty:
            slots = self._dirty[path]
            return [b""] * _WIDTH if slots is None else list(slots)
        raw = self._get(path)
        if raw is None:
            return [b""] * _WIDTH
        try:
            slots = _page.decode(raw)
        except msgspec.MsgspecError as error:
            raise InvariantViolation(f"state page {path.hex() or 'root'} is corrupt") from error
        if len(slots) != _WIDTH or not _SLOT_SIZES.issuperset(map(len, slots)):
            raise InvariantViolation(f"state page {path.hex() or 'root'} is corrupt")
        return slots

    def _update_page(self, path: bytes, items: Sequence[Item]) -> bytes:
        """Apply `items`, all below `path`; what the parent's slot must then hold."""
        slots, start = self._load(path), 0
        if len(items) == 1:
            index = _nibble(items[0][0], len(path))
            slots[index] = self._update_slot(slots[index], path, index, items)
        else:
            at, odd = divmod(len(path), 2)
            nibbles = [key[at] & 15 if odd else key[at] >> 4 for key, _ in items]
            while start < len(items):
                index = nibbles[start]
                end = bisect_right(nibbles, index, start)
                slots[index] = self._update_slot(slots[index], path, index, items[start:end])
                start = end
        used = [slot for slot in slots if slot]
        if not used or (path and len(used) == 1 and len(used[0]) == _LEAF_BYTES):
            self._dirty[path] = None
            return used[0] if used else b""
        self._dirty[path] = slots
        return _page_root(slots)

    def _update_slot(self, slot: bytes, path: bytes, index: int, items: Sequence[Item]) -> bytes:
        if len(slot) == 32:
            return self._update_page(path + bytes((index,)), items)
        if len(items) == 1 and (not slot or slot.startswith(items[0][0])):
            key, value = items[0]
            return key + value if value else b""
        live = [(key, value) for key, value in items if value]
        if slot and all(key != slot[:32] for key, _ in items):
            live = sorted([*live, (slot[:32], slot[32:])])
        if not live:
            return b""
        if len(live) == 1:
            return live[0][0] + live[0][1]
        return self._update_page(path + bytes((index,)), live)


def verify_proof(root: bytes, key: bytes, value: bytes, proof: TreeProof) -> bool:
    """Whether `proof` shows that `key` has `value` under `root` (empty value: that it is absent).

    Never raises on a proof from a stranger.
    """
    if len(key) != 32 or len(proof.leaf) not in (0, _LEAF_BYTES):
        return False
    depth, odd = divmod(len(proof.siblings), _ROWS)
    if odd or not 1 <= depth <= _DEPTH_MAX:
        return False
    found, there = proof.leaf[:32], proof.leaf[32:]
    if value:
        if found != key or there != value:
            return False
    elif found == key:
        return False
    elif found and any(_nibble(found, at) != _nibble(key, at) for at in range(depth)):
        return False  # another key's leaf shows absence only where this key's leaf would stand
    node = _slot_hash(proof.leaf)
    bits = int.from_bytes(key, "big") >> (256 - _ROWS * depth)
    for sibling in proof.siblings:
        if len(sibling) not in (0, 32) or sibling == ZERO_HASH:
            return False
        other = sibling or ZERO_HASH
        node = _node(other, node) if bits & 1 else _node(node, other)
        bits >>= 1
    return node == root
