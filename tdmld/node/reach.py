"""Whether this node can be reached, and what is done about it.

The daemon asks witnesses (connected daemons, one an owner, other owners first) to dial daemon and
carrier anew (`reachask`), and draws its conclusions (`reachverdict`):

    open      the node's carrier relays for others, unless the configuration says no
    closed    carrier and daemon keep reservations on relays; their relayed addresses are announced
    either    what was dialled with success is announced; receipts are kept for the ask

It asks again when a finding is old, when addresses change, and when a receipt nears its end. Where
the router forwards ports (UPnP) and who is on the local network (mDNS) is looked after here, too.

`changed` tells that the peer record must be signed anew, `on_news` that an ask may say more.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import trio

from tdmld.chain.codec import Hash
from tdmld.chain.crypto import KeyPair, address
from tdmld.chain.limits import RECEIPTS
from tdmld.chain.transactions import DIAL_OPEN, DIAL_PAIR, DialReceipt
from tdmld.node.errors import MachineError
from tdmld.node.peers import PeerBook
from tdmld.node.reachask import Asker, Finding, Trial
from tdmld.node.reachbook import Offers, is_relayed, key_of
from tdmld.node.reachcarrier import ReachCarrier
from tdmld.node.reachlan import LanPeers
from tdmld.node.reachverdict import (
    State,
    announced,
    candidates,
    is_loopback_text,
    verdict,
)
from tdmld.node.reachwitness import PAIR_SECONDS, Witness
from tdmld.node.receipts import Receipts
from tdmld.p2p import Host, PeerConnected, PeerInfo
from tdmld.p2p.errors import AddressInvalid
from tdmld.p2p.interfaces import expand, interface_addresses
from tdmld.p2p.upnp import PortMapper

log = logging.getLogger(__name__)

WITNESSES = 3
"""Asked at least; more when the chain wants more receipts."""
FINDING_SECONDS = 600.0
"""Age at which a witness is asked again."""
FAILURE_SECONDS = 60.0
"""The same when it did not try."""
CHECK_SECONDS = 15.0
"""Between two looks at what is old; a look that finds nothing costs nothing."""
EARLIEST_SECONDS = 2.0
"""Events come in crowds: one round for all of them."""
PATIENCE_SECONDS = 45.0
"""Without anybody to ask, or a direct path to others that nobody can dial, nothing is expected any
more after so long."""
MEMBERS_SECONDS = 60.0
"""Whom we relay for is a look at every record and its node on the chain."""
PAIRS = 4
"""Nodes with which direct paths are sought at a time."""
PAIR_FIRST_SECONDS, PAIR_LAST_SECONDS = 5.0, 600.0
"""Back-off: at first the other may not be connected yet, later there is hardly a way."""


@dataclass(frozen=True, slots=True)
class ReachPolicy:
    """What the configuration and the chain's rules say."""

    announce: tuple[str, ...] = ()
    carrier_announce: tuple[str, ...] = ()
    mdns: bool = False
    upnp: bool = False
    relay: bool = True
    receipt_blocks: int = 1000
    """Age of a receipt, in blocks, at which the chain takes it no more."""
    receipts: int = 0
    """Owners whose receipts the chain wants."""


