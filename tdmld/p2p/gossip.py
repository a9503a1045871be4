"""Gossip: gossipsub 1.1/1.2 with settings and wrappers under which it loses little and survives
hostile input.

What stock gossipsub does, and what is done here:

- its spam protection drops above 10 messages a second, silently: off; publishing is paced instead
- sequence numbers start at the second of the start, so a restarted node repeats them: they start
  at nanoseconds
- message ids are (source, seqno): ours are hashes of source, topic and content
- heartbeats every 120 s, stretched further by "adaptive" mode: every second, adaptive off
- a validator, a malformed key or a heartbeat that raises ends the whole host: each is caught at a
  boundary
- a subscriber that does not read loses everything after 32 messages: larger queue, drops counted
- own messages come back: not here
- a peer that reconnects before its old connection is cleaned up is never heard again: `forget`
- a peer that connects while a topic is joined is never told of it: the greeting is repeated
- every packet carries its sender's signed address record, which the receiver verifies twice, a
  fifth of a quiet validator's time: it is left out, peers learn addresses otherwise
- IDONTWANT is sent for every message, a packet to spare a packet: for large ones only
- IHAVE and IWANT name messages by (source, seqno), which no host has ever seen under that name, so
  that all of them are sent again: by our ids
- an IWANT that names one message 10,000 times is answered with 10,000 copies: with one
- whoever leaves our mesh may name peers whom the library dials: nobody is dialled
- a host remembers when each message came, the messages of each source and seqno, and a PRUNE of
  every topic that a peer invents, for ever or nearly: none of that
- what is lost is lost: it can be asked for, see `catchup`
"""

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.exceptions import ValidationError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.mcache import CacheEntry, MessageCache
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from tdmld.p2p.accounting import Offence
from tdmld.p2p.addresses import parse_peer_id
from tdmld.p2p.errors import GossipRefused
from tdmld.p2p.limits import Limits
from tdmld.p2p.peers import Peers
from tdmld.p2p.recent import Recent
from tdmld.p2p.types import GossipMessage

log = logging.getLogger(__name__)

Validator = Callable[[str, bytes], bool | None]

_HEARTBEAT_SECONDS = 1
_SEEN_SECONDS = 120
"""For so long a message is not delivered twice; the same bytes may be gossiped again afterwards."""
_GOSSIP_WINDOW, _GOSSIP_HISTORY = 3, 5
"""Heartbeats: a message is announced for so many, and given to who asks for so many."""
_DEGREE, _DEGREE_LOW, _DEGREE_HIGH = 6, 4, 12
_TOPICS_PER_PEER = 32
_BURST = 16
"""Publications that may go out at once."""
_QUEUE_BUSY = 16
"""The library queues 32 messages for a peer and drops further ones without a word: wait at half."""
_WANTED = 64
"""Messages that one IWANT may ask for; our caches hold few more."""
_BACKOFF_SECONDS = 60
"""For no longer a peer keeps us from asking it again into our mesh."""
_LARGE = 8 << 10
"""Bytes from which a message is worth an IDONTWANT (the specification leaves the bound open)."""
_LAG_SECONDS = 1.0
"""So long a publication waits for the slowest peer."""


@dataclass(frozen=True, slots=True)
class _Topic:
    limit: int
    validate: Validator
    send: trio.MemorySendChannel[GossipMessage]


def _message_id(message: rpc_pb2.Message) -> bytes:
    digest = hashlib.sha256()
    for part in (message.from_id, *(topic.encode() for topic in message.topicIDs), message.data):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _parse(raw: bytes) -> rpc_pb2.Message:
    """msgspec.DecodeError when it is no message of gossip."""
    message = rpc_pb2.Message()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise msgspec.DecodeError(f"not a message: {error}") from error
    return message


class _MessageCache(MessageCache):
    """The library's, by our ids."""

    def put(self, msg: rpc_pb2.Message) -> None:
        key = _message_id(msg)
        if key not in self.msgs:
            self.msgs[key] = msg
            self.history[0].append(CacheEntry(key, msg.topicIDs))


class _Router(GossipSub):
    """Gossipsub whose heartbeat survives its own defects, and that spares small messages' talk."""

    _publishing = 0
    """Size of the message whose `publish` runs: nothing in it waits before IDONTWANT is sent."""

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        if isinstance(self.pubsub, _Pubsub) and id(pubsub_msg) in self.pubsub.ages:
            return  # those who lack it ask for it
        self._publishing = len(pubsub_msg.data)
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()

    def _check_equivocation(self, msg: rpc_pb2.Message) -> bool:
        return True  # a message is known by its content; who says two things has said them

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        wanted = list(dict.fromkeys(iwant_msg.messageIDs))[:_WANTED]
        await super().handle_iwant(rpc_pb2.ControlIWant(messageIDs=wanted), sender_peer_id)

    async def handle_prune(self, prune_msg: rpc_pb2.ControlPrune, sender_peer_id: ID) -> None:
        if prune_msg.topicID in self.mesh:
            backoff = min(prune_msg.backoff, _BACKOFF_SECONDS)
            pruned = rpc_pb2.ControlPrune(topicID=prune_msg.topicID, backoff=backoff)
            await super().handle_prune(pruned, sender_peer_id)

    def remove_peer(self, peer_id: ID) -> None:
        super().remove_peer(peer_id)
        for peers in self.back_off.values():
            peers.pop(peer_id, None)

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Iterable[str]) -> None:
        if self._publishing >= _LARGE:
            await super()._emit_idontwant_for_message(msg_id, topic_ids)

    async def heartbeat(self) -> None:
        while True:
            try:
                await super().heartbeat()
            except Exception:
                # Boundary: a heartbeat fed by peers' control messages must not end the host.
                log.exception("a gossip heartbeat failed")
                await trio.sleep(_HEARTBEAT_SECONDS)


