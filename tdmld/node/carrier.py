"""The carrier process: `python -m tdmld.node.carrier --control FD`.

It holds the node's session key and the p2p host for tensors and content; it serves the workers of
live slots, keeps their frame logs, and gives and brings content. It knows neither money nor chain.
Everything that it must do comes over the control socket (`control.py`); when that ends, it ends.
"""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from tdmld import logs
from tdmld.chain.crypto import KeyPair, public_key
from tdmld.chain.errors import DecodeError
from tdmld.node import control
from tdmld.node.carriernet import CarrierNet, Relaying, tell_addresses
from tdmld.node.content import ContentClient
from tdmld.node.contentserver import ContentServer, JobContent
from tdmld.node.contentstore import ContentStore
from tdmld.node.control import Configure, Item, Message, Request
from tdmld.node.controlsocket import ControlSocket
from tdmld.node.errors import (
    ContentError,
    ContentMismatch,
    ControlError,
    LinkRefused,
    MachineError,
)
from tdmld.node.layout import SEED_BYTES, Layout
from tdmld.node.link import Hello, LinkSigner, Place, decode_message
from tdmld.node.linkserver import HELLO_SECONDS, LinkServer
from tdmld.node.parentdeath import die_with_parent, leave_no_core
from tdmld.node.seal import ContentKeys
from tdmld.node.slotserver import SlotServer
from tdmld.p2p import Ban, Host, PeerInfo, Stream, open_host
from tdmld.p2p.errors import AddressInvalid, ListenFailed, P2PError
from tdmld.train.errors import TrainError
from tdmld.train.framelog import FrameEntry

log = logging.getLogger(__name__)

MAX_HELLO_BYTES = 16 * 1024
_CANCELLED = (
    control.FetchData
    | control.FetchFile
    | control.ProbeFrame
    | control.ListResult
    | control.DialBack
    | control.ConnectDirect
)
"""Requests that end when the daemon's caller has gone; others are carried out."""
EXIT_USAGE = 2
EXIT_LISTEN = 3
EXIT_KEY = 4


def protocols(chain_id: bytes) -> tuple[str, str]:
    """The link and content protocols of a chain."""
    prefix = f"/tdmld/{chain_id.hex()[:8]}"
    return f"{prefix}/link/1", f"{prefix}/content/1"


def read_session_key(path: Path) -> KeyPair:
    """The session key; MachineError when the file is not 32 bytes."""
    try:
        with path.open("rb") as file:
            seed = file.read(SEED_BYTES + 1)
    except OSError as error:
        raise MachineError(f"session key: {error}") from error
    if len(seed) != SEED_BYTES:
        raise MachineError(
            f"{path} is no session key (it has not 32 bytes); delete it, a new one will be made"
        )
    return KeyPair(seed)


OtherEnd = tuple[bytes, int, int, str]
"""Job, lane, stage and link name as the other end of a link has them."""


