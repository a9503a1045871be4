"""A wide-area link in user space: a TCP proxy that delays, limits, resets and freezes.

Kernel shaping (tc netem) needs privileges and is not everywhere; this needs two sockets. What it
emulates is what TCP shows of such a link: order is kept, nothing is lost, bytes come later and
slower. All connections through one proxy share its bandwidth, as they would share a line.

    bottleneck   takes `rate` bytes a second; bytes wait before it for `queue` seconds at most, then
                 the sender is not read any more and its own TCP stops
    delay        every byte arrives `delay` seconds after it left the bottleneck, and up to
                 `jitter` seconds later (uniform, seeded)
    reset        RST to both ends: after N bytes of a connection, at random, or on demand
    freeze       nothing moves and nobody is told: the half-open connection of a dead modem

    scripts/wan --to HOST:PORT [--listen HOST:PORT] [--seconds S]     a proxy
    scripts/wan --check                                               measures itself
"""

import argparse
import math
import random
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio
from report import Report, say

QUEUE_SECONDS = 0.005
"""A line with a short queue. Long ones (bufferbloat) delay everybody; no sender can look into
them."""
_UNSHAPED_BYTES = 16 << 20
"""On its way at most, a direction of a connection without a rate."""
_CHUNK_SECONDS = 0.001
"""Transmission time of what is read at once: the grain of the emulation."""
_CHUNK_LEAST, _CHUNK_MOST = 1500, 256 * 1024
_LATE_SECONDS = 0.0005
_SMALLEST_BUFFER = 32 * 1024
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


@dataclass(frozen=True)
class Conditions:
    """One direction of a link: seconds, and bytes a second."""

    delay: float = 0.0
    jitter: float = 0.0
    rate: float = math.inf
    queue: float = QUEUE_SECONDS
    reset_after: int | None = None
    """A connection is reset when so many of its bytes were delivered in this direction."""


def home_line(round_trip: float, megabits: float) -> Conditions:
    """Both directions of a line with this round trip (seconds) and bandwidth."""
    return Conditions(delay=round_trip / 2, rate=megabits * 1e6 / 8)


@dataclass
class _Road:
    """One direction, shared by all connections."""

    conditions: Conditions
    free_at: float = 0.0
    """When the bottleneck will have sent what waits before it."""
    carried: int = 0
    frozen: bool = False
    thawed: trio.Event = field(default_factory=trio.Event)

    async def flows(self) -> None:
        while self.frozen:
            await self.thawed.wait()

    async def room(self) -> float:
        """Wait until the queue before the bottleneck has room for a chunk; gives the time at which
        it had."""
        ready = trio.current_time()
        while True:
            await self.flows()
            at = self.conditions
            begins = self.free_at - max(at.queue - self.chunk / at.rate, 0)
            if begins <= trio.current_time():
                return ready
            await trio.sleep_until(begins)
            ready = begins

    @property
    def chunk(self) -> int:
        """Bytes to read at once."""
        fitting = min(self.conditions.rate * _CHUNK_SECONDS, _CHUNK_MOST)
        return max(int(fitting), _CHUNK_LEAST)


