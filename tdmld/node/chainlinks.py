"""Streams between validators of this epoch, the next and the one before: one each pair, opened by
the smaller node key, re-opened while the peers are connected. They are begun an epoch early, and
end an epoch late: a validator whose last epoch is over is perhaps the only one that knows its last
block to be final, and those who still vote on it have nobody else to ask. A link begins with a
hello both ways; then messages in order, or the link ends.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import trio

from tdmld.chain.blocks import Committee
from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import address
from tdmld.chain.errors import DecodeError
from tdmld.node.chainwire import ConsensusMessage, Transactions
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import P2PError, StreamError

log = logging.getLogger(__name__)

QUEUE_BYTES = 64 << 20
"""What a slow link may have waiting before it is closed; its hello starts it afresh."""
QUEUE_TX_BYTES = 8 << 20
"""Above it transactions are dropped: their origin repeats or proposes them."""
RETRY_FIRST, RETRY_LAST = 0.1, 2.0

Receive = Callable[["Link", ConsensusMessage], Awaitable[None]]


class Link:
    """One validator at the other end. `index`: its place in the present committee, None when it
    validates from the next epoch on, or did until now."""

    def __init__(self, index: int | None, stream: Stream) -> None:
        self.index = index
        self.peer_id = stream.peer_id
        self.stream = stream
        self.answered = -1.0
        """When the peer was last helped out of an old view (monotonic seconds)."""
        self.scope = trio.CancelScope()
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._news = trio.Event()

    def tell(self, message: object) -> None:
        """Queue a message."""
        self.send(encode(message))

    def send(self, raw: bytes) -> None:
        """Queue an encoded message; a link that does not drain is closed."""
        self._queue.append(raw)
        self._bytes += len(raw)
        self._news.set()
        if self._bytes > QUEUE_BYTES:
            log.warning("validator %s does not read: link closed", self.peer_id)
            self.scope.cancel()

    @property
    def congested(self) -> bool:
        return self._bytes > QUEUE_TX_BYTES

    async def drain(self) -> None:
        """Write queued messages for ever; StreamError when the stream is gone."""
        while True:
            while not self._queue:
                self._news = trio.Event()
                await self._news.wait()
            raw = self._queue.popleft()
            await self.stream.send(raw)
            self._bytes -= len(raw)


class Links:
    """All links of one node. `greet` gives what a new link is told first. None before `seat`."""

    def __init__(
        self,
        host: Host,
        protocol: str,
        me: bytes,
        limit: int,
        *,
        greet: Callable[[], Iterable[object]],
        receive: Receive,
        changed: Callable[[], None],
    ) -> None:
        self._host = host
        self._protocol = protocol
        self._me = me
        self._limit = limit
        self._greet = greet
        self._receive = receive
        self._changed = changed
        self._nodes: dict[str, bytes] = {}
        """Who may be linked."""
        self._indices: dict[str, int] = {}
        self._links: dict[str, Link] = {}
        self._dialling: set[str] = set()

    def seat(
        self, committee: Committee, following: Committee | None, former: Committee | None
    ) -> None:
        """These validate now, those next, and those did before. A node that is in none of them
        links with nobody."""
        others = [one for one in (following, former) if one is not None]
        nodes = {*committee.nodes, *(node for one in others for node in one.nodes)}
        mine = self._me in nodes
        self._nodes = {address(node): node for node in nodes if mine and node != self._me}
        self._indices = {address(node): index for index, node in enumerate(committee.nodes)}
        for peer, link in list(self._links.items()):
            link.index = self._indices.get(peer)
            if peer not in self._nodes:
                link.scope.cancel()

    def greet_all(self) -> None:
        """Tell every link what a new one is told: our epoch has begun."""
        for message in self._greet():
            self.broadcast(message)

    # ---- sending -----------------------------------------------------------------------------

    @property
    def indices(self) -> set[int]:
        """Validators of the present committee linked now, without oneself."""
        return {link.index for link in self._links.values() if link.index is not None}

    def broadcast(self, message: object) -> None:
        """Send to every linked validator."""
        raw = encode(message)
        spare = isinstance(message, Transactions)
        for link in list(self._links.values()):
            if not (spare and link.congested):
                link.send(raw)

    def holds(self, link: Link) -> bool:
        """Whether this link is in use, so that its `index` is up to date."""
        return self._links.get(link.peer_id) is link

    def get(self, index: int) -> Link | None:
        return next((link for link in self._links.values() if link.index == index), None)

    # ---- life --------------------------------------------------------------------------------

    def connected(self, peer_id: str, nursery: trio.Nursery) -> None:
        """A peer is connected: open a link when that is our part."""
        node = self._nodes.get(peer_id)
        if node is not None and self._me < node and peer_id not in self._dialling:
            self._dialling.add(peer_id)
            nursery.start_soon(self._keep, peer_id)

    async def _keep(self, peer_id: str) -> None:
        """Keep a link while the peer is connected and validates."""
        delay = RETRY_FIRST
        try:
            while peer_id in self._host.connected() and peer_id in self._nodes:
                try:
                    stream = await self._host.open_stream(peer_id, self._protocol)
                    began = trio.current_time()
                    await self._serve(stream)
                    if trio.current_time() - began > RETRY_LAST:
                        delay = RETRY_FIRST
                except P2PError as error:
                    log.debug("link to validator %s: %s", peer_id, error)
                await trio.sleep(delay)
                delay = min(2 * delay, RETRY_LAST)
        finally:
            self._dialling.discard(peer_id)

    async def accept(self, stream: Stream) -> None:
        """Handler of inbound links: only from validators whose part it is to open."""
        node = self._nodes.get(stream.peer_id)
        if node is None or node > self._me:
            log.debug("%s may not open a consensus stream here", stream.peer_id)
            await stream.reset()
            return
        await self._serve(stream)

    async def _serve(self, stream: Stream) -> None:
        peer = stream.peer_id
        if peer not in self._nodes:  # its epochs ended while the stream was opened
            await stream.reset()
            return
        link = Link(self._indices.get(peer), stream)
        old = self._links.get(peer)
        if old is not None:
            old.scope.cancel()
        self._links[peer] = link
        for message in self._greet():
            link.tell(message)
        self._changed()
        log.info("linked with validator %s", peer)
        try:
            with link.scope:
                await self._talk(link)
        finally:
            if self._links.get(peer) is link:
                del self._links[peer]
            self._changed()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.reset()

    async def _talk(self, link: Link) -> None:
        """Both directions until one ends; an ended stream or a malformed message ends the link."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain, link)
            while True:
                try:
                    raw = await link.stream.receive(self._limit)
                    message: ConsensusMessage = decode(ConsensusMessage, raw, self._limit)  # type: ignore[arg-type]
                except StreamError as error:
                    log.debug("link to validator %s ended: %s", link.peer_id, error)
                    break
                except DecodeError as error:
                    log.warning("validator %s sent a malformed message: %s", link.peer_id, error)
                    link.stream.blame(str(error))
                    break
                await self._receive(link, message)
            nursery.cancel_scope.cancel()

    async def _drain(self, link: Link) -> None:
        try:
            await link.drain()
        except StreamError as error:
            log.debug("link to validator %s broke: %s", link.peer_id, error)
            link.scope.cancel()