class Reachability:
    """One node's service. Public attributes may be read at any time."""

    def __init__(
        self,
        host: Host,
        key: KeyPair,
        chain_id: Hash,
        book: PeerBook,
        carrier: ReachCarrier,
        session: bytes,
        policy: ReachPolicy,
        *,
        height: Callable[[], int],
        owner_of: Callable[[bytes], bytes | None],
    ) -> None:
        """`height()` is final; `owner_of(node)` is None for who is not registered."""
        self.policy = policy
        self.findings: dict[str, Finding] = {}
        """By witness."""
        self.settled = False
        self.changed = trio.Event()
        self.on_news: Callable[[], None] = lambda: None
        self.relaying: tuple[bytes, ...] = ()
        """Keys of nodes and sessions that the carrier relays for."""
        self.relays: tuple[PeerInfo, ...] = ()
        """Candidates that the carrier was given to be reached through."""
        self._host = host
        self._key = key
        self._book = book
        self._carrier = carrier
        self._height = height
        self._owner_of = owner_of
        self._offers = Offers(book, key.public, owner_of)
        self._asker = Asker(host, chain_id, key.public, session)
        self._receipts = Receipts(height, self._counts, policy.receipt_blocks)
        self._pair_due: dict[bytes, tuple[float, float]] = {}
        """Node -> when to seek a path to it again, and how long to wait then."""
        self._pairing = 0
        self._patient = True
        self._asking: set[str] = set()
        self._asked: dict[str, float] = {}
        """Witness -> when it answered last, or failed to."""
        self._anew: set[str] = set()
        """Witnesses that have connected since they were asked."""
        self._due_since = -math.inf
        self._answered = trio.Event()
        self._wake = trio.Event()
        self._told: tuple[object, ...] = ()
        self._daemon_relays: tuple[PeerInfo, ...] = ()
        self._own = interface_addresses()
        self._known_members: tuple[bytes, ...] = ()
        self._members_of, self._members_until = 0, -math.inf
        Witness(host, key, chain_id, book, carrier, height, owner_of)
        outside = [text for text in host.listening if not is_loopback_text(text)]
        outside += [text for text in carrier.addresses if not is_loopback_text(text)]
        ports = tuple(dict.fromkeys(int(text.rpartition("/")[2]) for text in outside))
        self.mapper = PortMapper(ports) if policy.upnp and ports else None
        self.lan = LanPeers(host, chain_id, book) if policy.mdns and ports else None

    # What is known

    @property
    def daemon_state(self) -> State:
        return self._verdict(lambda finding: finding.daemon)

    @property
    def carrier_state(self) -> State:
        return self._verdict(lambda finding: finding.carrier)

    @property
    def closed(self) -> bool:
        """Others tried to dial our carrier, in vain."""
        return self.carrier_state == "closed"

    def _verdict(self, trial: Callable[[Finding], Trial]) -> State:
        return verdict([(trial(f), not f.near) for f in self.findings.values()])

    @property
    def daemon_addresses(self) -> tuple[str, ...]:
        """What the peer record should say of the daemon."""
        return self._announced(
            self.policy.announce,
            self._host.listening,
            self._host.addresses,
            [finding.daemon for finding in self.findings.values()],
            self.daemon_state,
        )

    @property
    def carrier_addresses(self) -> tuple[str, ...]:
        """What the peer record should say of the carrier."""
        return self._announced(
            self.policy.carrier_announce,
            self._carrier_listening,
            self._carrier.addresses,
            [finding.carrier for finding in self.findings.values()],
            self.carrier_state,
        )

    @property
    def _carrier_listening(self) -> tuple[str, ...]:
        return tuple(text for text in self._carrier.addresses if not is_relayed(text))

    def _announced(
        self,
        configured: Sequence[str],
        listening: Sequence[str],
        present: Sequence[str],
        trials: Sequence[Trial],
        state: State,
    ) -> tuple[str, ...]:
        relayed = [text for text in present if is_relayed(text)]
        mapped = self._mapped(listening)
        own = expand(listening, self._own)
        return announced(configured, trials, mapped, relayed, own, state=state)

    def _mapped(self, listening: Sequence[str]) -> list[str]:
        """Addresses on the Internet that the router forwards to these listening ports."""
        if self.mapper is None:
            return []
        ports = {int(text.rpartition("/")[2]) for text in listening}
        mappings = self.mapper.state.mappings.items()
        return [m.address for port, m in mappings if port in ports and m.public]

    def receipts(self) -> tuple[DialReceipt, ...]:
        """As an ask takes them (`Receipts.fresh`)."""
        tried = (f for f in self.findings.values() if f.carrier.reached is not None)
        return self._receipts.fresh(outside=any(not f.near for f in tried))

    def _counts(self, witness: bytes) -> bool:
        """Whether the chain takes the word of a node for us."""
        owner = self._owner_of(witness)
        return owner is not None and owner != self._owner_of(self._key.public)

    # Running

    async def run(self) -> None:
        """Serve until cancelled; then ports are unmapped, within some seconds."""
        async with trio.open_nursery() as nursery:
            if self.mapper is not None:
                nursery.start_soon(self.mapper.run)
                nursery.start_soon(self._follow_router, self.mapper)
            if self.lan is not None:
                nursery.start_soon(self.lan.run)
            nursery.start_soon(self._follow_peers)
            nursery.start_soon(self._follow_host)
            nursery.start_soon(self._follow_carrier)
            nursery.start_soon(self._wait_in_vain)
            nursery.start_soon(self._rounds)

    async def _follow_router(self, mapper: PortMapper) -> None:
        while True:
            await mapper.changed.wait()
            self._moved()

    async def _follow_peers(self) -> None:
        with self._host.changes() as changes:
            async for change in changes:
                if isinstance(change, PeerConnected) and change.peer_id in self.findings:
                    # It may see us elsewhere now, or be elsewhere itself.
                    self._anew.add(change.peer_id)
                self._wake.set()

    async def _follow_host(self) -> None:
        with self._host.address_changes() as changes:
            async for _ in changes:
                self._tell()

    async def _follow_carrier(self) -> None:
        listening = self._carrier_listening
        while True:
            await self._carrier.changed.wait()
            if listening != self._carrier_listening:
                listening = self._carrier_listening
                self._moved()
            self._tell()

    async def _wait_in_vain(self) -> None:
        await trio.sleep(PATIENCE_SECONDS)
        self._patient = False
        self._settle()

    def _settle(self) -> None:
        """Say once that nothing more is expected, when that is so."""
        state, asked = self.carrier_state, self._all_answered()
        # Who cannot be dialled may still find a direct path: the others' relayed addresses come.
        paired = self._receipts.of_kind(DIAL_PAIR)
        done = asked and (state == "open" or paired)
        if not self.settled and not self._pairing and (done or not self._patient):
            self.settled = True
            self.on_news()

    def _moved(self) -> None:
        """What was found of addresses that we had is out of date."""
        self._ask_again()
        self._tell()

    def _ask_again(self) -> None:
        """Until the answers come, what was found before is all that is known."""
        self._due_since = trio.current_time()
        self._wake.set()

    def _tell(self) -> None:
        """Tell whoever signs the peer record, if it should say something else."""
        told = (self.daemon_addresses, self.carrier_addresses, bool(self.relaying))
        if told != self._told:
            self._told = told
            self.changed.set()
            self.changed = trio.Event()

    async def _rounds(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                if (own := interface_addresses()) != self._own:
                    self._own = own
                    self._ask_again()
                self._round(nursery)
                await self._follow_verdict()
                self._seek_pairs(nursery)
                self._tell()
                with trio.move_on_after(CHECK_SECONDS):
                    await self._wake.wait()
                self._wake = trio.Event()
                await trio.sleep(EARLIEST_SECONDS)

    async def refresh(self, seconds: float) -> None:
        """Ask every witness again, and wait for the answers for so long. For people."""
        self._ask_again()
        with trio.move_on_after(seconds):
            while not self._all_answered():
                await self._answered.wait()

    def _all_answered(self) -> bool:
        """Every witness, since the last reason to ask; False when there is none."""
        chosen = self.witnesses()
        return bool(chosen) and all(
            self._asked.get(witness, -math.inf) >= self._due_since for witness in chosen
        )

    # Witnesses

    def witnesses(self) -> list[str]:
        """Whom to ask: some of the connected daemons, those that were asked before preferred."""
        here = [p.peer_id for p in self._host.peers() if p.connected and p.path == "direct"]
        most = min(RECEIPTS, max(WITNESSES, self.policy.receipts + 1))
        return self._offers.witnesses(here, self.findings, most)

    def _round(self, nursery: trio.Nursery) -> None:
        """Ask those whose finding is missing or old. A slow witness keeps up nothing."""
        chosen = self.witnesses()
        for gone in self.findings.keys() - set(chosen):
            if trio.current_time() - self.findings[gone].at > FINDING_SECONDS:
                del self.findings[gone]
                self._asked.pop(gone, None)
                self._anew.discard(gone)
        for witness in chosen:
            if self._is_due(witness) and witness not in self._asking:
                self._asking.add(witness)
                nursery.start_soon(self._examine, witness)
        self._settle()

    def _is_due(self, witness: str) -> bool:
        finding, asked = self.findings.get(witness), self._asked.get(witness, -math.inf)
        age = trio.current_time() - asked
        useful = (
            finding is not None
            and finding.useful
            and not finding.partial
            and asked - finding.at < FAILURE_SECONDS
        )
        pause = FINDING_SECONDS if useful else FAILURE_SECONDS
        if asked < self._due_since or age > pause:
            return True
        anew = witness in self._anew or self._receipts.fades(DIAL_OPEN, key_of(witness))
        return anew and age > CHECK_SECONDS

    async def _examine(self, witness: str) -> None:
        self._anew.discard(witness)
        try:
            finding = await self._asker.examine(witness, self._daemon_at, self._carrier_at)
        finally:
            self._asking.discard(witness)
        self._asked[witness] = trio.current_time()
        known = self.findings.get(witness)
        if known is None or finding.at - known.at > FINDING_SECONDS:
            self.findings[witness] = finding
        elif finding.useful:
            self.findings[witness] = finding.completed(known)
        if finding.failure:
            log.info("%s does not say whether we can be reached: %s", witness, finding.failure)
        if finding.carrier.reached is False:
            self._receipts.drop(DIAL_OPEN, key_of(witness))
        self._keep(finding.receipt, near=finding.near)
        self._answered.set()
        self._answered = trio.Event()
        self._wake.set()

    def _daemon_at(self, seen_at: str) -> tuple[str, ...]:
        listening = self._host.listening
        return candidates(seen_at, listening, (*self.policy.announce, *self._mapped(listening)))

    def _carrier_at(self, seen_at: str) -> tuple[str, ...]:
        listening = self._carrier_listening
        configured = self.policy.carrier_announce
        return candidates(seen_at, listening, (*configured, *self._mapped(listening)))

    def _keep(self, receipt: DialReceipt | None, *, near: bool = False) -> None:
        if receipt is not None and self._receipts.keep(receipt, near=near):
            self.on_news()

    # Pairs

    async def pair_receipt(self, node: bytes) -> DialReceipt | None:
        """Make a direct path between our carrier and that of `node`, if there is one, and have its
        daemon sign for it. None when there is none; the log says why."""
        record = self._book.node(node)
        if record is None:
            return None
        try:
            direct = await self._carrier.connect_direct(
                address(record.session), record.session_addresses, PAIR_SECONDS
            )
        except MachineError as error:
            log.info("no path to the carrier of %s: %s", address(node), error)
            return None
        if not direct:
            log.info("no direct path to the carrier of %s", address(node))
            return None
        answer = await self._asker.pair(address(node))
        if isinstance(answer, str):
            log.info("no receipt of %s for a direct path: %s", address(node), answer)
            return None
        self._keep(answer)
        return answer

    def _seek_pairs(self, nursery: trio.Nursery) -> None:
        """Who cannot be dialled needs direct paths to those that cannot either."""
        if self.carrier_state != "closed":
            return
        now, here = trio.current_time(), self._host.connected()
        # Of others there would be no answer; records of nodes that are gone stay for long.
        closed = (node for node in self._offers.closed() if address(node) in here)
        for node in islice(closed, RECEIPTS):
            due, pause = self._pair_due.get(node, (now, PAIR_FIRST_SECONDS))
            known = self._receipts.has(DIAL_PAIR, node, 0.5)
            if self._pairing < PAIRS and now >= due and not known:
                self._pair_due[node] = (math.inf, pause)
                self._pairing += 1
                nursery.start_soon(self._pair, node, pause)
        if len(self._pair_due) > 256:
            self._pair_due.clear()

    async def _pair(self, node: bytes, pause: float) -> None:
        try:
            if await self.pair_receipt(node) is not None:
                pause = PAIR_FIRST_SECONDS
        finally:
            self._pairing -= 1
        due = trio.current_time() + pause
        self._pair_due[node] = (due, min(2 * pause, PAIR_LAST_SECONDS))
        self._wake.set()

    # Relays

    async def _follow_verdict(self) -> None:
        """Be reached through relays when we cannot be dialled; relay when we can."""
        carrier, daemon = self.carrier_state, self.daemon_state
        relays = self._offers.relays() if "closed" in (carrier, daemon) else ()
        relaying = self._members() if carrier == "open" and self.policy.relay else ()
        try:
            if relaying != self.relaying:
                await self._carrier.set_relaying(relaying)
                self.relaying = relaying
            if carrier != "unknown":
                wanted = relays if carrier == "closed" else ()
                if wanted != self.relays:
                    await self._carrier.set_relays(wanted)
                    self.relays = wanted
        except MachineError as error:
            log.info("the carrier was not told about relays: %s; again soon", error)
        if daemon != "unknown":
            wanted = relays if daemon == "closed" else ()
            if wanted != self._daemon_relays:
                self._set_daemon_relays(wanted)

    def _members(self) -> tuple[bytes, ...]:
        """Whom to relay for; looked up anew when there are more records, and every minute."""
        now, known = trio.current_time(), len(self._book.records())
        if known != self._members_of or now > self._members_until:
            self._members_of, self._members_until = known, now + MEMBERS_SECONDS
            self._known_members = self._offers.members()
        return self._known_members

    def _set_daemon_relays(self, wanted: tuple[PeerInfo, ...]) -> None:
        try:
            self._host.set_relays(wanted)
            self._daemon_relays = wanted
        except AddressInvalid as error:
            log.warning("the addresses of a relay cannot be used: %s", error)
