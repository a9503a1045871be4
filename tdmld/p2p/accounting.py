"""What each peer uses of us and does wrong: counters, and a score that decays.

An `Offence` adds its weight to the score of the peer, or of the address when no identity is proved
yet. At `BAN_SCORE` whoever it is gets disconnected and banned for a time (see `bans`). The table
holds only what an honest peer does not do however slow, overloaded, restarted or out of date it
is; what it may do now and then has a small weight and a score that is soon forgotten. Nobody is
blamed for what our own load can cause: a handshake that we were too busy to finish is not counted.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import trio
from libp2p.io.abc import ReadWriteCloser

BAN_SCORE = 100.0
PATIENCE = 3.0
"""Offences of kept peers (validators, configured ones) weigh so many times less."""
PEER_HALF_LIFE_SECONDS = 600.0
"""What an identity does is its own: it is remembered for a while."""
ADDRESS_HALF_LIFE_SECONDS = 60.0
"""An address may be shared by many honest peers: only what comes quickly adds up."""
STREAMS_HALF_LIFE_SECONDS = 10.0
STREAMS_LATELY = 3000.0
"""Streams of one peer; above it each waits: 200 a second, a tenth of a core."""
MAX_ADDRESSES = 4096
"""Addresses whose score is remembered."""

Network = IPv4Network | IPv6Network


class Offence(Enum):
    """What adds to a score: its weight, and what it is."""

    def __init__(self, weight: float, meaning: str) -> None:
        self.weight = weight
        self.meaning = meaning

    # Of a peer
    OVERSIZE = (20.0, "announced a message larger than its protocol allows")
    FLOW_CONTROL = (50.0, "broke the rules of the muxer: frames, stream numbers, credit")
    UNREAD = (25.0, "made us answer and did not read the answers")
    CONTROL_FLOOD = (2.0, "sent frames without content faster than any use of the muxer does")
    STREAMS = (0.5, "opened more streams than one peer may have")
    NEGOTIATION = (10.0, "sent garbage in the negotiation of a protocol")
    GOSSIP = (10.0, "passed on gossip that every honest node refuses")
    MALFORMED = (20.0, "sent a message that cannot be decoded, or with a false signature")
    # Of an address
    GARBAGE = (2.0, "sent garbage instead of a handshake")
    SILENCE = (1.0, "connected and let us wait until the time for a handshake was over")
    CROWDING = (0.1, "connected, and was refused by a limit or left without an identity")
    IMPOSTOR = (25.0, "a peer there was banned")


@dataclass(slots=True)
class Score:
    """A sum of weights that halves every `half_life` seconds."""

    half_life: float
    value: float = 0.0
    at: float = 0.0

    def now(self, now: float) -> float:
        """The score at `now` (seconds of any one clock)."""
        return float(self.value * 0.5 ** (max(0.0, now - self.at) / self.half_life))

    def add(self, weight: float, now: float) -> float:
        """Add to the score; its new value."""
        self.value, self.at = self.now(now) + weight, now
        return self.value


class Account:
    """What one peer used of us since the host started."""

    __slots__ = (
        "_accuse",
        "bytes_in",
        "bytes_out",
        "gossip_bytes",
        "messages_in",
        "messages_out",
        "opened",
        "pushes",
        "score",
        "spent",
    )

    def __init__(self, accuse: Callable[[Offence, str], None] | None = None) -> None:
        self._accuse = accuse
        self.bytes_in = 0
        """On the socket: handshake, muxer and encryption included."""
        self.bytes_out = 0
        self.messages_in = 0
        """Whole messages on streams."""
        self.messages_out = 0
        self.gossip_bytes = 0
        """Bodies of gossip that it handed to us, duplicates excluded."""
        self.spent = 0.0
        """Seconds of our time in validators and in what services report."""
        self.score = Score(PEER_HALF_LIFE_SECONDS)
        self.opened = Score(STREAMS_HALF_LIFE_SECONDS)
        """Streams that it opened lately."""
        self.pushes: Score | None = None
        """Identify pushes that it sent lately."""

    def accuse(self, offence: Offence, why: str) -> None:
        """The peer did this."""
        if self._accuse is not None:
            self._accuse(offence, why)


class Metered(ReadWriteCloser):
    """A socket whose bytes are counted; `charge` says for whom, when that is known."""

    def __init__(self, inner: ReadWriteCloser) -> None:
        self._inner = inner
        self._account = Account()
        self.ended = False
        """The other side closed or broke it."""
        self.waited = 0.0
        """Seconds that we waited for bytes of the other side."""

    def charge(self, account: Account) -> None:
        """From now on, and for what passed so far."""
        account.bytes_in += self._account.bytes_in
        account.bytes_out += self._account.bytes_out
        self._account = account

    async def read(self, n: int | None = None) -> bytes:
        began = trio.current_time()
        try:
            data = await self._inner.read(n)
        except Exception:  # any failure, which goes on up: the socket is of no use any more
            self.ended = True
            raise
        finally:
            self.waited += trio.current_time() - began
        self._account.bytes_in += len(data)
        self.ended = self.ended or not data
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._inner.write(data)
        except Exception:  # as above
            self.ended = True
            raise
        self._account.bytes_out += len(data)

    async def close(self) -> None:
        await self._inner.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._inner.get_remote_address()


def network_of(host: str) -> Network:
    """Whose address this is: one IPv4 address, or the /64 that one IPv6 customer has. ValueError
    when it is no IP address."""
    address = ip_address(host.split("%")[0])
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return ip_network((address, 64), strict=False)
        address = address.ipv4_mapped
    return ip_network(address)


class AddressScores:
    """Scores of addresses, for what happens before an identity is proved."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._scores: OrderedDict[Network, Score] = OrderedDict()

    def add(self, network: Network, offence: Offence) -> bool:
        """Whether this is enough for a ban; the score starts afresh then."""
        score = self._scores.setdefault(network, Score(ADDRESS_HALF_LIFE_SECONDS))
        self._scores.move_to_end(network)
        if len(self._scores) > MAX_ADDRESSES:
            self._scores.popitem(last=False)
        if score.add(offence.weight, self._clock()) < BAN_SCORE:
            return False
        del self._scores[network]
        return True
