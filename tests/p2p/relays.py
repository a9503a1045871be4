"""Helpers of the tests of relays: hosts of which some relay and others can only be relayed to."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tdmld.p2p import CircuitQuota, Host, Limits, PeerInfo, RelayPolicy, open_host
from tests.p2p.support import ECHO, echo, info, seed, until

AMPLE = CircuitQuota(bytes=1 << 30, seconds=60.0, bytes_per_second=1 << 30)
OPEN = RelayPolicy(strangers=AMPLE, bytes_per_second=1 << 30, reservations_per_address=100)
"""For everybody: on one machine all hosts have one address."""


@asynccontextmanager
async def relayed_hosts(
    count: int,
    *policies: RelayPolicy,
    listen: tuple[str, ...] = (),
    relay_listen: str = "/ip4/127.0.0.1/tcp/0",
    limits: Limits | None = None,
    gossip: bool = False,
) -> AsyncIterator[tuple[list[Host], list[Host]]]:
    """Relays with these policies, and hosts that without `listen` nobody can dial; not connected
    yet."""
    async with AsyncExitStack() as stack:
        relays, hosts = [], []
        for number, policy in enumerate(policies):
            opened = open_host(seed(101 + number), (relay_listen,), gossip=False, relay=policy)
            relays.append(await stack.enter_async_context(opened))
        for number in range(1, count + 1):
            opened = open_host(seed(number), listen, gossip=gossip, limits=limits)
            host = await stack.enter_async_context(opened)
            host.set_handler(ECHO, echo)
            hosts.append(host)
        yield relays, hosts


async def reserve(host: Host, *relays: Host) -> PeerInfo:
    """Use these relays; where the host can be dialled through them, once it can."""
    host.set_relays([info(relay) for relay in relays])
    await until(lambda: bool(relayed_only(host).addresses))
    return relayed_only(host)


def relayed_only(host: Host) -> PeerInfo:
    return PeerInfo(host.peer_id, tuple(a for a in host.addresses if a.endswith("/p2p-circuit")))


def path(host: Host, other: Host) -> str | None:
    return next((p.path for p in host.peers() if p.peer_id == other.peer_id), None)


async def connect(host: Host, peer: PeerInfo) -> None:
    """Keep a peer and wait until it is here."""
    host.add_peer(peer)
    await until(lambda: peer.peer_id in host.connected())
