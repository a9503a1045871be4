"""Dial receipts and the direct path that neighbours need (ASK-6, ASK-7, MATCH-3)."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from tdmld.chain import limits
from tdmld.chain.errors import DecodeError
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import (
    DIAL_OPEN,
    DIAL_PAIR,
    DialReceipt,
    decode_transaction,
    sign_receipt,
)
from tests.chain.world import World, make_genesis, mark, node_key

HEIGHT = 3


def behind_routers(dial_receipts: int = 2) -> World:
    world = World(make_genesis(nodes=7, dial_receipts=dial_receipts))
    world.wait(HEIGHT)
    return world


def told(
    world: World, node: int, witness: int, kind: int = DIAL_OPEN, height: int = HEIGHT
) -> DialReceipt:
    """What `witness` says of `node`."""
    session, key = mark("session", node), node_key(node).public
    return sign_receipt(node_key(witness), world.chain_id, key, session, kind, height)


def in_order(*receipts: DialReceipt) -> tuple[DialReceipt, ...]:
    return tuple(sorted(receipts, key=lambda receipt: (receipt.kind, receipt.witness)))


def matched(world: World) -> list[int] | None:
    """Who works, by slot; None when the job was not matched."""
    job_id = world.submit()
    world.wait(world.parameters.match_delay)
    job = world.job(job_id)
    if job.status is not JobStatus.MATCHED:
        assert "fits" in job.detail
        return None
    names = {node_key(i).public: i for i in range(7)}
    slots = [world.state.slot(job_id, slot) for slot in range(job.slots)]
    return [names[slot.worker.node] for slot in slots if slot is not None]


def ask(world: World, *open_nodes: int, pairs: Sequence[tuple[int, int]] = ()) -> None:
    """Everybody asks; `open_nodes` were dialled by two, `pairs` are (asking node, its witness)."""
    asks = []
    for node in range(1, 7):
        witnesses = [n for n in range(1, 7) if n != node][:2] if node in open_nodes else []
        receipts = [told(world, node, witness) for witness in witnesses]
        receipts += [told(world, a, b, DIAL_PAIR) for a, b in pairs if a == node]
        asks.append(world.ask(node, price=100 * node, receipts=in_order(*receipts)))
    assert all(receipt.ok for receipt in world.block(*asks).receipts)


def test_of_an_asks_receipts_stay_how_many_owners_and_which_nodes() -> None:
    world = behind_routers()
    receipts = in_order(
        told(world, 1, 2), told(world, 1, 3), told(world, 1, 3, DIAL_PAIR), told(world, 1, 4)
    )
    world.block(world.ask(1, receipts=receipts))
    standing = world.state.ask(node_key(1).public)
    assert standing is not None
    assert (standing.open, standing.paths) == (3, (node_key(3).public,))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"witness": node_key(1).public}, "another owner"),
        ({"witness": node_key(15).public}, "registered"),
        ({"height": HEIGHT + 2}, "not of this chain's past"),
        ({"height": HEIGHT - 1}, "did not sign"),
        ({"kind": DIAL_PAIR}, "did not sign"),
        ({"witness": node_key(3).public}, "did not sign"),
    ],
)
def test_a_receipt_that_proves_nothing_is_refused(changes: dict[str, object], rule: str) -> None:
    world = behind_routers()
    forged = replace(told(world, 1, 2), **changes)
    (receipt,) = world.block(world.ask(1, receipts=(forged,))).receipts
    assert not receipt.ok
    assert rule in receipt.reason


def test_receipts_are_of_this_node_and_this_carrier() -> None:
    world = behind_routers()
    for taken in (
        world.ask(1, receipts=(told(world, 5, 2),)),
        world.ask(1, session=mark("new carrier"), receipts=(told(world, 1, 2),)),
    ):
        (receipt,) = world.block(taken).receipts
        assert "did not sign" in receipt.reason


def test_receipts_are_sorted_and_of_each_witness_one_of_a_kind() -> None:
    world = behind_routers()
    first, second = in_order(told(world, 1, 2), told(world, 1, 3))
    for wrong in ((second, first), (first, first)):
        (receipt,) = world.block(world.ask(1, receipts=wrong)).receipts
        assert "sorted" in receipt.reason


def test_receipts_age_with_an_epoch() -> None:
    world = behind_routers()
    taken = world.ask(1, receipts=(told(world, 1, 2),), until_height=1000)
    world.wait(HEIGHT + world.parameters.epoch_blocks - world.height)
    (receipt,) = world.block(taken).receipts
    assert "older than an epoch" in receipt.reason


def test_an_ask_has_few_receipts() -> None:
    world = behind_routers()
    many = in_order(*(told(world, 1, n % 7, 1 + n // 7) for n in range(14) if n % 7 != 1))
    assert len(many) > limits.RECEIPTS
    with pytest.raises(DecodeError, match="length <= 8"):
        decode_transaction(world.ask(1, receipts=many), world.chain_id)


def test_where_no_receipts_are_asked_everybody_is_open() -> None:
    world = behind_routers(0)
    ask(world)
    assert matched(world) == [1, 2]


def test_of_two_neighbours_one_must_be_open() -> None:
    world = behind_routers()
    ask(world)
    assert matched(world) is None
    for opened, workers in ((1, [1, 2]), (4, [1, 4])):
        world = behind_routers()
        ask(world, opened)
        assert matched(world) == workers


def test_one_owner_alone_cannot_vouch() -> None:
    world = behind_routers()
    world.block(world.ask(1, receipts=(told(world, 1, 2),)), *(world.ask(n) for n in range(2, 7)))
    assert matched(world) is None


@pytest.mark.parametrize("pair", [(1, 3), (3, 1)])
def test_or_both_are_connected_already_whoever_says_so(pair: tuple[int, int]) -> None:
    world = behind_routers()
    ask(world, pairs=[pair])
    assert matched(world) == [1, 3]
