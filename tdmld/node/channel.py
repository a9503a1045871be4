"""Packets and shared memory between a worker and whoever serves it; the worker's Channel.

A live worker is served by the carrier, a drawing or replaying one by the daemon; the packets are
the same. One SOCK_SEQPACKET pair carries packets of at most PACKET_BYTES (kind byte, then a fixed
struct). Payloads lie in one memory file, cut into places, each as large as its link's frames:

    for each link of the slot: `places` incoming ones, then `places` outgoing ones

    server -> worker   Arrived(link, seq, place, length)   a frame lies in an incoming place
                       Free(place)                         an outgoing place may be used again
                       Granted(until, included)            segments < until may run; lanes whose
                                                           contributions enter segment until - 1
                       End()                               finish after the running operation
    worker -> server   Sent(link, seq, place, length)      a frame lies in an outgoing place
                       Free(place)                         an incoming place may be used again
                       Genesis(shared, lane, data)         the state where it begins is on disk
                       Step(...)                           an optimizer step is done
                       Segment(segment)                    list and state after it are on disk
                       Waits(link, seq, seconds)           it has waited so long for a frame
                       Failure(text, cause)                the worker's last words

1F1B itself bounds how many frames are under way: between stages there are never more than `stages`
+ 1 frames that arrived and were not released, and the spec gives such links more places than that.
On a lane link a whole step's parts may arrive before they are asked for: what finds no place waits
in the ring. A worker that begins again sends again: the server compares and drops.
"""

import mmap
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tdmld.node.errors import ControlError

if TYPE_CHECKING:
    from tdmld.train.spec import Spec

PACKET_BYTES = 256
MAX_LANES = 16
LINKS = ("up", "down", *(f"lane{lane}" for lane in range(MAX_LANES)))
"""Every name that a link can have; packets carry its number here."""
_NUMBER_OF = {link: number for number, link in enumerate(LINKS)}
_ALIGN = 4096
MAX_FAILURE_TEXT = 200
MAX_CAUSE = 32
WAITS_SECONDS = 10.0
"""A worker that waits for a frame says so each time that this went by."""
_TIMEVAL = struct.Struct("@ll")


@dataclass(frozen=True)
class Arrived:
    """A frame lies in an incoming place."""

    link: str
    seq: int
    place: int
    length: int


@dataclass(frozen=True)
class Sent:
    """A frame lies in an outgoing place."""

    link: str
    seq: int
    place: int
    length: int


@dataclass(frozen=True)
class Free:
    """A place is free again; said by its reader."""

    place: int


@dataclass(frozen=True)
class Granted:
    """Segments < until may run; `included` are lanes, ascending: their contributions to the round
    before enter segment until - 1."""

    until: int
    included: tuple[int, ...] = ()


@dataclass(frozen=True)
class End:
    """The worker shall end."""


@dataclass(frozen=True)
class Genesis:
    """Roots of the state where the worker begins, and of the data."""

    shared: bytes
    lane: bytes
    data: bytes


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is None in slots that do not see it; times are in seconds."""

    step: int
    loss: float | None
    seconds: float
    waiting: float
    verifying: float
    gradient_norm: float


@dataclass(frozen=True)
class Segment:
    """A segment's list and the state after it are on disk, synced."""

    segment: int


@dataclass(frozen=True)
class Failure:
    """Why the worker ends; `cause` is one word for it (machine_types.FailureCause) or nothing."""

    text: str
    cause: str = ""


@dataclass(frozen=True)
class Waits:
    """The worker has waited for this frame for so long."""

    link: str
    seq: int
    seconds: float


Packet = Arrived | Sent | Free | Granted | End | Genesis | Step | Segment | Failure | Waits

_FRAME = struct.Struct("<BBQII")
_NUMBER = struct.Struct("<BI")
_STEP = struct.Struct("<BQ?5d")
_ROOTS = struct.Struct("<B32s32s32s")
_GRANT = struct.Struct("<BIH")
_WAIT = struct.Struct("<BBQd")
_ARRIVED, _SENT, _FREE, _GRANTED, _END, _GENESIS, _STEP_KIND, _SEGMENT, _FAILURE, _WAITS = range(
    1, 11
)


