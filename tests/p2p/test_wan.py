"""The emulated link does what its conditions say; else tests and figures over it mean nothing."""

import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

LIB = Path(__file__).parents[2] / "scripts" / "lib"
sys.path.insert(0, str(LIB))
from wan import Conditions, Wan, home_line, measure, open_wan  # noqa: E402


@asynccontextmanager
async def echo_behind(
    up: Conditions, down: Conditions | None = None, *, seed: int = 1, resets: float = 0.0
) -> AsyncIterator[tuple[Wan, trio.SocketStream]]:
    """A connection through the link to something that sends everything back."""

    async def echo(stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        target = ("127.0.0.1", listener.socket.getsockname()[1])
        async with (
            open_wan(target, up, down, seed=seed, resets_per_minute=resets) as wan,
            await trio.open_tcp_stream(wan.host, wan.port) as stream,
        ):
            yield wan, stream
        nursery.cancel_scope.cancel()


async def exactly(stream: trio.SocketStream, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = await stream.receive_some(size - len(received))
        if not data:
            raise EOFError
        received += data
    return received


@pytest.mark.parametrize(("round_trip", "megabits"), [(0.04, 40.0), (0.01, 8.0)])
async def test_delay_and_bandwidth_are_as_said(round_trip: float, megabits: float):
    found = await measure(home_line(round_trip, megabits), 0.5, seed=1)
    assert 1000 * round_trip <= found["measured_rtt_ms"] < 1000 * round_trip + 10
    # Never more than said; less only when this machine gives the proxy no time.
    assert 0.6 * megabits < found["measured_mbit"] < 1.05 * megabits


async def test_jitter_delays_but_keeps_the_order():
    line = Conditions(delay=0.002, jitter=0.01)
    payload = os.urandom(300_000)
    async with echo_behind(line) as (wan, stream), trio.open_nursery() as nursery:

        async def send() -> None:
            for start in range(0, len(payload), 10_000):
                await stream.send_all(payload[start : start + 10_000])
                await trio.sleep(0.001)

        nursery.start_soon(send)
        with trio.fail_after(10):
            assert await exactly(stream, len(payload)) == payload
        assert wan.carried_up == len(payload)


async def test_a_queue_that_is_full_stops_the_sender():
    line = Conditions(rate=100_000.0, queue=0.05)
    async with echo_behind(line) as (wan, stream):
        with trio.move_on_after(0.5) as scope:
            await stream.send_all(bytes(20_000_000))
        assert scope.cancelled_caught
        assert wan.carried_up < 100_000


async def test_a_connection_is_reset_after_so_many_bytes():
    async with echo_behind(Conditions(), Conditions(reset_after=50_000)) as (wan, stream):
        await stream.send_all(bytes(80_000))
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            await exactly(stream, 80_000)
        assert wan.carried_down == 50_000
        assert wan.resets == 1


async def test_random_resets_come():
    async with echo_behind(Conditions(), resets=60 * 50.0) as (wan, stream):
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            await stream.receive_some()
        assert wan.resets == 1


async def test_a_frozen_link_carries_nothing_and_tells_nobody():
    async with echo_behind(Conditions()) as (wan, stream):
        await stream.send_all(b"one")
        assert await exactly(stream, 3) == b"one"
        wan.freeze("down")
        await stream.send_all(b"two")
        with trio.move_on_after(0.05) as waited:
            await stream.receive_some()
        assert waited.cancelled_caught
        assert wan.carried_up == 6
        wan.thaw()
        with trio.fail_after(5):
            assert await exactly(stream, 3) == b"two"


async def test_the_end_comes_after_the_data():
    async with echo_behind(Conditions(delay=0.02)) as (_, stream):
        await stream.send_all(b"last words")
        await stream.send_eof()
        with trio.fail_after(5):
            assert await exactly(stream, 10) == b"last words"
            assert await stream.receive_some() == b""


async def test_nobody_behind_the_link_is_a_refused_connection():
    async with open_wan(("127.0.0.1", 1), Conditions(rate=math.inf)) as wan:
        stream = await trio.open_tcp_stream(wan.host, wan.port)
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            await stream.receive_some()


def test_the_command_measures_itself(tmp_path: Path):
    document = tmp_path / "out.json"
    subprocess.run(
        [sys.executable, str(LIB / "wan.py"), "--check", "--seconds", "0.2", "--json", document],
        check=True,
        capture_output=True,
        timeout=60,
    )
    found = json.loads(document.read_text())
    assert {"command", "version", "seconds", "measured_mbit", "measured_rtt_ms"} <= set(found)
