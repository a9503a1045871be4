"""Nodes on the same local network find each other: multicast DNS (RFC 6762) service discovery
(RFC 6763) in the form of libp2p/specs discovery/mdns.md.

    query     _p2p._udp.local PTR
    answer    _p2p._udp.local PTR <random name>._p2p._udp.local, beside it SRV, A, and a TXT record
              with dnsaddr=/ip4/<ip>/tcp/<port>/p2p/<peer id> for each listening address

A further TXT entry `tdmld=<network>` tells networks apart; libp2p nodes of other kinds ignore it,
and we ignore them. Only packets are parsed by the library (zeroconf); its service browser is not
used, for it keeps whatever anybody on the network says in a cache and lives in threads of its own.
Here nothing is kept: an answer is checked, told on, forgotten.

What a hostile neighbour can do is bounded: a packet is at most 9,000 bytes, an answer names at most
MAX_ADDRESSES addresses, and only on the very IP address that it came from, so nobody can send us
elsewhere; PER_SECOND answers are looked at. Identity is proved when the peer is dialled.

IPv4 only: local networks without it are rare, and such a node is found by other means.
"""

import logging
import secrets
import socket
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import uniform

import trio
from zeroconf import (  # type: ignore[attr-defined]
    DNSAddress,
    DNSIncoming,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSService,
    DNSText,
)

from tdmld.p2p.addresses import parse_direct, parse_peer_id
from tdmld.p2p.errors import AddressInvalid
from tdmld.p2p.interfaces import expand, interface_addresses
from tdmld.p2p.shield import shielded
from tdmld.p2p.types import PeerInfo

log = logging.getLogger(__name__)

GROUP = "224.0.0.251"
PORT = 5353
SERVICE = "_p2p._udp.local."
_META = "_services._dns-sd._udp.local."  # RFC 6763 section 9
MAX_PACKET_BYTES = 9000
"""RFC 6762 section 17."""
MAX_ADDRESSES = 8
PER_SECOND = 20.0
"""Answers of others looked at on an interface."""
INTERFACES_SECONDS = 15.0
"""Between two looks at which interfaces there are: cables and Wi-Fi come and go."""
MAX_INTERFACES = 16
_FIRST_QUERY_SECONDS = 1.0
_LAST_QUERY_SECONDS = 3600.0
"""RFC 6762 section 5.2: the pause doubles, up to an hour. Who comes later asks itself."""
_ANSWER_DELAY_SECONDS = (0.02, 0.12)
_ANSWER_PAUSE_SECONDS = 1.0
"""RFC 6762 section 6: so long before an answer, so long between two of them."""
_TTL_SECONDS = 120
_HOST_TTL_SECONDS = 120
_GOODBYE_SECONDS = 0.5
_IP_MULTICAST_ALL = 49  # linux/in.h; the module socket has no name for it

