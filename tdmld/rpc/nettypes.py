"""What travels over JSON-RPC about the network; conventions as in `types`."""

from typing import Annotated, Literal

import msgspec

from tdmld.rpc.types import AddressText, Wire

SubjectText = Annotated[str, msgspec.Meta(min_length=2, max_length=128)]
"""A PeerId, an IP address, or a network such as 192.0.2.0/24."""
ReasonText = Annotated[str, msgspec.Meta(max_length=200)]
DialText = Annotated[str, msgspec.Meta(min_length=8, max_length=512)]
"""A multiaddr with the peer's id: /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo..."""
Seconds = Annotated[int, msgspec.Meta(ge=0, le=10 * 365 * 86400)]


class BanInfo(Wire, frozen=True):
    """Who may not connect to this node."""

    subject: str
    """A PeerId, or a network."""
    until: str
    """Empty: until it is lifted."""
    reason: str
    author: Literal["node", "operator", "configuration"]
    """The node itself, for offences; a command; the setting `deny`."""
    times: int = 1
    """How often the node has banned it: each time for twice as long."""


class Connected(Wire, frozen=True):
    """A peer that this node keeps connected from now on."""

    node: AddressText
    address: str
    """The other end of the connection."""
    path: Literal["direct", "relayed"]
    transport: str
    round_trip_ms: float | None = None
