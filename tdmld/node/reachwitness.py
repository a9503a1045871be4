"""The witness: dials others on request, and signs what it saw.

What an asker can make us do is bounded four times: by its own allowance, by that of its IP address
(identities cost nothing), by one for all askers together, and by the number of dials at a time.
Whom we dial is never a third party: see `reachwire`.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import trio

from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import KeyPair, address, public_key
from tdmld.chain.errors import DecodeError
from tdmld.chain.transactions import DIAL_OPEN, DIAL_PAIR, sign_receipt
from tdmld.node.errors import CarrierUnavailable, MachineError
from tdmld.node.fairness import Allowance, Meter
from tdmld.node.peers import PeerBook, PeerRecord
from tdmld.node.reachbook import is_relayed
from tdmld.node.reachwire import (
    MAX_REACH_BYTES,
    MAX_REASON,
    Answer,
    DialBack,
    DialDaemon,
    Observe,
    Observed,
    Pair,
    Reached,
    Receipt,
    Refused,
    Request,
    ip_of,
    protocol,
    seen_at,
)
from tdmld.p2p import Host, Stream
from tdmld.p2p.dialback import Prober
from tdmld.p2p.errors import P2PError

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
PAIR_SECONDS = 20.0
"""For a hole to be punched."""
DIALS_AT_ONCE = 8
# "Work" is dials here, "size" bytes of requests.
PER_PEER = Allowance(work=1 / 5, size=1024.0, burst=100.0)
"""Twenty dials at once, then twelve a minute: a node asks twice in some minutes."""
PER_ADDRESS = Allowance(work=1 / 2, size=8192.0, burst=128.0)
"""A household, an office, or a whole network on one machine."""
TOGETHER = Allowance(work=2.0, size=65536.0, burst=60.0)


class CarrierDials(Protocol):
    """What the witness's carrier does for it (see `tdmld.node.carrierreach`)."""

    async def dial_back(self, session: str, addresses: Sequence[str]) -> str:
        """The address where a fresh connection found the session; MachineError says why none."""

    async def connect_direct(self, session: str, addresses: Sequence[str], seconds: float) -> bool:
        """Whether a direct connection with the session is there; MachineError."""


