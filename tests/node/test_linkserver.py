"""What a link does beside its rules: logs beside the loop, acknowledges again, ends in order."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node.errors import LinkRefused
from tdmld.node.link import Ack, Bye, Frame, Hello, LinkSigner, decode_message, encode_small
from tdmld.node.linkserver import LinkServer
from tdmld.node.ring import INLINE_BYTES, SlotRing
from tdmld.p2p.errors import P2PError, StreamClosed
from tdmld.train.framelog import FrameLogWriter, read_frames
from tests.node.fake_stream import FakeStream, stream_pair
from tests.node.test_link import (
    CHAIN,
    DOWN,
    FRAMES,
    LOWER,
    UPPER,
    Make,
    Rig,
    attack,
    make_log,
    make_rig,  # noqa: F401 (a fixture)
    signed,
    value,
)


async def until_acknowledged(stream: FakeStream, *messages: bytes) -> Ack:
    """Speak to the lower end as the upper one; its first acknowledgement."""
    for message in messages:
        await stream.send(message)
    while True:
        message = decode_message(await stream.receive(1 << 16))
        if isinstance(message, Ack):
            return message
        assert isinstance(message, Frame | Hello)


async def test_an_acknowledgement_is_said_again_on_a_new_stream(
    make_rig: Make,  # noqa: F811
    nursery: trio.Nursery,
) -> None:
    rig = make_rig()
    for seq in range(6):
        await rig.lower.server.produce(seq, memoryview(b"gradient"))
    heard = []
    for frames in (range(6), range(0)):
        mine, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
        nursery.start_soon(ignoring_its_end, rig, theirs)
        greeting = Hello(*UPPER, 0, 6 - len(frames), ())
        with trio.fail_after(5):
            data = (signed(rig, n, b"data") for n in frames)
            heard.append(await until_acknowledged(mine, encode_small(greeting), *data))
    assert heard == 2 * [heard[0]]
    rig.lower.server.discard(1)
    assert rig.lower.server._given == []


async def ignoring_its_end(rig: Rig, stream: FakeStream) -> None:
    with suppress(P2PError):  # when a newer stream replaces it
        await rig.accept(stream)


async def test_what_was_acknowledged_to_a_predecessor_is_no_fault(make_rig: Make) -> None:  # noqa: F811
    """A replacement has not sent yet what its neighbour acknowledges again."""
    rig = make_rig()
    root = value(b"of what the predecessor sent")
    signature = LinkSigner(rig.upper.key, CHAIN).sign_ack(LOWER, 0, root)
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    for message in (encode_small(Hello(*UPPER, 0, 6, ())), encode_small(Ack(0, root, signature))):
        await evil.send(message)
    await evil.send(b"?")
    with pytest.raises(Exception, match="unknown"):
        await rig.accept(theirs)
    assert rig.lower.broken == []
    assert rig.lower.server.acks == {}


async def test_a_large_frame_is_logged_beside_the_loop_and_sent_when_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = INLINE_BYTES + 1
    ring = SlotRing(tmp_path, [msgspec.structs.replace(DOWN, frame_bytes=size)])
    server = LinkServer(
        make_log(UPPER, frame_bytes=size),
        ring,
        LinkSigner(KeyPair(b"1" * 32), CHAIN),
        KeyPair(b"2" * 32).address,
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
    written = threading.Event()
    append = FrameLogWriter.append

    def slow(writer: FrameLogWriter, *frame: Any) -> int:
        assert written.wait(10)
        return append(writer, *frame)

    monkeypatch.setattr(FrameLogWriter, "append", slow)
    mine, theirs = stream_pair("lower", "upper")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server._write, mine, 0, trio.Event(), server.done)
        nursery.start_soon(server.produce, 0, memoryview(bytes(size)))
        with trio.move_on_after(0.05) as waited:
            await theirs.receive(1 << 20)  # the loop runs, and nothing leaves that is not kept
        assert waited.cancelled_caught
        written.set()
        with trio.fail_after(10):
            assert len(await theirs.receive(1 << 20)) > size
        nursery.cancel_scope.cancel()
    ring.close()
    assert [frame.seq for frame in read_frames(tmp_path / "0.down.sent", size)] == [0]


async def test_a_slot_that_was_closed_takes_no_frame_more(
    make_rig: Make,  # noqa: F811
    nursery: trio.Nursery,
) -> None:
    rig = make_rig()
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    await evil.send(encode_small(rig.upper.server.state.hello()))
    nursery.start_soon(rig.accept, theirs)
    await trio.testing.wait_all_tasks_blocked()
    assert rig.lower.server.connected
    await rig.lower.server.stop()
    await trio.testing.wait_all_tasks_blocked()
    assert not rig.lower.server.connected
    assert "closed" in str(await attack(rig, signed(rig, 0, b"data")))
    assert rig.lower.got == []


async def test_a_stream_that_ends_while_a_newer_one_takes_its_place_is_one_error_of_that_stream(
    make_rig: Make,  # noqa: F811
    nursery: trio.Nursery,
) -> None:
    """It came as a group with the cancellation in it, and took the slot away."""
    rig = make_rig()
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    await evil.send(encode_small(rig.upper.server.state.hello()))
    ended: list[BaseException] = []

    async def serve() -> None:
        try:
            await rig.accept(theirs)
        except BaseException as error:
            ended.append(error)

    nursery.start_soon(serve)
    await trio.testing.wait_all_tasks_blocked()
    await evil.close()
    assert rig.lower.server._scope is not None
    rig.lower.server._scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert [type(error) for error in ended] == [StreamClosed]


async def test_the_goodbye_of_one_neighbour_is_not_that_of_the_next(
    make_rig: Make,  # noqa: F811
    nursery: trio.Nursery,
) -> None:
    """It came in the same moment as the news of another neighbour, whom nobody dialled then."""
    rig = make_rig()
    lower = rig.lower.server
    for seq in range(FRAMES):
        await lower.produce(seq, memoryview(b"gradient"))
        lower.state.consume(seq, value(b"data"))
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    await evil.send(encode_small(Hello(*UPPER, 0, FRAMES, ())))
    nursery.start_soon(ignoring_its_end, rig, theirs)
    await trio.testing.wait_all_tasks_blocked()
    done = lower.done
    await evil.send(encode_small(Bye()))
    with trio.CancelScope(deadline=trio.current_time() + 5):
        while not done.is_set():
            await trio.lowlevel.checkpoint()
    lower.set_peer(KeyPair(b"9" * 32).address, 1)
    assert not lower.done.is_set()
    await trio.testing.wait_all_tasks_blocked()
    assert not lower.done.is_set()


async def test_a_stream_that_comes_while_the_slot_is_closed_is_not_kept(make_rig: Make) -> None:  # noqa: F811
    """Its other end would wait on it for ever, and not dial the slot that is opened next."""
    rig = make_rig()
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    await evil.send(encode_small(rig.upper.server.state.hello()))
    await rig.lower.server.stop()
    with trio.fail_after(5), pytest.raises(LinkRefused, match="closed"):
        await rig.accept(theirs)