class Wan:
    """A running proxy; made by `open_wan`."""

    def __init__(
        self, target: tuple[str, int], up: Conditions, down: Conditions, seed: int, resets: float
    ) -> None:
        self.host, self.port = "", 0
        self.connections = 0
        """Accepted so far."""
        self.resets = 0
        self._target = target
        self._roads = {"up": _Road(up), "down": _Road(down)}
        self._random = random.Random(seed)
        self._resets_per_second = resets / 60
        self._alive: set[trio.CancelScope] = set()

    @property
    def carried_up(self) -> int:
        """Bytes delivered from those who dial to the target."""
        return self._roads["up"].carried

    @property
    def carried_down(self) -> int:
        return self._roads["down"].carried

    def change(self, up: Conditions, down: Conditions) -> None:
        """Other conditions from now on; `reset_after` counts for new connections."""
        self._roads["up"].conditions, self._roads["down"].conditions = up, down

    def reset(self) -> None:
        """Reset every connection now."""
        for scope in self._alive:
            scope.cancel()

    def freeze(self, *directions: str) -> None:
        """Nothing arrives any more in these directions ("up", "down"; none named: both)."""
        for name in directions or self._roads:
            self._roads[name].frozen = True

    def thaw(self) -> None:
        """Everything that was held back flows on."""
        for road in self._roads.values():
            road.frozen = False
            road.thawed.set()
            road.thawed = trio.Event()

    async def serve(self, listener: trio.SocketListener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._connection, await listener.accept())

    async def _connection(self, near: trio.SocketStream) -> None:
        self.connections += 1
        try:
            far = await self._dial()
        except OSError:
            _abort(near)
            return
        with trio.CancelScope() as scope:
            self._alive.add(scope)
            if self._resets_per_second:
                lifetime = self._random.expovariate(self._resets_per_second)
                scope.deadline = trio.current_time() + lifetime
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._direction, near, far, "up", scope)
                    nursery.start_soon(self._direction, far, near, "down", scope)
            finally:
                self._alive.discard(scope)
                if scope.cancel_called:
                    self.resets += 1
                # Without the last words of TCP when it was reset; else both ends said FIN before.
                for end in (near, far):
                    _abort(end) if scope.cancel_called else end.socket.close()

    async def _dial(self) -> trio.SocketStream:
        opened = trio.socket.socket()
        try:
            _bound_buffers(opened, self._roads["down"].conditions)
            await opened.connect(self._target)
        except BaseException:
            opened.close()
            raise
        return trio.SocketStream(opened)

    async def _direction(
        self, source: trio.SocketStream, sink: trio.SocketStream, name: str, scope: trio.CancelScope
    ) -> None:
        road = self._roads[name]
        left = road.conditions.reset_after
        entering, leaving = trio.open_memory_channel[tuple[float, bytes]](math.inf)
        on_its_way = _OnItsWay()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._enter, source, road, entering, on_its_way)
                async for arrival, data in leaving:
                    await trio.sleep_until(arrival)
                    await road.flows()
                    if left is not None:
                        data, left = data[:left], left - len(data)
                    await sink.send_all(data)
                    on_its_way.remove(len(data))
                    road.carried += len(data)
                    if left is not None and left <= 0:
                        scope.cancel()
                with suppress(*_BROKEN):
                    await sink.send_eof()
        except* _BROKEN:
            scope.cancel()

    async def _enter(
        self,
        source: trio.SocketStream,
        road: _Road,
        entering: trio.MemorySendChannel[tuple[float, bytes]],
        on_its_way: "_OnItsWay",
    ) -> None:
        last = 0.0
        async with entering:
            while True:
                await on_its_way.room()
                ready = await road.room()
                asked = trio.current_time()
                data = await source.receive_some(road.chunk)
                if not data:
                    return
                now, at = trio.current_time(), road.conditions
                if now - asked < _LATE_SECONDS:
                    now = ready  # it lay there; that we slept too long is not the line's fault
                road.free_at = max(road.free_at, now) + len(data) / at.rate
                last = max(last, road.free_at + at.delay + self._random.uniform(0, at.jitter))
                on_its_way.add(len(data), at)
                await entering.send((last, data))


class _OnItsWay:
    """What one direction of one connection holds in memory, bounded."""

    def __init__(self) -> None:
        self._bytes = 0
        self._most = float(_UNSHAPED_BYTES)
        self._less = trio.Event()

    def add(self, size: int, at: Conditions) -> None:
        self._bytes += size
        if at.rate < math.inf:
            self._most = at.rate * (2 * at.queue + at.delay + at.jitter + 2 * _CHUNK_SECONDS)

    def remove(self, size: int) -> None:
        self._bytes -= size
        self._less.set()
        self._less = trio.Event()

    async def room(self) -> None:
        while self._bytes > self._most:
            await self._less.wait()


def _bound_buffers(opened: trio.socket.SocketType, at: Conditions) -> None:
    """The kernel's own queue must not lengthen that of a slow line."""
    if at.rate < math.inf:
        size = max(int(at.queue * at.rate / 2), _SMALLEST_BUFFER)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _abort(stream: trio.SocketStream) -> None:
    """Close with RST."""
    with suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()


@asynccontextmanager
async def open_wan(
    target: tuple[str, int],
    up: Conditions = Conditions(),
    down: Conditions | None = None,
    *,
    listen: tuple[str, int] = ("127.0.0.1", 0),
    seed: int = 0,
    resets_per_minute: float = 0.0,
) -> AsyncIterator[Wan]:
    """A proxy to `target` on a port of its own; `down` is like `up` when not given.

    `resets_per_minute`: each connection lives for a random time with this rate of ending. Leaving
    the block resets what is still open. OSError when it cannot listen.
    """
    wan = Wan(target, up, down or up, seed, resets_per_minute)
    opened = trio.socket.socket()
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bound_buffers(opened, up)
        await opened.bind(listen)
        opened.listen(128)
        wan.host, wan.port = opened.getsockname()[:2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wan.serve, trio.SocketListener(opened))
            try:
                yield wan
            finally:
                nursery.cancel_scope.cancel()
    finally:
        opened.close()


