"""The digests of annex A6."""

from types import SimpleNamespace
from typing import Any, cast

from blake3 import blake3

from tdmld.train import digest
from tdmld.train.digest import Leaf, list_root, merkle_root, state_root, step_leaf


def h(data: bytes) -> bytes:
    return blake3(data).digest()


def test_merkle_tree_moves_an_odd_node_up() -> None:
    a, b, c = (h(b"\0" + leaf) for leaf in (b"a", b"b", b"c"))
    assert merkle_root([]) == bytes(32)
    assert merkle_root([b"a"]) == a
    assert merkle_root([b"a", b"b", b"c"]) == h(b"\1" + h(b"\1" + a + b) + c)


def test_every_part_of_a_step_counts() -> None:
    base: tuple[Any, ...] = (3, [h(b"1"), h(b"2")], h(b"d"), h(b"g"), 7)
    leaves = {step_leaf(*base)}
    for at, other in enumerate((4, [h(b"2"), h(b"1")], h(b"x"), h(b"x"), 8)):
        changed = list(base)
        changed[at] = other
        leaves.add(step_leaf(*changed))
    assert len(leaves) == 6


def test_the_chain_computes_the_same_list_root() -> None:
    from tdmld.chain import segments

    start, end = (h(b"1"), h(b"2")), (h(b"3"), h(b"4"))
    links = {"down": (h(b"5"), h(b"6")), "up": (h(b"7"), h(b"8"))}
    for present in ({}, {"down": links["down"]}, {"up": links["up"]}, links):
        segment = SimpleNamespace(
            start_shared=start[0],
            start_lane=start[1],
            end_shared=end[0],
            end_lane=end[1],
            links=[
                SimpleNamespace(link=link, sent=present[link][0], received=present[link][1])
                for link in ("up", "down")
                if link in present
            ],
            contribution=b"",
        )
        job = SimpleNamespace(id=h(b"job"), lane_of=lambda slot: 1, stage_of=lambda slot: 2)
        theirs = segments.audit_list_root(cast(Any, job), 5, 9, cast(Any, segment), h(b"steps"))
        assert theirs == list_root(
            h(b"job"), 1, 2, 9, start=start, end=end, links=present, steps=h(b"steps")
        )


def test_a_state_root_depends_on_names_shapes_and_parts_not_on_order() -> None:
    leaf = Leaf("w", "shared", "F32", (2, 3), h(b"x"))
    other = Leaf("v", "shared", "F32", (6,), h(b"x"))
    assert state_root([leaf, other]) == state_root([other, leaf])
    changed = [
        Leaf("u", "shared", "F32", (2, 3), h(b"x")),
        Leaf("w", "lane", "F32", (2, 3), h(b"x")),
        Leaf("w", "shared", "BF16", (2, 3), h(b"x")),
        Leaf("w", "shared", "F32", (3, 2), h(b"x")),
        Leaf("w", "shared", "F32", (2, 3), h(b"y")),
    ]
    assert len({state_root([one]) for one in [leaf, *changed]}) == 6


def test_link_roots_bind_numbers_to_digests() -> None:
    assert digest.link_root([(0, h(b"a"))]) != digest.link_root([(1, h(b"a"))])
