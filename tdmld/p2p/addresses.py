"""PeerIds and multiaddrs from outside, checked and turned into what can be dialled or listened
on."""

from dataclasses import dataclass

from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from tdmld.p2p.errors import AddressInvalid

_TEXT_LIMIT = 256
_HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """The only kind of address we dial: a host name or IP address and a TCP port."""

    host: str
    port: int
    text: str
    """As a multiaddr, without `/p2p/`."""


def parse_peer_id(text: str) -> ID:
    """AddressInvalid when `text` is not a PeerId."""
    if not 32 <= len(text) <= 128:
        raise AddressInvalid(f"{text[:64]!r} is not a PeerId: a wrong length ({len(text)})")
    try:
        return ID.from_base58(text)
    except ValueError as error:
        raise AddressInvalid(f"{text!r} is not a PeerId: {error}") from error


def parse_address(text: str) -> TcpAddress:
    """`/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`, AddressInvalid otherwise. A `/p2p/` suffix is
    refused."""
    if len(text) > _TEXT_LIMIT:
        raise AddressInvalid(f"an address has at most {_TEXT_LIMIT} characters, not {len(text)}")
    try:
        parts = list(Multiaddr(text).items())
    except (MultiaddrError, ValueError) as error:
        raise AddressInvalid(f"{text!r} is not a multiaddr: {error}") from error
    names = [protocol.name for protocol, _ in parts]
    values = [value for _, value in parts]
    if len(parts) != 2 or names[0] not in _HOST_PROTOCOLS or names[1] != "tcp":
        raise AddressInvalid(f"{text!r} cannot be used: write it as /ip4/1.2.3.4/tcp/4001")
    return TcpAddress(host=str(values[0]), port=int(values[1] or 0), text=text)


def format_address(host: str, port: int) -> str:
    """The multiaddr of a socket's IP address and port."""
    return f"/{'ip6' if ':' in host else 'ip4'}/{host.split('%')[0]}/tcp/{port}"
