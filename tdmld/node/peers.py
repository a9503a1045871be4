"""Who is where: signed peer records, how they spread, and which peers the daemon keeps.

Addresses of machines never stand on the chain. Every node signs one record of its own (where its
daemon and its carrier listen); daemons exchange the records they know over `/tdmld/<n>/peers/1` and
pass on what is new, so that whoever reaches one member of the network learns all of it. A record
with a higher sequence replaces an older one of the same node; nobody can speak for another.

Whom a node keeps connected so that all of them are one component, see `neighbours`.

Identities cost nothing, so records of nodes that are not registered on the chain get few places and
are dropped first; and nobody makes the network carry new records of one node without end.
"""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from tdmld import files
from tdmld.chain.codec import Hash, Natural, PublicKey, Record, Signature, decode, encode
from tdmld.chain.crypto import KeyPair, address, verify
from tdmld.chain.errors import DecodeError
from tdmld.node.neighbours import choose
from tdmld.p2p import Host, PeerConnected, PeerInfo, Stream
from tdmld.p2p.errors import P2PError

log = logging.getLogger(__name__)

MAX_RECORDS = 4096
"""Records in one book; a network of this size outgrows full exchange and needs another way."""
MAX_STRANGERS = 512
"""Of them, records of nodes that the chain does not know."""
MAX_RECORD_BYTES = 4096
MAX_RECORDS_PER_MESSAGE = 64
MAX_MESSAGE_BYTES = MAX_RECORDS_PER_MESSAGE * (MAX_RECORD_BYTES + 128)
"""Records of the greatest size pass, too: a few of them must not end everybody's exchange."""
MAX_BOOK_BYTES = 2 * MAX_RECORDS * (MAX_RECORD_BYTES + 128)
"""In base64."""
MAX_KEPT_PEERS = 48
"""Connections that the daemon itself keeps up; beyond that it still accepts. Validators and the
configured peers are kept besides."""
MAX_KEPT_STRANGERS = 16
"""Strangers are kept while fewer are."""
REVIEW_SECONDS = 30.0
"""Between two looks at who is away; each time, others of these are tried."""
AWAY_SECONDS = 60.0
"""Whom we did not reach for so long gives its place to another one."""
UPDATE_SECONDS = 5.0
"""Between two records of one node that we take from others and pass on, after the first few."""
UPDATE_BURST = 8
GREET_FIRST_SECONDS = 0.5
GREET_LAST_SECONDS = 10.0
"""Back-off between exchanges with a peer that stays connected."""
SAVE_SECONDS = 2.0
"""Changes of the book are collected for so long before it is written."""

_Address = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^/(ip4|ip6|dns|dns4|dns6)/[A-Za-z0-9.:_-]+/tcp/[0-9]{1,5}"
        r"(/p2p/[1-9A-HJ-NP-Za-km-z]{46,64}/p2p-circuit)?\Z"
    ),
    msgspec.Meta(max_length=256),
]
"""Where to dial: the node itself, or a relay by its address and PeerId."""
_Addresses = Annotated[tuple[_Address, ...], msgspec.Meta(max_length=8)]


class PeerRecord(Record, tag="peer", frozen=True):
    """Where a node's two listening processes are. `sequence` is the signer's clock in ms."""

    node: PublicKey
    sequence: Natural
    addresses: _Addresses
    session: PublicKey
    session_addresses: _Addresses
    relays: bool
    """Whether its carrier relays for those who cannot be dialled."""


class SignedRecord(Record, tag="signed", frozen=True):
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
    signature: Signature


class Records(Record, tag="records", frozen=True):
    """The only message of the protocol; both sides send it whenever they learn something new."""

    records: Annotated[tuple[SignedRecord, ...], msgspec.Meta(max_length=MAX_RECORDS_PER_MESSAGE)]


