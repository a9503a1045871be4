"""What travels over JSON-RPC about whether a node can be reached; conventions as in `types`."""

from typing import Literal

from tdmld.rpc.types import AddressText, Wire

ReachState = Literal["open", "closed", "unknown"]
"""open: others can dial it; closed: they come through relays and punched holes only; unknown:
nobody has tried."""


class TrialInfo(Wire, frozen=True):
    """What came of one dial."""

    reached: bool | None
    """None: nobody dialled."""
    address: str = ""
    why: str = ""


class WitnessInfo(Wire, frozen=True):
    """What one other node says."""

    node: AddressText
    owner: str
    """Empty: it is not registered."""
    seconds_ago: float
    seen_at: str
    """The IP address that it sees this node at; empty when it does not say."""
    clock_ms: float | None
    """How far its clock is ahead of ours."""
    daemon: TrialInfo
    carrier: TrialInfo
    failure: str = ""
    """Why it says nothing."""


class ProcessReach(Wire, frozen=True):
    """Daemon or carrier."""

    state: ReachState
    listening: tuple[str, ...]
    announced: tuple[str, ...]
    """What the peer record says, best first."""
    relayed: tuple[str, ...]
    """Addresses through relays that it holds a place on."""


class RouterInfo(Wire, frozen=True):
    """UPnP."""

    state: Literal["off", "asking", "forwards", "failed"]
    """off: by configuration, or because nothing but loopback is listened on."""
    addresses: tuple[str, ...] = ()
    """Forwarded to us."""
    public: bool = True
    """Whether the router itself is on the Internet."""
    why: str = ""


class RelayingInfo(Wire, frozen=True):
    """What this node carries for others."""

    on: bool
    members: int = 0
    """Nodes that may use it."""
    reservations: int = 0
    circuits: int = 0
    carried: int = 0
    """Bytes since the carrier started."""


class NetReachability(Wire, frozen=True):
    """Whether a node can be reached, who says so, and what it does about it."""

    daemon: ProcessReach
    carrier: ProcessReach
    settled: bool
    """Everybody who could be asked has answered."""
    witnesses: tuple[WitnessInfo, ...]
    own: tuple[str, ...]
    """IP addresses of this machine's interfaces."""
    router: RouterInfo
    local: tuple[str, ...] | None
    """Interfaces with local discovery; None: it is off."""
    relaying: RelayingInfo
    daemons: int
    """Connected."""
    daemons_relayed: int
    """Of them through a relay."""
    carriers: int
    carriers_relayed: int
    punched: int
    """Holes punched since daemon and carrier started."""
    open_receipts: int
    """Of other owners, and fresh: for the next ask."""
    pair_receipts: int
    wanted_receipts: int
    """`dial_receipts` of the chain."""
