"""Five real validator processes: one is away, loses its turns, comes back and leads again."""

from pathlib import Path

import pytest
import trio

from tdmld.chain.transactions import Transfer
from tests.node.test_chain_live import OWNERS, Network, NodeProcess, make_genesis, network

pytestmark = pytest.mark.e2e

EPOCH = 20
"""Blocks: an absent leader of five misses four or five turns in it."""


async def seats(node: NodeProcess) -> dict[str, tuple[bool, int]]:
    """Whether it leads in the present epoch, and since when it is jailed, by node."""
    return {name: (leads, jailed) for name, leads, jailed in await node.ask("seats")}


async def reach(net: Network, node: NodeProcess, height: int) -> int:
    """Wait for a height; the one that is there then."""
    (row,) = await net.until("height", lambda rows: rows[0]["height"] >= height, [node])
    found: int = row["height"]
    return found


async def test_an_absent_leader_is_jailed_costs_nothing_more_returns_and_leads_again(
    tmp_path: Path,
) -> None:
    """JAIL-1 to JAIL-4 and N9 between processes."""
    # A busy machine must not cost a view; a leader whose link broke does so soon.
    patient = {"view_timeout_ms": 10_000, "leader_away_ms": 50}
    genesis = make_genesis(interval_ms=20, epoch_blocks=EPOCH, **patient)
    async with network(tmp_path, 110, genesis) as net:
        victim, others = net.nodes[4], net.nodes[:4]
        watcher, away, stop = net.nodes[0], victim.key.address, trio.Event()

        async def load() -> None:
            """Blocks are made on demand: epochs need some."""
            while not stop.is_set():
                await net.do(net.nodes[1], 1, Transfer(OWNERS[0].public, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await reach(net, watcher, 3)
            victim.kill()
            await victim.process.wait()

            height, found = 3, await seats(watcher)
            while found[away][0]:  # at the end of one epoch jailed, not leading two later
                height = await reach(net, watcher, height + 1)
                found = await seats(watcher)
            assert found[away][1] % EPOCH == 0
            assert all(
                leads and not jailed for node, (leads, jailed) in found.items() if node != away
            )
            height = await reach(net, watcher, height + EPOCH)
            passed = [
                count for count, _ in (await watcher.ask("headers", height - EPOCH + 1))[:EPOCH]
            ]
            assert passed == [0] * EPOCH, "no view is lost to it"

            await net.restart(victim)
            back = height
            while (await seats(watcher))[away] != (True, 0):
                back = await reach(net, watcher, back + 1)
            proposers: list[str] = []
            while away not in proposers:
                after = await reach(net, watcher, back + 1)
                proposers = [node for _, node in await watcher.ask("headers", back)]
                back = after
            stop.set()
        rows = await net.agree(net.nodes)
        assert len({row["root"] for row in rows}) == 1
        assert "returning" in victim.complaints()
        for node in others:
            assert "returning" not in node.complaints()
        assert not any("signed twice" in node.complaints() for node in net.nodes)