class PeerBook:
    """The verified records of one chain. Pure: no clock, no network.

    `registered(node)` says whether the chain knows a node key. When the book is full, a stranger's
    record makes room for a registered node's, never the other way round.
    """

    def __init__(
        self, chain_id: Hash, registered: Callable[[bytes], bool] = lambda node: True
    ) -> None:
        self._chain_id = chain_id
        self._registered = registered
        self._records: dict[bytes, tuple[PeerRecord, SignedRecord]] = {}
        self._strangers: dict[bytes, None] = {}

    def add(self, signed: SignedRecord) -> PeerRecord | None:
        """Take a record; returns it when it was new, None when it was known, old or one too many.

        Raises DecodeError when the record is malformed or its signature wrong.
        """
        record = decode(PeerRecord, signed.record, MAX_RECORD_BYTES)
        known = self.node(record.node)
        stranger = not self._registered(record.node)
        if known is not None and known.sequence >= record.sequence:
            return None
        if known is None and not self._has_room(stranger):
            return None
        if not verify(record.node, "peer", self._chain_id, signed.record, signed.signature):
            raise DecodeError(f"peer record of {address(record.node)} has a wrong signature")
        self._strangers.pop(record.node, None)
        if known is None and len(self._records) >= MAX_RECORDS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest], self._records[oldest]
        if stranger:
            self._strangers[record.node] = None
        self._records[record.node] = (record, signed)
        return record

    def _has_room(self, stranger: bool) -> bool:
        if stranger:
            return len(self._strangers) < MAX_STRANGERS and len(self._records) < MAX_RECORDS
        return len(self._records) < MAX_RECORDS or bool(self._strangers)

    def sign(self, key: KeyPair, record: PeerRecord) -> SignedRecord:
        """Sign this node's own record and keep it."""
        raw = encode(record)
        signed = SignedRecord(raw, key.sign("peer", self._chain_id, raw))
        self.add(signed)
        return signed

    def node(self, node: bytes) -> PeerRecord | None:
        found = self._records.get(node)
        return found[0] if found else None

    def records(self) -> list[PeerRecord]:
        return [record for record, _ in self._records.values()]

    def is_stranger(self, node: bytes) -> bool:
        """Whether the chain did not know the node when its record came."""
        return node in self._strangers

    def signed(self) -> list[SignedRecord]:
        return [signed for _, signed in self._records.values()]


def load_book(
    path: Path, chain_id: Hash, registered: Callable[[bytes], bool] = lambda node: True
) -> PeerBook:
    """The book kept on disk; records that do not verify are dropped with a warning."""
    book = PeerBook(chain_id, registered)
    try:
        raw = files.read_file(path, MAX_BOOK_BYTES)
        rows = msgspec.json.decode(raw, type=list[tuple[bytes, bytes]])
    except FileNotFoundError:
        return book
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("address book %s is unreadable and starts anew: %s", path, error)
        return book
    for record, signature in rows:
        try:
            book.add(SignedRecord(record, signature))
        except DecodeError as error:
            log.warning("dropped from the address book: %s", error)
    return book


def save_book(path: Path, records: Iterable[SignedRecord]) -> None:
    """Write a book for `load_book`. OSError."""
    rows = [(signed.record, signed.signature) for signed in records]
    files.write_file(path, msgspec.json.encode(rows))


