"""Five real validators, one of which signs twice: the evidence of the others lands on the chain."""

from pathlib import Path

import pytest
import trio

from tdmld.chain.transactions import Nominate, Transfer
from tests.node.test_chain_live import (
    NODES,
    OWNERS,
    START,
    Network,
    make_genesis,
    network,
)

pytestmark = pytest.mark.e2e

BAD, STAKE = 4, 104
FEE, TWENTIETH = 10, 20


async def test_who_votes_twice_pays_leaves_and_is_not_missed(tmp_path: Path) -> None:
    """SLASH-1 to SLASH-3, end to end."""
    genesis = make_genesis(interval_ms=20, epoch_blocks=10)
    async with network(tmp_path, 90, genesis) as net:
        honest, bad = net.nodes[:BAD], net.nodes[BAD]
        key, owner = NODES[BAD], OWNERS[BAD]
        stop = trio.Event()

        async def load() -> None:
            """Blocks are made on demand: epochs need some."""
            while not stop.is_set():
                await net.do(honest[1], 1, Transfer(OWNERS[0].public, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await bad.ask("vote_twice")
            await net.until(
                "left",
                lambda rows: all(key.address not in row["validators"] for row in rows),
                honest,
            )
            bad.kill()
            after = (await honest[0].ask("status"))["height"] + 20
            await net.until("goes on", lambda rows: min(r["height"] for r in rows) > after, honest)
            stop.set()
        rows = await net.agree(honest)
        assert len({row["root"] for row in rows}) == 1
        assert sorted(rows[0]["validators"]) == sorted(node.address for node in NODES[:BAD])
        (found,) = await everywhere(net, owner.address)
        assert {one["node"] for one in found["offences"]} == {key.address}
        epochs = [one["epoch"] for one in found["offences"]]
        assert epochs == sorted(set(epochs)), "once an epoch"
        stake = STAKE
        for one in found["offences"]:
            assert int(one["burned"]) == -(-stake // TWENTIETH)
            stake -= int(one["burned"])
        assert int(found["vote_stake"]) == stake < STAKE
        (others,) = await everywhere(net, OWNERS[0].address)
        assert others["offences"] == []

        with pytest.raises(RuntimeError, match="voted twice"):
            await honest[0].ask("submit", net.sign(BAD, Nominate(key.public)))
        fees = net.nonces[1] * FEE
        assert await honest[0].ask("burned") == fees + STAKE - stake
        assert await honest[0].ask("balance", owner.address) == START


async def test_a_leader_that_shows_two_blocks_pays_too(tmp_path: Path) -> None:
    """N8: half of the others see one of its blocks, half the other; they compare."""
    async with network(tmp_path, 60, make_genesis(interval_ms=20)) as net:
        honest, bad = net.nodes[:BAD], net.nodes[BAD]
        await bad.ask("lead_twice")
        offences: object = []
        while not offences:
            await net.do(honest[1], 1, Transfer(OWNERS[0].public, 1))
            (found, *_) = await everywhere(net, OWNERS[BAD].address)
            offences = found["offences"]
        await net.agree(honest)
        (found,) = await everywhere(net, OWNERS[BAD].address)
        assert found["vote_stake"] == str(STAKE - -(-STAKE // TWENTIETH))


async def everywhere(net: Network, owner: str) -> list[dict[str, object]]:
    """What the honest say of a stake, without duplicates."""
    told = [await node.ask("stake", owner) for node in net.nodes[:BAD]]
    return [one for number, one in enumerate(told) if one not in told[:number]]
