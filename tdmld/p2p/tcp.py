"""A connected TCP socket as the sessions above use it, and what the kernel may hold of it.

The library's own (`TrioTCPStream`) takes a lock, which yields, around every read and write; here
there is one reader, and the secure sessions let one writer through at a time.

What was handed to the kernel cannot be overtaken. Linux lets a connection on loopback or a LAN hold
20 MB on its way through two sockets (measured): 20 ms of work, where a round trip takes a tenth of
a millisecond. So the kernel gets little ahead of what it sends, and near peers have small buffers.
"""

import socket
import struct
from contextlib import suppress

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_NOTSENT_BYTES = 64 * 1024
"""Handed over but not sent: 5 ms at 100 Mbit/s. What is on its way is the business of the kernel's
congestion control."""
_NEAR_SECONDS = 0.001
"""A round trip as on a LAN. There a fixed receive buffer suffices for any speed of ours; farther
away the kernel finds out what the line needs."""
_NEAR_BUFFER_BYTES = 96 * 1024
"""The kernel doubles it."""
_MIN_RTT = struct.Struct("148xI")
"""tcpi_min_rtt of Linux' struct tcp_info, microseconds."""


class TcpConnection(ReadWriteCloser):
    """One reader and one writer at a time. Reading after `close` gives the end, writing nothing."""

    def __init__(self, stream: trio.SocketStream, remote: tuple[str, int] | None) -> None:
        self._stream = stream
        self._remote = remote
        _tune(stream)

    async def read(self, n: int | None = None) -> bytes:
        if n == 0:
            return b""
        try:
            return await self._stream.receive_some(n)
        except trio.BrokenResourceError as error:
            raise _broken(error) from error
        except trio.ClosedResourceError:
            return b""

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise _broken(error) from error
        except trio.ClosedResourceError:
            return

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._remote


def _broken(error: trio.BrokenResourceError) -> ConnectionClosedError:
    reason = error.__cause__ or error
    return ConnectionClosedError(f"the TCP connection broke: {reason}", transport="tcp")


def _tune(stream: trio.SocketStream) -> None:
    """Bound what the kernel queues; where it cannot, nothing happens."""
    with suppress(OSError):
        stream.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, _NOTSENT_BYTES)
    if _round_trip(stream) < _NEAR_SECONDS:
        with suppress(OSError):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NEAR_BUFFER_BYTES)


def _round_trip(stream: trio.SocketStream) -> float:
    """The kernel's shortest measured round trip in seconds; infinite when it does not say."""
    if not hasattr(socket, "TCP_INFO"):
        return float("inf")
    try:
        info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
        (microseconds,) = _MIN_RTT.unpack(info)
    except (OSError, struct.error):
        return float("inf")
    return float(microseconds) / 1e6
