"""The chain side of a node: it follows the chain and, with a validator's key, makes it.

    Succession  one Validator an epoch: consensus over streams of their own (validators only)
    SyncClient  catch-up from anybody; SyncServer answers everybody
    gossip      final blocks, transactions and offers to everybody else
    Finality    the one queue through which final blocks reach the store
    Admission   the pool and the spreading of transactions

The caller keeps the host connected (`host.add_peer`); this service reacts to who is connected.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

import trio

from tdmld.chain.blocks import (
    MAX_VALIDATORS,
    Block,
    Certificate,
    Committee,
    ends_epoch,
    epoch_of,
)
from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import KeyPair, address
from tdmld.chain.genesis import Genesis
from tdmld.chain.ledger import Receipt
from tdmld.chain.light import Bundle
from tdmld.chain.mempool import Mempool
from tdmld.chain.pacing import Times
from tdmld.chain.state import State
from tdmld.node.admission import Admission
from tdmld.node.announcer import Announcer
from tdmld.node.chainerrors import SpecUnavailable
from tdmld.node.chainlinks import Links
from tdmld.node.chainwire import (
    GOSSIP_BLOCK_BYTES,
    GOSSIP_OFFER_BYTES,
    GOSSIP_TX_BYTES,
    Announcement,
    OfferNotice,
    Protocols,
    Transactions,
    consensus_bytes,
)
from tdmld.node.finality import Finality, HeadFeed
from tdmld.node.gossip import GossipDoor
from tdmld.node.handover import HandOver
from tdmld.node.prover import prove
from tdmld.node.snapshot import SnapshotServer
from tdmld.node.specs import Specs
from tdmld.node.store import AppliedBlock, ChainStore
from tdmld.node.succession import Succession
from tdmld.node.sync import SyncClient, SyncServer
from tdmld.node.validator import Validator
from tdmld.p2p import GossipMessage, Host, PeerConnected
from tdmld.p2p.errors import P2PError


class Started(Protocol):
    """trio's task status: called once, when the task is ready."""

    def started(self) -> None: ...


Deliver = Callable[[str, bytes], Awaitable[None]]

log = logging.getLogger(__name__)

EVERYBODY = "*"
"""The destination of transactions that are gossiped."""
QUIET_SECONDS = 5.0
"""A follower that hears nothing for a heartbeat and this much asks."""


