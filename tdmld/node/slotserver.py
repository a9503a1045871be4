"""The carrier's side of one live slot: packets of its worker, its frame logs, its links."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from tdmld.node import channel
from tdmld.node.channel import FrameMemory, Packet, decode_packet, encode_packet
from tdmld.node.control import (
    GenesisReported,
    OpenSlot,
    SegmentReported,
    SlotBroken,
    SlotEnded,
    SlotEvent,
    StepReported,
)
from tdmld.node.errors import ControlError, LinkRefused
from tdmld.node.layout import disk_text, list_file
from tdmld.node.link import LinkLog, LinkSigner, Place
from tdmld.node.linkserver import LinkServer
from tdmld.node.ring import SlotRing
from tdmld.p2p import Host
from tdmld.train.errors import FileError
from tdmld.train.framelog import FrameLogWriter
from tdmld.train.segment import read_list

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 3.0
END_SECONDS = 0.5
MAX_REASON = 1500


class SlotServer:
    """Serves one worker until it is closed.

    `tell(event)` passes an event to the daemon. Everything that goes wrong with this slot ends in
    one SlotBroken and touches nothing else; `serve` then returns.
    """

    def __init__(
        self,
        request: OpenSlot,
        directory: Path,
        memory_fd: int,
        worker: socket.socket,
        signer: LinkSigner,
        tell: Callable[[SlotEvent], None],
    ) -> None:
        """Takes both descriptors. OSError, ControlError when they cannot be used."""
        dims = request.dimensions
        peers = {"up": request.up, "down": request.down}
        names = [name for name in channel.LINKS if peers[name] is not None]
        self.slot = request.slot
        self.directory = directory
        self._rounds = dims.rounds
        self._tell = tell
        self._socket = trio.socket.from_stdlib_socket(worker)
        try:
            self._memory = FrameMemory(memory_fd, names, dims.stages, dims.frame_bytes)
        finally:
            os.close(memory_fd)
        for name in ("ring", "list", "state"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._segment_frames = dims.segment_steps * dims.micro_batches
        self._granted = 0
        ring = directory / "ring"
        self.ring = SlotRing(ring, self._segment_frames, dims.frame_bytes, 2 * dims.stages + 2)
        self.links: dict[str, LinkServer] = {}
        self._vacant: dict[str, deque[int]] = {}
        self._waiting: dict[str, deque[tuple[int, memoryview]]] = {}
        self._link_of: dict[int, str] = {}
        for name in names:
            peer = peers[name]
            assert peer is not None
            place = Place(self.slot.job, request.epoch, self.slot.lane, self.slot.stage, name)
            self.links[name] = LinkServer(
                LinkLog(place, request.incarnation, dims),
                self.ring,
                signer,
                peer,
                dims.frame_bytes,
                self._room,
                self._deliver,
                self.fail,
            )
            self._vacant[name] = deque(self._memory.incoming(name))
            self._waiting[name] = deque()
            self._link_of |= dict.fromkeys(self._memory.incoming(name), name)
        # Bounded by what it can carry: a packet a place and direction, and grants.
        self._outbox: deque[Packet] = deque()
        self._outbox_filled = trio.Event()
        self._ended = trio.Event()
        self._scope = trio.CancelScope()
        self._failed = False
        self._segments_done = 0
        self.closed = trio.Event()

    async def serve(self, host: Host, protocol: str) -> None:
        """Run until `close`, `fail` or the end of the job and its goodbye."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_packets)
                    nursery.start_soon(self._read_packets)
                    nursery.start_soon(self._goodbye)
                    for link in self.links.values():
                        if link.place.link == "down":
                            nursery.start_soon(link.dial, host, protocol)
        finally:
            self._socket.close()
            try:
                with trio.CancelScope(shield=True):
                    for link in self.links.values():
                        await link.stop()
                    await self._close_logs(self.ring.take_segment(2**62))
            except OSError as error:
                self.fail(f"its last frames could not be kept: {disk_text(error)}")
            self.closed.set()

    def fail(self, text: str) -> None:
        """Stop this slot with a reason."""
        if not self._failed:
            self._failed = True
            self._tell(SlotBroken(self.slot, text[:MAX_REASON]))
        self._scope.cancel()

    def grant(self, until: int) -> None:
        """Let the worker run segments < until: what it sends is never more than was granted."""
        self._granted = max(self._granted, until)
        self._post(channel.Granted(until))

    async def close(self, *, abort: bool) -> None:
        """Tell the worker to end and stop; the links may finish their goodbye first."""
        self._post(channel.End())
        if not abort and not self._failed and self._segments_done == self._rounds:
            with trio.move_on_after(GOODBYE_SECONDS):
                for link in self.links.values():
                    await link.done.wait()
        with trio.move_on_after(END_SECONDS):
            await self._ended.wait()
        self._scope.cancel()
        await self.closed.wait()

    def discard(self, segment: int) -> None:
        """Frames of segments <= `segment` are of no use any more."""
        for link in self.links.values():
            link.discard(segment)

    async def _goodbye(self) -> None:
        for link in self.links.values():
            await link.done.wait()
        while self._segments_done < self._rounds:
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
                return self.fail(f"the slot cannot go on: {disk_text(error)}")
            except (ControlError, LinkRefused, ValueError, FileError) as error:
                return self.fail(str(error))

    async def _packet(self, packet: Packet) -> None:
        match packet:
            case channel.Sent(link, seq, place, length):
                if link not in self.links or place not in self._memory.outgoing(link):
                    raise ControlError(f"the worker sent from place {place} on link {link!r}")
                if seq >= self._granted * self._segment_frames:
                    raise ControlError(f"the worker sent frame {seq}, of a segment not granted")
                await self.links[link].produce(seq, self._memory.view(place, length))
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
            case channel.Failure(text):
                self.fail(f"the worker gave up: {text}")
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
        """Frames that found no place wait in memory, as many as there are places."""
        while len(self._waiting[link]) >= self._memory.places:
            moved = self._outbox_filled
            await moved.wait()

    def _deliver(self, link: str, seq: int, payload: memoryview) -> None:
        vacant = self._vacant[link]
        if vacant and not self._waiting[link]:
            self._place(link, seq, payload, vacant.popleft())
        else:
            self._waiting[link].append((seq, payload))

    def _freed(self, place: int) -> None:
        link = self._link_of.get(place)
        if link is None or place in self._vacant[link]:
            raise ControlError(f"the worker freed place {place}, which it did not hold")
        if self._waiting[link]:
            self._place(link, *self._waiting[link].popleft(), place)
        else:
            self._vacant[link].append(place)

    def _place(self, link: str, seq: int, payload: memoryview, place: int) -> None:
        self._memory.view(place, payload.nbytes)[:] = payload
        self._post(channel.Arrived(link, seq, place, payload.nbytes))

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