# ---- the command ---------------------------------------------------------------------------------


async def measure(line: Conditions, seconds: float, seed: int) -> dict[str, float]:
    """What the proxy really does: round trip and bandwidth (each way) against an echo."""

    async def sink(stream: trio.SocketStream) -> None:
        async with stream:
            kind = await stream.receive_some(1)
            while data := await stream.receive_some(65536):
                if kind == b"e":
                    await stream.send_all(data)
            if kind == b"s":
                await stream.send_all(b"k")

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, sink, [listener])
        target = ("127.0.0.1", listener.socket.getsockname()[1])
        async with open_wan(target, replace(line, reset_after=None), seed=seed) as wan:
            trips = []
            echo = await trio.open_tcp_stream(wan.host, wan.port)
            await echo.send_all(b"e")
            for _ in range(max(3, min(20, int(seconds / 2 / max(2 * line.delay, 1e-3))))):
                began = time.perf_counter()
                await echo.send_all(b"?")
                await echo.receive_some(1)
                trips.append(time.perf_counter() - began)
            size = int(min(line.rate * seconds, 1 << 30))
            began = time.perf_counter()
            bulk = await trio.open_tcp_stream(wan.host, wan.port)
            await bulk.send_all(b"s")
            piece = bytes(65536)
            for _ in range(size // len(piece)):
                await bulk.send_all(piece)
            await bulk.send_eof()
            await bulk.receive_some(1)
            took = time.perf_counter() - began - min(trips)
        nursery.cancel_scope.cancel()
    megabits = size // len(piece) * len(piece) * 8 / 1e6 / took
    return {
        "measured_rtt_ms": 1000 * min(trips),
        "measured_rtt_max_ms": 1000 * max(trips),
        "measured_mbit": megabits,
    }


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/wan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--to", type=_endpoint, metavar="HOST:PORT", help="what is behind the link")
    add("--listen", type=_endpoint, default=("127.0.0.1", 0), metavar="HOST:PORT")
    add("--rtt-ms", type=float, default=50.0, help="round trip; half of it each way")
    add("--jitter-ms", type=float, default=0.0, help="each way, on top")
    add("--mbit", type=float, default=100.0, help="each way; 0: no limit")
    add("--queue-ms", type=float, default=1000 * QUEUE_SECONDS, help="before the bottleneck")
    add("--reset-after", type=int, metavar="BYTES", help="each connection, each way")
    add("--resets-per-minute", type=float, default=0.0, help="each connection, at random")
    add("--freeze-after", type=float, metavar="S", help="nothing moves from then on")
    add("--freeze-for", type=float, default=math.inf, metavar="S")
    add("--seconds", type=float, default=60.0, help="then it ends; with --check: of each part")
    add("--seed", type=int, default=0)
    add("--check", action="store_true", help="measure the link itself")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not options.check and options.to is None:
        parser.error("say --to HOST:PORT or --check")
    return options


async def _proxy(options: argparse.Namespace, line: Conditions, report: Report) -> None:
    wan_of = open_wan(
        options.to,
        line,
        listen=options.listen,
        seed=options.seed,
        resets_per_minute=options.resets_per_minute,
    )
    async with wan_of as wan:
        say(f"listening on {wan.host}:{wan.port}")
        with trio.move_on_after(options.seconds):
            if options.freeze_after is not None:
                await trio.sleep(options.freeze_after)
                wan.freeze()
                await trio.sleep(options.freeze_for)
                wan.thaw()
            await trio.sleep_forever()
        report.document |= {
            "connections": wan.connections,
            "resets": wan.resets,
            "bytes_up": wan.carried_up,
            "bytes_down": wan.carried_down,
        }


def main() -> int:
    options = _options()
    report = Report("scripts/wan")
    line = Conditions(
        delay=options.rtt_ms / 2000,
        jitter=options.jitter_ms / 1000,
        rate=options.mbit * 1e6 / 8 or math.inf,
        queue=options.queue_ms / 1000,
        reset_after=options.reset_after,
    )
    report.document |= {"rtt_ms": options.rtt_ms, "mbit": options.mbit, "seed": options.seed}
    try:
        if options.check:
            report.document |= trio.run(measure, line, min(options.seconds, 5.0), options.seed)
        else:
            trio.run(_proxy, options, line, report)
    except OSError as error:
        say(f"scripts/wan: {error}")
        return 1
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
