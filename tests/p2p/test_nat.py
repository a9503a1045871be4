"""Hosts behind routers that translate addresses, in network namespaces."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import trio

from tests.p2p.netns import Internet, forbidden, internet, root

_REASON = forbidden()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_REASON is not None, reason=f"no network namespaces: {_REASON}"),
]

RELAY, OTHER_RELAY = "203.0.113.10", "203.0.113.11"
QUOTA = (1 << 20, 8 << 20)
"""Bytes a second and in all for each circuit."""
CANARY = "canary-that-no-relay-may-see"


class Node:
    """A host process in a namespace."""

    def __init__(self, process: "subprocess.Popen[str]", listen: str) -> None:
        self.process = process
        self.listen = listen
        self.peer_id = ""

    async def started(self) -> None:
        self.peer_id = await self._answer()

    async def ask(self, *order: object, seconds: float = 30.0) -> Any:
        """The answer to an order; AssertionError when it failed."""
        answer = await self.try_to(*order, seconds=seconds)
        assert "ok" in answer, answer
        return answer["ok"]

    async def try_to(self, *order: object, seconds: float = 30.0) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        with trio.fail_after(seconds):
            return await self._answer()

    async def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = await trio.to_thread.run_sync(self.process.stdout.readline, abandon_on_cancel=True)
        assert line, "the node ended"
        return json.loads(line)

    async def reserves(self, *relays: "Node") -> list[str]:
        """Use these relays; the relayed addresses through the first two, which are as many as are
        used."""
        await self.ask("relays", [[relay.peer_id, [relay.listen]] for relay in relays])
        return await self.relayed_addresses(*relays[:2])

    async def relayed_addresses(self, *relays: "Node") -> list[str]:
        """The relayed addresses once they are through these relays and no others."""
        wanted = {relay.peer_id for relay in relays}
        with trio.fail_after(30):
            while True:
                found = [a for a in await self.ask("addresses") if a.endswith("/p2p-circuit")]
                if {address.split("/")[-2] for address in found} == wanted:
                    return found
                await trio.sleep(0.1)

    async def path_to(self, other: "Node", path: str) -> None:
        """Wait until the connection goes this way."""
        with trio.fail_after(30):
            while await self.ask("path", other.peer_id) != path:  # noqa: ASYNC110 (polled)
                await trio.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Nodes:
    def __init__(self, net: Internet, stack: ExitStack) -> None:
        self.net = net
        self._stack = stack
        self._count = 0

    def start(self, name: str, listen: str, *quota: int) -> Node:
        self._count += 1
        process = self.net.popen(
            name,
            [sys.executable, "-m", "tests.p2p.natnode", str(self._count), listen, *map(str, quota)],
            cwd=root(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return Node(process, listen)

    def relay(self, address: str = RELAY, quota: tuple[int, int] = QUOTA) -> Node:
        self.net.public(address, address)
        return self.start(address, f"/ip4/{address}/tcp/4001", *quota)


@contextmanager
def nodes() -> Iterator[Nodes]:
    with internet() as net, ExitStack() as stack:
        yield Nodes(net, stack)


def homes(net: Internet, *, random_ports: bool = False) -> None:
    """Two homes, "a" and "b", each a router with one host; the second one's may be hard."""
    net.router("router-a", "203.0.113.2", "10.0.1")
    net.behind("router-a", "a", "10.0.1.2")
    net.router("router-b", "203.0.113.3", "10.0.2", random_ports=random_ports)
    net.behind("router-b", "b", "10.0.2.2")


ANY = "/ip4/0.0.0.0/tcp/4001"


async def test_a_hole_is_punched_through_two_routers_and_bytes_flow_past_the_relays_quota():
    with nodes() as world:
        homes(world.net)
        relay, a, b = world.relay(), world.start("a", ANY), world.start("b", ANY)
        for node in (relay, a, b):
            await node.started()
        addresses = await b.reserves(relay)
        await a.reserves(relay)
        assert addresses == [f"{relay.listen}/p2p/{relay.peer_id}/p2p-circuit"]
        await a.ask("keep", b.peer_id, addresses)
        await a.path_to(b, "direct")
        await b.path_to(a, "direct")
        sent = await a.ask("send", b.peer_id, 4 * QUOTA[1], CANARY)
        assert sent["arrived"] == 4 * QUOTA[1]
        assert sent["arrived"] / sent["seconds"] > 4 * QUOTA[0]


