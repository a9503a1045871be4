"""The RPC server: hypercorn's HTTP and WebSocket on our own sockets.

hypercorn's `serve` is not used, only its per-connection server, for three reasons found by trying:
its sends are shielded from cancellation, so one peer that stops reading would keep a daemon from
ever stopping; it has no limit of connections; and an exception of one connection reaches the whole
server. Here every socket has a send deadline, connections are counted, and each runs inside its own
supervised boundary.

Life: bind (ListenFailed if that cannot be), serve until the stop event, then say goodbye to every
WebSocket (1001), give running calls `limits.STOP_SECONDS`, close what is left, return.
"""

import ipaddress
import logging
import socket
from collections.abc import Mapping
from functools import partial

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from tdmld.rpc import limits
from tdmld.rpc.access import Scope
from tdmld.rpc.asgi import LOOPBACK_NAMES, App
from tdmld.rpc.backend import Backend
from tdmld.rpc.errors import RpcError
from tdmld.rpc.methods import registry
from tdmld.rpc.registry import Registry

log = logging.getLogger(__name__)


class ListenFailed(Exception):
    """The server cannot listen where it was told to. Shown to the operator at start."""


class Server:
    """A bound RPC server. Bind early, to fail before anything else starts; then `serve`.

    `tokens` may be filled or changed while the server runs. `method_registry` is for tests; a node
    has the methods of `tdmld.rpc.methods`.
    """

    def __init__(
        self,
        listen: str,
        tokens: Mapping[str, Scope],
        *,
        insecure: bool = False,
        method_registry: Registry | None = None,
    ) -> None:
        host, port = _parse_listen(listen)
        if not insecure and not _is_loopback(host):
            raise ListenFailed(
                f"RPC on {host} would send tokens in clear text to the network; listen on "
                "127.0.0.1 (and use an SSH tunnel), or allow it with --rpc-insecure"
            )
        self._tokens = tokens
        self._registry = method_registry or registry()
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        self._hosts = LOOPBACK_NAMES | {name.lower()}
        self.url = f"http://{name}:{self.port}"
        """What clients of this machine use."""

    def close(self) -> None:
        """Give the port back, for a server that is never served."""
        self._socket.close()

    async def serve(self, backend: Backend | object, stop: trio.Event) -> None:
        """Answer calls until `stop` is set. Used once.

        Callers may connect from the moment of binding; they wait until this runs. Cancelling it
        closes every connection at once, without a goodbye.
        """
        stopping = trio.Event()
        app = App(
            self._registry,
            backend,
            self._tokens,
            ready=lambda: _is_ready(backend),
            stopping=stopping,
            hosts=self._hosts,
        )
        context = WorkerContext(None)
        connections = _Connections(app, context)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        try:
            async with trio.open_nursery() as live, trio.open_nursery() as accepting:
                accept = partial(trio.serve_listeners, handler_nursery=live)
                accepting.start_soon(accept, connections.handle, [listener])
                await stop.wait()
                accepting.cancel_scope.cancel()
                stopping.set()
                await context.terminated.set()
                live.start_soon(connections.finish)
        finally:
            connections.abort()
            self._socket.close()


class _Connections:
    """All open sockets of one server, and what each of them runs."""

    def __init__(self, app: App, context: WorkerContext) -> None:
        self._app = ASGIWrapper(app)  # type: ignore[arg-type]  # our App is typed more loosely
        self._config = _hypercorn_config()
        self._context = context
        self._open: set[_Stream] = set()
        self._empty = trio.Event()

    async def handle(self, accepted: trio.SocketStream) -> None:
        stream = _Stream(accepted)
        if len(self._open) >= limits.CONNECTIONS:
            log.warning("rpc connection refused: %d are open", limits.CONNECTIONS)
            stream.abort()
            return
        self._open.add(stream)
        try:
            with stream.scope:
                await TCPServer(
                    self._app,
                    self._config,
                    self._context,
                    ConnectionState({}),
                    stream,  # type: ignore[arg-type]  # the five members that it uses
                )
        except Exception:  # Supervised boundary: one broken connection must not stop the daemon.
            log.exception("rpc connection failed")
        finally:
            stream.abort()
            self._open.discard(stream)
            if not self._open:
                self._empty.set()
                self._empty = trio.Event()

    async def finish(self) -> None:
        """Wait for the running calls a while, then close their sockets."""
        with trio.move_on_after(limits.STOP_SECONDS):
            while self._open:
                await self._empty.wait()
        self.abort()

    def abort(self) -> None:
        for stream in list(self._open):
            stream.abort()


class _Stream:
    """A socket whose sends end: in success, or with the connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        self.scope = trio.CancelScope()

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(limits.SEND_SECONDS) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            log.warning("an rpc caller does not read; its connection is closed")
            self.abort()
            raise trio.BrokenResourceError

    async def receive_some(self, limit: int) -> bytes:
        data = await self._stream.receive_some(limit)
        if not data:
            # hypercorn's HTTP/2 side forgets to leave when its peer has gone.
            self.scope.deadline = trio.current_time() + limits.GONE_SECONDS
        return bytes(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        """Close the socket, which ends even a shielded send, and what runs for it."""
        self.socket.close()
        self.scope.cancel()


async def _is_ready(backend: object) -> bool:
    """For /readyz: the node answers and is not catching up."""
    status = getattr(backend, "node_status", None)
    if status is None:
        return True
    try:
        return not (await status()).syncing
    except RpcError:
        return False


def _hypercorn_config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger(f"{__name__}.hypercorn")
    config.include_server_header = False
    config.keep_alive_timeout = 30
    config.websocket_max_message_size = limits.BODY_BYTES
    return config


def _parse_listen(listen: str) -> tuple[str, int]:
    host, separator, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ListenFailed(
            f"{listen!r} is not host:port; for example 127.0.0.1:7717, or port 0 for a free one"
        )
    return host, int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise ListenFailed(
            f"cannot listen on {host}:{port}: {error.strerror}; is another node running there? "
            "Choose another port with --rpc-listen, or 0 for a free one"
        ) from error
    bound.setblocking(False)
    return bound
