"""Two ledgers, one written as the node, one from docs/spec/chain.md alone, never disagree.

The second one (tests/chain/second) replays the conformance vectors, then lives beside the first
through jobs with any actors. A rule that is changed in the code must be changed on the page and
there: whoever only has the page is the third.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain.genesis import genesis_document
from tdmld.chain.ledger import BlockResult
from tests.chain.second.executor import Executor
from tests.chain.second.records import Place
from tests.chain.test_supply import NODES, PARAMETERS, noise, shaped, shapes, vices
from tests.chain.test_vectors import ledger_cases, unhex
from tests.chain.world import World, make_genesis, node_key, owner_key


@pytest.mark.parametrize(("document", "group", "case"), ledger_cases())
def test_vectors(document: dict[str, Any], group: dict[str, Any], case: dict[str, Any]) -> None:
    state, at = unhex(group["pre"]), case["context"]
    second = Executor(document, bytes.fromhex(group["chain_id"]), state)
    place = Place(
        at["height"],
        at["view"],
        at["parent_view"],
        at["time_ms"],
        bytes.fromhex(at["beacon"]),
    )
    found = second.block(place, [bytes.fromhex(raw) for raw in case["transactions"]])
    assert found == [receipt["ok"] for receipt in case["receipts"]]
    for key, value in case["changes"].items():
        state.pop(bytes.fromhex(key), None)
        if value is not None:
            state[bytes.fromhex(key)] = bytes.fromhex(value)
    assert second.state == state


class Pair(World):
    """A world that two ledgers execute."""

    def __init__(self, nodes: int, seed: int, **parameters: int) -> None:
        super().__init__(make_genesis(nodes, **parameters), seed)
        self.second = Executor(genesis_document(self.genesis), self.chain_id, self.store)

    def block(self, *raws: bytes, tainted: bool = False, passed: int = 0) -> BlockResult:
        before = self.view
        result = super().block(*raws, tainted=tainted, passed=passed)
        at = Place(self.height, self.view, before, self.height * 500, self.beacon)
        found = self.second.block(at, list(raws))
        assert found == [receipt.ok for receipt in result.receipts]
        assert self.second.state == self.store, f"height {self.height}"
        return result


@settings(max_examples=40, deadline=None)
@given(shape=shapes, who=vices, taints=st.sets(st.integers(0, 60)), data=st.data())
def test_any_job(
    shape: dict[str, int], who: dict[int, frozenset[Any]], taints: set[int], data: st.DataObject
) -> None:
    world = Pair(NODES, data.draw(st.integers(0, 999)), **PARAMETERS)
    capacity = data.draw(st.sampled_from([0, 1, 4]))
    world.block(*(world.ask(index, audit_capacity=capacity) for index in range(NODES)))
    world.bad_segment = data.draw(st.integers(0, 3))
    if data.draw(st.booleans()):
        shape = {**shape, "deadline": world.height + data.draw(st.integers(2, 60))}
    job = world.do(owner_key(0), world.offer(**shaped(shape)))
    world.vices = {node_key(index).public: found for index, found in who.items()}
    for turn in range(400):
        if world.job(job).final:
            break
        if data.draw(st.integers(0, 9)) == 0:
            world.block(noise(world, job, data))
        world.play(job, tainted=turn in taints)