def encode_packet(packet: Packet) -> bytes:
    """The bytes of a packet."""
    match packet:
        case Arrived(link, seq, place, length):
            return _FRAME.pack(_ARRIVED, _NUMBER_OF[link], seq, place, length)
        case Sent(link, seq, place, length):
            return _FRAME.pack(_SENT, _NUMBER_OF[link], seq, place, length)
        case Free(place):
            return _NUMBER.pack(_FREE, place)
        case Granted(until, included):
            return _GRANT.pack(_GRANTED, until, sum(1 << lane for lane in included))
        case End():
            return bytes([_END])
        case Genesis(shared, lane, data):
            return _ROOTS.pack(_GENESIS, shared, lane, data)
        case Step(step, loss, seconds, waiting, verifying, norm):
            value = 0.0 if loss is None else loss
            return _STEP.pack(
                _STEP_KIND, step, loss is not None, value, seconds, waiting, verifying, norm
            )
        case Segment(segment):
            return _NUMBER.pack(_SEGMENT, segment)
        case Waits(link, seq, seconds):
            return _WAIT.pack(_WAITS, _NUMBER_OF[link], seq, seconds)
        case Failure(text, cause):
            short = cause.encode("ascii", "replace")[:MAX_CAUSE]
            cut = text.encode("utf-8", "replace")[:MAX_FAILURE_TEXT].decode("utf-8", "ignore")
            return bytes([_FAILURE, len(short)]) + short + cut.encode()


def decode_packet(raw: bytes) -> Packet:
    """The packet in `raw`; ControlError when it is none."""
    if not 1 <= len(raw) <= PACKET_BYTES:
        raise ControlError(f"a packet of {len(raw)} bytes")
    kind = raw[0]
    try:
        if kind in (_ARRIVED, _SENT):
            _, link, seq, place, length = _FRAME.unpack(raw)
            make = Arrived if kind == _ARRIVED else Sent
            return make(LINKS[link], seq, place, length)
        if kind in (_FREE, _SEGMENT):
            _, number = _NUMBER.unpack(raw)
            return Free(number) if kind == _FREE else Segment(number)
        if kind == _GRANTED:
            _, until, mask = _GRANT.unpack(raw)
            return Granted(until, tuple(n for n in range(MAX_LANES) if mask >> n & 1))
        if kind == _END and len(raw) == 1:
            return End()
        if kind == _GENESIS:
            return Genesis(*_ROOTS.unpack(raw)[1:])
        if kind == _STEP_KIND:
            _, step, known, loss, *rest = _STEP.unpack(raw)
            return Step(step, loss if known else None, *rest)
        if kind == _WAITS:
            _, link, seq, seconds = _WAIT.unpack(raw)
            return Waits(LINKS[link], seq, seconds)
        if kind == _FAILURE and len(raw) >= 2 + raw[1] and raw[1] <= MAX_CAUSE:
            border = 2 + raw[1]
            return Failure(raw[border:].decode("utf-8"), raw[2:border].decode("ascii"))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ControlError(f"malformed packet of kind {kind}: {error}") from error
    raise ControlError(f"unknown packet kind {kind}")


class LinkMemory(NamedTuple):
    """The places of one link: so many in each direction, of so many bytes."""

    link: str
    places: int
    frame_bytes: int


def link_memory(spec: "Spec", lane: int, stage: int) -> tuple[LinkMemory, ...]:
    """The places of a slot's links, in the order of the memory file."""
    return tuple(
        LinkMemory(link, spec.link_places(stage, link), spec.link_frame_bytes(stage, link))
        for link in spec.links(lane, stage)
    )


class FrameMemory:
    """The memory file of one slot, mapped: numbered places, for each link first those in which
    frames arrive, then those for frames to send."""

    def __init__(self, fd: int, links: Sequence[LinkMemory]) -> None:
        """Map `fd` (made by `create` for the same links). ControlError when it is smaller than it
        must be."""
        self.links = tuple(link.link for link in links)
        size = self.size(links)
        if os.fstat(fd).st_size < size:
            raise ControlError(f"the memory file has less than {size} bytes")
        self._map = mmap.mmap(fd, size)
        whole = memoryview(self._map)
        self._places: list[memoryview] = []
        self._first: dict[str, tuple[int, int]] = {}
        at = 0
        for link, places, frame_bytes in links:
            self._first[link] = (len(self._places), places)
            for _ in range(2 * places):
                self._places.append(whole[at : at + frame_bytes])
                at += _stride(frame_bytes)

    @staticmethod
    def size(links: Sequence[LinkMemory]) -> int:
        """Bytes of the memory file; at least one page, so that it can be mapped."""
        return max(sum(2 * places * _stride(size) for _, places, size in links), _ALIGN)

    @classmethod
    def create(cls, links: Sequence[LinkMemory]) -> int:
        """A new memory file; gives its descriptor, which is not inherited."""
        fd = os.memfd_create("tdmld-frames", os.MFD_CLOEXEC)
        os.ftruncate(fd, cls.size(links))
        return fd

    def incoming(self, link: str) -> range:
        """Places in which frames of `link` arrive."""
        first, places = self._first[link]
        return range(first, first + places)

    def outgoing(self, link: str) -> range:
        """Places for frames to send on `link`."""
        first, places = self._first[link]
        return range(first + places, first + 2 * places)

    def view(self, place: int, length: int) -> memoryview:
        """The first `length` bytes of a place, in the shared memory itself. ControlError."""
        if not 0 <= place < len(self._places):
            raise ControlError(f"no place {place}")
        found = self._places[place]
        if not 0 < length <= found.nbytes:
            raise ControlError(f"a frame of {length} bytes in a place of {found.nbytes}")
        return found[:length]