class Carrier:
    """One run of the carrier, on an open host."""

    def __init__(
        self,
        config: Configure,
        key: KeyPair,
        host: Host,
        relaying: Relaying,
        sock: ControlSocket,
    ) -> None:
        self._host = host
        self._net = CarrierNet(host, key.seed, relaying)
        self._control = sock
        self._layout = Layout(Path(config.data_dir))
        self._signer = LinkSigner(key, config.chain_id)
        self._link_protocol, content_protocol = protocols(config.chain_id)
        self._jobs: dict[bytes, JobContent] = {}
        self._kept: dict[str, tuple[str, ...]] = {}
        self._slots: dict[control.Slot, SlotServer] = {}
        self._links: dict[OtherEnd, LinkServer] = {}
        """Of open slots, by who is at the other end."""
        self._fetches: dict[int, trio.CancelScope] = {}
        keys = ContentKeys(self._layout, key)
        self._store = ContentStore(self._layout, config.content_quota, keys)
        self._server = ContentServer(self._store, keys, self._jobs, self._still_grows)
        self._client = ContentClient(host, content_protocol, self._layout, self._store, keys)
        # Bounded by what the slots can cause: the daemon reads always, it only starts to late.
        self._outbox, self._to_send = trio.open_memory_channel[Message](4096)
        host.set_handler(self._link_protocol, self._accept_link)
        host.set_handler(content_protocol, self._server.handle)

    async def run(self) -> None:
        """Serve requests until the daemon closes the control socket."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            self._tell(control.Ready(self._host.peer_id, self._host.listening))
            nursery.start_soon(tell_addresses, self._host, self._outbox)
            while True:
                raw, descriptors = await self._control.receive()
                if not raw:
                    break
                message = control.decode_to_carrier(raw)
                if isinstance(message, Configure):
                    raise ControlError("a second Configure")
                if isinstance(message, control.Cancel):
                    if (fetch := self._fetches.get(message.id)) is not None:
                        fetch.cancel()
                    continue
                nursery.start_soon(self._request, message, descriptors, nursery)
            nursery.cancel_scope.cancel()

    def _tell(self, message: Message) -> None:
        self._outbox.send_nowait(message)

    async def _send(self) -> None:
        async for message in self._to_send:
            await self._control.send(control.encode_message(message))

    async def _request(
        self, request: Request, descriptors: tuple[int, ...], nursery: trio.Nursery
    ) -> None:
        # Boundary: what goes wrong with one request is its reply and ends nothing else.
        try:
            with self._cancellable(request) as scope:
                reply = await self._carry_out(request, descriptors, nursery)
            if scope.cancelled_caught:
                return
        except (MachineError, TrainError, P2PError, OSError, DecodeError) as error:
            kind = type(error).__name__ if isinstance(error, MachineError) else "MachineError"
            reply = control.Failed(request.id, kind, f"{error}"[: control.MAX_TEXT])
        except Exception as error:
            log.exception("a %s failed", type(request).__name__)
            text = f"a defect of the carrier, see its log: {error!r}"[: control.MAX_TEXT]
            reply = control.Failed(request.id, "MachineError", text)
        self._tell(reply)

    @contextmanager
    def _cancellable(self, request: Request) -> Iterator[trio.CancelScope]:
        """A scope in which the daemon's Cancel ends the request."""
        with trio.CancelScope() as scope:
            if isinstance(request, _CANCELLED):
                self._fetches[request.id] = scope
            try:
                yield scope
            finally:
                self._fetches.pop(request.id, None)

    async def _carry_out(
        self, request: Request, descriptors: tuple[int, ...], nursery: trio.Nursery
    ) -> control.Reply:
        match request:
            case control.OpenSlot():
                self._open_slot(request, descriptors, nursery)
            case control.SetPeers():
                self._set_peers(request)
            case control.SetBans(_, bans):
                self._host.set_bans([Ban(ban.subject, ban.until, ban.reason) for ban in bans])
            case control.SetMembers():
                self._set_members(request)
            case control.Rekey(_, _, _, sealed):
                self._set_members(request)
                await trio.to_thread.run_sync(self._store.rekey, sealed)
            case control.ImportText(_, path, sealed):
                found = await trio.to_thread.run_sync(self._store.import_text, Path(path), sealed)
                return control.Imported(request.id, tuple(found))
            case control.FetchData(_, job, sealed, shards, holders):
                await self._client.fetch_data(job, sealed, shards, holders)
            case control.HandData(_, sealed, shards):
                await self._hand_data(sealed, shards, descriptors)
            case control.FetchFile(_, item, limit, holders, destination):
                target = Path(destination)
                had = await self._client.fetch_file(item, limit, holders, target)
                return control.Stored(request.id, had)
            case control.ProbeFrame():
                return await self._probe(request)
            case control.ListResult(_, job, holders):
                files = await self._client.list_result(job, holders)
                return control.Listing(request.id, files)
            case control.Grant(_, slot, until, included):
                if slot in self._slots:
                    self._slots[slot].grant(until, included)
            case control.SetLinkPeer(_, slot, link, session, incarnation):
                if slot in self._slots:
                    self._slots[slot].set_link_peer(link, session, incarnation)
            case control.CloseSlot(_, slot, abort):
                if slot in self._slots:
                    await self._slots[slot].close(abort=abort)
            case control.Discard(_, slot, keep_from):
                if slot in self._slots:
                    self._slots[slot].discard(keep_from)
            case _:
                return await self._net.carry_out(request, lambda: self._kept)
        return control.Done(request.id)

    def _set_members(self, request: control.SetMembers | control.Rekey) -> None:
        self._jobs[request.job] = JobContent(
            frozenset(request.sessions), request.sealed, request.private, frozenset(request.given)
        )
        if not request.sessions:
            del self._jobs[request.job]

    async def _probe(self, request: control.ProbeFrame) -> control.Probed:
        """Whether a holder gives out a frame that it should have sent, signed by itself."""
        slot, seq = request.slot, request.seq
        sender = Place(slot.job, request.epoch, slot.lane, slot.stage, request.link)
        item = control.FrameFile(slot, request.link, seq)
        key = public_key(request.holder)

        def check(frame: FrameEntry) -> None:
            if not self._signer.check_kept(key, sender, seq, frame.digest, frame.signature):
                raise ContentMismatch("the frame is not signed by its sender")

        try:
            await self._client.probe(item, request.limit, request.holder, check)
        except ContentError as error:
            return control.Probed(request.id, False, f"{error}"[: control.MAX_TEXT])
        return control.Probed(request.id, True, "")

    def _set_peers(self, request: control.SetPeers) -> None:
        wanted = {peer.session: peer.addresses for peer in request.peers}
        wanted.pop(self._host.peer_id, None)
        for session in self._kept.keys() - wanted.keys():
            self._host.remove_peer(session)
        for session, addresses in wanted.items():
            if self._kept.get(session) != addresses:
                try:
                    self._host.add_peer(PeerInfo(session, addresses))
                except AddressInvalid as error:
                    # They come from that peer; what it says of itself must not cost us the others.
                    log.warning("the addresses of %s cannot be used: %s", session, error)
        self._kept = wanted

    async def _hand_data(
        self,
        sealed: bytes | None,
        shards: Sequence[tuple[bytes, int]],
        descriptors: tuple[int, ...],
    ) -> None:
        """The text to a worker: in memory, and past the daemon."""
        ends = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        try:
            if len(ends) != 1:
                raise ControlError("HandData comes with one descriptor")
            text = await trio.to_thread.run_sync(self._store.text_memory, sealed, shards)
            try:
                # It waits in the socket for a worker that is started next: this does not block.
                socket.send_fds(ends[0], [b"text"], [text])
            finally:
                os.close(text)
        finally:
            for end in ends:
                end.close()

    def _open_slot(
        self, request: control.OpenSlot, descriptors: tuple[int, ...], nursery: trio.Nursery
    ) -> None:
        if len(descriptors) != control.MAX_DESCRIPTORS or request.slot in self._slots:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ControlError("the slot is open already, or its descriptors are missing")
        worker, memory = descriptors
        slot = request.slot
        directory = self._layout.slot(slot.job, slot.lane, slot.stage)
        server = SlotServer(
            request,
            directory,
            memory,
            socket.socket(fileno=worker),
            self._signer,
            self._tell,
            self._introduce,
        )
        self._slots[slot] = server
        nursery.start_soon(self._serve_slot, server)

    async def _serve_slot(self, server: SlotServer) -> None:
        try:
            await server.serve(self._host, self._link_protocol)
        except Exception as error:
            # Boundary: a defect in one slot must not take the others' carrier away.
            log.exception("serving a slot failed")
            server.fail(f"a defect of the carrier, see its log: {error!r}")
        finally:
            self._slots.pop(server.slot, None)
            for link in server.links.values():
                self._links.pop(_end(link.state.other), None)

    def _introduce(self, links: Iterable[LinkServer]) -> None:
        for link in links:
            self._links[_end(link.state.other)] = link

    async def _accept_link(self, stream: Stream) -> None:
        """Whoever wants to open a link here; what is wrong with it is no defect of ours."""
        try:
            await self._answer_link(stream)
        except (LinkRefused, trio.TooSlowError) as error:
            log.debug("a link of %s is refused: %s", stream.peer_id, error or "no Hello in time")
            await stream.reset()

    async def _answer_link(self, stream: Stream) -> None:
        with trio.fail_after(HELLO_SECONDS):
            hello = decode_message(await stream.receive(MAX_HELLO_BYTES))
        if not isinstance(hello, Hello):
            raise LinkRefused("a link begins with a Hello")
        link = self._links.get(_end(hello.place))
        if link is None:
            raise LinkRefused("no such link is open here")
        await link.answer(stream, hello)

    def _still_grows(self, item: Item) -> bool:
        if not isinstance(item, control.FramesFile):
            return False
        slot = self._slots.get(item.slot)
        return slot is not None and slot.ring.is_open(item.segment, item.link, "sent")


