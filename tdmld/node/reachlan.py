"""Nodes that local discovery finds are dialled; what they say of themselves is worth no more.

Whoever proves its identity exchanges peer records and is kept by the peer service like any other.
"""

import logging
from contextlib import suppress

import trio

from tdmld.chain.crypto import public_key
from tdmld.chain.errors import DecodeError
from tdmld.node.peers import PeerBook
from tdmld.p2p import Host, PeerInfo
from tdmld.p2p.errors import DialFailed, P2PError
from tdmld.p2p.mdns import PORT, LanDiscovery

log = logging.getLogger(__name__)

TRIES_AT_ONCE = 8
"""Answers beyond that are forgotten: whoever is there answers again."""
TRY_SECONDS = 10.0
RECORDS_SECONDS = 30.0
"""For the exchange of records after the connection, before we stop keeping a stranger."""


class LanPeers:
    """Connects the daemon with what is found on its local networks."""

    def __init__(
        self,
        host: Host,
        chain_id: bytes,
        book: PeerBook,
        *,
        loopback: bool = False,
        port: int = PORT,
    ) -> None:
        """`loopback` and `port` are for tests."""
        self._host = host
        self._book = book
        self._trying: set[str] = set()
        self._nursery: trio.Nursery | None = None
        network = chain_id.hex()[:8]
        self._lan = LanDiscovery(
            host.peer_id, network, self._listening, self._found, loopback=loopback, port=port
        )

    @property
    def interfaces(self) -> tuple[str, ...]:
        """IP addresses on which we announce and listen now."""
        return tuple(sorted(self._lan.interfaces))

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._lan.run()
            finally:
                self._nursery = None

    def _listening(self) -> tuple[str, ...]:
        return self._host.listening

    def _found(self, info: PeerInfo) -> None:
        if (
            self._nursery is not None
            and info.peer_id not in self._host.connected()
            and info.peer_id not in self._trying
            and len(self._trying) < TRIES_AT_ONCE
        ):
            self._trying.add(info.peer_id)
            self._nursery.start_soon(self._try, info)

    async def _try(self, info: PeerInfo) -> None:
        try:
            node = public_key(info.peer_id)
            known = self._book.node(node)
            addresses = dict.fromkeys((*info.addresses, *(known.addresses if known else ())))
            self._host.add_peer(PeerInfo(info.peer_id, tuple(addresses)))
            if await self._connected(info.peer_id) and known is None:
                log.info("found %s on the local network", info.peer_id)
                with trio.move_on_after(RECORDS_SECONDS):
                    await self._recorded(node)
            if self._book.node(node) is None:
                self._host.remove_peer(info.peer_id)
        except (DecodeError, P2PError) as error:
            log.debug("what local discovery found cannot be used: %s", error)
        finally:
            self._trying.discard(info.peer_id)

    async def _connected(self, peer_id: str) -> bool:
        with trio.move_on_after(TRY_SECONDS), suppress(DialFailed):
            await self._host.connect(peer_id)
        return peer_id in self._host.connected()

    async def _recorded(self, node: bytes) -> None:
        """Return when the book has a record of the node."""
        while self._book.node(node) is None:  # noqa: ASYNC110 (the book tells nobody)
            await trio.sleep(1.0)
