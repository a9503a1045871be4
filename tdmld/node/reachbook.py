"""What the address book offers to a node that wants to be reached, or to help others. Pure.

Only nodes that the chain knows count: anybody may sign a record.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from tdmld.chain.crypto import address
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
