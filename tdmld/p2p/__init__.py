"""The network: authenticated connections, message streams and gossip between peers.

The only package that knows libp2p, and nothing of libp2p's types leaves it. See `host` for the
face, `connector`, `peers`, `tls`, `fastmux`, `streams` and `gossip` for what each repairs in the
library, `limits` for every bound.
"""

from tdmld.p2p import errors
from tdmld.p2p.accounting import Offence
from tdmld.p2p.bans import Ban, Bans
from tdmld.p2p.host import Host, open_host
from tdmld.p2p.limits import Limits
from tdmld.p2p.relay import CircuitQuota, RelayPolicy, RelayUse
from tdmld.p2p.streams import Stream
from tdmld.p2p.types import (
    GossipMessage,
    PeerChange,
    PeerConnected,
    PeerDisconnected,
    PeerInfo,
    PeerStatus,
)

__all__ = [
    "Ban",
    "Bans",
    "CircuitQuota",
    "GossipMessage",
    "Host",
    "Limits",
    "Offence",
    "PeerChange",
    "PeerConnected",
    "PeerDisconnected",
    "PeerInfo",
    "PeerStatus",
    "RelayPolicy",
    "RelayUse",
    "Stream",
    "errors",
    "open_host",
]
