"""The package's vocabulary: plain frozen values, none of them libp2p's."""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["inbound", "outbound"]
Path = Literal["direct", "relayed"]


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Where a peer can be dialled: multiaddr strings such as `/ip4/1.2.3.4/tcp/4001`, without
    `/p2p/`."""

    peer_id: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One peer as `Host.peers()` sees it now: every connected peer, and every peer we keep."""

    peer_id: str
    connected: bool
    kept: bool
    """Whether `add_peer` asked for it, so that it is redialled when it drops."""
    addresses: tuple[str, ...]
    """Known dialable addresses."""
    direction: Direction | None = None
    """Who dialled the present connection."""
    path: Path | None = None
    """Whether the present connection's bytes pass a relay."""
    remote: str = ""
    """The present connection's other end, as a multiaddr."""
    transport: str = ""
    """What was negotiated, such as `/tls/1.0.0 /tdmld/fastmux/1.0.0`."""
    latency: float | None = None
    """Round trip of the last keepalive, seconds."""
    bytes_in: int = 0
    """All bytes of its connections since the host started: handshake, muxer and encryption too."""
    bytes_out: int = 0
    messages_in: int = 0
    """Messages on streams."""
    messages_out: int = 0
    gossip_bytes: int = 0
    """Bodies of gossip that it handed to us, duplicates excluded."""
    spent_seconds: float = 0.0
    """Our time for it in validators and in what services report."""
    connected_since: float | None = None
    """Unix time, seconds."""
    last_error: str = ""
    """Why the last dial failed; empty after a success."""
    score: float = 0.0
    """What its offences weigh now (see `accounting`); they decay, and 0 is a clean record."""


@dataclass(frozen=True, slots=True)
class PeerConnected:
    peer_id: str


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    peer_id: str


PeerChange = PeerConnected | PeerDisconnected


@dataclass(frozen=True, slots=True)
class GossipMessage:
    """A gossiped message that passed its topic's limit and validator."""

    source: str
    """Who signed and first published it (authenticated), not who forwarded it."""
    topic: str
    data: bytes