class Witness:
    """Serves the reach protocol of one chain. `height()` is the finalized height; `owner_of(node)`
    is None for who is not registered."""

    def __init__(
        self,
        host: Host,
        key: KeyPair,
        chain_id: bytes,
        book: PeerBook,
        carrier: CarrierDials,
        height: Callable[[], int],
        owner_of: Callable[[bytes], bytes | None],
    ) -> None:
        self._host = host
        self._key = key
        self._chain_id = chain_id
        self._book = book
        self._carrier = carrier
        self._height = height
        self._owner_of = owner_of
        self._prober = Prober(key.seed)
        self._per_peer = Meter(PER_PEER)
        self._per_address = Meter(PER_ADDRESS)
        self._together = Meter(TOGETHER)
        self._dials = trio.CapacityLimiter(DIALS_AT_ONCE)
        host.set_handler(protocol(chain_id), self.serve)

    async def serve(self, stream: Stream) -> None:
        """One request and its answer; who sends what is none, or nothing, is not answered."""
        with trio.move_on_after(REQUEST_SECONDS) as scope:
            raw = await stream.receive(MAX_REACH_BYTES)
        if scope.cancelled_caught:
            return await stream.reset()
        try:
            request: Request = decode(Request, raw, MAX_REACH_BYTES)  # type: ignore[arg-type]
        except DecodeError as error:
            stream.blame(str(error))
            return await stream.reset()
        if not _is_node(stream.peer_id):
            return await stream.reset()
        answer = await self._answer(stream.peer_id, request, len(raw))
        await stream.send(encode(answer))

    async def _answer(self, peer_id: str, request: Request, size: int) -> Answer:
        ip = seen_at(peer_id, self._host.peers())
        if not self._allowed(peer_id, ip, size, dials=not isinstance(request, Observe)):
            return _refused("too many requests; ask again in some minutes")
        if isinstance(request, Observe):
            now = time.time_ns() // 1_000_000
            return Observed(ip, now) if ip else _refused("you are connected through a relay")
        try:
            # Who finds every place taken is not made to wait: others may have room.
            self._dials.acquire_nowait()
        except trio.WouldBlock:
            return _refused("too many dials are under way here; ask again in some minutes")
        try:
            match request:
                case DialDaemon(addresses):
                    return await self._dial_daemon(peer_id, ip, addresses)
                case DialBack(session, addresses):
                    return await self._dial_back(peer_id, ip, session, addresses)
                case Pair(session):
                    return await self._pair(peer_id, ip, session)
        except CarrierUnavailable as error:
            return _refused(str(error))
        except (MachineError, P2PError) as error:
            return _refused(str(error), tried=True)
        finally:
            self._dials.release()

    def _allowed(self, peer_id: str, ip: str, size: int, *, dials: bool) -> bool:
        accounts = ((self._per_peer, peer_id), (self._per_address, ip), (self._together, "all"))
        # Every account is looked at, or one full one would let the others run over.
        if not all([meter.open(name, size) for meter, name in accounts]):
            return False
        if dials:
            for meter, name in accounts:
                meter.charge(name, 1.0)
        return True

    async def _dial_daemon(self, peer_id: str, ip: str, addresses: Sequence[str]) -> Answer:
        if (reason := _foreign(ip, addresses)) is not None:
            return reason
        return Reached(await self._prober.probe(peer_id, addresses))

    async def _dial_back(
        self, peer_id: str, ip: str, session: bytes, addresses: Sequence[str]
    ) -> Answer:
        if (reason := _foreign(ip, addresses)) is not None:
            return reason
        if self._record(peer_id, session) is None:
            return _not_theirs(session)
        found = await self._carrier.dial_back(address(session), addresses)
        return self._receipt(peer_id, session, DIAL_OPEN, found)

    async def _pair(self, peer_id: str, ip: str, session: bytes) -> Answer:
        record = self._record(peer_id, session)
        if record is None:
            return _not_theirs(session)
        # Not of strangers: anybody may sign a record that names somebody else's address.
        relays = (r for r in self._book.records() if r.relays)
        known = {r.session: r for r in relays if self._owner_of(r.node) is not None}
        at = [text for text in record.session_addresses if _may_dial(text, ip, known)]
        if not await self._carrier.connect_direct(address(session), at, PAIR_SECONDS):
            return _refused("our carriers have no direct connection", tried=True)
        return self._receipt(peer_id, session, DIAL_PAIR, "")

    def _record(self, peer_id: str, session: bytes) -> PeerRecord | None:
        """The asker's own record, when it names this session."""
        record = self._book.node(public_key(peer_id))
        return record if record is not None and record.session == session else None

    def _receipt(self, peer_id: str, session: bytes, kind: int, at: str) -> Receipt:
        node = public_key(peer_id)
        receipt = sign_receipt(self._key, self._chain_id, node, session, kind, self._height())
        return Receipt(receipt, at)


def _may_dial(text: str, ip: str, relays: Mapping[bytes, PeerRecord]) -> bool:
    """Whether an address in somebody's record leads to where we see it, or through a relay that
    says of itself that it is one, and there."""
    if not is_relayed(text):
        return bool(ip) and ip_of(text) == ip
    direct, _, rest = text.partition("/p2p/")
    try:
        relay = relays.get(public_key(rest.partition("/")[0]))
    except DecodeError:
        return False
    return relay is not None and direct in relay.session_addresses


def _is_node(peer_id: str) -> bool:
    """Whether a peer has a key of our kind; libp2p knows others."""
    try:
        public_key(peer_id)
    except DecodeError:
        return False
    return True


def _refused(reason: str, *, tried: bool = False) -> Refused:
    return Refused(reason[:MAX_REASON], tried)


def _not_theirs(session: bytes) -> Refused:
    return _refused(f"your peer record does not name the session {address(session)}")


def _foreign(ip: str, addresses: Sequence[str]) -> Refused | None:
    """Why not all of these are the asker's own."""
    if not ip:
        return _refused("you are connected through a relay")
    if not addresses:
        return _refused("no address to dial")
    for text in addresses:
        if ip_of(text) != ip:
            return _refused(f"{text} is not where I see you: {ip}")
    return None