class PeerService:
    """Keeps the daemon connected and its book current.

    `registered(node)` says whether the chain knows a node key, `validates(node)` whether it votes
    now or in the next epoch: validators are kept connected wherever their records come from. Call
    `validators_changed` when other nodes do.
    """

    def __init__(
        self,
        host: Host,
        key: KeyPair,
        chain_id: Hash,
        path: Path,
        bootstrap: Iterable[PeerInfo],
        *,
        registered: Callable[[bytes], bool] = lambda node: True,
        validates: Callable[[bytes], bool] = lambda node: False,
    ) -> None:
        self.book = load_book(path, chain_id, registered)
        self._host = host
        self._key = key
        self._path = path
        self._bootstrap = {info.peer_id: info for info in bootstrap}
        self._validates = validates
        self._protocol = f"/tdmld/{chain_id.hex()[:8]}/peers/1"
        self._outboxes: dict[str, trio.MemorySendChannel[list[SignedRecord]]] = {}
        self._kept: set[str] = set()
        self._validators: set[bytes] = set()
        self._unusable: dict[bytes, int] = {}
        """Node -> the sequence of a record whose addresses nobody can dial."""
        self._lost: dict[str, float] = {}
        """Peer that we keep -> since when it was not here."""
        self._turn = 0
        self._greeting: set[str] = set()
        self._updates: dict[bytes, float] = {}
        """Node -> when its next record would be due if it kept to UPDATE_SECONDS."""
        self._changed = trio.Event()

    @staticmethod
    def now_ms() -> int:
        """The wall clock in ms: sequences of records, times shown to people."""
        return time.time_ns() // 1_000_000

    def announce(
        self,
        session: bytes,
        session_addresses: tuple[str, ...],
        sequence: int,
        *,
        addresses: tuple[str, ...] | None = None,
        relays: bool = False,
    ) -> PeerRecord:
        """Sign and spread this node's own record; `sequence` must grow from call to call.

        `addresses`: where others can dial the daemon, when that is not where it listens.
        """
        record = PeerRecord(
            self._key.public,
            sequence,
            self._host.addresses if addresses is None else addresses,
            session,
            session_addresses,
            relays,
        )
        self._spread([self.book.sign(self._key, record)], sender=None)
        return record

    def validators_changed(self) -> None:
        """Connect to those whose records came when they did not validate yet."""
        self._validators = {r.node for r in self.book.records() if self._validates(r.node)}
        self._review()

    async def run(self) -> None:
        """Serve until cancelled."""
        self._host.set_handler(self._protocol, self._exchange)
        changes = self._host.changes()
        for info in self._bootstrap.values():
            self._keep(info)
        for record in self.book.records():
            if address(record.node) in self._bootstrap:
                self._keep_record(record)
        self.validators_changed()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._save)
            nursery.start_soon(self._watch)
            for peer_id in self._host.connected():
                nursery.start_soon(self._greet, peer_id)
            async for change in changes:
                if isinstance(change, PeerConnected):
                    nursery.start_soon(self._greet, change.peer_id)

    async def _save(self) -> None:
        """Write the book some time after it changed: strangers decide how often it does."""
        while True:
            await self._changed.wait()
            await trio.sleep(SAVE_SECONDS)
            self._changed = trio.Event()
            try:
                await trio.to_thread.run_sync(save_book, self._path, self.book.signed())
            except OSError as error:
                log.warning("the address book could not be saved: %s", error)

    async def _watch(self) -> None:
        """Who is away gives its place to others, and is tried now and then."""
        while True:
            await trio.sleep(REVIEW_SECONDS)
            now, here = trio.current_time(), self._host.connected()
            for peer_id in self._kept - here:
                self._lost.setdefault(peer_id, now)
            known = self._kept | {address(record.node) for record in self.book.records()}
            self._lost = {p: at for p, at in self._lost.items() if p in known and p not in here}
            self._turn += 1
            self._review()

    def _review(self) -> None:
        """Keep the bootstrap nodes, the validators, and whom `neighbours` chooses; nobody else."""
        candidates: dict[bytes, PeerRecord] = {}
        for record in self.book.records():
            if record.addresses and self._unusable.get(record.node) != record.sequence:
                candidates[record.node] = record
        long_ago = trio.current_time() - AWAY_SECONDS
        lost = {peer_id for peer_id, at in self._lost.items() if at <= long_ago}
        away = {node for node in candidates if lost and address(node) in lost}
        strangers = {node for node in candidates if self.book.is_stranger(node)}

        def chosen(nodes: set[bytes], most: int) -> set[bytes]:
            return choose(self._key.public, nodes, away, most=most, turn=self._turn)

        wanted = chosen(candidates.keys() - strangers, MAX_KEPT_PEERS)
        if len(wanted) < MAX_KEPT_STRANGERS:
            wanted |= chosen(strangers, MAX_KEPT_STRANGERS - len(wanted))
        wanted |= self._validators & candidates.keys()
        named = {address(node) for node in wanted} | self._bootstrap.keys()
        for peer_id in self._kept - named:
            self._host.remove_peer(peer_id)
        self._kept &= named
        for record in candidates.values():
            if record.node in wanted and address(record.node) not in self._kept:
                self._keep_record(record)

    def _keep_record(self, record: PeerRecord) -> None:
        hearsay = record.node not in self._validators
        if not self._keep(PeerInfo(address(record.node), record.addresses), patient=hearsay):
            self._unusable[record.node] = record.sequence

    def _keep(self, info: PeerInfo, *, patient: bool = False) -> bool:
        """Whether it can be dialled. Addresses from the configuration stay good."""
        if info.peer_id == self._host.peer_id:
            return True
        if (configured := self._bootstrap.get(info.peer_id)) is not None:
            info = PeerInfo(
                info.peer_id, tuple(dict.fromkeys((*configured.addresses, *info.addresses)))
            )
            patient = False
        try:
            self._host.add_peer(info, patient=patient)
        except P2PError as error:
            log.warning("the addresses of %s cannot be used: %s", info.peer_id, error)
            return False
        self._kept.add(info.peer_id)
        return True

    async def _greet(self, peer_id: str) -> None:
        """Keep an exchange with a peer while it is connected. Of two peers the one with the
        smaller id opens the stream; again when it is refused (the other is just starting) or
        breaks (one of two connections was dropped)."""
        if self._host.peer_id > peer_id or peer_id in self._greeting:
            return
        self._greeting.add(peer_id)
        pause = GREET_FIRST_SECONDS
        try:
            while peer_id in self._host.connected():
                try:
                    stream = await self._host.open_stream(peer_id, self._protocol)
                except P2PError as error:
                    log.info("no exchange of peer records with %s: %s", peer_id, error)
                else:
                    await self._exchange(stream)
                await trio.sleep(pause)
                pause = min(2 * pause, GREET_LAST_SECONDS)
        finally:
            self._greeting.discard(peer_id)

    async def _exchange(self, stream: Stream) -> None:
        send, receive = trio.open_memory_channel[list[SignedRecord]](256)
        self._outboxes[stream.peer_id] = send
        everything = self.book.signed()
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream, everything, receive)
                while True:
                    raw = await stream.receive(MAX_MESSAGE_BYTES)
                    self._learn(stream.peer_id, decode(Records, raw, MAX_MESSAGE_BYTES))
        except* P2PError as group:
            log.debug("peer exchange with %s ended: %s", stream.peer_id, group.exceptions[0])
        except* DecodeError as group:
            log.warning("peer exchange with %s: %s", stream.peer_id, group.exceptions[0])
            stream.blame(str(group.exceptions[0]))
        finally:
            if self._outboxes.get(stream.peer_id) is send:
                del self._outboxes[stream.peer_id]

    async def _write(
        self,
        stream: Stream,
        first: list[SignedRecord],
        more: trio.MemoryReceiveChannel[list[SignedRecord]],
    ) -> None:
        await self._send(stream, first)
        async for records in more:
            await self._send(stream, records)

    async def _send(self, stream: Stream, records: list[SignedRecord]) -> None:
        for start in range(0, len(records), MAX_RECORDS_PER_MESSAGE):
            batch = tuple(records[start : start + MAX_RECORDS_PER_MESSAGE])
            await stream.send(encode(Records(batch)))

    def _learn(self, sender: str, message: Records) -> None:
        new, began = list[SignedRecord](), time.perf_counter()
        try:
            for signed in message.records:
                record = self._take(signed)
                if record is not None:
                    new.append(signed)
                    if self._validates(record.node):
                        self._validators.add(record.node)
                    if address(record.node) in self._kept:
                        self._keep_record(record)  # at new addresses
        finally:
            if new:
                self._review()
                self._changed.set()
                self._spread(new, sender)
            self._host.spent(sender, time.perf_counter() - began)

    def _take(self, signed: SignedRecord) -> PeerRecord | None:
        """A record that is new, and not one more of a node that floods us."""
        node, now = decode(PeerRecord, signed.record, MAX_RECORD_BYTES).node, trio.current_time()
        due = max(self._updates.get(node, now), now)
        if due - now > UPDATE_BURST * UPDATE_SECONDS:
            return None
        record = self.book.add(signed)
        if record is not None:
            self._updates[node] = due + UPDATE_SECONDS
            if len(self._updates) > 2 * MAX_RECORDS:
                self._updates = {key: at for key, at in self._updates.items() if at > now}
        return record

    def _spread(self, records: list[SignedRecord], sender: str | None) -> None:
        for peer_id, outbox in self._outboxes.items():
            if peer_id != sender:
                try:
                    outbox.send_nowait(records)
                except trio.WouldBlock:
                    log.info("%s reads too slowly for peer records; it asks again", peer_id)
