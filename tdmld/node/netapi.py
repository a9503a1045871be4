"""What the RPC answers and does about peers and bans, and where bans are kept.

The daemon's host judges daemons, the carrier's judges carriers; what either has of bans by hand,
and the daemon's own, holds for both. A ban of a node is a ban of the session of its carrier, too.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from tdmld.chain.crypto import address, public_key
from tdmld.chain.errors import DecodeError
from tdmld.node.chainservice import ChainService
from tdmld.node.errors import MachineError
from tdmld.node.machine import Machine
from tdmld.node.peers import PeerService
from tdmld.p2p import Ban, Host, PeerStatus
from tdmld.p2p import PeerInfo as Dialable
from tdmld.p2p.bans import load_bans, save_bans
from tdmld.p2p.errors import AddressInvalid, BansFull, DialFailed
from tdmld.rpc.errors import InvalidParams, NotFound, Refused
from tdmld.rpc.nettypes import BanInfo, Connected
from tdmld.rpc.types import PeerInfo, time_text

log = logging.getLogger(__name__)

BANS_FILE = "bans.json"
SAVE_SECONDS = 1.0
"""Changes are collected for so long: strangers decide how often the host bans one."""


def load(data_dir: Path) -> tuple[Ban, ...]:
    """The bans kept in a node's directory."""
    return load_bans(data_dir / BANS_FILE)


class NetApi:
    """The net_* methods of one daemon. `run` keeps what is banned on disk and in the carrier."""

    def __init__(
        self,
        host: Host,
        peers: PeerService,
        chain: ChainService,
        machine: Machine,
        me: str,
        data_dir: Path,
    ) -> None:
        self._host, self._peers, self._chain, self._machine = host, peers, chain, machine
        self._me = me
        self._path = data_dir / BANS_FILE

    async def run(self) -> None:
        """Until cancelled."""
        saved: tuple[Ban, ...] = ()
        while True:
            changed = self._host.bans.changed
            try:
                await self._machine.set_bans(tuple(self._for_carrier()))
            except MachineError as error:
                log.info("the carrier will hear of the bans when it is back: %s", error)
            bans = self._host.bans.all()
            if bans != saved:
                try:
                    await trio.to_thread.run_sync(save_bans, self._path, bans)
                    saved = bans
                except OSError as error:
                    log.warning("the bans could not be saved: %s", error)
            await changed.wait()
            await trio.sleep(SAVE_SECONDS)

    def _for_carrier(self) -> Iterator[Ban]:
        sessions = {address(r.node): address(r.session) for r in self._peers.book.records()}
        for ban in self._host.bans.holding():
            yield ban
            if ban.subject in sessions:
                yield msgspec.structs.replace(ban, subject=sessions[ban.subject])

    # ---- answers -----------------------------------------------------------------------------

    async def peers(self) -> tuple[PeerInfo, ...]:
        """Known nodes, connected ones first."""
        state = self._chain.state()
        status = {peer.peer_id: peer for peer in self._host.peers()}
        known = {address(r.node): r.addresses for r in self._peers.book.records()}
        known |= {p: status[p].addresses for p in status if p not in known}
        validators = set(map(address, self._chain.committee.nodes))
        rows = []
        for node, addresses in known.items():
            if node == self._me:
                continue
            owner = state.owner_of(public_key(node))
            row = PeerInfo(
                node=node,
                addresses=tuple(addresses),
                connected=False,
                validator=node in validators,
                owner=address(owner) if owner is not None else "",
                banned=self._host.bans.peer(node) is not None,
            )
            peer = status.get(node)
            rows.append(row if peer is None else _with_status(row, peer))
        return tuple(sorted(rows, key=lambda row: (not row.connected, row.node)))

    async def bans(self) -> tuple[BanInfo, ...]:
        """Who may not connect now."""
        return tuple(map(_info, self._host.bans.holding()))

    # ---- changes -----------------------------------------------------------------------------

    async def connect(self, text: str) -> Connected:
        """Keep a peer connected from now on; Refused when the first dial fails."""
        where, _, node = text.rpartition("/p2p/")
        if not where:
            raise InvalidParams(
                f"{text!r} names no peer: write /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo..."
            )
        if self._host.bans.peer(node) is not None:
            raise Refused(f"{node} is banned; tdmld peers unban {node}")
        try:
            key = public_key(node)
            known = [r.addresses for r in self._peers.book.records() if r.node == key]
            self._host.add_peer(Dialable(node, (where, *(known[0] if known else ()))))
            peer = await self._host.connect(node)
        except DialFailed as error:
            raise Refused(f"{error}; the node goes on trying, see tdmld peers list") from error
        except (AddressInvalid, DecodeError) as error:
            raise InvalidParams(str(error)) from error
        return Connected(
            node=node,
            address=peer.remote,
            path=peer.path or "direct",
            transport=peer.transport,
            round_trip_ms=None if peer.latency is None else 1000 * peer.latency,
        )

    async def ban(self, subject: str, seconds: int = 0, reason: str = "") -> BanInfo:
        """Disconnect and refuse; 0 seconds: until it is lifted."""
        if subject == self._me:
            raise Refused("this is the node's own id")
        try:
            return _info(self._host.ban(subject, seconds or None, reason))
        except AddressInvalid as error:
            raise InvalidParams(str(error)) from error
        except BansFull as error:
            raise Refused(str(error)) from error

    async def unban(self, subject: str) -> BanInfo:
        """Take a ban back; NotFound."""
        try:
            ban = self._host.unban(subject)
        except AddressInvalid as error:
            raise InvalidParams(str(error)) from error
        if ban is None:
            raise NotFound(f"{subject} is not banned; see tdmld peers bans")
        return _info(ban)


def _with_status(row: PeerInfo, peer: PeerStatus) -> PeerInfo:
    return msgspec.structs.replace(
        row,
        connected=peer.connected,
        kept=peer.kept,
        round_trip_ms=None if peer.latency is None else 1000 * peer.latency,
        direction=peer.direction,
        path=peer.path,
        remote=peer.remote,
        transport=peer.transport,
        bytes_in=peer.bytes_in,
        bytes_out=peer.bytes_out,
        messages_in=peer.messages_in,
        messages_out=peer.messages_out,
        gossip_bytes=peer.gossip_bytes,
        spent_ms=1000 * peer.spent_seconds,
        score=round(peer.score, 1),
        last_error=peer.last_error,
    )


def _info(ban: Ban) -> BanInfo:
    return BanInfo(
        subject=ban.subject,
        until="" if ban.until is None else time_text(int(1000 * ban.until)),
        reason=ban.reason,
        author=ban.author,
        times=ban.times,
    )
