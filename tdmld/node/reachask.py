"""Asking one witness how this node can be reached."""

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import public_key, verify
from tdmld.chain.errors import DecodeError
from tdmld.chain.transactions import (
    DIAL_DOMAIN,
    DIAL_OPEN,
    DIAL_PAIR,
    DialReceipt,
    receipt_bytes,
)
from tdmld.node.reachwire import (
    ANSWER_SECONDS,
    MAX_REACH_BYTES,
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
    protocol,
    seen_at,
)
from tdmld.p2p import Host
from tdmld.p2p.accounting import network_of
from tdmld.p2p.errors import P2PError, StreamBroken
from tdmld.p2p.interfaces import is_global

OBSERVE_SECONDS = 10.0
"""For an answer that needs no dial."""
AGAIN_SECONDS = 0.5
"""Pause after a broken stream; doubled each time, so a few tries in all."""

Candidates = Callable[[str], tuple[str, ...]]
"""Where to be dialled, when seen at an IP address."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one dial."""

    reached: bool | None
    """None: nobody dialled."""
    address: str = ""
    """Where, when it was reached."""
    why: str = ""
    """Why not, in the witness's words."""


UNTRIED = Trial(None)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one witness says."""

    witness: str
    """PeerId of its daemon."""
    at: float
    """When it was asked, on trio's clock."""
    seen_at: str = ""
    """The IP address that it sees us at; empty when it does not say."""
    near: bool = False
    """It is on our local network, or behind our router: how others are seen from there says nothing
    of the world."""
    clock_ms: float | None = None
    """How far its clock is ahead of ours."""
    daemon: Trial = UNTRIED
    carrier: Trial = UNTRIED
    receipt: DialReceipt | None = None
    failure: str = ""
    """Why there is no finding at all."""
    partial: bool = False
    """It refused to dial where it might have: it was busy, or lacks our newest record."""

    @property
    def useful(self) -> bool:
        """It was tried whether we can be reached."""
        return self.daemon.reached is not None or self.carrier.reached is not None

    def completed(self, known: "Finding") -> "Finding":
        """With what was found before of what was not tried this time; once, then it is too old."""
        if not self.partial or known.partial:
            return self
        daemon = known.daemon if self.daemon.reached is None else self.daemon
        carrier = known.carrier if self.carrier.reached is None else self.carrier
        return replace(self, daemon=daemon, carrier=carrier)


class Asker:
    """Asks witnesses on behalf of this node and its carrier's `session`."""

    def __init__(self, host: Host, chain_id: bytes, node: bytes, session: bytes) -> None:
        self._host = host
        self._chain_id = chain_id
        self._protocol = protocol(chain_id)
        self._node = node
        self._session = session

    async def examine(self, witness: str, daemon: Candidates, carrier: Candidates) -> Finding:
        """Everything that a connected daemon can say; never raises but cancellation. It may take
        ANSWER_SECONDS for each of two dials."""
        begun, asked = trio.current_time(), time.time_ns() // 1_000_000
        seen = await self._ask(witness, Observe(), OBSERVE_SECONDS)
        if not isinstance(seen, Observed):
            return Finding(witness, begun, failure=_why(seen).why)
        if not _is_ip(seen.ip):
            return Finding(witness, begun, failure="where it sees us is no IP address")
        took = 1000 * (trio.current_time() - begun)
        found: dict[str, Answer] = {}

        async def ask(name: str, request: Request) -> None:
            found[name] = await self._ask(witness, request)

        async with trio.open_nursery() as nursery:
            if at := daemon(seen.ip):
                nursery.start_soon(ask, "daemon", DialDaemon(at))
            if at := carrier(seen.ip):
                nursery.start_soon(ask, "carrier", DialBack(self._session, at))
        answer = found.get("carrier")
        receipt = answer if isinstance(answer, Receipt) else None
        return Finding(
            witness,
            begun,
            seen_at=seen.ip,
            near=is_near(seen.ip, seen_at(witness, self._host.peers())),
            clock_ms=seen.time_ms - asked - took / 2,
            daemon=_trial(found.get("daemon")),
            carrier=_trial(answer),
            receipt=receipt.receipt if receipt is not None else None,
            partial=any(_trial(answer).reached is None for answer in found.values()),
        )

    async def pair(self, witness: str) -> DialReceipt | str:
        """A receipt that its carrier and ours are connected directly, or why there is none."""
        answer = await self._ask(witness, Pair(self._session))
        return answer.receipt if isinstance(answer, Receipt) else _why(answer).why

    async def _ask(self, witness: str, request: Request, seconds: float = ANSWER_SECONDS) -> Answer:
        """The answer; a witness that fails or lies counts as one that refuses."""
        try:
            with trio.fail_after(seconds):
                raw = await self._exchange(witness, encode(request))
            answer: Answer = decode(Answer, raw, MAX_REACH_BYTES)  # type: ignore[arg-type]
        except trio.TooSlowError:
            return Refused(f"no answer within {seconds:g} s", False)
        except (P2PError, DecodeError) as error:
            return Refused(f"{error}"[:400], False)
        if isinstance(answer, Receipt) and not self._signed(witness, request, answer.receipt):
            return Refused("its receipt is not for what we asked, or not signed by it", False)
        if isinstance(answer, Reached | Receipt) and answer.address not in _where(request):
            # What it says goes into our record, and others dial it.
            return Refused("it says that it dialled what we did not ask for", False)
        return answer

    async def _exchange(self, witness: str, request: bytes) -> bytes:
        """The answer in bytes. Again after a broken stream: just now connections through a relay
        may become direct ones, and the streams on them break."""
        pause = AGAIN_SECONDS
        while True:
            try:
                async with await self._host.open_stream(witness, self._protocol) as stream:
                    await stream.send(request)
                    return await stream.receive(MAX_REACH_BYTES)
            except StreamBroken:
                await trio.sleep(pause)
                pause *= 2

    def _signed(self, witness: str, request: Request, receipt: DialReceipt) -> bool:
        kind = DIAL_OPEN if isinstance(request, DialBack) else DIAL_PAIR
        message = receipt_bytes(self._node, self._session, receipt.kind, receipt.height)
        return (
            receipt.witness == public_key(witness)
            and receipt.kind == kind
            and verify(receipt.witness, DIAL_DOMAIN, self._chain_id, message, receipt.signature)
        )


def is_near(us: str, witness: str) -> bool:
    """Whether a witness at an IP address that sees us at another stands on our side of a router."""
    return not is_global(us) or (bool(witness) and network_of(us) == network_of(witness))


def _where(request: Request) -> tuple[str, ...]:
    """What the answer may name."""
    return request.addresses if isinstance(request, DialDaemon | DialBack) else ("",)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _trial(answer: Answer | None) -> Trial:
    match answer:
        case None:
            return Trial(None, why="there is no address that it could dial: see what we listen on")
        case Reached(address):
            return Trial(True, address)
        case Receipt(_, address):
            return Trial(True, address)
        case Refused(reason, tried):
            return Trial(False if tried else None, why=reason)
        case _:
            return _why(answer)


def _why(answer: Answer) -> Trial:
    if isinstance(answer, Refused):
        return Trial(None, why=answer.reason)
    return Trial(None, why=f"it answers with a {type(answer).__name__}")
