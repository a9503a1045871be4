"""Packets and shared memory between a worker and its server."""

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdmld.node import channel
from tdmld.node.channel import (
    Arrived,
    End,
    Failure,
    FrameMemory,
    Free,
    Genesis,
    Granted,
    LinkMemory,
    Packet,
    Segment,
    Sent,
    Step,
    Waits,
    WorkerChannel,
    decode_packet,
    encode_packet,
)
from tdmld.node.errors import ControlError

PLACES, FRAME = 6, 5000
UP, DOWN = LinkMemory("up", PLACES, FRAME), LinkMemory("down", PLACES, FRAME)
LANE = LinkMemory("lane3", 4, 3 * FRAME)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
links = st.sampled_from(channel.LINKS)
digests = st.binary(min_size=32, max_size=32)
times = st.floats(allow_nan=False)
packets = st.one_of(
    st.builds(Arrived, links, u64, u32, u32),
    st.builds(Sent, links, u64, u32, u32),
    st.builds(Free, u32),
    st.builds(Granted, u32, st.sets(st.integers(0, 15)).map(lambda found: tuple(sorted(found)))),
    st.builds(Segment, u32),
    st.just(End()),
    st.builds(Genesis, digests, digests, digests),
    st.builds(Step, u64, st.none() | times, times, times, times, times),
    st.builds(Waits, links, u64, times),
    st.builds(Failure, st.text(max_size=40), st.from_regex(r"[a-z_]{0,32}", fullmatch=True)),
)


@given(packets)
def test_every_packet_survives_the_way_and_is_small(packet: Packet) -> None:
    raw = encode_packet(packet)
    assert len(raw) <= channel.PACKET_BYTES
    assert decode_packet(raw) == packet


@given(st.binary(max_size=300))
def test_foreign_bytes_are_a_control_error_or_a_packet(raw: bytes) -> None:
    try:
        packet = decode_packet(raw)
    except ControlError:
        return
    assert isinstance(packet, Packet)