def _stride(frame_bytes: int) -> int:
    return -(-frame_bytes // _ALIGN) * _ALIGN


class WorkerChannel:
    """The worker's end: `receive`, `release`, `send` for the runner, reports for the server.

    Blocking, single-threaded. `receive` waits for the frame, and says so when it takes long; `send`
    waits only while every outgoing place of the link is taken. Both raise ControlError when the
    server is gone and `Ended` when it said so.
    """

    class Ended(Exception):
        """The server wants this worker to end; not an error."""

    def __init__(self, end: socket.socket, memory: FrameMemory | None) -> None:
        # Not settimeout: that costs a poll beside each recv, and would hold for sending as well.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(WAITS_SECONDS), 0))
        self._socket = end
        self._memory = memory
        self._arrived: dict[tuple[str, int], tuple[int, int]] = {}
        self._taken: dict[tuple[str, int], int] = {}
        self._free: dict[str, deque[int]] = {}
        self._link_of: dict[int, str] = {}
        self._granted = 0
        self._included: dict[int, tuple[int, ...]] = {}
        for link in memory.links if memory else ():
            self._free[link] = deque(memory.outgoing(link))  # type: ignore[union-attr]
            for place in self._free[link]:
                self._link_of[place] = link

    def report(self, packet: Packet) -> None:
        """Send a report."""
        try:
            self._socket.send(encode_packet(packet))
        except OSError as error:
            raise ControlError(f"the serving process is gone: {error}") from error

    def may_run(self, segment: int) -> bool:
        """Whether `segment` was granted, as far as the packets read so far say."""
        return self._granted > segment

    def wait_for_grant(self, segment: int) -> tuple[int, ...]:
        """Return when `segment` may run, with the lanes whose contributions enter it."""
        while self._granted <= segment:
            self._pump()
        return self._included.pop(segment, ())

    def wait_for_end(self) -> None:
        """Serve packets until the server ends this worker; returns then."""
        try:
            while True:
                self._pump()
        except self.Ended:
            return

    def receive(self, link: str, seq: int) -> memoryview:
        """Frame `seq` of `link`, in place: valid until `release(link, seq)`."""
        key = (link, seq)
        if key not in self._arrived:
            self._wait_for(key)
        place, length = self._arrived.pop(key)
        self._taken[key] = place
        assert self._memory is not None
        return self._memory.view(place, length)

    def release(self, link: str, seq: int) -> None:
        """The bytes of a received frame are not needed any more."""
        self.report(Free(self._taken.pop((link, seq))))

    def send(self, link: str, seq: int, payload: memoryview | bytes) -> None:
        """Hand over a frame; its bytes are copied before this returns."""
        assert self._memory is not None
        free = self._free[link]
        while not free:
            self._pump()
        place = free.popleft()
        length = memoryview(payload).nbytes
        self._memory.view(place, length)[:] = memoryview(payload).cast("B")
        self.report(Sent(link, seq, place, length))

    def _wait_for(self, key: tuple[str, int]) -> None:
        began = said = time.monotonic()
        while key not in self._arrived:
            self._pump()
            now = time.monotonic()
            if now - said >= WAITS_SECONDS:
                said = now
                self.report(Waits(*key, now - began))

    def _pump(self) -> None:
        """Take one packet, or return after WAITS_SECONDS without any."""
        try:
            raw = self._socket.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise ControlError(f"the serving process is gone: {error}") from error
        if not raw:
            raise ControlError("the serving process is gone")
        match decode_packet(raw):
            case Arrived(link, seq, place, length):
                if link not in self._free:
                    raise ControlError(f"a frame on link {link!r}, which this slot has not")
                self._arrived[link, seq] = (place, length)
            case Free(place):
                if place not in self._link_of:
                    raise ControlError(f"place {place} is not an outgoing one")
                self._free[self._link_of[place]].append(place)
            case Granted(until, included):
                self._granted = max(self._granted, until)
                if included:
                    self._included[until - 1] = included
            case End():
                raise self.Ended
            case other:
                raise ControlError(f"a {type(other).__name__} packet came to a worker")