def _end(place: Place) -> OtherEnd:
    return place.job, place.lane, place.stage, place.link


async def main(fd: int) -> int:
    """Run a carrier on the control socket `fd`; gives the exit status."""
    sock = ControlSocket(socket.socket(fileno=fd))
    raw, _ = await sock.receive()
    if not raw:
        return 0
    config = control.decode_to_carrier(raw)
    if not isinstance(config, Configure):
        raise ControlError("the first message must be Configure")
    layout = Layout(Path(config.data_dir))
    # In a file that rotates: how often strangers make us write a line is theirs to decide. What
    # goes to stderr are last words; the daemon keeps them and says them on.
    logs.configure(file=layout.logs / "carrier.jsonl", console=False, process="carrier")
    try:
        key = read_session_key(layout.session_key)
    except MachineError as error:
        print(error, file=sys.stderr)
        return EXIT_KEY
    try:
        relaying = Relaying()
        async with open_host(
            key.seed, config.listen, gossip=False, relay=relaying.policy()
        ) as host:
            await Carrier(config, key, host, relaying, sock).run()
    except ListenFailed as error:
        print(error, file=sys.stderr)
        return EXIT_LISTEN
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A tdmld carrier; started by the daemon.")
    parser.add_argument("--control", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(arguments.control)
    leave_no_core()
    sys.exit(trio.run(main, arguments.control))
