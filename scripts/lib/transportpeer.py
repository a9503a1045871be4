"""One end of a transport under test, in a process of its own: used by `scripts/bench transport`.

    transportpeer.py STACK listen            prints where it listens, serves until stdin ends
    transportpeer.py STACK dial HOST PORT ID    prints "ready", then one result a command line

Stacks: raw (trio sockets), tls (trio SSLStream), stock (libp2p with Noise and Yamux, its defaults
otherwise), ours. A message is a u32 length and its bytes in all of them. "bulk" messages are
answered by the CPU seconds that the listening process has used, "echo" ones by themselves.
"""

import contextlib
import datetime
import json
import os
import ssl
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import libp2p
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo as LibInfo
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr
from report import percentile

from tdmld.p2p import PeerInfo, open_host
from tdmld.p2p.errors import StreamClosed

STACKS = ("raw", "tls", "stock", "ours")
MOST = 128 << 20
READ_BYTES = 1 << 20
WARM_BYTES = 4 << 20
"""Goes before what is timed: windows open, buffers and frames grow."""
BULK, ECHO = "/bench/bulk/1", "/bench/echo/1"
_LENGTH = struct.Struct("!I")
_SECONDS = struct.Struct("!d")


class End(Protocol):
    """A stream of messages, whatever carries it."""

    async def send(self, data: bytes | bytearray) -> None: ...

    async def receive(self) -> bytes | bytearray: ...


Serve = Callable[[End], Awaitable[None]]
Open = Callable[[str], Awaitable[End]]


async def bulk(end: End) -> None:
    while True:
        await end.receive()
        await end.send(_SECONDS.pack(time.process_time()))


async def echo(end: End) -> None:
    while True:
        await end.send(await end.receive())


SERVED: dict[str, Serve] = {BULK: bulk, ECHO: echo}


class Framed:
    """Messages over something that reads up to n bytes and writes."""

    def __init__(
        self,
        read: Callable[[int], Awaitable[bytes | bytearray]],
        write: Callable[[bytes | bytearray], Awaitable[None]],
    ) -> None:
        self._read, self._write = read, write

    async def send(self, data: bytes | bytearray) -> None:
        if len(data) <= READ_BYTES // 64:
            await self._write(_LENGTH.pack(len(data)) + data)
        else:
            await self._write(_LENGTH.pack(len(data)))
            await self._write(data)

    async def receive(self) -> bytearray:
        (size,) = _LENGTH.unpack(await self._exactly(_LENGTH.size))
        return await self._exactly(size)

    async def _exactly(self, size: int) -> bytearray:
        # Into its place at once: joining chunks afterwards is slower for large messages.
        message, filled = bytearray(size), 0
        with memoryview(message) as view:
            while filled < size:
                data = await self._read(min(size - filled, READ_BYTES))
                if not data:
                    raise EOFError
                view[filled : filled + len(data)] = data
                filled += len(data)
        return message


class Ours:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.send = stream.send

    async def receive(self) -> bytes:
        return await self._stream.receive(MOST)


# ---- raw and tls ---------------------------------------------------------------------------------


def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For server and client: TLS 1.3 with a certificate that nobody checks."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "pem")
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + made.public_bytes(serialization.Encoding.PEM)
        )
        server.load_cert_chain(path)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    return server, client


def _framed(stream: trio.abc.Stream) -> Framed:
    return Framed(stream.receive_some, stream.send_all)


async def listen_sockets(*, tls: bool) -> None:
    server, _ = _contexts()

    async def accepted(stream: trio.abc.Stream) -> None:
        if tls:
            stream = trio.SSLStream(stream, server, server_side=True)
        end = _framed(stream)
        with contextlib.suppress(EOFError, trio.BrokenResourceError):
            await SERVED[(await end.receive()).decode()](end)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, accepted, [listener])
        await until_stdin_ends("127.0.0.1", listener.socket.getsockname()[1], "-")
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def dial_sockets(host: str, port: int, *, tls: bool) -> AsyncIterator[Open]:
    _, client = _contexts()

    async def open_end(protocol: str) -> End:
        stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
        if tls:
            stream = trio.SSLStream(stream, client)
        end = _framed(stream)
        await end.send(protocol.encode())
        return end

    yield open_end


# ---- libp2p --------------------------------------------------------------------------------------


def _stock_host(seed: int) -> Any:
    pair = create_new_key_pair(bytes([seed]) * 32)
    return libp2p.new_host(
        key_pair=pair,
        sec_opt={NOISE: Noise(pair, noise_privkey=create_x25519().private_key)},
        muxer_opt={TProtocol(YAMUX): Yamux},
    )


def _of_libp2p(stream: Any) -> Framed:
    async def write(data: bytes) -> None:
        await stream.write(data)

    return Framed(stream.read, write)


async def listen_stock() -> None:
    host = _stock_host(1)
    for protocol, serve in SERVED.items():

        async def accepted(stream: Any, serve: Serve = serve) -> None:
            # Boundary: whatever ends a stream of the library, it must not end its host.
            with contextlib.suppress(Exception):
                await serve(_of_libp2p(stream))

        host.set_stream_handler(TProtocol(protocol), accepted)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        port = int(host.get_addrs()[0].value_for_protocol("tcp"))
        await until_stdin_ends("127.0.0.1", port, str(host.get_id()))