def wall_clock_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class ChainService:
    """Follow the chain of `store`; validate in the epochs whose set has `node_key`.

    Run it once: `await nursery.start(service.run)`. Everything else may be used before and after.
    """

    def __init__(
        self,
        host: Host,
        store: ChainStore,
        genesis: Genesis,
        node_key: KeyPair | None = None,
        *,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._host, self.store, self.genesis = host, store, genesis
        parameters = genesis.parameters
        self._times = Times(
            parameters.interval_ms / 1000,
            parameters.view_timeout_ms / 1000,
            parameters.leader_away_ms / 1000,
            parameters.heartbeat_ms / 1000,
        )
        self._epoch_blocks = parameters.epoch_blocks
        self._protocols = Protocols(store.chain_id)
        self._finality = Finality(store)
        self._admission = Admission(self._finality, Mempool(genesis), self._spread, self._grown)
        self._admission.spent = host.spent
        self._hand_over = HandOver(self._deliver_to)
        self._specs = Specs(store)
        self._snapshots = SnapshotServer(self._finality)
        self._server = SyncServer(store, self._submitted, self._specs.get, self._snapshots)
        self._client = SyncClient(
            host,
            self._protocols.sync,
            self._finality,
            self._adopt,
            self._connected_validators,
        )
        self._door = GossipDoor(self._finality, self._admission, self._specs)
        self._announcer = Announcer(partial(self._publish, self._protocols.block), self._door.heard)
        self._heard_block = trio.Event()
        self._gossiping = False
        self._nursery: trio.Nursery | None = None
        self._links: Links | None = None
        self._succession = Succession(
            node_key,
            self._finality,
            self._admission,
            self._times,
            now_ms=now_ms,
            hint=self._client.hint,
        )
        if node_key is not None:
            self._links = Links(
                host,
                self._protocols.consensus,
                node_key.public,
                consensus_bytes(parameters.block_bytes, MAX_VALIDATORS),
                greet=self._succession.greet,
                receive=self._succession.receive,
                changed=self._grown,
            )
        self._succession.seat(self._links)
        self._finality.on_executed.append(self._executed)

    # ---- epochs ------------------------------------------------------------------------------

    @property
    def committee(self) -> Committee:
        """Who validates the block after the head."""
        return self._succession.committee

    @property
    def _validator(self) -> Validator | None:
        return self._succession.validator

    def _turn(self) -> None:
        """The last block of an epoch is executed."""
        self._succession.turn()
        if self._nursery is not None and self._links is not None:
            for peer in self._host.connected():
                self._links.connected(peer, self._nursery)

    # ---- questions ---------------------------------------------------------------------------

    @property
    def height(self) -> int:
        """The executed height."""
        return self.store.height

    @property
    def view(self) -> int:
        """A validator's current view; a follower's: that of the head."""
        return self._validator.view if self._validator is not None else self.store.head.view

    @property
    def head_hash(self) -> bytes:
        """The id of the executed head."""
        return self.store.head.hash

    @property
    def validating(self) -> bool:
        return self._validator is not None

    @property
    def syncing(self) -> bool:
        """Whether final blocks are known that are not executed here yet."""
        return self._client.active or self._finality.backlog > 3

    @property
    def pool_size(self) -> int:
        """Transactions waiting for a block."""
        return len(self._admission.pool)

    def is_pending(self, transaction: bytes) -> bool:
        """Whether a transaction waits here: in the pool, or final and not executed yet."""
        return transaction in self._admission.pool or transaction in self._finality.limbo

    @property
    def linked_validators(self) -> int:
        """Other validators with a consensus stream to this one; a follower: connected ones."""
        if self._validator is None or self._links is None:
            return len(self._connected_validators())
        return len(self._links.indices - {self.committee.index(self._validator.key.public)})

    def state(self) -> State:
        """The executed state, as of now and later: reads go to the store."""
        return State(self.store.get)

    def heads(self) -> HeadFeed:
        """Applied blocks from the next one on; see HeadFeed. Several may subscribe."""
        return self._finality.heads()

    async def prove(self, kind: str, name: str, checkpoint: int = 0) -> Bundle:
        """A proof for somebody who holds no chain; see `prover.prove`."""
        return await prove(self._finality, kind, name, checkpoint)

    # ---- transactions --------------------------------------------------------------------------

    async def submit(self, raw: bytes) -> bytes:
        """Admit a signed transaction and tell the validators; its id.

        Raises DecodeError, InvalidTransaction (with the broken rule) or ServiceBusy. Submitting
        one that is known is no error. After a cancellation it may or may not be on its way.
        """
        return await self._admission.submit(raw)

    async def wait_for(self, transaction: bytes) -> Receipt:
        """Wait until a transaction is final and executed. One that never will be is waited for
        until the caller gives up; cancellation changes nothing."""
        return await self._finality.wait_for(transaction)

    async def _spread(self, raws: Sequence[bytes]) -> None:
        """Tell all who could propose them. Returns at once."""
        if self._validator is not None and self._links is not None:
            self._links.broadcast(Transactions(tuple(raws)))
            return
        for to in self._connected_validators():
            self._hand_over.send(to, raws)
        if self._gossiping:
            self._hand_over.send(EVERYBODY, raws)

    async def _deliver_to(self, to: str, raws: Sequence[bytes]) -> None:
        if to == EVERYBODY:
            await self._publish(self._protocols.tx, encode(Transactions(tuple(raws))))
            return
        try:
            await self._client.submit(to, raws)
        except P2PError as error:
            log.info("could not hand transactions to %s: %s", to, error)

    async def _submitted(self, peer: str, raws: Sequence[bytes]) -> None:
        await self._admission.receive(raws, spread=True, source=peer)

    def _grown(self) -> None:
        if self._validator is not None:
            self._validator.wake()

    # ---- specs ---------------------------------------------------------------------------------

    async def publish_spec(self, raw: bytes, offer: bytes = b"") -> bytes:
        """Keep a spec, serve it, and gossip it with the signed offer that names it; its id."""
        spec = self._specs.put(raw)
        if offer and self._gossiping:
            await self._publish(self._protocols.offer, encode(OfferNotice(offer, raw)))
        return spec

    async def fetch_spec(self, spec: bytes) -> bytes:
        """A spec's bytes, from here or from a connected peer. Raises SpecUnavailable."""
        raw = self._specs.get(spec)
        if raw is not None:
            return raw
        peers = sorted(self._host.connected())
        raw = await self._client.spec_from_any(peers, spec)
        if raw is None:
            raise SpecUnavailable(
                f"none of {len(peers)} connected peers has the spec {spec.hex()}: "
                "try again when its submitter is connected"
            )
        self._specs.put(raw)
        return raw

    # ---- final blocks --------------------------------------------------------------------------

    def _adopt(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        self._succession.adopt(blocks, certificate)

    def _executed(self, applied: AppliedBlock) -> None:
        self._heard_block.set()
        self._specs.executed(applied)
        header = applied.block.header
        leads = self.committee.nodes[self.committee.leader(header.view + 1)]
        if self._validator is not None and not self.syncing:
            me = self._validator.key.public
            if me == header.proposer:
                self._announcer.proposed(applied)
            elif me == leads:
                self._announcer.leads_next(applied)
        if ends_epoch(applied.height, self._epoch_blocks):
            self._turn()

    def _heard(self, source: str, raw: bytes) -> None:
        """An announcement that passed the door."""
        notice = decode(Announcement, raw, GOSSIP_BLOCK_BYTES)
        header, finality = notice.header, self._finality
        if header.height <= finality.height:
            return
        if epoch_of(header.height, self._epoch_blocks) != self.committee.epoch:
            self._client.hint(source)
            return
        if self.validating:
            self._succession.certificate(notice.certificate)
            return
        body = notice.transactions
        if (
            body is not None
            and header.parent == finality.hash
            and header.height == finality.height + 1
        ):
            block = Block(header, notice.signature, body)
            self._adopt([block], notice.certificate)
        else:
            self._client.hint(source)

    def _connected_validators(self) -> list[str]:
        return sorted(self._host.connected() & set(map(address, self.committee.nodes)))

    # ---- running -------------------------------------------------------------------------------

    async def run(self, *, task_status: Started = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and follow until cancelled; started when handlers and topics are in place.

        Ends with InvariantViolation, StoreError, SignGuardError or ProtocolUnknown (in an
        exception group) when the node must stop.
        """
        self._host.set_handler(self._protocols.sync, self._server.accept)
        self._succession.start()
        if self._links is not None:
            self._host.set_handler(self._protocols.consensus, self._links.accept)
        changes = self._host.changes()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._finality.run)
            nursery.start_soon(self._admission.run)
            nursery.start_soon(self._admission.run_queue)
            nursery.start_soon(self._hand_over.run)
            nursery.start_soon(self._client.run)
            nursery.start_soon(self._snapshots.run)
            await self._subscribe(nursery)
            self._nursery = nursery
            nursery.start_soon(self._succession.run)
            nursery.start_soon(self._listen_for_silence)
            for peer in self._host.connected():
                self._peer_connected(peer, nursery)
            task_status.started()
            async for change in changes:
                if isinstance(change, PeerConnected):
                    self._peer_connected(change.peer_id, nursery)
            nursery.cancel_scope.cancel()

    def _peer_connected(self, peer: str, nursery: trio.Nursery) -> None:
        if self._links is not None:
            self._links.connected(peer, nursery)
        if self._validator is None:
            self._client.hint(peer)

    async def _listen_for_silence(self) -> None:
        """A follower that missed an announcement at the end of activity would never know."""
        while True:
            self._heard_block = trio.Event()
            with trio.move_on_after(self._times.heartbeat + QUIET_SECONDS) as quiet:
                await self._heard_block.wait()
            if quiet.cancelled_caught and self._validator is None:
                self._client.hint()

    # ---- gossip --------------------------------------------------------------------------------

    async def _subscribe(self, nursery: trio.Nursery) -> None:
        """Take part in gossip, when the host does."""
        door = self._door
        topics: tuple[tuple[str, int, Callable[[str, bytes], bool | None], Deliver], ...] = (
            (
                self._protocols.block,
                GOSSIP_BLOCK_BYTES,
                door.announcement,
                self._deliver_block,
            ),
            (self._protocols.tx, GOSSIP_TX_BYTES, door.transactions, self._deliver_tx),
            (self._protocols.offer, GOSSIP_OFFER_BYTES, door.offer, self._deliver_offer),
        )
        for topic, limit, validate, deliver in topics:
            try:
                channel = await self._host.subscribe(topic, limit=limit, validate=validate)
            except P2PError as error:
                log.info("not gossiping: %s", error)
                return
            nursery.start_soon(self._pump, channel, deliver)
        self._gossiping = True
        nursery.start_soon(self._announcer.run)

    async def _pump(
        self, channel: trio.MemoryReceiveChannel[GossipMessage], deliver: Deliver
    ) -> None:
        async for message in channel:
            await deliver(message.source, message.data)

    async def _deliver_block(self, source: str, raw: bytes) -> None:
        self._heard(source, raw)
        await self._finality.room()

    async def _deliver_tx(self, _: str, raw: bytes) -> None:
        batch = decode(Transactions, raw, GOSSIP_TX_BYTES)
        await self._admission.receive(batch.raws, spread=False, source="gossip")

    async def _deliver_offer(self, _source: str, _raw: bytes) -> None:
        """Remembered when it was validated."""

    async def _publish(self, topic: str, raw: bytes) -> None:
        try:
            await self._host.publish(topic, raw)
        except P2PError as error:
            log.warning("could not gossip on %s: %s", topic, error)
