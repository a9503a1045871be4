"""The carrier's side of one live slot: packets of its worker, its frame logs, its links."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import trio

from tdmld.node import channel
from tdmld.node.channel import FrameMemory, LinkMemory, Packet, decode_packet, encode_packet
from tdmld.node.control import (
    MAX_CAUSE,
    MAX_SEQ,
    GenesisReported,
    Link,
    OpenSlot,
    SegmentReported,
    SlotBroken,
    SlotEnded,
    SlotEvent,
    StepReported,
    WaitReported,
)
from tdmld.node.errors import ControlError, LinkMismatch, LinkRefused
from tdmld.node.layout import disk_text, list_file
from tdmld.node.link import LinkLog, LinkSigner
from tdmld.node.linkserver import LinkServer
from tdmld.node.ring import SlotRing, cause_of
from tdmld.p2p import Host
from tdmld.train.errors import FileError
from tdmld.train.framelog import FrameLogWriter
from tdmld.train.segment import read_list

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 3.0
END_SECONDS = 0.5
MAX_REASON = 1500


class _Inbox:
    """Frames of one link on their way to the worker: those that find a place at once go there from
    memory, the others are read from the ring when a place is free."""

    def __init__(self, link: Link, places: Sequence[int], first: int) -> None:
        self.link = link
        self.vacant = deque(places)
        self.next = first
        """The frame that the worker gets next."""
        self.there = first
        """Frames below it are in the ring."""
        self.most = link.ahead + link.places
        """So many may wait there before the peer has to."""
        self.news = trio.Event()

    def wake(self) -> None:
        """Something came or a place became free."""
        self.news.set()
        self.news = trio.Event()


class SlotServer:
    """Serves one worker until it is closed.

    `tell(event)` passes an event to the daemon. Everything that goes wrong with this slot ends in
    one SlotBroken and touches nothing else; `serve` then returns. `links` are there when the ring
    was taken up; `introduce(links)` is called then.
    """

    def __init__(
        self,
        request: OpenSlot,
        directory: Path,
        memory_fd: int,
        worker: socket.socket,
        signer: LinkSigner,
        tell: Callable[[SlotEvent], None],
        introduce: Callable[[Iterable[LinkServer]], None] = lambda links: None,
    ) -> None:
        """Takes both descriptors. OSError, ControlError when they cannot be used."""
        self.slot = request.slot
        self.directory = directory
        self._request = request
        self._signer = signer
        self._tell = tell
        self._introduce = introduce
        self._socket = trio.socket.from_stdlib_socket(worker)
        places = [LinkMemory(link.name, link.places, link.frame_bytes) for link in request.links]
        try:
            self._memory = FrameMemory(memory_fd, places)
        finally:
            os.close(memory_fd)
        for name in ("ring", "list", "state"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._granted = 0
        self.ring = SlotRing(directory / "ring", request.links)
        self.links: dict[str, LinkServer] = {}
        self._inboxes: dict[str, _Inbox] = {}
        self._link_of: dict[int, str] = {}
        self._peers: dict[str, tuple[str, int]] = {}
        """What SetLinkPeer said before the links were there."""
        # Bounded by what it can carry: a packet a place and direction, and grants.
        self._outbox: deque[Packet] = deque()
        self._outbox_filled = trio.Event()
        self._ended = trio.Event()
        self._scope = trio.CancelScope()
        self._failed = False
        self._segments_done = request.start
        self.closed = trio.Event()

    async def serve(self, host: Host, protocol: str) -> None:
        """Run until `close`, `fail` or the end of the job and its goodbye."""
        try:
            with self._scope:
                await self._restore()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_packets)
                    nursery.start_soon(self._read_packets)
                    nursery.start_soon(self._goodbye)
                    for inbox in self._inboxes.values():
                        nursery.start_soon(self._feed, inbox)
                    for link in self.links.values():
                        nursery.start_soon(link.keep, host, protocol)
        except OSError as error:
            self.fail(f"its frame logs cannot be read: {disk_text(error)}", cause_of(error))
        finally:
            self._socket.close()
            try:
                with trio.CancelScope(shield=True):
                    for link in self.links.values():
                        await link.stop()
                    await self._close_logs(self.ring.take_segment(2**62))
            except OSError as error:
                text = f"its last frames could not be kept: {disk_text(error)}"
                self.fail(text, cause_of(error))
            self.closed.set()

    async def _restore(self) -> None:
        """Take up what lies in the ring (LINK-8), and be there for the other ends from now on."""
        request = self._request
        found = await trio.to_thread.run_sync(self.ring.restore, request.start)
        slot = self.slot
        for link in request.links:
            state = LinkLog(
                slot.job,
                request.epoch,
                (slot.lane, slot.stage),
                request.incarnation,
                link,
                request.start,
            )
            first = state.made
            server = LinkServer(
                state, self.ring, self._signer, link.peer, self._room, self._deliver, self.fail
            )
            server.restore(found[link.name])
            inbox = _Inbox(link, self._memory.incoming(link.name), first)
            inbox.there = state.consumed
            if state.produced > first or inbox.there > first:
                log.info(
                    "link %s goes on: the ring has %d frames sent and %d received from %d on",
                    link.name,
                    state.produced - first,
                    inbox.there - first,
                    first,
                )
            self._inboxes[link.name] = inbox
            self._link_of |= dict.fromkeys(inbox.vacant, link.name)
            self.links[link.name] = server
        for name, peer in self._peers.items():
            self.set_link_peer(name, *peer)
        self._introduce(self.links.values())

    def set_link_peer(self, link: str, session: str, incarnation: int) -> None:
        """Somebody else has the other end of a link now. ControlError when there is no such link,
        DecodeError when `session` is none."""
        if all(link != known.name for known in self._request.links):
            raise ControlError(f"slot {self.slot} has no link {link}")
        if link in self.links:
            self.links[link].set_peer(session, incarnation)
        else:
            self._peers[link] = (session, incarnation)

    def fail(self, text: str, cause: str = "") -> None:
        """Stop this slot with a reason."""
        if not self._failed:
            self._failed = True
            self._tell(SlotBroken(self.slot, text[:MAX_REASON], cause[:MAX_CAUSE]))
        self._scope.cancel()

    def grant(self, until: int, included: tuple[int, ...] = ()) -> None:
        """Let the worker run segments < until: what it sends is never more than was granted."""
        self._granted = max(self._granted, until)
        self._post(channel.Granted(until, included))

    async def close(self, *, abort: bool) -> None:
        """Tell the worker to end and stop; the links may finish their goodbye first."""
        self._post(channel.End())
        if not abort and not self._failed and self._segments_done == self._request.rounds:
            with trio.move_on_after(GOODBYE_SECONDS):
                for link in self.links.values():
                    await link.done.wait()
        with trio.move_on_after(END_SECONDS):
            await self._ended.wait()
        self._scope.cancel()
        await self.closed.wait()

    def discard(self, keep_from: int) -> None:
        """Frames of segments < `keep_from` are of no use any more."""
        for link in self.links.values():
            link.discard(keep_from)

    async def _goodbye(self) -> None:
        for link in self.links.values():
            await link.done.wait()
        while self._segments_done < self._request.rounds:
            filled = self._outbox_filled
            await filled.wait()
        self._tell(SlotEnded(self.slot))

    # --- worker -> carrier

    async def _read_packets(self) -> None:
        while True:
            try:
                raw = await self._socket.recv(channel.PACKET_BYTES)
                if not raw:
                    return self.fail("the worker process closed its channel")
                await self._packet(decode_packet(raw))
            except OSError as error:
                return self.fail(f"the slot cannot go on: {disk_text(error)}", cause_of(error))
            except LinkMismatch as error:
                return self.fail(str(error), "link")
            except (ControlError, LinkRefused, ValueError, FileError) as error:
                return self.fail(str(error))

    async def _packet(self, packet: Packet) -> None:
        match packet:
            case channel.Sent(link, seq, place, length):
                if link not in self.links or place not in self._memory.outgoing(link):
                    raise ControlError(f"the worker sent from place {place} on link {link!r}")
                server = self.links[link]
                if seq >= self._granted * server.state.segment_frames:
                    raise ControlError(f"the worker sent frame {seq}, of a segment not granted")
                await server.produce(seq, self._memory.view(place, length))
                self._post(channel.Free(place))
            case channel.Free(place):
                self._freed(place)
            case channel.Genesis(shared, lane, data):
                self._tell(GenesisReported(self.slot, shared, lane, data))
            case channel.Step():
                self._tell(
                    StepReported(
                        self.slot,
                        packet.step,
                        packet.loss,
                        packet.seconds,
                        packet.waiting,
                        packet.verifying,
                        packet.gradient_norm,
                    )
                )
            case channel.Segment(segment):
                await self._segment(segment)
            case channel.Waits(link, seq, seconds):
                if link not in self.links:
                    raise ControlError(f"the worker waits for link {link!r}")
                self._tell(WaitReported(self.slot, link, min(seq, MAX_SEQ), seconds))
            case channel.Failure(text, cause):
                self.fail(f"the worker gave up: {text}", cause)
            case other:
                raise ControlError(f"a {type(other).__name__} packet came from a worker")

    async def _segment(self, segment: int) -> None:
        """The evidence is durable before the daemon may commit; and it is about these frames."""
        if segment != self._segments_done:
            raise ControlError(f"segment {segment} where {self._segments_done} was due")
        await self._close_logs(self.ring.take_segment(segment))
        stored = await trio.to_thread.run_sync(read_list, list_file(self.directory, segment))
        for name, link in self.links.items():
            if stored.record.links.get(name) != link.state.roots(segment):
                raise ControlError(
                    f"segment {segment}: the worker's list and the frames of link {name} differ;"
                    " memory or disk of this machine is not reliable"
                )
        self._segments_done += 1
        self._tell(SegmentReported(self.slot, segment))
        self._wake()

    async def _close_logs(self, logs: Iterable[FrameLogWriter]) -> None:
        for writer in logs:
            await trio.to_thread.run_sync(writer.close)

    # --- carrier -> worker

    async def _room(self, link: str) -> None:
        """Wait while the ring holds all that an honest peer could have sent ahead of the worker."""
        inbox = self._inboxes[link]
        while inbox.there - inbox.next >= inbox.most:
            await inbox.news.wait()

    def _deliver(self, link: str, seq: int, payload: memoryview) -> None:
        inbox = self._inboxes[link]
        inbox.there = seq + 1
        if seq == inbox.next and inbox.vacant:
            place = inbox.vacant.popleft()
            inbox.next += 1
            self._memory.view(place, payload.nbytes)[:] = payload
            self._post(channel.Arrived(link, seq, place, payload.nbytes))
        else:
            inbox.wake()

    async def _feed(self, inbox: _Inbox) -> None:
        """Give the worker what waits in the ring, as places become free."""
        link = inbox.link.name
        while True:
            news = inbox.news
            while inbox.vacant and inbox.next < inbox.there:
                seq, place = inbox.next, inbox.vacant.popleft()
                try:
                    view = self._memory.view(place, self.ring.length(link, "received", seq))
                    await self.ring.read_received(link, seq, view)
                except LinkRefused as error:
                    return self.fail(f"what came in cannot be read again: {error}")
                inbox.next += 1
                self._post(channel.Arrived(link, seq, place, view.nbytes))
                inbox.wake()
            await news.wait()

    def _freed(self, place: int) -> None:
        link = self._link_of.get(place)
        if link is None or place in self._inboxes[link].vacant:
            raise ControlError(f"the worker freed place {place}, which it did not hold")
        inbox = self._inboxes[link]
        inbox.vacant.append(place)
        if inbox.next < inbox.there:
            inbox.wake()

    def _post(self, packet: Packet) -> None:
        self._outbox.append(packet)
        self._wake()

    def _wake(self) -> None:
        self._outbox_filled.set()
        self._outbox_filled = trio.Event()

    async def _send_packets(self) -> None:
        while True:
            filled = self._outbox_filled
            while self._outbox:
                try:
                    await self._socket.send(encode_packet(self._outbox[0]))
                except OSError as error:
                    return self.fail(f"the worker process is gone: {error}")
                if isinstance(self._outbox.popleft(), channel.End):
                    self._ended.set()
            await filled.wait()
