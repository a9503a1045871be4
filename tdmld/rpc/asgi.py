"""The ASGI face: `POST /` and `WebSocket /` for JSON-RPC, `GET /healthz`, `GET /readyz`.

Before anything else the Host header must be one that we listen as (against DNS rebinding) and there
must be no Origin (no web page has business here); then the bearer token decides the scope. Bodies
are counted while they arrive, because hypercorn has no limit for them.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import trio

from tdmld.rpc import limits
from tdmld.rpc.access import Scope, scope_of
from tdmld.rpc.dispatch import Session
from tdmld.rpc.registry import Registry

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Ready = Callable[[], Awaitable[bool]]

CLOSE_GOING_AWAY = 1001
CLOSE_TRY_LATER = 1013

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


class Refusal(Exception):
    """An HTTP answer other than 200; caught where the request began."""

    def __init__(self, status: HTTPStatus, text: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


class App:
    """One server's ASGI application. `stopping` makes every WebSocket say goodbye (1001)."""

    def __init__(
        self,
        registry: Registry,
        backend: object,
        tokens: Mapping[str, Scope],
        *,
        ready: Ready,
        stopping: trio.Event,
        hosts: frozenset[str] = LOOPBACK_NAMES,
    ) -> None:
        self._registry = registry
        self._backend = backend
        self._tokens = tokens
        self._ready = ready
        self._stopping = stopping
        self._hosts = hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket to its end."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            raise RuntimeError(f"unexpected ASGI scope {scope['type']!r}")

    def _authorize(self, scope: Message) -> Scope:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_host(headers)
        kind, _, token = headers.get(b"authorization", "").partition(" ")
        found = scope_of(self._tokens, token.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise Refusal(
                HTTPStatus.UNAUTHORIZED,
                "this node does not know the token; the present one stands in rpc.token "
                "in its data directory",
                (b"www-authenticate", b"Bearer"),
            )
        return found

    def _check_host(self, headers: Mapping[bytes, str]) -> None:
        host = headers.get(b"host", "")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if name.lower() not in self._hosts:
            raise Refusal(HTTPStatus.FORBIDDEN, "the Host header is not a name of this server")
        if b"origin" in headers:
            raise Refusal(HTTPStatus.FORBIDDEN, "browsers are not served")

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        extra: tuple[tuple[bytes, bytes], ...] = ()
        kind = b"text/plain; charset=utf-8"
        try:
            status, body = await self._answer(scope, receive)
            if body.startswith((b"{", b"[")):
                kind = b"application/json"
        except Refusal as refusal:
            status, body, extra = refusal.status, str(refusal).encode() + b"\n", refusal.headers
        except trio.BrokenResourceError:
            return
        length = str(len(body)).encode()
        headers = [(b"content-type", kind), (b"content-length", length), *extra]
        if status is HTTPStatus.NO_CONTENT:
            headers = []
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Message, receive: Receive) -> tuple[HTTPStatus, bytes]:
        path, method = scope["path"], scope["method"]
        if path in ("/healthz", "/readyz") and method == "GET":
            self._check_host({k.lower(): v.decode("latin-1") for k, v in scope["headers"]})
            if path == "/healthz" or await self._ready():
                return HTTPStatus.OK, b"ok\n"
            return HTTPStatus.SERVICE_UNAVAILABLE, b"syncing\n"
        granted = self._authorize(scope)
        if path != "/":
            raise Refusal(HTTPStatus.NOT_FOUND, "JSON-RPC is at /")
        if method != "POST":
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED, "POST a JSON-RPC request", (b"allow", b"POST")
            )
        body = await _read_body(receive)
        session = Session(self._registry, self._backend, granted)
        reply: bytes | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_disconnect, receive, nursery.cancel_scope)
            reply = (await session.handle(body)).raw
            nursery.cancel_scope.cancel()
        return (HTTPStatus.OK, reply) if reply is not None else (HTTPStatus.NO_CONTENT, b"")

    async def _websocket(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        try:
            granted = self._authorize(scope)
            if scope["path"] != "/":
                raise Refusal(HTTPStatus.NOT_FOUND, "JSON-RPC is at /")
        except Refusal as refusal:
            await _reject(send, refusal)
            return
        await send({"type": "websocket.accept"})
        await _Socket(self._registry, self._backend, granted, self._stopping).run(receive, send)


class _Socket:
    """One accepted WebSocket: a reader, a writer behind a bounded queue, and its session."""

    def __init__(
        self, registry: Registry, backend: object, scope: Scope, stopping: trio.Event
    ) -> None:
        self._registry = registry
        self._backend = backend
        self._scope = scope
        self._stopping = stopping
        self._queue, self._outgoing = trio.open_memory_channel[bytes](limits.QUEUE_MESSAGES)
        self._calls = trio.CapacityLimiter(limits.CALLS_IN_FLIGHT)
        self._overrun = trio.Event()
        self._writing = trio.CancelScope()
        self._written = trio.Event()

    async def run(self, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            session = Session(
                self._registry, self._backend, self._scope, nursery=nursery, push=self._push
            )
            nursery.start_soon(self._write, send)
            nursery.start_soon(self._leave, self._stopping, CLOSE_GOING_AWAY, send, nursery)
            nursery.start_soon(self._leave, self._overrun, CLOSE_TRY_LATER, send, nursery)
            while (event := await receive())["type"] == "websocket.receive":
                raw = (event.get("text") or "").encode() or event.get("bytes") or b""
                ticket = object()
                await self._calls.acquire_on_behalf_of(ticket)
                nursery.start_soon(self._serve, session, raw, ticket)
            nursery.cancel_scope.cancel()

    def _push(self, message: bytes) -> None:
        try:
            self._queue.send_nowait(message)
        except trio.WouldBlock:
            if not self._overrun.is_set():
                log.warning("a slow subscriber is disconnected")
                self._overrun.set()

    async def _serve(self, session: Session, raw: bytes, ticket: object) -> None:
        try:
            reply = await session.handle(raw)
            if reply.raw is not None:
                await self._queue.send(reply.raw)
            for started in reply.begin:
                started.set()
        finally:
            self._calls.release_on_behalf_of(ticket)

    async def _write(self, send: Send) -> None:
        with self._writing:
            async for message in self._outgoing:
                await send({"type": "websocket.send", "text": message.decode()})
        self._written.set()

    async def _leave(self, when: trio.Event, code: int, send: Send, nursery: trio.Nursery) -> None:
        await when.wait()
        # Nothing may be sent after the close, so the writer ends first (its send has a deadline).
        self._writing.cancel()
        await self._written.wait()
        await send({"type": "websocket.close", "code": code})
        nursery.cancel_scope.cancel()


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    with trio.move_on_after(limits.BODY_SECONDS):
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise trio.BrokenResourceError
            body += event.get("body", b"")
            if len(body) > limits.BODY_BYTES:
                # The rest is unread, so this connection cannot be kept for another request.
                raise Refusal(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"a request has at most {limits.BODY_BYTES} bytes",
                    (b"connection", b"close"),
                )
            if not event.get("more_body", False):
                return bytes(body)
    raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the body came too slowly", (b"connection", b"close"))


async def _cancel_at_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    """A caller that went away does not want its answer any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _reject(send: Send, refusal: Refusal) -> None:
    body = str(refusal).encode() + b"\n"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *refusal.headers,
    ]
    start = {"type": "websocket.http.response.start", "status": int(refusal.status)}
    await send({**start, "headers": headers})
    with suppress(trio.BrokenResourceError):
        await send({"type": "websocket.http.response.body", "body": body})
