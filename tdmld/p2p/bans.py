"""Who may not connect: PeerIds and IP networks, for a time or until the operator lifts it.

Three kinds of entries: what the configuration denies, what the operator bans by command, and what
the host bans by itself for offences. The host's own bans last `FIRST_SECONDS`, twice as long each
time the same one is banned again, `LAST_SECONDS` at most; who stays away from trouble for
`FORGET_SECONDS` after a ban begins anew. Pure: the caller gives the clock, saves and enforces.
"""

import logging
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import trio

from tdmld import files
from tdmld.p2p.accounting import Network, network_of
from tdmld.p2p.addresses import parse_peer_id
from tdmld.p2p.errors import AddressInvalid, BansFull

log = logging.getLogger(__name__)

FIRST_SECONDS = 600.0
LAST_SECONDS = 24 * 3600.0
FORGET_SECONDS = 24 * 3600.0
MAX_OWN = 4096
"""Bans of the host itself; above it the one that ends first goes."""
MAX_OPERATOR = 1024
"""Entries of configuration and operator together: each is looked at for every new connection."""
MAX_REASON = 200
_FILE_BYTES = (MAX_OWN + MAX_OPERATOR) * 512

Author = Literal["node", "operator", "configuration"]


class Ban(msgspec.Struct, frozen=True):
    """One entry. The form in bans.json, too."""

    subject: Annotated[str, msgspec.Meta(max_length=128)]
    """A PeerId, or a network such as 192.0.2.7/32 or 2001:db8::/64."""
    until: Annotated[float, msgspec.Meta(ge=0, le=1e11)] | None
    """Unix time in seconds; None: until it is lifted."""
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)] = ""
    author: Author = "operator"
    times: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1
    """How often the host has banned it: each time for twice as long."""

    def holds(self, now: float) -> bool:
        return self.until is None or now < self.until


def parse_subject(text: str) -> str:
    """A PeerId, IP address or network in its one spelling. AddressInvalid."""
    if len(text) > 128:
        raise AddressInvalid("that is too long for a PeerId or a network")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        try:
            return str(parse_peer_id(text))
        except AddressInvalid as error:
            raise AddressInvalid(
                f"{text!r} is neither a PeerId nor an IP address or network such as 192.0.2.0/24"
            ) from error
    if "/" not in text:
        network = network_of(text)
    return str(network)


