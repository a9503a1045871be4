"""Two slots with a link between them, whose processes, disks and machines can be taken away.

The workers are played: frame n of a direction has known bytes, the lower worker answers each frame
of the upper one. A kill leaves what is in the page cache, a power cut what was synced and any part
of the rest, a lost machine nothing.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tdmld.chain.crypto import KeyPair
from tdmld.node import channel, control
from tdmld.node.channel import FrameMemory, LinkMemory, Packet, decode_packet, encode_packet
from tdmld.node.control import Link, OpenSlot, Slot
from tdmld.node.jobfiles import remove_tree
from tdmld.node.layout import list_file
from tdmld.node.link import Hello, LinkSigner, decode_message
from tdmld.node.linkserver import LinkServer
from tdmld.node.slotserver import SlotServer
from tdmld.train.digest import digest, link_root
from tdmld.train.framelog import frame_log_name, read_frames
from tdmld.train.segment import LinkRoots, SegmentRecord, write_list
from tests.node.fake_stream import FakeHost, FakeStream

JOB, CHAIN = b"j" * 32, b"c" * 32
SEGMENT, ROUNDS, FRAME_BYTES, AHEAD, PLACES = 3, 3, 64, 2, 3
FRAMES = SEGMENT * ROUNDS
NAMES = ("down", "up")
"""Of the link at the upper and at the lower slot; and the directions, by who sends."""


def payload(seq: int, sender: int) -> bytes:
    return f"{NAMES[sender]} {seq}".encode() * (1 + seq % 3)


def roots(segment: int, side: int) -> LinkRoots:
    numbers = range(segment * SEGMENT, (segment + 1) * SEGMENT)
    sent, received = (
        link_root((seq, digest(payload(seq, sender))) for seq in numbers)
        for sender in (side, 1 - side)
    )
    return LinkRoots(NAMES[side], sent, received)


@dataclass
class Life:
    """One opening of a slot, until it is killed."""

    server: SlotServer
    socket: "trio.socket.SocketType"
    memory: FrameMemory
    start: int
    told: list[object]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Side:
    """The upper (0) or the lower (1) slot."""

    def __init__(self, number: int, root: Path) -> None:
        self.number = number
        self.root = root
        self.machine = 0
        """Incarnation: another machine with another session."""
        self.epoch = 0
        self.life: Life | None = None
        self.made = 0
        """Frames that workers have made in all, also again: what a plan of kills counts."""
        self.moved = trio.Event()
        self.given: list[int] = []
        """Frames that the running worker was given."""

    @property
    def key(self) -> KeyPair:
        return KeyPair(bytes([1 + self.number + 2 * self.machine]) * 32)

    @property
    def directory(self) -> Path:
        return self.root / f"{NAMES[self.number]}-{self.machine}"

    def log(self, segment: int, direction: str) -> Path:
        return self.directory / "ring" / frame_log_name(segment, NAMES[self.number], direction)

    @property
    def finished(self) -> int:
        """Boundaries that a worker could begin at: those that were reported."""
        done = [event.segment + 1 for event in self.told(control.SegmentReported)]
        return max(done, default=0)

    def told(self, kind: type) -> list[object]:  # type: ignore[type-arg]
        return [event for event in self.all_told if isinstance(event, kind)]

    all_told: list[object]


class Pair:
    """Both slots. Run it inside a nursery."""

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.sides = (Side(0, root), Side(1, root))
        self.hosts: dict[str, FakeHost] = {}
        self._nursery = nursery
        self._links: dict[str, LinkServer] = {}
        for side in self.sides:
            side.all_told = []

    # --- what happens

    def open(self, number: int, start: int) -> None:
        """Open a slot on its machine, with a worker that begins at boundary `start`."""
        side, other = self.sides[number], self.sides[1 - number]
        link = Link(
            NAMES[number],
            other.key.address,
            0,
            1 - number,
            NAMES[1 - number],
            ROUNDS,
            SEGMENT,
            FRAME_BYTES,
            AHEAD,
            PLACES,
            other.machine,
        )
        places = [LinkMemory(link.name, PLACES, FRAME_BYTES)]
        fd = FrameMemory.create(places)
        memory = FrameMemory(fd, places)
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        slot = Slot(JOB, 0, number)
        request = OpenSlot(1, slot, side.epoch, side.machine, ROUNDS, start, (link,))
        told: list[object] = []

        def tell(event: object) -> None:
            told.append(event)
            side.all_told.append(event)
            moved, side.moved = side.moved, trio.Event()
            moved.set()

        def introduce(links: object) -> None:
            (self._links[side.key.address],) = links  # type: ignore[misc]

        server = SlotServer(
            request, side.directory, fd, theirs, LinkSigner(side.key, CHAIN), tell, introduce
        )
        ours = trio.socket.from_stdlib_socket(mine)
        side.life = Life(server, ours, memory, start, told)
        side.given = []
        self._nursery.start_soon(self._live, side, side.life)

    async def kill(self, number: int) -> None:
        """The processes of a slot end; what was written is in the page cache."""
        side = self.sides[number]
        life, side.life = side.life, None
        assert life is not None
        self._links.pop(side.key.address, None)
        life.scope.cancel()
        await life.ended.wait()

    def lose_power(self, number: int, keep: Callable[[Path, int], int]) -> None:
        """After a kill: of logs that were not synced `keep(path, size)` bytes stay."""
        side = self.sides[number]
        for segment in range(side.finished, ROUNDS):
            for direction in ("sent", "received"):
                path = side.log(segment, direction)
                if path.exists():
                    os.truncate(path, keep(path, path.stat().st_size))

    def replace(self, number: int) -> None:
        """After a kill: the slot goes to a machine that has nothing. The other end hears of it."""
        side, other = self.sides[number], self.sides[1 - number]
        remove_tree(side.directory)
        side.machine += 1
        side.all_told.clear()
        if other.life is not None:
            name = NAMES[other.number]
            other.life.server.set_link_peer(name, side.key.address, side.machine)

    async def until_made(self, number: int, frames: int) -> None:
        """Until workers of a slot made so many frames in all."""
        side = self.sides[number]
        while side.made < frames:
            await side.moved.wait()

    async def until_ended(self) -> None:
        """Until both slots ran to their end and said goodbye."""
        for side in self.sides:
            while not any(isinstance(e, control.SlotEnded) for e in self._told_now(side)):
                broken = [e for e in self._told_now(side) if isinstance(e, control.SlotBroken)]
                assert not broken, broken
                await side.moved.wait()

    @staticmethod
    def _told_now(side: Side) -> list[object]:
        return side.life.told if side.life is not None else []

    # --- how it works

    async def _live(self, side: Side, life: Life) -> None:
        host = FakeHost(side.key.address)
        with life.scope:
            async with trio.open_nursery() as nursery:
                host.nursery = nursery
                for other in self.sides:
                    if other is not side:
                        host.routes = _Routes(self)
                nursery.start_soon(life.server.serve, host, "link")
                nursery.start_soon(self._work, side, life)
                await life.server.closed.wait()
        life.socket.close()
        life.ended.set()

    async def accept(self, session: str, stream: FakeStream) -> None:
        hello = decode_message(await stream.receive(1 << 16))
        assert isinstance(hello, Hello)
        link = self._links.get(session)
        if link is None:
            await stream.reset()
            return
        await link.answer(stream, hello)  # type: ignore[arg-type]

    async def _work(self, side: Side, life: Life) -> None:
        """The worker: 1F1B without anything to compute."""
        life.server.grant(ROUNDS)
        worker = _Worker(side, life)
        for segment in range(life.start, ROUNDS):
            for seq in range(segment * SEGMENT, (segment + 1) * SEGMENT):
                if side.number == 0:
                    await worker.send(seq)
                    await worker.receive(seq)
                else:
                    await worker.receive(seq)
                    await worker.send(seq)
            zero = bytes(32)
            links = (roots(segment, side.number),)
            record = SegmentRecord(segment, zero, zero, zero, zero, links, False, ())
            write_list(list_file(side.directory, segment), record)
            await worker.say(channel.Segment(segment))
        while True:
            await worker.hear()

    def check(self) -> None:
        """Both ends have each frame once, in order, signed by who sent it; both say the same."""
        for segment in range(ROUNDS):
            numbers = range(segment * SEGMENT, (segment + 1) * SEGMENT)
            for sender in (0, 1):
                expected = [(seq, payload(seq, sender)) for seq in numbers]
                sides = (self.sides[sender], "sent"), (self.sides[1 - sender], "received")
                for side, direction in sides:
                    assert side.life is not None
                    path = side.log(segment, direction)
                    if not path.exists():
                        # It began later on another machine, and has nothing older.
                        assert side.machine
                        continue
                    found = read_frames(path, FRAME_BYTES)
                    assert [(frame.seq, frame.payload) for frame in found] == expected


class _Routes(dict[str, object]):
    """Every session leads to whoever has the link open under it now."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._pair = pair

    def __getitem__(self, session: str) -> Callable[[FakeStream], object]:
        return lambda stream: self._pair.accept(session, stream)


