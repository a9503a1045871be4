"""Blocks above the head: what is kept, what is found, what a faulty leader cannot fill."""

from tdmld.chain.blocks import Block, Header, block_hash
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.pending import MAX_BLOCKS, VARIANTS, BlockTree

HEAD = b"\x01" * 32


def block(height: int, view: int, parent: bytes = HEAD, variant: int = 0) -> Block:
    header = Header(
        1, height, view, view - 1, parent, variant, bytes(32), b"", ZERO_HASH, 0, *[ZERO_HASH] * 4
    )
    return Block(header, bytes(64), ())


def key(body: Block) -> bytes:
    return block_hash(body.header)


def test_a_path_leads_from_the_head_and_misses_what_is_not_there() -> None:
    tree = BlockTree(4, HEAD, 9)
    one = block(5, 10)
    two = block(6, 12, key(one))
    three = block(7, 13, key(two))
    assert tree.add(one)
    assert tree.add(three)
    assert tree.path(HEAD) == []
    assert tree.path(key(one)) == [one]
    assert tree.path(key(three)) is None
    assert tree.missing(key(three)) == key(two)
    assert tree.add(two)
    assert tree.path(key(three)) == [one, two, three]
    assert tree.missing(key(three)) is None
    assert not tree.add(two), "known"


def test_what_cannot_stand_above_the_head_is_not_kept_even_if_wanted() -> None:
    tree = BlockTree(4, HEAD, 9)
    assert not tree.add(block(4, 10), wanted=True)
    assert not tree.add(block(5, 9), wanted=True)
    assert tree.add(block(5, 10))


def test_finality_forgets_old_heights_and_old_views() -> None:
    tree = BlockTree(0, HEAD)
    final, beside, far = block(1, 5), block(1, 6), block(2**60, 4)
    above = block(2, 6, key(final), variant=1)
    for body in (final, beside, far, above):
        assert tree.add(body)
    tree.finalize(1, key(final), 5)
    assert tree.items() == [(key(above), above)]
    assert tree.path(key(above)) == [above]
    assert tree.add(block(2, 6, key(final), variant=2)), "one place of view 6 is free again"


def test_a_view_has_few_places_but_for_what_is_wanted() -> None:
    tree = BlockTree(0, HEAD)
    variants = [block(1, 1, variant=number) for number in range(VARIANTS + 2)]
    assert [tree.add(body) for body in variants[:-1]] == [True] * VARIANTS + [False]
    assert tree.add(variants[-1], wanted=True)


def test_a_full_tree_makes_room_where_views_failed() -> None:
    tree = BlockTree(0, HEAD)
    bodies = [block(1, view) for view in range(1, MAX_BLOCKS + 1)]
    for body in bodies:
        assert tree.add(body)
    late = block(1, MAX_BLOCKS + 1)
    assert not tree.add(late)
    tree.make_room(MAX_BLOCKS, {key(bodies[7])})
    assert tree.items() == [(key(body), body) for body in (bodies[7], bodies[-1])]
    assert tree.add(late)


def test_a_tree_with_room_forgets_nothing() -> None:
    tree = BlockTree(0, HEAD)
    tree.add(block(1, 1))
    tree.make_room(9, ())
    assert len(tree) == 1