class Bans:
    """All entries of one host."""

    def __init__(self, denied: Iterable[str] = (), now: Callable[[], float] = time.time) -> None:
        """`denied`: PeerIds and networks of the configuration. AddressInvalid."""
        self._now = now
        self._bans: dict[str, Ban] = {}
        self._networks: dict[str, Network] = {}
        """Those of operator and configuration, parsed."""
        self.changed = trio.Event()
        """Set and replaced when an entry comes or is lifted; nothing announces that one ends."""
        for text in denied:
            subject = parse_subject(text)
            self._put(Ban(subject, None, "denied in the configuration", "configuration"))

    def all(self) -> tuple[Ban, ...]:
        """Every entry, also past ones that make the next ban of the same one longer."""
        return tuple(self._bans.values())

    # Questions

    def peer(self, peer_id: str) -> Ban | None:
        """The entry that keeps this PeerId out now."""
        return self._holding(peer_id)

    def address(self, host: str) -> Ban | None:
        """The entry that keeps this IP address out now."""
        try:
            own = network_of(host)
        except ValueError:
            return None
        found = self._holding(str(own))
        if found is not None:
            return found
        for subject, network in self._networks.items():
            covers = network.version == own.version and own.subnet_of(network)  # type: ignore[arg-type]
            if covers and (found := self._holding(subject)) is not None:
                return found
        return None

    def holding(self) -> tuple[Ban, ...]:
        """Every entry that holds now: those of people first, then by subject."""
        now = self._now()
        found = [ban for ban in self._bans.values() if ban.holds(now)]
        return tuple(sorted(found, key=lambda ban: (ban.author == "node", ban.subject)))

    def _holding(self, subject: str) -> Ban | None:
        ban = self._bans.get(subject)
        return ban if ban is not None and ban.holds(self._now()) else None

    # Changes

    def add(self, text: str, seconds: float | None = None, reason: str = "") -> Ban:
        """The operator bans a PeerId, address or network. AddressInvalid, BansFull."""
        subject = parse_subject(text)
        known = self._bans.get(subject)
        if known is not None and known.author == "configuration":
            return known
        people = sum(ban.author != "node" for ban in self._bans.values())
        if people >= MAX_OPERATOR:
            raise BansFull(f"{MAX_OPERATOR} bans are the most there can be: lift some, or ban nets")
        until = None if seconds is None else self._now() + seconds
        return self._put(Ban(subject, until, reason[:MAX_REASON], "operator"))

    def lift(self, text: str) -> Ban | None:
        """Take an entry back; None when there is none that holds. AddressInvalid.

        One of the configuration comes back with the next start.
        """
        found = self._holding(parse_subject(text))
        if found is not None:
            self._remove(found.subject)
            self._tell()
        return found

    def punish(self, subject: str, reason: str) -> Ban:
        """The host bans `subject` (a PeerId, or a network's text) by itself."""
        now, known = self._now(), self._bans.get(subject)
        if known is not None and (known.author != "node" or known.holds(now)):
            return known
        times = 1
        if known is not None and known.until is not None and now < known.until + FORGET_SECONDS:
            times = known.times + 1
        seconds = min(FIRST_SECONDS * 2.0 ** min(times - 1, 32), LAST_SECONDS)
        self._make_room()
        return self._put(Ban(subject, now + seconds, reason[:MAX_REASON], "node", times))

    def restore(self, bans: Iterable[Ban]) -> None:
        """Take entries as they are (from disk, or from the daemon); the malformed are left out.
        The configuration's own stay."""
        now = self._now()
        for ban in bans:
            try:
                subject = parse_subject(ban.subject)
            except AddressInvalid as error:
                log.warning("dropped a ban: %s", error)
                continue
            known = self._bans.get(subject)
            old = ban.until is not None and now >= ban.until + FORGET_SECONDS
            if (known is None or known.author != "configuration") and not old:
                self._put(msgspec.structs.replace(ban, subject=subject))

    def replace(self, bans: Iterable[Ban]) -> None:
        """What people and another host have banned, in the place of what was given before; what
        this host found out by itself stays."""
        for ban in [ban for ban in self._bans.values() if ban.author == "operator"]:
            self._remove(ban.subject)
        # As the operator's, so that the next list takes them back.
        self.restore(msgspec.structs.replace(ban, author="operator") for ban in bans)

    def _put(self, ban: Ban) -> Ban:
        self._bans[ban.subject] = ban
        if ban.author != "node" and ("/" in ban.subject):
            self._networks[ban.subject] = ip_network(ban.subject)
        self._tell()
        return ban

    def _remove(self, subject: str) -> None:
        self._bans.pop(subject, None)
        self._networks.pop(subject, None)

    def _make_room(self) -> None:
        own = [ban for ban in self._bans.values() if ban.author == "node"]
        if len(own) >= MAX_OWN:
            self._remove(min(own, key=lambda ban: ban.until or 0.0).subject)

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


def load_bans(path: Path) -> tuple[Ban, ...]:
    """The entries kept on disk; what cannot be read is left out with a warning."""
    try:
        rows = msgspec.json.decode(files.read_file(path, _FILE_BYTES), type=list[msgspec.Raw])
    except FileNotFoundError:
        return ()
    except (OSError, RecursionError, msgspec.MsgspecError) as error:
        log.warning("%s is unreadable and starts anew: %s", path, error)
        return ()
    found = []
    for row in rows:
        try:
            found.append(msgspec.json.decode(row, type=Ban))
        except (RecursionError, msgspec.MsgspecError) as error:
            log.warning("dropped from %s: %s", path, error)
    return tuple(found)


def save_bans(path: Path, bans: Iterable[Ban]) -> None:
    """Write entries for `load_bans`, without those of the configuration. OSError."""
    rows = [ban for ban in bans if ban.author != "configuration"]
    files.write_file(path, msgspec.json.format(msgspec.json.encode(rows), indent=1))