class _Pubsub(Pubsub):
    """Pubsub with our size check, validation and delivery in the place of the library's."""

    def __init__(self, host: IHost, router: GossipSub, peers: Peers) -> None:
        super().__init__(
            host,
            router,
            strict_signing=True,
            seen_ttl=_SEEN_SECONDS,
            msg_id_constructor=_message_id,
            max_subscriptions_per_peer=_TOPICS_PER_PEER,
        )
        self.counter = time.time_ns()
        self.topics: dict[str, _Topic] = {}
        self.recent = Recent()
        self.ages: dict[int, float] = {}
        """Of messages that were asked for and are just being checked, by `id`: seconds."""
        self.dropped = 0
        self.rejected = 0
        self._written = trio.Event()
        self._lagging: set[ID] = set()
        self._peers = peers
        self._unproved: rpc_pb2.Message | None = None
        """A new message, while its signature is checked."""

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Every message, ours included, enters here; the library runs it in a task of the
        service."""
        if len(msg.topicIDs) != 1 or (topic := self.topics.get(msg.topicIDs[0])) is None:
            return
        if self._peers.ban_of(msg_forwarder) is not None:
            return  # the rest of a flood that is over
        if len(msg.data) > topic.limit:
            self._refuse(msg_forwarder, f"{len(msg.data)} bytes on {msg.topicIDs[0]}")
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:
            # Boundary: keys, signatures and ids in the message are hostile input, and an exception
            # here would end pubsub and with it the host.
            self.rejected += 1
            log.debug("dropped a gossip message from %s: %r", msg_forwarder, error)
        if self._unproved is msg:
            # The library drops it without a word. Nothing in it awaits before `validate_msg`.
            self._unproved = None
            self._refuse(msg_forwarder, "a message without a good signature")

    def _is_msg_seen(self, msg: rpc_pb2.Message) -> bool:
        seen = bool(super()._is_msg_seen(msg))
        self._unproved = None if seen else msg
        return seen

    def _refuse(self, forwarder: ID, why: str) -> None:
        """Everybody checks what it passes on: this comes from nobody honest."""
        self.rejected += 1
        if forwarder != self.my_id:
            self._peers.accuse(forwarder, Offence.GOSSIP, why)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        """A topic joined while the greeting is on its way stands neither in it nor in the
        announcement to known peers: say all topics again, or the peer is never told."""
        before = set(self.topic_ids)
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None and set(self.topic_ids) != before:
            queue.push(self.get_hello_packet())

    async def validate_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        self._unproved = None
        if ID(msg.from_id) != self.my_id:
            self._ask_validator(msg_forwarder, msg)
        # Ours, too, when it comes back after a restart: we may be the only one who passes it on.
        now, age = trio.current_time(), self.ages.get(id(msg))
        raw = msg.SerializeToString()
        self.recent.hold(_message_id(msg), msg.topicIDs[0], msg.from_id, raw, now, age)

    def _ask_validator(self, forwarder: ID, msg: rpc_pb2.Message) -> None:
        name = msg.topicIDs[0]
        account = self._peers.account(forwarder)
        account.gossip_bytes += len(msg.data)
        began = time.perf_counter()
        try:
            valid = self.topics[name].validate(str(forwarder), msg.data)
        except Exception:
            # Boundary: a defect in a validator costs the message, not the host.
            log.exception("the validator of %s failed", name)
            valid = None
        account.spent += time.perf_counter() - began
        if valid is False:
            self._refuse(forwarder, f"its message on {name} is invalid")
        if not valid:
            raise ValidationError("the validator refused")

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        rpc_msg.ClearField("senderRecord")
        try:
            return await super().write_msg(stream, rpc_msg)
        finally:
            self._written.set()
            self._written = trio.Event()

    async def wait_for_room(self, topic: str) -> None:
        """Until the queues of the peers on `topic` are short; a peer that does not read holds us
        up once, and then no more before its queue is short again."""
        with trio.move_on_after(_LAG_SECONDS):
            while self._busy(topic) - self._lagging:
                await self._written.wait()
        self._lagging = self._busy(topic)

    def _busy(self, topic: str) -> set[ID]:
        """Peers to whom so much is waiting that more might be dropped."""
        return {
            peer
            for peer in self.peer_topics.get(topic, ())
            if (queue := self.peer_queues.get(peer)) is not None and len(queue) >= _QUEUE_BUSY
        }

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        source = ID(publish_message.from_id)
        if source == self.my_id:
            return
        name = publish_message.topicIDs[0]
        try:
            self.topics[name].send.send_nowait(
                GossipMessage(str(source), name, publish_message.data)
            )
        except trio.WouldBlock:
            self.dropped += 1
        except trio.BrokenResourceError:
            pass  # the subscriber has gone; the topic is still relayed

    async def take(self, peer: ID, raw: bytes, age: float) -> bool:
        """Check and deliver a message that we asked `peer` for; whether it was new and good."""
        message = _parse(raw)
        key = _message_id(message)
        if self.seen_messages.has(key):
            return False
        self.ages[id(message)] = age
        try:
            await self.push_msg(peer, message)
        finally:
            del self.ages[id(message)]
        return key in self.recent

    def forget(self, peer: ID) -> None:
        """The connection to `peer` is gone. The library forgets this when a new one comes quickly,
        keeps a dead stream in its table and is deaf to the peer from then on."""
        if peer in self.peers:
            self._handle_dead_peer(peer)


class Gossip:
    """Gossip of one host; made by `open_gossip`."""

    def __init__(self, host: IHost, limits: Limits, peers: Peers) -> None:
        self._router = _Router(
            [PROTOCOL_ID_V12, PROTOCOL_ID_V11],
            degree=_DEGREE,
            degree_low=_DEGREE_LOW,
            degree_high=_DEGREE_HIGH,
            heartbeat_interval=_HEARTBEAT_SECONDS,
            heartbeat_initial_delay=0.1,
            prune_back_off=10,
            spam_protection_enabled=False,
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,
        )
        self._router.mcache = _MessageCache(_GOSSIP_WINDOW, _GOSSIP_HISTORY)
        self._pubsub = _Pubsub(host, self._router, peers)
        self._limits = limits
        self.joined = trio.Event()
        """Set and replaced whenever a topic is joined."""
        self._pace = trio.Lock()
        self._next = 0.0

    @property
    def recent(self) -> Recent:
        """What others can ask for."""
        return self._pubsub.recent

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self._pubsub.topics)

    def lacks(self, key: bytes) -> bool:
        """Whether a message was not seen lately."""
        return key not in self.recent and not self._pubsub.seen_messages.has(key)

    def key_of(self, raw: bytes) -> bytes:
        """The id of a message; msgspec.DecodeError when it is none."""
        return _message_id(_parse(raw))

    async def take(self, peer: str, raw: bytes, age: float) -> bool:
        """Check and deliver a message that we asked `peer` for; whether it was new and good."""
        return await self._pubsub.take(parse_peer_id(peer), raw, age)

    @property
    def dropped(self) -> int:
        return self._pubsub.dropped

    @property
    def rejected(self) -> int:
        return self._pubsub.rejected

    async def subscribe(
        self, topic: str, *, limit: int, validate: Validator
    ) -> trio.MemoryReceiveChannel[GossipMessage]:
        if topic in self._pubsub.topics:
            raise GossipRefused(f"{topic} is subscribed already")
        if limit > self._limits.gossip_bytes:
            raise GossipRefused(
                f"a gossip message has at most {self._limits.gossip_bytes} bytes, not {limit}: "
                "announce a hash and serve the rest by stream"
            )
        send, receive = trio.open_memory_channel[GossipMessage](self._limits.gossip_queue)
        self._pubsub.topics[topic] = _Topic(limit, validate, send)
        # The library's own channel stays unread and empty: delivery is `notify_subscriptions`.
        await self._pubsub.subscribe(topic)
        self.joined.set()
        self.joined = trio.Event()
        return receive

    async def publish(self, topic: str, data: bytes) -> None:
        known = self._pubsub.topics.get(topic)
        if known is None:
            raise GossipRefused(f"subscribe to {topic} before publishing on it")
        if len(data) > known.limit:
            raise GossipRefused(f"{topic} takes at most {known.limit} bytes, not {len(data)}")
        async with self._pace:
            # A bucket of `_BURST` publications, refilled with `gossip_per_second`.
            interval = 1 / self._limits.gossip_per_second
            now = trio.current_time()
            self._next = max(self._next, now - _BURST * interval) + interval
            if self._next > now:
                await trio.sleep(self._next - now)
            await self._pubsub.wait_for_room(topic)
            await self._pubsub.publish(topic, data)

    def forget(self, peer: ID) -> None:
        self._pubsub.forget(peer)


@asynccontextmanager
async def open_gossip(host: IHost, limits: Limits, peers: Peers) -> AsyncIterator[Gossip]:
    """Run gossip on a running libp2p host; `peers` keeps the accounts of who passes what on."""
    gossip = Gossip(host, limits, peers)
    try:
        async with (
            background_trio_service(gossip._pubsub),
            background_trio_service(gossip._router),
        ):
            await gossip._pubsub.wait_until_ready()
            yield gossip
    finally:
        # Joins the sweeper thread that the library leaves behind.
        await trio.to_thread.run_sync(gossip._pubsub.seen_messages.stop)