@contextlib.asynccontextmanager
async def dial_stock(host: str, port: int, peer: str) -> AsyncIterator[Open]:
    node = _stock_host(2)
    async with node.run(listen_addrs=[]):
        known = ID.from_base58(peer)
        await node.connect(LibInfo(known, [Multiaddr(f"/ip4/{host}/tcp/{port}")]))

        async def open_end(protocol: str) -> End:
            return _of_libp2p(await node.new_stream(known, [TProtocol(protocol)]))

        yield open_end


async def listen_ours() -> None:
    async with open_host(bytes([1]) * 32, gossip=False) as host:
        for protocol, serve in SERVED.items():

            async def accepted(stream: Any, serve: Serve = serve) -> None:
                with contextlib.suppress(StreamClosed):
                    await serve(Ours(stream))

            host.set_handler(protocol, accepted)
        await until_stdin_ends("127.0.0.1", int(host.addresses[0].split("/")[-1]), host.peer_id)


@contextlib.asynccontextmanager
async def dial_ours(host: str, port: int, peer: str) -> AsyncIterator[Open]:
    async with open_host(bytes([2]) * 32, gossip=False) as node:
        node.add_peer(PeerInfo(peer, (f"/ip4/{host}/tcp/{port}",)))

        async def open_end(protocol: str) -> End:
            return Ours(await node.open_stream(peer, protocol))

        yield open_end


# ---- measuring -----------------------------------------------------------------------------------


class Meter:
    """The dialling side; its streams stay open between the commands."""

    def __init__(self, open_end: Open) -> None:
        self._open = open_end
        self._ends: dict[str, End] = {}
        self._payload = os.urandom(1 << 20)

    async def _end(self, protocol: str) -> End:
        if protocol not in self._ends:
            self._ends[protocol] = await self._open(protocol)
        return self._ends[protocol]

    async def bulk(self, size: int, count: int) -> dict[str, float]:
        """`count` messages, each answered before the next: MB/s and CPU seconds a GB."""
        end = await self._end(BULK)
        payload = (self._payload * -(-size // len(self._payload)))[:size]
        await end.send(payload[:WARM_BYTES])
        (remote,) = _SECONDS.unpack(await end.receive())
        began, local = time.perf_counter(), time.process_time()
        for _ in range(count):
            await end.send(payload)
            (used,) = _SECONDS.unpack(await end.receive())
        seconds, gigabytes = time.perf_counter() - began, size * count / 1e9
        return {
            "mb_per_s": 1000 * gigabytes / seconds,
            "cpu_s_per_gb_send": (time.process_time() - local) / gigabytes,
            "cpu_s_per_gb_recv": (used - remote) / gigabytes,
        }

    async def trips(self, count: int, load: int, warm: float = 0.0) -> dict[str, float]:
        """Round trips of 1 KiB, alone or (`load` bytes a message) while bulk flows."""
        end = await self._end(ECHO)
        message, times, enough = os.urandom(1024), [], not load

        async def flow() -> None:
            # To the end of the last message: a write of the library that is cancelled ends its
            # connection.
            carrier, payload = await self._end(BULK), self._payload * (load >> 20)
            while not enough:
                await carrier.send(payload)
                await carrier.receive()

        async with trio.open_nursery() as nursery:
            if load:
                nursery.start_soon(flow)
            await trio.sleep(warm)
            for _ in range(count):
                sent = time.perf_counter()
                await end.send(message)
                await end.receive()
                times.append(1000 * (time.perf_counter() - sent))
            enough = True
        return {
            "p50_ms": statistics.median(times),
            "p90_ms": percentile(times, 0.90),
            "p99_ms": percentile(times, 0.99),
        }


async def obey(open_end: Open) -> None:
    """Commands [name, arguments] from stdin, results to stdout, one JSON a line."""
    meter = Meter(open_end)
    print(json.dumps("ready"), flush=True)
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        name, arguments = json.loads(line)
        print(json.dumps(await getattr(meter, name)(**arguments)), flush=True)


async def until_stdin_ends(host: str, port: int, peer: str) -> None:
    print(json.dumps([host, port, peer]), flush=True)
    await trio.to_thread.run_sync(sys.stdin.read)


async def main(stack: str, role: str, *where: str) -> None:
    if role == "listen":
        if stack in ("raw", "tls"):
            await listen_sockets(tls=stack == "tls")
        else:
            await (listen_stock() if stack == "stock" else listen_ours())
        return
    host, port, peer = where[0], int(where[1]), where[2]
    if stack in ("raw", "tls"):
        dialled = dial_sockets(host, port, tls=stack == "tls")
    else:
        dialled = (dial_stock if stack == "stock" else dial_ours)(host, port, peer)
    async with dialled as open_end:
        await obey(open_end)
        os._exit(0)  # the library's goodbyes are not measured


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