# RFC 1035 section 3.2, RFC 6762 section 10.2
_PTR, _TXT, _A, _SRV, _ANY = 12, 16, 1, 33, 255
_IN, _FLUSH = 1, 0x8000
_QUERY, _RESPONSE = 0x0000, 0x8400


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node says about itself on one interface."""

    name: str
    """Random, so that it tells nothing before the identity is proved."""
    peer_id: str
    network: str
    ip: str
    """Of the interface."""
    addresses: tuple[str, ...]


def query() -> bytes:
    """The question for all peers."""
    packet = DNSOutgoing(_QUERY)
    packet.add_question(DNSQuestion(SERVICE, _PTR, _IN))
    return packet.packets()[0]


def answer(said: Announcement, *, meta: bool = False, goodbye: bool = False) -> bytes:
    """The answer to it; `meta` also names the service, `goodbye` takes the answer back."""
    instance, server = f"{said.name}.{SERVICE}", f"{said.name}.local."
    ttl = 0 if goodbye else _TTL_SECONDS
    packet = DNSOutgoing(_RESPONSE)
    packet.add_answer_at_time(DNSPointer(SERVICE, _PTR, _IN, ttl, instance), 0)
    if meta:
        packet.add_answer_at_time(DNSPointer(_META, _PTR, _IN, ttl, SERVICE), 0)
    if not goodbye:
        unique = _IN | _FLUSH
        texts = [f"dnsaddr={address}/p2p/{said.peer_id}" for address in said.addresses]
        text = b"".join(_string(entry) for entry in [*texts, f"tdmld={said.network}"])
        port = parse_direct(said.addresses[0]).port
        service = DNSService(instance, _SRV, unique, _HOST_TTL_SECONDS, 0, 0, port, server)
        packet.add_additional_answer(service)
        packet.add_additional_answer(DNSText(instance, _TXT, unique, ttl, text))
        ip = socket.inet_aton(said.ip)
        packet.add_additional_answer(DNSAddress(server, _A, unique, _HOST_TTL_SECONDS, ip))
    return packet.packets()[0]


def _string(text: str) -> bytes:
    raw = text.encode()
    return bytes([len(raw)]) + raw


def asks(packet: DNSIncoming, name: str) -> tuple[bool, bool]:
    """Whether a query is for us (the service, or the names of the instance `name`), and whether
    it asks for the services there are."""
    ours = {SERVICE, f"{name}.{SERVICE}", f"{name}.local."}
    questions = {question.key for question in packet.questions}
    meta = _META in questions
    return meta or bool(ours & questions), meta


def answers(packet: DNSIncoming, sender: str, network: str) -> Iterator[PeerInfo]:
    """The peers of `network` that an answer from the IP address `sender` names."""
    for record in packet.answers():
        if isinstance(record, DNSText) and record.key.endswith(SERVICE) and record.ttl > 0:
            found = _peer(_entries(record.text), sender, network)
            if found is not None:
                yield found


def _entries(text: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(text):
        found.append(text[at + 1 : at + 1 + text[at]])
        at += 1 + text[at]
    return found


def _peer(entries: Sequence[bytes], sender: str, network: str) -> PeerInfo | None:
    if b"tdmld=" + network.encode() not in entries:
        return None
    peers: dict[str, list[str]] = {}
    for entry in [entry for entry in entries if entry.startswith(b"dnsaddr=")][:MAX_ADDRESSES]:
        address, _, peer_id = entry[8:].decode("ascii", "replace").partition("/p2p/")
        try:
            parse_peer_id(peer_id)
            if parse_direct(address).host == sender:
                peers.setdefault(peer_id, []).append(address)
        except AddressInvalid as error:
            log.debug("%s announces what cannot be used: %s", sender, error)
    if len(peers) != 1:
        return None
    peer_id, addresses = next(iter(peers.items()))
    return PeerInfo(peer_id, tuple(addresses))


class LanDiscovery:
    """Announces one host on the local networks and finds others of `network`.

    `listening()` gives the host's listening addresses, asked whenever somebody asks us. `found` is
    called with each valid answer, also a repeated one, and must not block. `loopback` looks on
    the interface of the machine itself and no other, for tests.
    """

    def __init__(
        self,
        peer_id: str,
        network: str,
        listening: Callable[[], Sequence[str]],
        found: Callable[[PeerInfo], None],
        *,
        loopback: bool = False,
        port: int = PORT,
    ) -> None:
        self._peer_id = peer_id
        self._network = network
        self._listening = listening
        self._found = found
        self._loopback = loopback
        self._port = port
        alphabet = string.ascii_lowercase + string.digits
        self._name = "".join(secrets.choice(alphabet) for _ in range(40))
        self.interfaces: frozenset[str] = frozenset()
        """IP addresses on which we announce and listen now."""

    async def run(self) -> None:
        """Announce and listen until cancelled; then say goodbye, within half a second."""
        scopes: dict[str, trio.CancelScope] = {}
        async with trio.open_nursery() as nursery:
            while True:
                own = interface_addresses(loopback=self._loopback)
                present = [ip for ip in own if ":" not in ip][:MAX_INTERFACES]
                for ip in scopes.keys() - set(present):
                    scopes.pop(ip).cancel()
                for ip in present:
                    if ip not in scopes:
                        scopes[ip] = trio.CancelScope()
                        nursery.start_soon(self._interface, ip, scopes)
                await trio.sleep(INTERFACES_SECONDS)

    async def _interface(self, ip: str, scopes: dict[str, trio.CancelScope]) -> None:
        scope = scopes[ip]
        try:
            with scope, trio.socket.from_stdlib_socket(_open(ip, self._port)) as opened:
                self.interfaces |= {ip}
                said = partial(self._said, ip)
                await _Interface(
                    opened, self._port, self._network, self._name, said, self._take
                ).run()
        except OSError as error:
            # The interface went away, or has no multicast; the next look tries again.
            log.debug("no local discovery on %s: %s", ip, error)
        finally:
            self.interfaces -= {ip}
            if scopes.get(ip) is scope:
                del scopes[ip]

    def _said(self, ip: str) -> Announcement | None:
        """What can be reached through this interface; None: nothing."""
        addresses = [a for a in expand(self._listening(), [ip]) if a.startswith(f"/ip4/{ip}/tcp/")]
        if not addresses:
            return None
        return Announcement(
            self._name, self._peer_id, self._network, ip, tuple(addresses[:MAX_ADDRESSES])
        )

    def _take(self, info: PeerInfo) -> None:
        if info.peer_id != self._peer_id:
            self._found(info)


class _Interface:
    """Discovery on one interface."""

    def __init__(
        self,
        opened: trio.socket.SocketType,
        port: int,
        network: str,
        name: str,
        said: Callable[[], Announcement | None],
        take: Callable[[PeerInfo], None],
    ) -> None:
        self._socket = opened
        self._port = port
        self._network = network
        self._name = name
        self._said = said
        self._take = take
        self._asked = trio.Event()
        self._meta = False
        self._room = PER_SECOND
        self._counted = trio.current_time()

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ask)
                nursery.start_soon(self._answer)
                await self._read()
        except BaseExceptionGroup as group:
            # One of the three tasks met the end of the interface.
            error = group.exceptions[0]
            if len(group.exceptions) == 1 and isinstance(error, OSError):
                raise error from None
            raise
        finally:
            with shielded(_GOODBYE_SECONDS), suppress(OSError):
                if (said := self._said()) is not None:
                    await self._send(answer(said, goodbye=True))

    async def _send(self, raw: bytes) -> None:
        await self._socket.sendto(raw, (GROUP, self._port))

    async def _ask(self) -> None:
        pause = _FIRST_QUERY_SECONDS
        while True:
            # We hear it, too, and answer: so it is our announcement at the same time.
            await self._send(query())
            await trio.sleep(pause * uniform(1.0, 1.1))
            pause = min(2 * pause, _LAST_QUERY_SECONDS)

    async def _answer(self) -> None:
        while True:
            await self._asked.wait()
            await trio.sleep(uniform(*_ANSWER_DELAY_SECONDS))
            meta, self._meta, self._asked = self._meta, False, trio.Event()
            if (said := self._said()) is not None:
                await self._send(answer(said, meta=meta))
            await trio.sleep(_ANSWER_PAUSE_SECONDS)

    async def _read(self) -> None:
        while True:
            raw, sender = await self._socket.recvfrom(MAX_PACKET_BYTES)
            packet = DNSIncoming(raw)
            if not packet.valid:
                continue
            if packet.is_query():
                asked, meta = asks(packet, self._name)
                self._meta |= meta
                if asked:
                    self._asked.set()
            elif sender[1] == self._port and self._has_room():  # RFC 6762 section 6
                for info in answers(packet, str(sender[0]), self._network):
                    self._take(info)

    def _has_room(self) -> bool:
        """Whether this second still has room for an answer."""
        now = trio.current_time()
        self._room = min(PER_SECOND, self._room + (now - self._counted) * PER_SECOND)
        self._counted = now
        if self._room < 1:
            return False
        self._room -= 1
        return True


def _open(ip: str, port: int) -> socket.socket:
    """A socket in the group on the interface that has `ip`. OSError."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        # Shared: the system's own responder uses the same port.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        interface = socket.inet_aton(ip)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        if sys.platform == "linux":
            # Only what comes through this interface.
            opened.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        # To the group, not to any address: or we would take the system's unicast away.
        opened.bind((GROUP, port))
        membership = socket.inet_aton(GROUP) + interface
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    except OSError:
        opened.close()
        raise
    return opened
