"""Helpers of the network tests: hosts by number, waiting, hosts in other processes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import libp2p
import trio
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from tdmld.p2p import Host, Limits, PeerInfo, Stream, open_host
from tdmld.p2p.errors import StreamError

ECHO = "/test/echo/1"
SINK = "/test/sink/1"
QUICK = Limits(keepalive_seconds=0.2, keepalive_timeout_seconds=0.5)
MOST = 1 << 27


def seed(number: int) -> bytes:
    return bytes([number]) * 32


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive(MOST))


def info(host: Host) -> PeerInfo:
    return PeerInfo(host.peer_id, host.addresses)


@asynccontextmanager
async def hosts(
    count: int, *, gossip: bool = False, limits: Limits | None = None
) -> AsyncIterator[list[Host]]:
    """Echoing hosts with the seeds 1..count, not connected."""
    async with AsyncExitStack() as stack:
        opened = []
        for number in range(1, count + 1):
            host = await stack.enter_async_context(
                open_host(seed(number), gossip=gossip, limits=limits)
            )
            host.set_handler(ECHO, echo)
            opened.append(host)
        yield opened


@asynccontextmanager
async def connected_pair(
    *, gossip: bool = False, limits: Limits | None = None
) -> AsyncIterator[tuple[Host, Host]]:
    """Two echoing hosts; the first keeps the second connected."""
    async with hosts(2, gossip=gossip, limits=limits) as (a, b):
        a.add_peer(info(b))
        await until(lambda: b.peer_id in a.connected() and a.peer_id in b.connected())
        yield a, b


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that nothing announces; fails after `seconds`."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 (nothing announces it)
            await trio.sleep(0.005)


async def says_hello(host: Host, peer_id: str) -> bool:
    """Whether a round trip over a new stream works."""
    stream = await host.open_stream(peer_id, ECHO)
    async with stream:
        await stream.send(b"hello")
        return await stream.receive(100) == b"hello"


async def drain(stream: Stream) -> BaseException:
    """Receive until the end and return how it ended."""
    try:
        while True:
            await stream.receive(MOST)
    except StreamError as error:
        return error


def count_tasks() -> int:
    """Tasks of this trio run."""
    root = trio.lowlevel.current_root_task()
    waiting = [root] if root is not None else []
    count = 0
    while waiting:
        task = waiting.pop()
        count += 1
        for nursery in task.child_nurseries:
            waiting += nursery.child_tasks
    return count


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def foreign_host(number: int, **options: object) -> IHost:
    """A stock libp2p host with Noise and Yamux only, as others would run it."""
    key_pair = create_new_key_pair(seed(number))
    return libp2p.new_host(
        key_pair=key_pair,
        listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")],
        sec_opt={NOISE: Noise(key_pair, noise_privkey=create_x25519().private_key)},
        muxer_opt={TProtocol(YAMUX): Yamux},
        **options,
    )


class RemoteHost:
    """An echoing host in a process of its own, on a fixed port: to be killed or frozen."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.port = free_port()
        self._process: subprocess.Popen[str] | None = None

    @property
    def info(self) -> PeerInfo:
        peer_id = str(libp2p.generate_peer_id_from(create_new_key_pair(seed(self.number))))
        return PeerInfo(peer_id, (f"/ip4/127.0.0.1/tcp/{self.port}",))

    async def start(self) -> None:
        """Returns when it listens."""
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(  # noqa: ASYNC220 (returns at once)
            [sys.executable, "-m", "tests.p2p.remote", str(self.number), str(self.port)],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert self._process.stdout is not None
        line = await trio.to_thread.run_sync(self._process.stdout.readline)
        assert line == "ready\n"

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    async def __aenter__(self) -> "RemoteHost":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
