"""Whatever is gossiped can be asked for: `/tdmld/gossip-recent/1`.

Gossip is best effort: a full queue, a broken connection or a restart loses messages without a word.
So every host keeps what it accepted lately (see `recent`), and asks its peers for what it lacks:
each when it connects, then one of them at a time at a slow pace, and all of them soon when it got
something in this way, for then others may lack it too.

One exchange, on a stream of its own (msgpack arrays in the frames of `streams`):

    asker                                      asked
    Ask(topics, life, since, mine, learned) ->
                                            <- Have(life, upto, rows (id, size), more)
    Want(ids)                               ->
                                            <- age in ms, u32 big endian, and the signed message
                                               as in gossipsub's RPC; one frame each, then the end

`life` and `since` say how far the asker has read the other's log: nothing is listed twice, and when
nothing is missing an exchange is two small frames. `mine` and `learned` are the asker's own life
and the newest number in its log that it got by asking: whoever has not read so far asks back.

A message got in this way is checked like any other (size, signature, validator; its forwarder is
the peer that was asked), delivered to the subscriber, and not forwarded by gossip: those who lack
it ask. Nothing is believed but signatures. An `age` that is a lie keeps a message alive that its
liar could have gossiped again anyway.

A peer that refuses the protocol three times is not asked again on its connection.
"""

import logging
import random
import struct
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import msgspec
import trio

from tdmld.p2p.errors import P2PError, ProtocolRefused, StreamClosed
from tdmld.p2p.recent import MAX_BYTES, WINDOW_SECONDS, Recent
from tdmld.p2p.streams import Stream
from tdmld.p2p.types import PeerConnected

if TYPE_CHECKING:
    from tdmld.p2p.host import Host

log = logging.getLogger(__name__)

PROTOCOL = "/tdmld/gossip-recent/1"
PACE_SECONDS = 5.0
"""Between two exchanges with peers at random, while nothing is missing."""
FIRST_SECONDS = 0.5
"""A new peer is asked within this time."""
SPACING_SECONDS = 1.0
"""Between two exchanges with one peer."""
EXCHANGE_SECONDS = 20.0
"""Longer takes no honest peer."""
TRIES = 3
"""A peer that is overloaded refuses streams, too."""
MAX_ROWS = 1024
MAX_WANTED_BYTES = 1 << 20
"""Asked for in one exchange; the rest is asked for in the next one."""
MAX_ASKING = 4
"""Exchanges that we begin at the same time."""
MAX_ASKED = 2
"""Exchanges that one peer may have with us at the same time."""
SERVED_BYTES_PER_SECOND = MAX_BYTES / WINDOW_SECONDS
"""What a peer may have of us, and MAX_BYTES at once: all that we hold, for one that restarts."""
MAX_SERVED = 1024
"""Peers of which it is remembered what they had."""
MAX_REFUSED = 4096
REFUSALS = 2
"""So often a message is asked for that is refused here; so many of them are remembered."""
ASK_COST = 64 << 10
"""What an exchange costs us, in bytes that a peer may have."""
_ASK_BYTES = 16 << 10
_HAVE_BYTES = 64 + 48 * MAX_ROWS
_WANT_BYTES = 64 + 40 * MAX_ROWS
_AGE = struct.Struct("!I")
_ENVELOPE_BYTES = 1024
"""Around the data of a message: key, signature, source, topic."""

_Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Life = Annotated[bytes, msgspec.Meta(max_length=8)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
_Topics = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=32)
]


