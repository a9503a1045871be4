"""When a node asks for work, and what it says of how it can be reached."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import address
from tdmld.chain.market import ask_pause
from tdmld.chain.transactions import DIAL_OPEN, DIAL_PAIR, Ask, DialReceipt, sign_receipt
from tdmld.node.agent import Agent, AskPolicy
from tests.chain.world import GIB, World, make_genesis, node_key
from tests.node.fake_chain import FakeChain, FakeWitnesses, session_of

POLICY = AskPolicy("cpu", GIB, 1000, 1, 1)


class Asker:
    """Node 1 and its agent; what it asks stands in the next block."""

    def __init__(self, tmp_path: Path, witnessed: FakeWitnesses) -> None:
        self.world = World(make_genesis(dial_receipts=2))
        self.world.wait(3)
        self.chain, self.witnessed = FakeChain(self.world), witnessed
        (tmp_path / "jobs").mkdir()
        self.agent = Agent(
            key=node_key(1),
            chain_id=self.world.chain_id,
            chain=cast(Any, self.chain),
            machine=cast(Any, SimpleNamespace(session=address(session_of(1)))),
            book=cast(Any, None),
            data_dir=tmp_path,
            ask=POLICY,
            ask_blocks=900,
            witnessed=witnessed,
        )

    def told(self, witness: int, kind: int = DIAL_OPEN) -> DialReceipt:
        key, session = node_key(1).public, session_of(1)
        return sign_receipt(
            node_key(witness), self.world.chain_id, key, session, kind, self.world.height
        )

    async def look(self) -> list[Ask]:
        """What the agent asks now; it stands in a block afterwards."""
        self.chain.sent.clear()
        async with trio.open_nursery() as nursery:
            await self.agent._look(nursery)
        asks = [cast(Ask, payload) for payload in self.chain.sent]
        self.world.block(*(self.world.sign(node_key(1), ask) for ask in asks))
        return asks

    def wait(self) -> None:
        """Until another ask is allowed."""
        self.world.wait(ask_pause(self.world.parameters))


def in_order(*receipts: DialReceipt) -> tuple[DialReceipt, ...]:
    return tuple(sorted(receipts, key=lambda receipt: (receipt.kind, receipt.witness)))


@pytest.fixture
def asker(tmp_path: Path) -> Asker:
    return Asker(tmp_path, FakeWitnesses(settled=False))


async def test_the_first_ask_waits_for_what_is_on_its_way(asker: Asker) -> None:
    assert await asker.look() == []
    asker.witnessed.known = in_order(asker.told(2))
    assert await asker.look() == []
    asker.witnessed.known = in_order(asker.told(2), asker.told(3))
    (ask,) = await asker.look()
    assert ask.receipts == asker.witnessed.known
    assert await asker.look() == []


async def test_a_node_that_nobody_reaches_asks_all_the_same(asker: Asker) -> None:
    asker.witnessed.settled = True
    (ask,) = await asker.look()
    assert ask.receipts == ()


@pytest.mark.parametrize("kind", [DIAL_OPEN, DIAL_PAIR])
async def test_it_asks_again_when_it_is_open_or_connected_at_last(asker: Asker, kind: int) -> None:
    asker.witnessed.settled = True
    await asker.look()
    asker.wait()
    assert await asker.look() == []
    asker.witnessed.known = in_order(asker.told(2, kind), asker.told(3, kind))
    (ask,) = await asker.look()
    assert ask.receipts == asker.witnessed.known
    asker.wait()
    assert await asker.look() == []


async def test_not_because_one_more_owner_dialled_it(asker: Asker) -> None:
    asker.witnessed.settled = True
    await asker.look()
    asker.wait()
    asker.witnessed.known = in_order(asker.told(2))
    assert await asker.look() == []


async def test_a_renewal_after_a_restart_waits_for_receipts(asker: Asker) -> None:
    """One without them would stand for a part of an epoch, and undo what was proved."""
    asker.witnessed.known = in_order(asker.told(2), asker.told(3))
    await asker.look()
    asker.wait()
    asker.agent.ask_blocks = 10_000  # it is past its half
    asker.witnessed.known = ()
    assert await asker.look() == []
    asker.agent.ask_blocks = 900
    ask = asker.world.state.ask(node_key(1).public)
    assert ask is not None
    assert ask.open == 2


async def test_who_can_be_dialled_no_more_says_so(asker: Asker) -> None:
    """Or it would be matched as somebody's neighbour whom it cannot reach."""
    asker.witnessed.known = in_order(asker.told(2), asker.told(3))
    asker.witnessed.settled = True
    await asker.look()
    asker.wait()
    asker.witnessed.known = ()  # a lull, as after a restart of the others
    assert await asker.look() == []
    asker.witnessed.closed = True
    (ask,) = await asker.look()
    assert ask.receipts == ()
    asker.wait()
    assert await asker.look() == []
