"""The carrier's part in being reached: dials for receipts, direct paths, relays of its own, and
what it relays for others. The daemon decides, see `reach`; here it is done."""

from collections import Counter
from collections.abc import Callable, Container, Sequence

import trio

from tdmld.chain.crypto import address
from tdmld.node import control
from tdmld.p2p import CircuitQuota, Host, PeerInfo, RelayPolicy
from tdmld.p2p.dialback import Prober

ReachRequest = (
    control.DialBack
    | control.ConnectDirect
    | control.SetRelays
    | control.SetRelaying
    | control.AskNetwork
)
_NOTHING = CircuitQuota(bytes=0, seconds=0.0, bytes_per_second=1)


class Relaying:
    """Whom this carrier relays for: nobody until the daemon says so. Who stands neither on the
    chain nor in a job of ours gets nothing, or anybody could use our line for anything."""

    def __init__(self) -> None:
        self._allowed: frozenset[str] = frozenset()

    def policy(self) -> RelayPolicy:
        """For `open_host`."""
        return RelayPolicy(allow=lambda peer_id: peer_id in self._allowed, strangers=_NOTHING)

    def replace(self, keys: Sequence[bytes]) -> None:
        """PeerIds of those whom the chain knows."""
        self._allowed = frozenset(map(address, keys))


class CarrierNet:
    """Carries out the requests of `tdmld.node.reachcarrier` on the carrier's host."""

    def __init__(self, host: Host, seed: bytes, relaying: Relaying) -> None:
        self._host = host
        self._prober = Prober(seed)
        self._relaying = relaying
        self._seeking: Counter[str] = Counter()
        """Sessions with which direct paths are sought now, by how many."""

    async def carry_out(
        self, request: ReachRequest, kept: Callable[[], Container[str]]
    ) -> control.Reply:
        """The reply; DialFailed, AddressInvalid. `kept()`: sessions that jobs need now."""
        match request:
            case control.DialBack(number, session, addresses):
                return control.Dialled(number, await self._prober.probe(session, addresses))
            case control.ConnectDirect(number, session, addresses, seconds):
                direct = await self._direct(PeerInfo(session, addresses), seconds, kept)
                return control.Direct(number, direct)
            case control.SetRelays(number, peers):
                self._host.set_relays([PeerInfo(p.session, p.addresses) for p in peers])
            case control.SetRelaying(number, keys):
                self._relaying.replace(keys)
            case control.AskNetwork(number):
                return self._network(number)
        return control.Done(request.id)

    async def _direct(
        self, info: PeerInfo, seconds: float, kept: Callable[[], Container[str]]
    ) -> bool:
        if info.peer_id not in kept():
            self._host.add_peer(info)
        self._seeking[info.peer_id] += 1
        try:
            return await self._host.connect_direct(info.peer_id, seconds)
        finally:
            self._seeking[info.peer_id] -= 1
            self._seeking += Counter()  # drops the zeros
            if info.peer_id not in self._seeking and info.peer_id not in kept():
                # The connection stays as long as somebody uses it; we do not dial it again.
                self._host.remove_peer(info.peer_id)

    def _network(self, number: int) -> control.Network:
        peers = [peer for peer in self._host.peers() if peer.connected]
        use = self._host.relay_use
        return control.Network(
            number,
            connected=len(peers),
            relayed=sum(peer.path == "relayed" for peer in peers),
            punched=self._host.holes_punched,
            reservations=use.reservations if use else 0,
            circuits=use.circuits if use else 0,
            carried=use.bytes if use else 0,
        )


async def tell_addresses(host: Host, tell: "trio.MemorySendChannel[control.Message]") -> None:
    """Tell the daemon whenever the carrier's addresses change; ends when the host closes."""
    with host.address_changes() as changes:
        async for _ in changes:
            tell.send_nowait(control.AddressesChanged(host.addresses))
