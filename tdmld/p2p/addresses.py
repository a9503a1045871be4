"""PeerIds and multiaddrs from outside, checked and turned into what can be dialled or listened
on."""

from dataclasses import dataclass

from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from tdmld.p2p.errors import AddressInvalid

_TEXT_LIMIT = 256
_HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")
_CIRCUIT = "p2p-circuit"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A direct address: a host name or IP address and a TCP port."""

    host: str
    port: int
    text: str
    """As a multiaddr, without `/p2p/`."""


@dataclass(frozen=True, slots=True)
class RelayedAddress:
    """An address behind a relay that the peer holds a reservation on."""

    relay: TcpAddress
    relay_id: ID
    text: str
    """`<direct address of the relay>/p2p/<relay>/p2p-circuit`, without the peer's own `/p2p/`."""


Address = TcpAddress | RelayedAddress


def parse_peer_id(text: str) -> ID:
    """AddressInvalid when `text` is not a PeerId."""
    if not 32 <= len(text) <= 128:
        raise AddressInvalid(f"{text[:64]!r} is not a PeerId: a wrong length ({len(text)})")
    try:
        return ID.from_base58(text)
    except ValueError as error:
        raise AddressInvalid(f"{text!r} is not a PeerId: {error}") from error


def parse_address(text: str) -> Address:
    """A direct or a relayed address, AddressInvalid otherwise. The peer's own `/p2p/` suffix is
    refused."""
    if len(text) > _TEXT_LIMIT:
        raise AddressInvalid(f"an address has at most {_TEXT_LIMIT} characters, not {len(text)}")
    try:
        parts = list(Multiaddr(text).items())
    except (MultiaddrError, ValueError) as error:
        raise AddressInvalid(f"{text!r} is not a multiaddr: {error}") from error
    names = [protocol.name for protocol, _ in parts]
    values = [str(value) for _, value in parts]
    if len(parts) < 2 or names[0] not in _HOST_PROTOCOLS or names[1] != "tcp":
        raise AddressInvalid(f"{text!r} cannot be used: write it as /ip4/1.2.3.4/tcp/4001")
    direct = f"/{names[0]}/{values[0]}/tcp/{values[1]}"
    if len(parts) == 2:
        return TcpAddress(host=values[0], port=int(values[1]), text=text)
    if names[2:] != ["p2p", _CIRCUIT]:
        raise AddressInvalid(
            f"{text!r} cannot be used: after the port only /p2p/<relay>/{_CIRCUIT} may stand"
        )
    relay = TcpAddress(host=values[0], port=int(values[1]), text=direct)
    return RelayedAddress(relay=relay, relay_id=parse_peer_id(values[2]), text=text)


def parse_direct(text: str) -> TcpAddress:
    """`/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`, AddressInvalid otherwise."""
    address = parse_address(text)
    if not isinstance(address, TcpAddress):
        raise AddressInvalid(f"{text!r} leads through a relay; a direct address is needed here")
    return address


def format_address(host: str, port: int) -> str:
    """The multiaddr of a socket's IP address and port."""
    return f"/{'ip6' if ':' in host else 'ip4'}/{host.split('%')[0]}/tcp/{port}"


def relayed_through(relay: TcpAddress, relay_id: ID) -> RelayedAddress:
    """Where a peer with a reservation on this relay can be dialled."""
    return RelayedAddress(relay, relay_id, f"{relay.text}/p2p/{relay_id}/{_CIRCUIT}")
