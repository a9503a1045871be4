"""The state tree: contents alone decide pages and root; proofs show presence and absence."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain.codec import ZERO_HASH, decode, encode
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.tree import Tree, TreeProof, verify_proof


def key_of(number: int) -> bytes:
    """Keys that share long prefixes, so that small examples reach deep pages."""
    return bytes([0xAB] * (number % 5)) + hashlib.sha256(bytes([number])).digest()[number % 5 :]


def value_of(number: int) -> bytes:
    return hashlib.sha256(b"value" + bytes([number])).digest()


class Disk:
    """A tree whose pages are written away after every update, as the store does."""

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.tree = Tree(self.stored.get)

    def update(self, contents: dict[bytes, bytes]) -> bytes:
        root = self.tree.update(sorted(contents.items()))
        for path, page in self.tree.pages().items():
            if page is None:
                self.stored.pop(path, None)
            else:
                self.stored[path] = page
        self.tree.commit()
        return root


BATCHES = st.lists(
    st.dictionaries(st.integers(0, 60), st.one_of(st.just(-1), st.integers(0, 9)), max_size=30),
    max_size=6,
)


@given(BATCHES)
@settings(max_examples=150, deadline=None)
def test_history_leaves_no_trace(batches: list[dict[int, int]]) -> None:
    disk, contents = Disk(), dict[bytes, bytes]()
    for batch in batches:
        changes = {key_of(k): b"" if v < 0 else value_of(v) for k, v in batch.items()}
        contents |= changes
        contents = {key: value for key, value in contents.items() if value}
        disk.update(changes)
        fresh = Disk()
        fresh.update(contents)
        assert disk.tree.root == fresh.tree.root
        assert disk.stored == fresh.stored


@given(st.permutations(range(20)))
@settings(max_examples=30, deadline=None)
def test_one_by_one_in_any_order_equals_all_at_once(order: list[int]) -> None:
    together, single = Disk(), Disk()
    root = together.update({key_of(n): value_of(n) for n in range(20)})
    for n in order:
        single.update({key_of(n): value_of(n)})
    assert (single.tree.root, single.stored) == (root, together.stored)


@given(st.sets(st.integers(0, 60)), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_proofs_show_presence_and_absence(present: set[int], asked: int) -> None:
    disk = Disk()
    root = disk.update({key_of(n): value_of(n) for n in present})
    proof = disk.tree.prove(key_of(asked))
    assert decode(TreeProof, encode(proof), 1 << 14) == proof
    value = value_of(asked) if asked in present else b""
    assert verify_proof(root, key_of(asked), value, proof)
    assert not verify_proof(root, key_of(asked), value_of(asked + 100), proof)
    assert not verify_proof(root, key_of(asked), b"" if value else value_of(asked), proof)
    assert not verify_proof(bytes(31) + b"x", key_of(asked), value, proof)


@given(st.sets(st.integers(0, 60), min_size=2), st.data())
@settings(max_examples=100, deadline=None)
def test_a_proof_shows_nothing_about_another_key(present: set[int], data: st.DataObject) -> None:
    disk = Disk()
    root = disk.update({key_of(n): value_of(n) for n in present})
    held, other = data.draw(st.permutations(sorted(present)))[:2]
    proof = disk.tree.prove(key_of(held))
    assert not verify_proof(root, key_of(other), b"", proof)
    assert not verify_proof(root, key_of(other), value_of(other), proof)


@given(st.binary(max_size=70), st.lists(st.binary(max_size=33), max_size=9))
def test_hostile_proofs_are_refused_without_raising(leaf: bytes, siblings: list[bytes]) -> None:
    disk = Disk()
    root = disk.update({key_of(1): value_of(1)})
    assert not verify_proof(root, key_of(2), value_of(2), TreeProof(leaf, tuple(siblings)))


def test_two_keys_that_differ_in_the_last_nibble() -> None:
    disk, a, b = Disk(), bytes(31) + b"\x10", bytes(31) + b"\x11"
    root = disk.update({a: value_of(1), b: value_of(2)})
    assert verify_proof(root, a, value_of(1), disk.tree.prove(a))
    assert verify_proof(root, b, value_of(2), disk.tree.prove(b))
    disk.update({b: b""})
    assert len(disk.stored) == 1


def test_emptied_it_is_as_new() -> None:
    disk = Disk()
    disk.update({key_of(n): value_of(n) for n in range(30)})
    assert disk.update({key_of(n): b"" for n in range(30)}) == ZERO_HASH
    assert disk.stored == {}


def test_updates_before_a_commit_build_on_each_other() -> None:
    tree, disk = Tree({}.get), Disk()
    tree.update([(key_of(1), value_of(1))])
    tree.update([(key_of(2), value_of(2))])
    assert tree.root == disk.update({key_of(1): value_of(1), key_of(2): value_of(2)})


@pytest.mark.parametrize(
    "items",
    [
        [(key_of(1), b"x")],
        [(b"short", value_of(1))],
        [(b"\x02" * 32, value_of(1)), (b"\x01" * 32, value_of(1))],
        [(b"\x02" * 32, value_of(1)), (b"\x02" * 32, value_of(1))],
    ],
    ids=["short value", "short key", "descending", "twice"],
)
def test_ill_formed_updates_are_refused(items: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(ValueError, match="key"):
        Tree({}.get).update(items)


@pytest.mark.parametrize("page", [b"", b"junk", encode([b""] * 15), encode([b"x"] * 16)])
def test_a_corrupt_page_stops(page: bytes) -> None:
    with pytest.raises(InvariantViolation, match="state page root is corrupt"):
        Tree({b"": page}.get).update([(key_of(1), value_of(1))])
