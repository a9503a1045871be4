"""The daemon's end of `carriernet`: where its carrier can be dialled, and what it is asked to do.

What the carrier must know is kept here and told again to a restarted one (`restore`).
"""

from collections.abc import Callable, Sequence
from itertools import islice

import trio

from tdmld.node import control
from tdmld.node.carrierclient import CarrierClient
from tdmld.p2p import PeerInfo


class ReachCarrier:
    """MachineError of every method: the carrier could not, or is being restarted."""

    def __init__(self, client: CarrierClient) -> None:
        self._client = client
        self._relays: tuple[control.Peer, ...] = ()
        self._relayed: tuple[bytes, ...] = ()
        self.addresses: tuple[str, ...] = ()
        """Where it listens, and through which relays it can be dialled."""
        self.changed = trio.Event()
        """Set and replaced whenever `addresses` change."""

    def moved(self, addresses: tuple[str, ...]) -> None:
        """The carrier says where it can be dialled now."""
        if addresses != self.addresses:
            self.addresses = addresses
            self.changed.set()
            self.changed = trio.Event()

    def restore(self) -> list[Callable[[int], control.Request]]:
        """What a restarted carrier must know."""
        return [
            lambda n: control.SetRelays(n, self._relays),
            lambda n: control.SetRelaying(n, self._relayed),
        ]

    async def dial_back(self, session: str, addresses: Sequence[str]) -> str:
        """The address where a fresh connection found the session."""
        reply = await self._client.call(
            lambda n: control.DialBack(n, session, tuple(addresses)), control.Dialled
        )
        return reply.address

    async def connect_direct(self, session: str, addresses: Sequence[str], seconds: float) -> bool:
        """Whether a direct connection with the session is there within `seconds`."""
        at = tuple(addresses[: control.MAX_ADDRESSES])
        reply = await self._client.call(
            lambda n: control.ConnectDirect(n, session, at, seconds), control.Direct
        )
        return reply.direct

    async def set_relays(self, relays: Sequence[PeerInfo]) -> None:
        """Replace the relays through which the carrier wants to be reached."""
        self._relays = tuple(
            control.Peer(info.peer_id, info.addresses[: control.MAX_ADDRESSES])
            for info in islice(relays, control.MAX_RELAYS)
        )
        await self._client.call(lambda n: control.SetRelays(n, self._relays), control.Done)

    async def set_relaying(self, keys: Sequence[bytes]) -> None:
        """Replace those whom the carrier relays for; the first ones that fit into a message."""
        self._relayed = tuple(keys[: control.MAX_RELAYED])
        await self._client.call(lambda n: control.SetRelaying(n, self._relayed), control.Done)

    async def network(self) -> control.Network:
        """The carrier's place in the network."""
        return await self._client.call(control.AskNetwork, control.Network)
