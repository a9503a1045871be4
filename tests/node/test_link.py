"""The numbered log of a link (LINK-1 to LINK-7), pure and on streams that break."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tdmld.chain.crypto import KeyPair
from tdmld.node.control import Link
from tdmld.node.errors import LinkMismatch, LinkRefused
from tdmld.node.link import (
    HELD_DIGESTS,
    Ack,
    Bye,
    Hello,
    LinkLog,
    LinkSigner,
    Place,
    decode_message,
    encode_small,
    frame_header,
)
from tdmld.node.linkserver import LinkServer
from tdmld.node.ring import SlotRing
from tdmld.train.digest import link_root
from tdmld.train.framelog import read_frames
from tests.node.fake_stream import FakeHost, FakeStream, stream_pair

JOB, CHAIN = b"j" * 32, b"c" * 32
AHEAD, SEGMENT, FRAMES = 2, 6, 12
DOWN = Link("down", "lower", 0, 1, "up", 2, SEGMENT, 64, AHEAD, 6)
UP = Link("up", "upper", 0, 0, "down", 2, SEGMENT, 64, AHEAD, 6)
UPPER, LOWER = Place(JOB, 0, 0, 0, "down"), Place(JOB, 0, 0, 1, "up")


def payload(seq: int, direction: str) -> bytes:
    return f"{direction}{seq}".encode()


def value(data: bytes) -> bytes:
    return blake3(data).digest()


def make_log(place: Place, incarnation: int = 0, start: int = 0, **changes: int) -> LinkLog:
    link = msgspec.structs.replace(DOWN if place.link == "down" else UP, **changes)
    return LinkLog(place.job, place.epoch, (place.lane, place.stage), incarnation, link, start)


def log_pair() -> tuple[LinkLog, LinkLog]:
    return make_log(UPPER), make_log(LOWER)


def test_both_ends_agree_about_the_link() -> None:
    upper, lower = log_pair()
    assert (upper.place, upper.other) == (lower.other, lower.place) == (UPPER, LOWER)
    assert upper.greeted(lower.hello()) == 0
    assert lower.greeted(upper.hello()) == 0


def test_a_reader_resumes_where_it_stopped() -> None:
    upper, lower = log_pair()
    for seq in range(2):
        upper.produce(seq, value(payload(seq, "down")))
        assert lower.admits(seq, 5)
        lower.consume(seq, value(payload(seq, "down")))
    assert upper.greeted(lower.hello()) == 2


@pytest.mark.parametrize("seq", [1, 5, FRAMES])
def test_a_frame_must_carry_the_next_number(seq: int) -> None:
    _, lower = log_pair()
    with pytest.raises(LinkRefused, match="was due"):
        lower.admits(seq, 5)


@pytest.mark.parametrize("length", [0, 65])
def test_a_frame_of_a_wrong_size_is_refused(length: int) -> None:
    _, lower = log_pair()
    with pytest.raises(LinkRefused, match="bytes"):
        lower.admits(0, length)


def test_a_peer_may_be_ahead_by_so_much_and_no_more() -> None:
    _, lower = log_pair()
    for seq in range(AHEAD):
        assert lower.admits(seq, 5)
        lower.consume(seq, value(payload(seq, "down")))
    with pytest.raises(LinkRefused, match="ahead"):
        lower.admits(AHEAD, 5)
    lower.produce(0, value(b"gradient"))
    assert lower.admits(AHEAD, 5)


def test_an_old_frame_is_dropped_when_equal_and_stops_the_slot_when_not() -> None:
    _, lower = log_pair()
    lower.admits(0, 5)
    lower.consume(0, value(b"one"))
    assert lower.admits(0, 5) is False
    lower.consume(0, value(b"one"))
    assert lower.consumed == 1
    with pytest.raises(LinkMismatch):
        lower.consume(0, value(b"two"))


def test_a_peer_that_holds_other_bytes_stops_the_slot() -> None:
    upper, _ = log_pair()
    upper.produce(0, value(b"one"))
    with pytest.raises(LinkMismatch):
        upper.greeted(Hello(*LOWER, 0, 1, (value(b"two"),)))


def test_a_replacement_is_compared_before_it_sends() -> None:
    upper, _ = log_pair()
    assert upper.greeted(Hello(*LOWER, 0, 2, (value(b"0"), value(b"1")))) == 2
    upper.produce(0, value(b"0"))
    with pytest.raises(LinkMismatch):
        upper.produce(1, value(b"other"))


@pytest.mark.parametrize(
    "place",
    [
        UPPER,
        LOWER._replace(epoch=1),
        LOWER._replace(job=b"k" * 32),
        LOWER._replace(lane=1),
        LOWER._replace(stage=3),
    ],
)
def test_a_hello_of_something_else_is_refused(place: Place) -> None:
    upper, _ = log_pair()
    with pytest.raises(LinkRefused, match="another"):
        upper.greeted(Hello(*place, 0, 0, ()))


def test_an_older_incarnation_is_fenced() -> None:
    upper, _ = log_pair()
    upper.greeted(Hello(*LOWER, 3, 0, ()))
    with pytest.raises(LinkRefused, match="older"):
        upper.greeted(Hello(*LOWER, 2, 0, ()))
    upper.greeted(Hello(*LOWER, 3, 0, ()))


def test_what_was_discarded_cannot_be_asked_for() -> None:
    upper, _ = log_pair()
    for seq in range(6):
        upper.produce(seq, value(b"x"))
        upper.consume(seq, value(b"y"))
    upper.discard(1)
    with pytest.raises(LinkRefused, match="can be had"):
        upper.greeted(Hello(*LOWER, 0, 5, ()))
    assert upper.greeted(Hello(*LOWER, 0, 6, ())) == 6


def test_the_worker_must_send_in_order() -> None:
    upper, _ = log_pair()
    with pytest.raises(ValueError, match="was due"):
        upper.produce(1, value(b"x"))


def test_a_hello_is_bounded() -> None:
    upper = make_log(UPPER, segments=1, segment_frames=1000)
    for seq in range(600):
        upper.consume(seq, value(b"x"))
    assert len(upper.hello().held) == HELD_DIGESTS
    assert decode_message(encode_small(upper.hello())) == upper.hello()


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(raw: bytes) -> None:
    try:
        message = decode_message(raw)
    except LinkRefused:
        return
    assert message is not None


# --- on streams


@dataclass
class Side:
    server: LinkServer
    key: KeyPair
    ring: SlotRing
    arriving: trio.MemorySendChannel[int]
    arrived: trio.MemoryReceiveChannel[int]
    got: list[tuple[int, bytes]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    room: trio.Event = field(default_factory=trio.Event)


@dataclass
class Rig:
    upper: Side
    lower: Side
    host: FakeHost
    streams: list[FakeStream] = field(default_factory=list)

    async def accept(self, stream: FakeStream) -> None:
        hello = decode_message(await stream.receive(1 << 16))
        assert isinstance(hello, Hello)
        await self.lower.server.answer(stream, hello)  # type: ignore[arg-type]


Make = Callable[[], Rig]


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Make]:
    rings: list[SlotRing] = []

    def make() -> Rig:
        keys = [KeyPair(bytes([n]) * 32) for n in (1, 2)]
        sides = []
        for n, place in enumerate((UPPER, LOWER)):
            directory = tmp_path / str(n)
            directory.mkdir(exist_ok=True)
            ring = SlotRing(directory, [(DOWN, UP)[n]])
            rings.append(ring)
            side = Side(None, keys[n], ring, *trio.open_memory_channel[int](100))  # type: ignore[arg-type]
            side.room.set()

            async def room(link: str, side: Side = side) -> None:
                await side.room.wait()

            def deliver(link: str, seq: int, data: memoryview, side: Side = side) -> None:
                side.got.append((seq, bytes(data)))
                side.arriving.send_nowait(seq)

            side.server = LinkServer(
                make_log(place),
                ring,
                LinkSigner(keys[n], CHAIN),
                keys[1 - n].address,
                room,
                deliver,
                lambda text, cause, side=side: side.broken.append((text, cause)),
            )
            sides.append(side)
        rig = Rig(*sides, FakeHost(keys[0].address))
        rig.host.routes[keys[1].address] = rig.accept
        return rig

    yield make
    for ring in rings:
        ring.close()


async def drive(rig: Rig, frames: int = FRAMES) -> None:
    """Both workers, in step: the lower one answers each frame."""
    for seq in range(frames):
        data = payload(seq, "down")
        await rig.upper.server.produce(seq, memoryview(data))
        await rig.lower.arrived.receive()
        back = payload(seq, "up")
        await rig.lower.server.produce(seq, memoryview(back))
        await rig.upper.arrived.receive()


async def test_everything_arrives_in_order_and_both_say_goodbye(
    make_rig: Make, tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    rig = make_rig()
    rig.host.nursery = nursery
    nursery.start_soon(rig.upper.server.keep, rig.host, "link")
    await drive(rig)
    await rig.upper.server.done.wait()
    await rig.lower.server.done.wait()
    assert rig.lower.got == [(n, payload(n, "down")) for n in range(FRAMES)]
    assert rig.upper.got == [(n, payload(n, "up")) for n in range(FRAMES)]
    assert rig.upper.server.state.roots(1)[0] == rig.lower.server.state.roots(1)[1]
    rig.upper.ring.close()
    sent = list(read_frames(tmp_path / "0" / "1.down.sent", 64))
    assert link_root((f.seq, value(f.payload)) for f in sent) == rig.upper.server.state.roots(1)[0]


async def test_each_segment_is_acknowledged_by_signature(
    make_rig: Make, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    rig = make_rig()
    rig.host.nursery = nursery
    nursery.start_soon(rig.upper.server.keep, rig.host, "link")
    await drive(rig)
    await rig.upper.server.done.wait()
    signer = LinkSigner(rig.lower.key, CHAIN)
    acks = rig.upper.server.acks
    assert sorted(acks) == [0, 1]
    for ack in acks.values():
        assert signer.check_ack(rig.lower.key.public, UPPER, ack)
        assert not signer.check_ack(rig.upper.key.public, UPPER, ack)


@pytest.mark.parametrize("after", range(1, 9))
async def test_a_stream_that_breaks_anywhere_loses_and_repeats_nothing(
    make_rig: Make,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    after: int,
) -> None:
    rig = make_rig()
    rig.host.nursery = nursery
    accept = rig.accept

    async def fragile(stream: FakeStream) -> None:
        if len(rig.host.opened) < 4:
            stream.break_after = after
        await accept(stream)

    rig.host.routes[rig.lower.key.address] = fragile
    nursery.start_soon(rig.upper.server.keep, rig.host, "link")
    await drive(rig)
    await rig.upper.server.done.wait()
    assert len(rig.host.opened) > 2
    assert [seq for seq, _ in rig.lower.got] == list(range(FRAMES))
    assert [seq for seq, _ in rig.upper.got] == list(range(FRAMES))
    assert not rig.upper.broken
    assert not rig.lower.broken


async def test_a_peer_that_was_away_is_served_from_disk(
    make_rig: Make, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    rig = make_rig()
    rig.host.nursery = nursery
    # Four frames are made while nobody listens.
    for seq in range(4):
        await rig.upper.server.produce(seq, memoryview(payload(seq, "down")))
        await rig.lower.server.produce(seq, memoryview(payload(seq, "up")))
    nursery.start_soon(rig.upper.server.keep, rig.host, "link")
    for _ in range(4):
        await rig.lower.arrived.receive()
    assert rig.lower.got == [(n, payload(n, "down")) for n in range(4)]
    nursery.cancel_scope.cancel()


async def attack(rig: Rig, *messages: bytes) -> Exception:
    """Speak to the lower end as the upper one; give the error that ends its handler."""
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    for message in (encode_small(rig.upper.server.state.hello()), *messages):
        await evil.send(message)
    with trio.fail_after(30), pytest.raises(LinkRefused) as caught:
        await rig.accept(theirs)
    return caught.value


def signed(rig: Rig, seq: int, data: bytes, place: Place = UPPER) -> bytes:
    signature = LinkSigner(rig.upper.key, CHAIN).sign_frame(place, seq, value(data))
    return frame_header(seq, signature) + data


async def test_an_unsigned_or_foreign_frame_is_refused(make_rig: Make) -> None:
    rig = make_rig()
    for bad in (
        frame_header(0, bytes(64)) + b"data",
        signed(rig, 0, b"data")[:-1] + b"!",
        signed(rig, 0, b"data", UPPER._replace(epoch=1)),
        signed(rig, 0, b"data", UPPER._replace(lane=1)),
        signed(rig, 0, b"data", UPPER._replace(link="lane1")),
    ):
        assert "signed" in str(await attack(rig, bad))
    assert rig.lower.got == []
    assert rig.lower.broken == []


async def test_a_flood_is_refused_before_it_fills_the_memory(make_rig: Make) -> None:
    rig = make_rig()
    frames = [signed(rig, n, b"data") for n in range(4)]
    assert "ahead" in str(await attack(rig, *frames))
    assert len(rig.lower.got) == AHEAD


async def test_a_peer_that_claims_to_hold_everything_waits_for_room(
    make_rig: Make, nursery: trio.Nursery
) -> None:
    """Its Hello lifts LINK-3; what we keep for a slow worker stays bounded nevertheless."""
    rig = make_rig()
    rig.lower.room = trio.Event()
    held = encode_small(Hello(*UPPER, 0, FRAMES, (bytes(32),)))
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    for message in (held, *(signed(rig, n, b"data") for n in range(6))):
        await evil.send(message)
    nursery.start_soon(rig.accept, theirs)
    await trio.testing.wait_all_tasks_blocked()
    assert rig.lower.got == []
    assert rig.lower.server.state.consumed == 0
    nursery.cancel_scope.cancel()


async def test_an_acknowledgement_that_comes_after_the_segment_was_forgotten_harms_nothing(
    make_rig: Make,
) -> None:
    rig = make_rig()
    for seq in range(6):
        await rig.lower.server.produce(seq, memoryview(b"gradient"))
        rig.lower.server.state.consume(seq, value(b"data"))
    signer = LinkSigner(rig.upper.key, CHAIN)
    root = rig.lower.server.state.roots(0)[0]
    ack = encode_small(Ack(0, root, signer.sign_ack(LOWER, 0, root)))
    rig.lower.server.discard(1)
    hello = Hello(*UPPER, 0, 6, ())
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    for message in (encode_small(hello), ack, b"?"):
        await evil.send(message)
    with pytest.raises(LinkRefused, match="unknown"):
        await rig.accept(theirs)
    assert rig.lower.broken == []
    assert rig.lower.server.acks == {}


async def test_an_early_goodbye_a_second_hello_and_a_false_ack_are_refused(make_rig: Make) -> None:
    rig = make_rig()
    assert "before the end" in str(await attack(rig, encode_small(Bye())))
    again = encode_small(rig.upper.server.state.hello())
    assert "second Hello" in str(await attack(rig, again))
    ack = encode_small(Ack(0, bytes(32), bytes(64)))
    assert "before it was sent" in str(await attack(rig, ack))


async def test_a_stranger_cannot_speak_on_a_link(make_rig: Make) -> None:
    rig = make_rig()
    evil, theirs = stream_pair(KeyPair(b"3" * 32).address, rig.lower.key.address)
    await evil.send(encode_small(rig.upper.server.state.hello()))
    with pytest.raises(LinkRefused, match="not the other end"):
        await rig.accept(theirs)


async def test_a_frame_that_changes_when_sent_again_stops_the_slot(make_rig: Make) -> None:
    rig = make_rig()
    error = await attack(rig, signed(rig, 0, b"one"), signed(rig, 0, b"two"))
    assert isinstance(error, LinkMismatch)
    assert [cause for _, cause in rig.lower.broken] == ["link"]