class _Message(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    pass


class Ask(_Message, tag="ask", frozen=True):
    topics: _Topics
    life: _Life
    since: _Number
    mine: _Life
    learned: _Number


class Have(_Message, tag="have", frozen=True):
    life: _Life
    upto: _Number
    rows: Annotated[tuple[tuple[_Key, _Number], ...], msgspec.Meta(max_length=MAX_ROWS)]
    more: bool


class Want(_Message, tag="want", frozen=True):
    keys: Annotated[tuple[_Key, ...], msgspec.Meta(max_length=MAX_ROWS)]


_M = TypeVar("_M", bound=_Message)


class Source(Protocol):
    """What gossip offers to this module."""

    @property
    def recent(self) -> Recent: ...

    @property
    def joined(self) -> trio.Event:
        """Set and replaced whenever a topic is joined."""

    @property
    def topics(self) -> tuple[str, ...]: ...

    def lacks(self, key: bytes) -> bool:
        """Whether a message was not seen lately."""

    def key_of(self, raw: bytes) -> bytes:
        """The id of a message; msgspec.DecodeError when it is none."""

    async def take(self, peer: str, raw: bytes, age: float) -> bool:
        """Check and deliver a message that `peer` gave; whether it was new and good."""


async def _receive(stream: Stream, kind: type[_M], limit: int) -> _M:
    """The next frame; msgspec.MsgspecError when it is something else."""
    return msgspec.msgpack.decode(await stream.receive(limit), type=kind)


@dataclass(slots=True)
class _Followed:
    """How far a connected peer's log was read, and when it is read on."""

    life: bytes = b""
    since: int = 0
    topics: tuple[str, ...] = ()
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    wake: trio.Event = field(default_factory=trio.Event)


class CatchUp:
    """Asks and answers for one host; `run` it as long as the host runs."""

    def __init__(self, host: "Host", gossip: Source) -> None:
        self._host = host
        self._gossip = gossip
        self._followed: dict[str, _Followed] = {}
        self._asking = trio.CapacityLimiter(MAX_ASKING)
        self._claimed: set[bytes] = set()
        self._refused: OrderedDict[bytes, int] = OrderedDict()
        self._learned = 0
        self._asked: Counter[str] = Counter()
        self._served: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self.caught = 0
        """Messages that we got by asking."""
        host.set_handler(PROTOCOL, self._serve)

    async def run(self) -> None:
        """Ask until cancelled."""
        changes = self._host.changes()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pace)
            nursery.start_soon(self._join)
            for peer_id in self._host.connected():
                self._begin(nursery, peer_id)
            async for change in changes:
                if isinstance(change, PeerConnected):
                    self._begin(nursery, change.peer_id)
                elif (gone := self._followed.pop(change.peer_id, None)) is not None:
                    gone.scope.cancel()

    def wake(self) -> None:
        """Ask everybody soon."""
        for followed in self._followed.values():
            followed.wake.set()

    def _begin(self, nursery: trio.Nursery, peer_id: str) -> None:
        if peer_id not in self._followed:
            followed = self._followed[peer_id] = _Followed()
            nursery.start_soon(self._follow, peer_id, followed)

    async def _join(self) -> None:
        while True:
            await self._gossip.joined.wait()
            self.wake()

    async def _pace(self) -> None:
        while True:
            await trio.sleep(PACE_SECONDS * random.uniform(0.5, 1.5))
            if self._followed:
                random.choice(list(self._followed.values())).wake.set()

    # Asking

    async def _follow(self, peer_id: str, followed: _Followed) -> None:
        """Read a peer's log, each time that somebody wakes us, while it is connected."""
        with followed.scope:
            await trio.sleep(FIRST_SECONDS * random.random())
            tries = TRIES
            while True:
                more = False
                if self._gossip.topics:
                    followed.wake = trio.Event()
                    try:
                        async with self._asking:
                            with trio.move_on_after(EXCHANGE_SECONDS):
                                more = await self._exchange(peer_id, followed)
                    except ProtocolRefused:
                        tries -= 1
                        if not tries:
                            return
                        more = True
                    except (P2PError, msgspec.MsgspecError) as error:
                        log.debug("asking %s for recent gossip: %s", peer_id, error)
                await trio.sleep(SPACING_SECONDS)
                if not more:
                    await followed.wake.wait()

    async def _exchange(self, peer_id: str, followed: _Followed) -> bool:
        """One exchange; whether there is more to ask for now."""
        gossip, recent = self._gossip, self._gossip.recent
        if followed.topics != gossip.topics:
            followed.topics, followed.life = gossip.topics, b""
        async with await self._host.open_stream(peer_id, PROTOCOL) as stream:
            ask = Ask(followed.topics, followed.life, followed.since, recent.life, self._learned)
            await stream.send(msgspec.msgpack.encode(ask))
            have = await _receive(stream, Have, _HAVE_BYTES)
            wanted = self._choose(have)
            self._claimed |= wanted
            try:
                await stream.send(msgspec.msgpack.encode(Want(tuple(wanted))))
                got = await self._fetch(stream, set(wanted))
            finally:
                self._claimed -= wanted
        if got:
            self.caught += got
            self._learned = recent.top
            self.wake()
        if any(self._lacks(key) for key, _ in have.rows):
            # It was too much for once, or others are asked for it. What the peer has listed and
            # does not give is asked for at our pace.
            return got > 0
        followed.life, followed.since = have.life, have.upto
        return have.more

    def _choose(self, have: Have) -> set[bytes]:
        wanted: set[bytes] = set()
        total = 0
        for key, size in have.rows:
            if key not in self._claimed and self._lacks(key):
                total += size
                if wanted and total > MAX_WANTED_BYTES:
                    break
                wanted.add(key)
        return wanted

    def _lacks(self, key: bytes) -> bool:
        return self._refused.get(key, 0) < REFUSALS and self._gossip.lacks(key)

    async def _fetch(self, stream: Stream, wanted: set[bytes]) -> int:
        """Take what comes until the end; how many messages were new and good."""
        got = 0
        limit = _AGE.size + self._host.limits.gossip_bytes + _ENVELOPE_BYTES
        while wanted:
            try:
                frame = await stream.receive(limit)
            except StreamClosed:
                break
            if len(frame) < _AGE.size:
                raise msgspec.DecodeError("a message without its age")
            raw = frame[_AGE.size :]
            key = self._gossip.key_of(raw)
            if key not in wanted:
                raise msgspec.DecodeError("a message that was not asked for")
            wanted.discard(key)
            if await self._gossip.take(stream.peer_id, raw, _AGE.unpack_from(frame)[0] / 1000):
                got += 1
            elif self._gossip.lacks(key):
                self._refused[key] = self._refused.pop(key, 0) + 1
                if len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
        return got

    # Answering

    async def _serve(self, stream: Stream) -> None:
        peer_id = stream.peer_id
        if self._asked[peer_id] >= MAX_ASKED:
            await stream.reset()
            return
        self._asked[peer_id] += 1
        try:
            with trio.move_on_after(EXCHANGE_SECONDS) as late:
                await self._answer(stream)
            if late.cancelled_caught:
                await stream.reset()
        except msgspec.MsgspecError as error:
            log.debug("%s asked for recent gossip: %s", peer_id, error)
            stream.blame(str(error))
            await stream.reset()
        finally:
            self._asked[peer_id] -= 1
            if not self._asked[peer_id]:
                del self._asked[peer_id]

    async def _answer(self, stream: Stream) -> None:
        ask = await _receive(stream, Ask, _ASK_BYTES)
        recent, now = self._gossip.recent, trio.current_time()
        followed = self._followed.get(stream.peer_id)
        if followed is not None and (
            ask.learned > followed.since or (ask.learned and ask.mine != followed.life)
        ):
            followed.wake.set()
        if not self._may_have(stream.peer_id, ASK_COST):
            await stream.reset()
            return
        since = ask.since if ask.life == recent.life else 0
        page = recent.since(since, frozenset(ask.topics), now, MAX_ROWS)
        offered = {held.key for held in page.messages}
        rows = tuple((held.key, len(held.raw)) for held in page.messages)
        await stream.send(msgspec.msgpack.encode(Have(recent.life, page.upto, rows, page.more)))
        want = await _receive(stream, Want, _WANT_BYTES)
        for key in want.keys:
            held = recent.get(key, trio.current_time()) if key in offered else None
            offered.discard(key)
            if held is None or not self._may_have(stream.peer_id, held.cost):
                continue
            age = round(1000 * (trio.current_time() - held.born))
            await stream.send(_AGE.pack(age), held.raw)

    def _may_have(self, peer_id: str, cost: int) -> bool:
        """Take `cost` from what a peer may have of us, when it has that much left."""
        now = trio.current_time()
        left, at = self._served.pop(peer_id, (float(MAX_BYTES), now))
        left = min(float(MAX_BYTES), left + (now - at) * SERVED_BYTES_PER_SECOND)
        allowed = left >= cost
        self._served[peer_id] = (left - cost if allowed else left), now
        if len(self._served) > MAX_SERVED:
            self._served.popitem(last=False)
        return allowed