def test_a_long_failure_text_is_cut_at_a_character() -> None:
    packet = decode_packet(encode_packet(Failure("ä" * 300)))
    assert packet == Failure("ä" * (channel.MAX_FAILURE_TEXT // 2))


class Server:
    """The other end of a worker's channel."""

    def __init__(self) -> None:
        fd = FrameMemory.create([UP])
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setblocking(False)
        self.socket = mine
        self.memory = FrameMemory(fd, [UP])
        self.worker = WorkerChannel(theirs, FrameMemory(fd, [UP]))
        self._theirs = theirs
        os.close(fd)

    def say(self, packet: Packet) -> None:
        self.socket.send(encode_packet(packet))

    def hear(self) -> Packet:
        return decode_packet(self.socket.recv(channel.PACKET_BYTES))

    def close(self) -> None:
        self.socket.close()
        self._theirs.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def test_a_frame_is_read_in_place_and_its_place_freed_after_release(server: Server) -> None:
    place = server.memory.incoming("up")[3]
    server.memory.view(place, 5)[:] = b"hello"
    server.say(Arrived("up", 7, place, 5))
    view = server.worker.receive("up", 7)
    assert bytes(view) == b"hello"
    server.memory.view(place, 5)[:] = b"HELLO"
    assert bytes(view) == b"HELLO"
    server.worker.release("up", 7)
    assert server.hear() == Free(place)


def test_frames_may_arrive_before_they_are_asked_for(server: Server) -> None:
    for seq, place in enumerate(server.memory.incoming("up")[:3]):
        server.memory.view(place, 1)[:] = bytes([seq])
        server.say(Arrived("up", seq, place, 1))
    assert [bytes(server.worker.receive("up", seq)) for seq in (2, 0, 1)] == [b"\2", b"\0", b"\1"]


def test_send_copies_and_waits_only_when_every_place_is_taken(server: Server) -> None:
    payload = bytearray(b"x" * FRAME)
    for seq in range(PLACES):
        server.worker.send("up", seq, memoryview(payload))
    payload[:] = b"y" * FRAME
    sent = [server.hear() for _ in range(PLACES)]
    assert [packet.seq for packet in sent if isinstance(packet, Sent)] == list(range(PLACES))
    first = sent[0]
    assert isinstance(first, Sent)
    assert bytes(server.memory.view(first.place, FRAME)) == b"x" * FRAME
    server.say(Free(first.place))
    server.worker.send("up", PLACES, memoryview(payload))
    again = server.hear()
    assert isinstance(again, Sent)
    assert again.place == first.place


def test_a_grant_lets_segments_below_it_run(server: Server) -> None:
    server.say(Granted(2))
    assert server.worker.wait_for_grant(0) == ()
    assert server.worker.wait_for_grant(1) == ()
    server.say(End())
    with pytest.raises(WorkerChannel.Ended):
        server.worker.wait_for_grant(2)


def test_a_vanished_server_is_an_error(server: Server) -> None:
    server.socket.close()
    with pytest.raises(ControlError, match="gone"):
        server.worker.receive("up", 0)


@pytest.mark.parametrize(
    "packet", [Arrived("down", 0, 0, 1), Free(0), Segment(1)], ids=lambda p: type(p).__name__
)
def test_a_packet_that_makes_no_sense_is_refused(server: Server, packet: Packet) -> None:
    server.say(packet)
    with pytest.raises(ControlError):
        server.worker.wait_for_grant(0)


def test_a_place_outside_the_memory_or_a_frame_that_is_too_long_is_refused(server: Server) -> None:
    with pytest.raises(ControlError, match="no place"):
        server.memory.view(2 * PLACES, 1)
    with pytest.raises(ControlError, match="frame of"):
        server.memory.view(0, FRAME + 1)


def test_a_memory_file_that_is_too_small_is_refused() -> None:
    fd = FrameMemory.create([UP._replace(frame_bytes=10)])
    try:
        with pytest.raises(ControlError, match="less than"):
            FrameMemory(fd, [UP, DOWN])
    finally:
        os.close(fd)


def test_places_have_the_size_of_their_link_and_do_not_overlap() -> None:
    links = [UP, DOWN, LANE]
    fd = FrameMemory.create(links)
    memory = FrameMemory(fd, links)
    os.close(fd)
    places = [
        place
        for link in links
        for place in (*memory.incoming(link.link), *memory.outgoing(link.link))
    ]
    assert places == list(range(4 * PLACES + 2 * LANE.places))
    sizes = {place: FRAME for place in places[: 4 * PLACES]}
    sizes |= {place: 3 * FRAME for place in places[4 * PLACES :]}
    for place, size in sizes.items():
        memory.view(place, size)[:] = struct.pack("<I", place) * (size // 4)
    for place, size in sizes.items():
        assert bytes(memory.view(place, size)) == struct.pack("<I", place) * (size // 4)
        with pytest.raises(ControlError, match="frame of"):
            memory.view(place, size + 1)


def test_a_grant_names_the_lanes_that_enter_its_segment(server: Server) -> None:
    server.say(Granted(1))
    server.say(Granted(2, (0, 2)))
    server.say(Granted(3, (1,)))
    assert [server.worker.wait_for_grant(segment) for segment in range(3)] == [(), (0, 2), (1,)]


def test_a_worker_that_waits_long_says_so_and_goes_on_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "WAITS_SECONDS", 1)
    server = Server()
    monkeypatch.setattr(channel, "WAITS_SECONDS", 0)
    place = server.memory.incoming("up")[0]
    heard: list[Packet] = []

    def serve() -> None:
        server.socket.setblocking(True)
        heard.append(server.hear())
        server.memory.view(place, 2)[:] = b"ok"
        server.say(Arrived("up", 4, place, 2))

    thread = threading.Thread(target=serve)
    thread.start()
    assert bytes(server.worker.receive("up", 4)) == b"ok"
    thread.join()
    (waits,) = heard
    assert isinstance(waits, Waits)
    assert (waits.link, waits.seq) == ("up", 4)
    assert waits.seconds > 0.5
    server.close()