async def test_behind_a_router_with_unforeseeable_ports_the_relayed_path_stays():
    with nodes() as world:
        homes(world.net, random_ports=True)
        world.net.router("router-c", "203.0.113.4", "10.0.3", random_ports=True)
        world.net.behind("router-c", "c", "10.0.3.2")
        relay, b, c = world.relay(), world.start("b", ANY), world.start("c", ANY)
        for node in (relay, b, c):
            await node.started()
        addresses = await b.reserves(relay)
        await c.reserves(relay)
        await c.ask("keep", b.peer_id, addresses)
        await c.path_to(b, "relayed")
        assert not await c.ask("direct", b.peer_id, 25.0)
        assert await c.ask("path", b.peer_id) == "relayed"
        sent = await c.ask("send", b.peer_id, 1 << 20, CANARY)
        assert sent["arrived"] == 1 << 20


async def test_two_hosts_behind_one_router_connect_inside_its_network():
    with nodes() as world:
        world.net.router("router-a", "203.0.113.2", "10.0.1")
        world.net.behind("router-a", "a", "10.0.1.2")
        world.net.behind("router-a", "b", "10.0.1.3")
        relay, a, b = world.relay(), world.start("a", ANY), world.start("b", ANY)
        for node in (relay, a, b):
            await node.started()
        addresses = await b.reserves(relay)
        await a.reserves(relay)
        await a.ask("keep", b.peer_id, addresses)
        await a.path_to(b, "direct")
        sent = await a.ask("send", b.peer_id, 4 * QUOTA[1], CANARY)
        assert sent["arrived"] == 4 * QUOTA[1]


async def test_who_can_be_dialled_is_dialled_by_a_host_behind_a_hard_router():
    with nodes() as world:
        homes(world.net, random_ports=True)
        world.net.public("open", "203.0.113.20")
        relay, hard, easy = world.relay(), world.start("b", ANY), world.start("open", ANY)
        for node in (relay, hard, easy):
            await node.started()
        await easy.ask("keep", hard.peer_id, await hard.reserves(relay))
        await easy.path_to(hard, "direct")


async def test_a_circuit_ends_at_its_quota_and_is_no_faster_than_it():
    with nodes() as world:
        homes(world.net, random_ports=True)
        # Without a listening port nobody punches.
        relay, a, b = world.relay(), world.start("a", ""), world.start("b", "")
        for node in (relay, a, b):
            await node.started()
        await a.ask("keep", b.peer_id, await b.reserves(relay))
        await a.path_to(b, "relayed")
        sent = await a.ask("send", b.peer_id, 3 << 20, CANARY)
        assert sent["arrived"] == 3 << 20
        assert sent["seconds"] > 2.5
        refused = await a.try_to("send", b.peer_id, 2 * QUOTA[1], CANARY, seconds=40)
        assert "StreamBroken" in refused["error"]


async def test_a_firewall_without_an_open_port_is_no_obstacle():
    with nodes() as world:
        world.net.public("fenced", "203.0.113.20", firewall=True)
        world.net.router("router-a", "203.0.113.2", "10.0.1")
        world.net.behind("router-a", "a", "10.0.1.2")
        listen = "/ip4/203.0.113.20/tcp/4001"
        relay, a, fenced = world.relay(), world.start("a", ANY), world.start("fenced", listen)
        for node in (relay, a, fenced):
            await node.started()
        await a.reserves(relay)
        addresses = [listen, *await fenced.reserves(relay)]
        await a.ask("keep", fenced.peer_id, addresses)
        await a.path_to(fenced, "direct")
        sent = await a.ask("send", fenced.peer_id, 4 * QUOTA[1], CANARY)
        assert sent["arrived"] == 4 * QUOTA[1]


async def test_another_relay_is_used_when_one_dies():
    with nodes() as world:
        homes(world.net)
        relay, spare = world.relay(), world.relay(OTHER_RELAY)
        third = world.relay("203.0.113.12")
        a, b = world.start("a", ""), world.start("b", "")
        for node in (relay, spare, third, a, b):
            await node.started()
        before = await b.reserves(relay, spare, third)
        await a.ask("keep", b.peer_id, before)
        await a.path_to(b, "relayed")
        relay.kill()
        after = await b.relayed_addresses(spare, third)
        await a.ask("keep", b.peer_id, after)
        await a.path_to(b, "relayed")
        sent = await a.ask("send", b.peer_id, 1 << 20, CANARY)
        assert sent["arrived"] == 1 << 20
