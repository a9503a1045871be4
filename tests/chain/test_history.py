"""The mountain range against the plain list tree, and a range that begins in the middle."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain import history, merkle
from tdmld.chain.codec import ZERO_HASH

LEAVES = [bytes([n]) * 64 for n in range(80)]


def held(
    count: int, start: int = 0, known: dict[tuple[int, int], bytes] | None = None
) -> history.Get:
    nodes = dict(known or {})
    get = lambda level, index: nodes.get((level, index))  # noqa: E731
    for number in range(start, count):
        for level, index, node in history.append(get, number, LEAVES[number]):
            nodes[level, index] = node
    return get


def test_an_empty_history_has_the_zero_root() -> None:
    assert history.root(held(0), 0) == ZERO_HASH == history.outcomes_root([])


@given(st.integers(1, 80), st.data())
@settings(max_examples=200, deadline=None)
def test_root_and_proofs_are_those_of_the_list_tree(count: int, data: st.DataObject) -> None:
    """Over any earlier count, too: complete nodes do not change."""
    get = held(80)
    index = data.draw(st.integers(0, count - 1))
    root = history.root(get, count)
    assert root == merkle.root(LEAVES[:count])
    found = history.proof(get, count, index)
    assert found == merkle.proof(LEAVES[:count], index)
    assert merkle.verify_proof(root, LEAVES[index], index, count, found)


@given(st.integers(1, 79), st.data())
@settings(max_examples=100, deadline=None)
def test_a_range_goes_on_from_its_peaks_alone(start: int, data: st.DataObject) -> None:
    whole = held(80)
    known = {}
    for level, index in history.peaks(start):
        node = whole(level, index)
        assert node is not None
        known[level, index] = node
    get = held(80, start, known)
    count = data.draw(st.integers(start, 80))
    assert history.root(get, count) == merkle.root(LEAVES[:count])
    later = data.draw(st.integers(start, 79))
    assert history.proof(get, 80, later) == merkle.proof(LEAVES, later)


def test_what_was_never_held_says_so() -> None:
    known = {(6, 0): bytes(32)}
    get = held(80, 64, known)
    with pytest.raises(history.NotHeld):
        history.proof(get, 80, 3)
    with pytest.raises(IndexError):
        history.proof(get, 80, 80)
