"""Peers that come and go leave nothing behind: the library keeps a task and 16 KB of each time."""

import gc
import sys

import pytest
import trio

from tdmld.p2p import Host, Limits, open_host
from tests.p2p.support import connected_pair, count_tasks, info, says_hello, until
from tests.p2p.test_gossip import TOPIC, accept, known

BLOCKS = 40
"""Allocations a cycle: a hundredth of what the library leaves."""


async def reconnect(a: Host, b: Host, cycles: int) -> None:
    for _ in range(cycles):
        await b.disconnect(a.peer_id)
        await until(lambda: not a.connected() and not b.connected())
        assert await says_hello(a, b.peer_id)
        await until(lambda: known(a) == known(b) == 1)


def allocated() -> int:
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.parametrize("cycles", [20, pytest.param(200, marks=pytest.mark.slow)])
async def test_tasks_and_memory_are_flat_over_reconnects(cycles: int):
    async with connected_pair(gossip=True) as (a, b):
        for host in (a, b):
            await host.subscribe(TOPIC, limit=1000, validate=accept)
        await reconnect(a, b, 10)
        tasks, blocks = count_tasks(), allocated()
        await reconnect(a, b, cycles)
        await until(lambda: count_tasks() <= tasks)
        assert allocated() - blocks < BLOCKS * cycles


async def test_a_peer_that_came_once_leaves_little():
    """Its counters and scores, of 4096 such peers at most; its gossip, for a while."""

    async def visit(number: int) -> None:
        async with open_host(number.to_bytes(32, "big"), limits=Limits(shutdown_seconds=0.5)) as v:
            await v.subscribe(TOPIC, limit=1000, validate=accept)
            v.add_peer(info(host))
            await until(lambda: known(host) == 1)
        await until(lambda: not host.connected())

    async with open_host(bytes(32)) as host:
        await host.subscribe(TOPIC, limit=1000, validate=accept)
        for number in range(1, 6):
            await visit(number)
        tasks, blocks = count_tasks(), allocated()
        for number in range(6, 16):
            await visit(number)
        await until(lambda: count_tasks() <= tasks)
        assert allocated() - blocks < 10 * 500
        gossip = host._gossip
        router, pubsub = gossip._router, gossip._pubsub
        for table in (pubsub.peers, pubsub.peer_queues, router.peer_protocol, router.back_off):
            assert not any(table.values()) if table is router.back_off else not table


async def test_two_minutes_of_gossip_leave_no_trace():
    """The library notes the time of each message for ever."""
    async with connected_pair(gossip=True, limits=Limits(gossip_per_second=400)) as (a, b):
        for host in (a, b):
            await host.subscribe(TOPIC, limit=1000, validate=accept)
        await until(lambda: known(a) == known(b) == 1)
        for number in range(100):
            await a.publish(TOPIC, b"%d" % number)
        await until(lambda: len(b._gossip.recent) == 100)
        with trio.fail_after(10):
            while len(a._gossip._router.mcache.msgs):  # noqa: ASYNC110 (heartbeats empty it)
                await trio.sleep(0.1)
        for host in (a, b):
            router = host._gossip._router
            assert not router.recent_message_deliveries
            assert not router.equivocation_detection
            assert not host._gossip._pubsub.ages
