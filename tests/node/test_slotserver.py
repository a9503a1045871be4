"""The carrier's side of a worker: what it checks before the daemon may commit, and how it fails."""

import errno
import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node import channel, control
from tdmld.node.channel import FrameMemory, Packet, decode_packet, encode_packet
from tdmld.node.control import Dimensions, OpenSlot, Slot
from tdmld.node.link import LinkSigner
from tdmld.node.slotserver import SlotServer
from tdmld.train.segment import LinkRoots, SegmentRecord, write_list
from tests.node.fake_stream import FakeHost

ME, PEER = KeyPair(b"1" * 32), KeyPair(b"2" * 32)
SLOT = Slot(b"j" * 32, 0, 1)
DIMS = Dimensions(stages=2, rounds=1, segment_steps=1, micro_batches=2, frame_bytes=100)


class Rig:
    def __init__(self, root: Path) -> None:
        self.told: list[object] = []
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = trio.socket.from_stdlib_socket(mine)
        fd = FrameMemory.create(1, DIMS.stages, DIMS.frame_bytes)
        self.memory = FrameMemory(fd, ["up"], DIMS.stages, DIMS.frame_bytes)
        request = OpenSlot(1, SLOT, 0, 0, DIMS, PEER.address, None)
        signer = LinkSigner(ME, bytes(32))
        self.directory = root
        self.server = SlotServer(request, root, fd, theirs, signer, self.told.append)

    async def say(self, packet: Packet) -> None:
        await self.socket.send(encode_packet(packet))
        await trio.testing.wait_all_tasks_blocked()

    async def hear(self) -> Packet:
        return decode_packet(await self.socket.recv(channel.PACKET_BYTES))

    async def make(self, seq: int) -> None:
        place = self.memory.outgoing("up")[seq]
        self.memory.view(place, 5)[:] = b"frame"
        await self.say(channel.Sent("up", seq, place, 5))

    def broken(self) -> str:
        (event,) = [event for event in self.told if isinstance(event, control.SlotBroken)]
        return event.text


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    made = Rig(tmp_path)
    nursery.start_soon(made.server.serve, FakeHost(ME.address), "link")
    made.server.grant(DIMS.rounds)
    assert await made.hear() == channel.Granted(DIMS.rounds)
    return made


async def test_a_sent_frame_is_logged_and_its_place_freed(rig: Rig) -> None:
    await rig.make(0)
    assert await rig.hear() == channel.Free(rig.memory.outgoing("up")[0])
    assert rig.server.ring.read_sent("up", 0)[1] == b"frame"
    assert rig.server.ring.is_open(0, "up", "sent")


async def test_a_frame_of_a_segment_that_was_not_granted_is_not_taken(rig: Rig) -> None:
    """The ring never holds more than the D segments that the daemon grants."""
    for seq in range(DIMS.segment_steps * DIMS.micro_batches):
        await rig.make(seq)
    assert not rig.told
    await rig.make(DIMS.segment_steps * DIMS.micro_batches)
    await rig.server.closed.wait()
    assert "not granted" in rig.broken()


async def test_frames_wait_when_the_worker_holds_every_place(rig: Rig) -> None:
    places = list(rig.memory.incoming("up"))
    for seq in range(len(places) + 2):
        rig.server._deliver("up", seq, memoryview(b"%05d" % seq))
    arrived = [await rig.hear() for _ in places]
    assert arrived == [channel.Arrived("up", n, place, 5) for n, place in enumerate(places)]
    await rig.say(channel.Free(places[4]))
    assert await rig.hear() == channel.Arrived("up", len(places), places[4], 5)
    assert bytes(rig.memory.view(places[4], 5)) == b"%05d" % len(places)


async def test_a_worker_that_takes_nothing_stops_the_reader(rig: Rig) -> None:
    places = list(rig.memory.incoming("up"))
    for seq in range(2 * len(places)):
        await rig.server._room("up")
        rig.server._deliver("up", seq, memoryview(b"%05d" % seq))
    with trio.move_on_after(0) as waited:
        await rig.server._room("up")
    assert waited.cancelled_caught
    await rig.say(channel.Free(places[0]))
    await rig.server._room("up")


async def test_logs_that_cannot_be_closed_end_this_slot_only(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.make(0)

    def broken(writer: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("tdmld.train.framelog.FrameLogWriter.close", broken)
    await rig.server.close(abort=True)
    assert "last frames" in rig.broken()


@pytest.mark.parametrize(
    "packet",
    [
        channel.Sent("up", 0, 0, 5),
        channel.Sent("down", 0, 7, 5),
        channel.Sent("up", 1, 6, 5),
        channel.Sent("up", 0, 6, 101),
        channel.Free(0),
        channel.Free(99),
        channel.Granted(1),
        channel.Segment(1),
        channel.Segment(0),
    ],
    ids=str,
)
async def test_a_worker_that_speaks_nonsense_fails_its_slot(rig: Rig, packet: Packet) -> None:
    await rig.say(packet)
    await rig.server.closed.wait()
    assert rig.broken()


async def test_last_words_are_passed_on(rig: Rig) -> None:
    await rig.say(channel.Failure("the loss is nan"))
    await rig.server.closed.wait()
    assert "the loss is nan" in rig.broken()


async def test_a_full_disk_fails_the_slot_with_a_remedy_and_deletes_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.make(0)

    async def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rig.server.ring, "append", full)
    await rig.make(1)
    await rig.server.closed.wait()
    assert "disk is full" in rig.broken()
    assert "free some space" in rig.broken()
    assert (rig.directory / "ring" / "0.up.sent").stat().st_size > 5


async def test_frames_leave_the_chain_its_room_on_the_disk(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdmld.node.ring.free_bytes", lambda directory: 199)
    await rig.make(0)
    await rig.server.closed.wait()
    assert "no room for the frames" in rig.broken()
    assert "free some space" in rig.broken()


async def test_a_list_that_is_not_about_these_frames_is_not_reported(rig: Rig) -> None:
    await rig.make(0)
    zero = bytes(32)
    links = (LinkRoots("up", zero, zero),)
    record = SegmentRecord(0, zero, zero, zero, zero, links, False, ())
    write_list(rig.directory / "list" / "0", record)
    await rig.say(channel.Segment(0))
    await rig.server.closed.wait()
    assert "differ" in rig.broken()
    assert not any(isinstance(event, control.SegmentReported) for event in rig.told)


async def test_a_true_list_is_reported_after_the_logs_are_closed(rig: Rig) -> None:
    await rig.make(0)
    sent, received = rig.server.links["up"].state.roots(0)
    zero = bytes(32)
    links = (LinkRoots("up", sent, received),)
    record = SegmentRecord(0, zero, zero, zero, zero, links, False, ())
    write_list(rig.directory / "list" / "0", record)
    await rig.socket.send(encode_packet(channel.Segment(0)))
    assert await rig.hear() == channel.Free(rig.memory.outgoing("up")[0])
    with trio.move_on_after(30):
        while rig.told != [control.SegmentReported(SLOT, 0)]:
            await trio.lowlevel.checkpoint()
    assert rig.told == [control.SegmentReported(SLOT, 0)]
    assert not rig.server.ring.is_open(0, "up", "sent")
    await rig.server.close(abort=True)
    assert await rig.hear() == channel.End()