class _Worker:
    def __init__(self, side: Side, life: Life) -> None:
        self._side, self._life = side, life
        self._name = NAMES[side.number]
        self._free = list(life.memory.outgoing(self._name))
        self._arrived: dict[int, tuple[int, int]] = {}

    async def say(self, packet: Packet) -> None:
        await self._life.socket.send(encode_packet(packet))

    async def hear(self) -> None:
        try:
            raw = await self._life.socket.recv(channel.PACKET_BYTES)
        except ConnectionError:
            raw = b""
        if not raw:
            await trio.sleep_forever()
        match decode_packet(raw):
            case channel.Arrived(_, seq, place, length):
                assert seq not in self._arrived
                self._arrived[seq] = (place, length)
            case channel.Free(place):
                self._free.append(place)

    async def send(self, seq: int) -> None:
        data = payload(seq, self._side.number)
        while not self._free:
            await self.hear()
        place = self._free.pop(0)
        self._life.memory.view(place, len(data))[:] = data
        await self.say(channel.Sent(self._name, seq, place, len(data)))
        self._side.made += 1
        moved, self._side.moved = self._side.moved, trio.Event()
        moved.set()

    async def receive(self, seq: int) -> None:
        while seq not in self._arrived:
            await self.hear()
        place, length = self._arrived.pop(seq)
        data = bytes(self._life.memory.view(place, length))
        assert data == payload(seq, 1 - self._side.number)
        self._side.given.append(seq)
        await self.say(channel.Free(place))
