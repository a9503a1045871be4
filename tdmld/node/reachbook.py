"""What the address book offers to a node that wants to be reached, or to help others. Pure.

Only nodes that the chain knows count: anybody may sign a record.
"""

import hashlib
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from itertools import islice

from tdmld.chain.crypto import address, public_key
from tdmld.chain.errors import DecodeError
from tdmld.node.control import MAX_RELAYED
from tdmld.node.peers import PeerBook, PeerRecord
from tdmld.p2p import PeerInfo

RELAY_CANDIDATES = 6


def order_of(mine: bytes, other: bytes) -> bytes:
    """A random order of nodes, another one for each of us, the same for ever."""
    return hashlib.blake2b(other, key=mine, digest_size=16).digest()


def is_relayed(address: str) -> bool:
    """Whether an address leads through a relay."""
    return address.endswith("/p2p-circuit")


def key_of(peer_id: str) -> bytes:
    """The node key of a daemon; empty for a libp2p peer of another kind."""
    try:
        return public_key(peer_id)
    except DecodeError:
        return b""


@dataclass(frozen=True)
class Offers:
    """`me` is this node's key; `owner_of(node)` is None for who is not registered."""

    book: PeerBook
    me: bytes
    owner_of: Callable[[bytes], bytes | None]

    def relays(self) -> tuple[PeerInfo, ...]:
        """Carriers that relay, in an order of each node's own, so that the load is spread."""
        known = [record for record in self.book.records() if self._can_relay(record)]
        known.sort(key=lambda record: order_of(self.me, record.node))
        return tuple(
            PeerInfo(address(record.session), _direct(record))
            for record in islice(known, RELAY_CANDIDATES)
        )

    def _can_relay(self, record: PeerRecord) -> bool:
        return (
            record.relays
            and record.node != self.me
            and self.owner_of(record.node) is not None
            and bool(_direct(record))
        )

    def members(self) -> tuple[bytes, ...]:
        """Nodes that may be relayed, and the sessions that they name: as many as the carrier can
        be told of, in a network of more each relay has its own choice."""
        known = [r for r in self.book.records() if self.owner_of(r.node) is not None]
        known.sort(key=lambda record: order_of(self.me, record.node))
        return tuple(
            key for record in known[: MAX_RELAYED // 2] for key in (record.node, record.session)
        )

    def witnesses(self, connected: Iterable[str], asked: Container[str], most: int) -> list[str]:
        """Whom to ask how we can be reached: one an owner; of other owners first, then those that
        were asked before."""
        mine = self.owner_of(self.me)
        ranked: list[tuple[bool, bool, bytes, str, bytes | None]] = []
        for peer_id in connected:
            record = self.book.node(key_of(peer_id))
            if record is not None:
                owner = self.owner_of(record.node)
                strange = owner is None or owner == mine
                order = order_of(self.me, record.node)
                ranked.append((strange, peer_id not in asked, order, peer_id, owner))
        chosen: list[str] = []
        owners: set[bytes | None] = set()
        for _, _, _, peer_id, owner in sorted(ranked):
            if owner not in owners or owner is None:
                owners.add(owner)
                chosen.append(peer_id)
        return chosen[:most]

    def closed(self) -> list[bytes]:
        """Nodes of other owners that can be reached through relays only, as they say themselves;
        in an order in which two that are first for each other find each other first."""
        mine = self.owner_of(self.me)
        found = [
            record.node
            for record in self.book.records()
            if any(map(is_relayed, record.session_addresses))
            and record.node != self.me
            and self.owner_of(record.node) not in (None, mine)
        ]
        return sorted(found, key=lambda node: order_of(*sorted((self.me, node))))


def _direct(record: PeerRecord) -> tuple[str, ...]:
    return tuple(text for text in record.session_addresses if not is_relayed(text))
