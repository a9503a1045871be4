"""Asks the home router to forward our ports (UPnP Internet Gateway Device).

The library (miniupnpc) works in a helper process, see `upnp_helper`: it can be ended at any moment,
and nothing that a device on the local network sends is parsed beside our keys.

A mapping is a lease of LEASE_SECONDS, renewed at half of it, so that a node that was killed leaves
nothing open for long; it is taken back when the node stops. That the router says yes proves
nothing: whether we can be reached from outside is for others to say (dial-back).
"""

import ipaddress
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio

from tdmld.p2p.addresses import format_address
from tdmld.p2p.errors import P2PError
from tdmld.p2p.interfaces import is_global
from tdmld.p2p.shield import shielded

log = logging.getLogger(__name__)

LEASE_SECONDS = 3600
RENEW_SECONDS = LEASE_SECONDS / 2
RETRY_SECONDS = 300.0
"""After a failure: routers restart, and laptops come home."""
SEARCH_SECONDS = 1.0
"""How long devices may take to answer one kind of search; there are four (UPnP Device
Architecture 1.3.2: MX)."""
_CALL_SECONDS = 15.0
_REMOVE_SECONDS = 4.0
_ANSWER_BYTES = 4096
_HELPER = Path(__file__).with_name("upnp_helper.py")


class UpnpFailed(P2PError):
    """There is no router that forwards ports, or it refuses; `str(error)` says which."""


class Mapping(msgspec.Struct, frozen=True):
    """What a router forwards to us. Decoded from the helper's answer."""

    gateway: str
    external_ip: str
    external_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    inside: str
    """Our own address as the router sees it."""

    @property
    def address(self) -> str:
        """As a multiaddr."""
        return format_address(self.external_ip, self.external_port)

    @property
    def public(self) -> bool:
        """Whether the router itself is on the Internet, not behind another one."""
        return is_global(self.external_ip)


class _Failure(msgspec.Struct, frozen=True):
    error: str


@dataclass
class UpnpState:
    """What `PortMapper` reached so far, by listening port."""

    mappings: dict[int, Mapping] = field(default_factory=dict)
    failure: str = ""
    """Why the last attempt failed; empty after a success."""


async def add_mapping(
    port: int,
    *,
    prefer: int | None = None,
    interface: str = "",
    search_seconds: float = SEARCH_SECONDS,
) -> Mapping:
    """Ask the router to forward a TCP port to us for LEASE_SECONDS; also renews. `prefer`: the
    external port, the same one if not given; another is taken when somebody has it.

    Takes the time of the search and a few seconds at most. UpnpFailed. Cancelled, the helper is
    ended; a mapping may stay until its lease is over.
    """
    request = {
        "do": "map",
        "port": port,
        "prefer": prefer or port,
        "lease": LEASE_SECONDS,
        "url": "",
    }
    raw = await _call(request, interface, search_seconds)
    try:
        mapping = msgspec.json.decode(raw, type=Mapping)
        ipaddress.ip_address(mapping.external_ip)
        return mapping
    except (msgspec.MsgspecError, ValueError) as error:
        raise UpnpFailed("the router does not say its address on the Internet") from error


async def remove_mappings(
    external_ports: Sequence[int], *, interface: str = "", search_seconds: float = SEARCH_SECONDS
) -> None:
    """Take mappings back. UpnpFailed when there is no router."""
    request = {"do": "unmap", "external_ports": list(external_ports)}
    await _call(request, interface, search_seconds)


async def _call(request: dict[str, Any], interface: str, search_seconds: float) -> bytes:
    request |= {"interface": interface, "wait_ms": int(1000 * search_seconds)}
    command = [sys.executable, "-I", str(_HELPER), msgspec.json.encode(request).decode()]
    try:
        with trio.fail_after(_CALL_SECONDS):
            done = await trio.run_process(
                command,
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath},
                check=False,
            )
    except trio.TooSlowError as error:
        raise UpnpFailed("the router does not finish its answer") from error
    except OSError as error:
        raise UpnpFailed(f"the UPnP helper cannot be started: {error}") from error
    if done.returncode != 0 or len(done.stdout) > _ANSWER_BYTES:
        raise UpnpFailed("the router's answer is more than we take; the UPnP helper was ended")
    try:
        failure = msgspec.json.decode(done.stdout, type=_Failure)
    except msgspec.MsgspecError:
        return done.stdout
    raise UpnpFailed(failure.error)


class PortMapper:
    """Keeps ports forwarded while `run` runs."""

    def __init__(
        self, ports: tuple[int, ...], *, interface: str = "", search_seconds: float = SEARCH_SECONDS
    ) -> None:
        self._ports = ports
        self._interface = interface
        self._search_seconds = search_seconds
        self.state = UpnpState()
        self.tried = trio.Event()
        """The first attempt is over."""
        self.changed = trio.Event()
        """Set and replaced whenever the mappings change."""

    async def run(self) -> None:
        """Map and renew until cancelled; then take the mappings back, within four seconds."""
        try:
            while True:
                try:
                    for port in self._ports:
                        await self._map(port)
                    self.state.failure, pause = "", RENEW_SECONDS
                except UpnpFailed as error:
                    log.info("no port is forwarded by UPnP: %s", error)
                    self.state.failure, pause = str(error), RETRY_SECONDS
                    self._set({})
                self.tried.set()
                await trio.sleep(pause)
        finally:
            await self._remove()

    async def _map(self, port: int) -> None:
        known = self.state.mappings.get(port)
        mapping = await add_mapping(
            port,
            prefer=known.external_port if known else None,
            interface=self._interface,
            search_seconds=self._search_seconds,
        )
        if known != mapping:
            log.info("the router forwards %s to our port %d", mapping.address, port)
            self._set(self.state.mappings | {port: mapping})

    def _set(self, mappings: dict[int, Mapping]) -> None:
        if mappings != self.state.mappings:
            self.state.mappings = mappings
            self.changed.set()
            self.changed = trio.Event()

    async def _remove(self) -> None:
        ports = [mapping.external_port for mapping in self.state.mappings.values()]
        if not ports:
            return
        with shielded(_REMOVE_SECONDS):
            try:
                await remove_mappings(
                    ports, interface=self._interface, search_seconds=self._search_seconds
                )
            except UpnpFailed as error:
                log.info("ports %s stay forwarded until the lease ends: %s", ports, error)
