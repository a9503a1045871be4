"""How daemons help each other to know whether they can be reached: `/tdmld/<n>/reach/1`.

One request and one answer a stream; whoever opened it asks.

    Observe                       -> Observed     where the witness sees the asker, and its clock
    DialDaemon(addresses)         -> Reached      the witness's daemon dialled the asking daemon
    DialBack(session, addresses)  -> Receipt(1)   the witness's carrier dialled the asker's anew
    Pair(session)                 -> Receipt(2)   the carriers of both hold a direct connection

or Refused with the reason. A receipt goes into the asker's ask (see `tdmld.chain.market`, ASK-6).

Only IP addresses at which the witness sees the asker are dialled, as in AutoNAT (libp2p/specs
autonat), so nobody is made to knock at the door of a third party; for a pair also relays that are
known as such, and what hole punching allows (`tdmld.p2p.punch`). `session` is the one of the
asker's own signed peer record.
"""

import ipaddress
from collections.abc import Iterable
from typing import Annotated

import msgspec

from tdmld.chain.codec import Natural, PublicKey, Record
from tdmld.chain.transactions import DialReceipt
from tdmld.p2p import PeerStatus

MAX_REACH_BYTES = 4096
MAX_DIALLED = 4
"""Addresses of one request: each may cost the witness some seconds."""
MAX_REASON = 400
ANSWER_SECONDS = 45.0
"""An honest witness has answered by then, also when it dials every address in vain."""

_Address = Annotated[
    str,
    msgspec.Meta(pattern=r"^/ip[46]/[0-9A-Fa-f:.]{2,45}/tcp/[0-9]{1,5}\Z"),
]
_Addresses = Annotated[tuple[_Address, ...], msgspec.Meta(max_length=MAX_DIALLED)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_REASON)]


class Observe(Record, tag="observe", frozen=True):
    """Where do you see me?"""


class DialDaemon(Record, tag="dial_daemon", frozen=True):
    """Dial this stream's other end anew, at one of these addresses."""

    addresses: _Addresses


class DialBack(Record, tag="dial_back", frozen=True):
    """Let your carrier dial mine, which has the key `session`, anew."""

    session: PublicKey
    addresses: _Addresses


class Pair(Record, tag="pair", frozen=True):
    """Let your carrier connect directly with mine, however it can, or say that it is so."""

    session: PublicKey


class Observed(Record, tag="observed", frozen=True):
    """`time_ms`: the witness's clock, Unix milliseconds; for people, nothing rests on it."""

    ip: Annotated[str, msgspec.Meta(max_length=45)]
    time_ms: Natural


class Reached(Record, tag="reached", frozen=True):
    address: _Address


class Receipt(Record, tag="receipt", frozen=True):
    """`address`: where the asker was dialled; empty for a pair."""

    receipt: DialReceipt
    address: Annotated[str, msgspec.Meta(max_length=128)]


class Refused(Record, tag="refused", frozen=True):
    """`tried`: whether the asker was dialled, and in vain; else the witness did not try."""

    reason: _Text
    tried: bool


Request = Observe | DialDaemon | DialBack | Pair
Answer = Observed | Reached | Receipt | Refused


def protocol(chain_id: bytes) -> str:
    """The protocol of a chain."""
    return f"/tdmld/{chain_id.hex()[:8]}/reach/1"


def ip_of(address: str) -> str:
    """The IP address in a direct multiaddr, in one spelling; empty when there is none."""
    parts = address.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
        return ""
    try:
        found = ipaddress.ip_address(parts[2])
    except ValueError:
        return ""
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def seen_at(peer_id: str, peers: Iterable[PeerStatus]) -> str:
    """The IP address that a peer is directly connected from; empty when it is not, or relayed."""
    for peer in peers:
        if peer.peer_id == peer_id and peer.connected and peer.path == "direct":
            return ip_of(peer.remote)
    return ""
