"""TCP sockets: listening, and dialling from a port on which we listen.

A router that translates addresses shows relays, and lets through, the port that we dial from. When
that is a listening port, what relays see is where we can be reached (`punch`). So listening sockets
share their port with our own dials. Two nodes must never share one unnoticed, as the library's
would: a port is taken alone first and opened for sharing afterwards, so a second node cannot have
it.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import suppress

import trio
from libp2p.network.connection.raw_connection import RawConnection

from tdmld.p2p.addresses import TcpAddress, format_address, parse_direct
from tdmld.p2p.errors import AddressInvalid, ListenFailed
from tdmld.p2p.tcp import TcpConnection

_BACKLOG = 128
UNUSABLE_PORT = {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EINVAL, errno.EACCES}
"""A dial cannot share the listening port: taken for just this peer, or of another interface."""


async def open_listeners(addresses: Sequence[str]) -> list[trio.SocketListener]:
    """Bind and listen on every address, or raise ListenFailed and leave none open."""
    listeners: list[trio.SocketListener] = []
    try:
        for text in addresses:
            listeners.append(await _open_listener(text))
    except BaseException:  # also cancellation: no port stays taken
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


async def _open_listener(text: str) -> trio.SocketListener:
    try:
        address = parse_direct(text)
    except AddressInvalid as error:
        raise ListenFailed(f"cannot listen: {error}") from error
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    opened = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        # Reuse of TIME_WAIT only, or two nodes would share a port unnoticed.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await opened.bind((address.host, address.port))
        opened.listen(_BACKLOG)
        _share_port(opened)
        return trio.SocketListener(opened)
    except OSError as error:
        opened.close()
        raise ListenFailed(f"cannot listen on {text}: {_explain(error)}") from error
    except BaseException:  # also cancellation: no port stays taken
        opened.close()
        raise


def _share_port(opened: trio.socket.SocketType) -> None:
    """Let sockets that ask for it have the port too; where the system cannot, dials do without."""
    with suppress(OSError, AttributeError):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _explain(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use by another process; stop it, or listen on another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address; use one of its own, or 0.0.0.0"
    if error.errno == errno.EACCES:
        return "no permission for this port; use one above 1023"
    return os.strerror(error.errno) if error.errno else str(error)


def listened(listeners: Sequence[trio.SocketListener]) -> tuple[str, ...]:
    """The multiaddrs really bound, with the ports that the system chose."""
    names = [listener.socket.getsockname() for listener in listeners]
    return tuple(format_address(name[0], name[1]) for name in names)


async def connect_from(local: TcpAddress, remote: TcpAddress) -> trio.SocketStream:
    """Connect to an IP address from a port on which we listen too; OSError."""
    family = socket.AF_INET6 if ":" in remote.host else socket.AF_INET
    opened = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _share_port(opened)
        await opened.bind((local.host, local.port))
        await opened.connect((remote.host, remote.port))
        return trio.SocketStream(opened)
    except BaseException:  # also cancellation: no socket stays open
        opened.close()
        raise


def raw_connection(stream: trio.SocketStream, initiator: bool) -> RawConnection:
    """A socket in the form that the library's upgrade steps take."""
    try:
        remote = remote_of(stream)
    except OSError:
        remote = None
    return RawConnection(TcpConnection(stream, remote), initiator)


def remote_of(stream: trio.SocketStream) -> tuple[str, int]:
    """The other end's IP address and port; OSError when it is gone. An IPv4 address stays one on a
    socket that serves both versions."""
    host, port = stream.socket.getpeername()[:2]
    return str(host).removeprefix("::ffff:").split("%")[0], int(port)


def family_of(host: str) -> socket.AddressFamily | None:
    """None for a name, which has none before it is looked up."""
    try:
        version = ipaddress.ip_address(host.split("%")[0]).version
    except ValueError:
        return None
    return socket.AF_INET6 if version == 6 else socket.AF_INET
