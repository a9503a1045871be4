"""A link between two hosts, over a line that breaks in the middle of large frames (LINK-1)."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tdmld.chain.crypto import KeyPair
from tdmld.node.control import Link
from tdmld.node.link import Hello, LinkLog, LinkSigner, decode_message
from tdmld.node.linkserver import LinkServer
from tdmld.node.ring import SlotRing
from tdmld.p2p import Host, PeerInfo, Stream, open_host
from tdmld.train.framelog import read_frames
from tests.p2p.support import QUICK

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "lib"))
from wan import Conditions, Wan, open_wan

PROTOCOL = "/test/link/1"
FRAME_BYTES, FRAMES = 1 << 20, 6
SIZES = (1, FRAMES, FRAME_BYTES, FRAMES, FRAMES)
DOWN, UP = Link("down", "lower", 0, 1, "up", *SIZES), Link("up", "upper", 0, 0, "down", *SIZES)
"""The upper end may be ahead by the whole job."""


@dataclass
class End:
    server: LinkServer
    ring: SlotRing
    got: list[tuple[int, bytes]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def make_end(link: Link, key: KeyPair, peer: KeyPair, directory: Path) -> End:
    async def room(link: str) -> None: ...

    def deliver(link: str, seq: int, data: memoryview) -> None:
        end.got.append((seq, bytes(data)))

    directory.mkdir()
    ring = SlotRing(directory, [link])
    signer = LinkSigner(key, bytes(32))
    end = End(None, ring)  # type: ignore[arg-type]
    end.server = LinkServer(
        LinkLog(b"j" * 32, 0, (0, 1 - link.other_stage), 0, link, 0),
        ring,
        signer,
        peer.address,
        room,
        deliver,
        lambda text, cause: end.broken.append(text),
    )
    return end


@asynccontextmanager
async def link_over(
    up: Conditions, directory: Path
) -> AsyncIterator[tuple[End, End, Host, Wan, list[int]]]:
    """Both ends, the upper one's host, the line, and what the peer wanted on each new stream."""
    keys = [KeyPair(bytes([n]) * 32) for n in (1, 2)]
    upper = make_end(DOWN, keys[0], keys[1], directory / "upper")
    lower = make_end(UP, keys[1], keys[0], directory / "lower")
    wanted: list[int] = []

    async def accept(stream: Stream) -> None:
        hello = decode_message(await stream.receive(1 << 16))
        assert isinstance(hello, Hello)
        wanted.append(lower.server.state.consumed)
        await lower.server.answer(stream, hello)

    async with (
        open_host(keys[0].seed, gossip=False, limits=QUICK) as a,
        open_host(keys[1].seed, gossip=False, limits=QUICK) as b,
    ):
        b.set_handler(PROTOCOL, accept)
        target = ("127.0.0.1", int(b.addresses[0].split("/")[-1]))
        async with open_wan(target, up, Conditions()) as wan:
            a.add_peer(PeerInfo(b.peer_id, (f"/ip4/127.0.0.1/tcp/{wan.port}",)))
            yield upper, lower, a, wan, wanted
    for end in (upper, lower):
        end.ring.close()


async def drive(upper: End, lower: End, host: Host) -> list[bytes]:
    """All frames of the job, both ways, until both ends said goodbye."""
    frames = [os.urandom(FRAME_BYTES - seq) for seq in range(FRAMES)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upper.server.keep, host, PROTOCOL)
        for seq, frame in enumerate(frames):
            await upper.server.produce(seq, memoryview(frame))
            await lower.server.produce(seq, memoryview(b"gradient"))
        await upper.server.done.wait()
        await lower.server.done.wait()
        nursery.cancel_scope.cancel()
    return frames


def check(upper: End, lower: End, frames: list[bytes], directory: Path) -> None:
    assert lower.got == list(enumerate(frames))
    assert [seq for seq, _ in upper.got] == list(range(FRAMES))
    assert upper.broken == lower.broken == []
    assert upper.server.state.roots(0)[0] == lower.server.state.roots(0)[1]
    sent = read_frames(directory / "upper" / "0.down.sent", FRAME_BYTES)
    received = read_frames(directory / "lower" / "0.up.received", FRAME_BYTES)
    assert list(sent) == list(received)


@pytest.mark.parametrize("after", [1_500_000, 2_600_000])
async def test_a_reset_in_the_middle_of_a_large_frame_resumes_at_its_beginning(
    tmp_path: Path, after: int
) -> None:
    async with link_over(Conditions(reset_after=after), tmp_path) as (upper, lower, a, wan, wanted):
        with trio.fail_after(60):
            frames = await drive(upper, lower, a)
    check(upper, lower, frames, tmp_path)
    assert wan.resets >= FRAMES * FRAME_BYTES // after
    # Each stream went on with the frame that the one before did not bring whole.
    assert wanted == sorted(wanted)
    assert set(wanted) - {0, FRAMES}


async def test_a_line_that_freezes_in_the_middle_of_a_frame_is_left_and_the_link_goes_on(
    tmp_path: Path,
) -> None:
    slow = Conditions(rate=4e6)
    async with link_over(slow, tmp_path) as (upper, lower, a, wan, _):

        async def freeze() -> None:
            while wan.carried_up < FRAME_BYTES * 3 // 2:  # noqa: ASYNC110 (nothing announces it)
                await trio.sleep(0.01)
            wan.freeze()
            while upper.server.connected:  # noqa: ASYNC110
                await trio.sleep(0.01)
            wan.thaw()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(freeze)
            with trio.fail_after(60):
                frames = await drive(upper, lower, a)
    check(upper, lower, frames, tmp_path)
