"""The carrier's side of a worker: what it checks before the daemon may commit, and how it fails."""

import errno
import os
import socket
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node import channel, control
from tdmld.node.channel import FrameMemory, LinkMemory, Packet, decode_packet, encode_packet
from tdmld.node.control import Link, OpenSlot, Slot
from tdmld.node.link import LinkSigner
from tdmld.node.slotserver import SlotServer
from tdmld.train.digest import digest
from tdmld.train.segment import LinkRoots, SegmentRecord, write_list
from tests.node.fake_stream import FakeHost, FakeStream

ME, PEER = KeyPair(b"1" * 32), KeyPair(b"2" * 32)
SLOT = Slot(b"j" * 32, 0, 1)
FRAMES = 2
UP = Link("up", PEER.address, 0, 0, "down", 1, FRAMES, 100, 2, 6)
PLACES = [LinkMemory("up", 6, 100)]


class Rig:
    def __init__(self, root: Path, link: Link = UP) -> None:
        self.told: list[object] = []
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = trio.socket.from_stdlib_socket(mine)
        fd = FrameMemory.create(PLACES)
        self.memory = FrameMemory(fd, PLACES)
        request = OpenSlot(1, SLOT, 0, 0, 1, 0, (link,))
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

    async def arrive(self, seq: int) -> None:
        """As the link does with a frame that it has verified."""
        data = memoryview(b"%05d" % seq)
        await self.server.ring.append("up", "received", seq, bytes(64), data, digest(data))
        self.server._deliver("up", seq, data)

    def broken(self) -> str:
        (event,) = [event for event in self.told if isinstance(event, control.SlotBroken)]
        return event.text


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    return await started(Rig(tmp_path), nursery)


@pytest.fixture
async def long_rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    """Whose segment has more frames than there are places."""
    long = msgspec.structs.replace(UP, segment_frames=100, ahead=6)
    return await started(Rig(tmp_path, long), nursery)


async def started(rig: Rig, nursery: trio.Nursery) -> Rig:
    host = FakeHost(ME.address)
    host.nursery = nursery
    host.routes[PEER.address] = FakeStream.reset  # nobody is there
    nursery.start_soon(rig.server.serve, host, "link")
    rig.server.grant(1)
    assert await rig.hear() == channel.Granted(1)
    return rig


async def test_a_sent_frame_is_logged_and_its_place_freed(rig: Rig) -> None:
    await rig.make(0)
    assert await rig.hear() == channel.Free(rig.memory.outgoing("up")[0])
    _, payload = await rig.server.ring.read_sent("up", 0, memoryview(bytearray(100)))
    assert payload == b"frame"
    assert rig.server.ring.is_open(0, "up", "sent")


async def test_a_frame_of_a_segment_that_was_not_granted_is_not_taken(rig: Rig) -> None:
    """The ring never holds more than the D segments that the daemon grants."""
    for seq in range(FRAMES):
        await rig.make(seq)
    assert not rig.told
    await rig.make(FRAMES)
    await rig.server.closed.wait()
    assert "not granted" in rig.broken()


async def test_frames_wait_in_the_ring_when_the_worker_holds_every_place(long_rig: Rig) -> None:
    rig = long_rig
    places = list(rig.memory.incoming("up"))
    for seq in range(len(places) + 2):
        await rig.arrive(seq)
    arrived = [await rig.hear() for _ in places]
    assert arrived == [channel.Arrived("up", n, place, 5) for n, place in enumerate(places)]
    for n, place in enumerate((places[4], places[1]), len(places)):
        await rig.say(channel.Free(place))
        assert await rig.hear() == channel.Arrived("up", n, place, 5)
        assert bytes(rig.memory.view(place, 5)) == b"%05d" % n
    await rig.say(channel.Free(places[0]))
    await rig.arrive(len(places) + 2)
    assert await rig.hear() == channel.Arrived("up", len(places) + 2, places[0], 5)


async def test_a_frame_that_arrives_while_an_older_one_is_read_again_does_not_overtake_it(
    long_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, go, read = long_rig, trio.Event(), long_rig.server.ring.read_received

    async def slow(*arguments: object) -> None:
        await go.wait()
        await read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.server.ring, "read_received", slow)
    places = list(rig.memory.incoming("up"))
    for seq in range(len(places) + 1):
        await rig.arrive(seq)
    for _ in places:
        await rig.hear()
    await rig.say(channel.Free(places[0]))
    await rig.say(channel.Free(places[1]))
    await rig.arrive(len(places) + 1)
    go.set()
    for seq in (len(places), len(places) + 1):
        arrived = await rig.hear()
        assert isinstance(arrived, channel.Arrived)
        assert arrived.seq == seq
        assert bytes(rig.memory.view(arrived.place, 5)) == b"%05d" % seq


async def test_a_worker_that_takes_nothing_stops_the_reader(long_rig: Rig) -> None:
    rig = long_rig
    places = list(rig.memory.incoming("up"))
    for seq in range(2 * len(places) + 6):
        await rig.server._room("up")
        await rig.arrive(seq)
    with trio.move_on_after(0) as waited:
        await rig.server._room("up")
    assert waited.cancelled_caught
    await rig.say(channel.Free(places[0]))
    await rig.server._room("up")


async def test_how_long_the_worker_waits_is_said_on(rig: Rig) -> None:
    await rig.say(channel.Waits("up", 1, 12.5))
    assert rig.told == [control.WaitReported(SLOT, "up", 1, 12.5)]


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
        channel.Waits("down", 0, 1.0),
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


async def test_last_words_are_passed_on_with_their_cause(rig: Rig) -> None:
    await rig.say(channel.Failure("the loss is nan", "refused"))
    await rig.server.closed.wait()
    assert "the loss is nan" in rig.broken()
    (event,) = rig.told
    assert isinstance(event, control.SlotBroken)
    assert event.cause == "refused"


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
