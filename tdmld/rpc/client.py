"""The one JSON-RPC client: commands use it under trio, the dashboard under asyncio (anyio, httpx).

    async with Client(find_access(data_dir, default_dir)) as client:
        head = await client.call("chain_head", {}, Head)
        async with client.subscribe("chain_subscribeHeads", {}, Head) as heads:
            async for head in heads:
                ...

Errors are those of `tdmld.rpc.errors`: what the node says by its code, `Unauthorized` when it does
not know the token, `Unreachable` when nobody answers; their texts say what to type next. httpx-ws
wraps whatever happens inside its block into exception groups; here they arrive bare.
"""

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx
import msgspec
from httpx_ws import AsyncWebSocketSession, HTTPXWSException, WebSocketUpgradeError, aconnect_ws

from tdmld.rpc.access import Access, find_access
from tdmld.rpc.errors import NotFound, RpcError, Unauthorized, Unreachable, from_wire

__all__ = [
    "Access",
    "Client",
    "NotFound",
    "RpcError",
    "Subscription",
    "Unauthorized",
    "Unreachable",
    "find_access",
]

T = TypeVar("T")
Params = Mapping[str, object]

RESPONSE_BYTES = 1 << 26
"""A block of 4,000 transactions is about 1 MiB of JSON."""
CALL_SECONDS = 15.0
KEEPALIVE_SECONDS = 10.0
"""A dashboard notices a node that vanished without a word after at most twice this."""


class _ErrorObject(msgspec.Struct):
    code: int
    message: str
    data: Any = None


class _Answer(msgspec.Struct):
    """A response or a pushed event; which one, `method` says."""

    id: int | str | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: _ErrorObject | None = None
    method: str = ""
    params: "_Pushed | None" = None


class _Pushed(msgspec.Struct):
    subscription: str
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: _ErrorObject | None = None
    done: bool = False


class Client:
    """Calls and subscriptions of one node. Safe for several tasks at once."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._http = httpx.AsyncClient(
            base_url=access.url,
            headers={"authorization": f"Bearer {access.token}"},
            timeout=httpx.Timeout(CALL_SECONDS),
            trust_env=False,  # a proxy has no business between a user and his own node
        )
        self._ids = itertools.count(1)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, value, trace)

    async def call(
        self, method: str, params: Params, result: type[T], *, patience: float | None = CALL_SECONDS
    ) -> T:
        """Call a method and decode its result. `patience` is in seconds, None for ever."""
        raw = await self.call_raw(method, dict(params), patience=patience)
        return _decode(raw, result, method)

    async def call_raw(
        self, method: str, params: object, *, patience: float | None = CALL_SECONDS
    ) -> bytes:
        """Call a method with any JSON params; the result as JSON bytes."""
        body = _request(next(self._ids), method, params)
        with self._bare_errors():
            async with self._http.stream(
                "POST",
                "/",
                content=body,
                headers={"content-type": "application/json"},
                timeout=httpx.Timeout(patience, connect=CALL_SECONDS),
            ) as response:
                raw = await _read(response)
                self._check_status(response.status_code, raw)
        answer = _decode(raw, _Answer, method)
        if answer.error is not None:
            raise from_wire(answer.error.code, answer.error.message, answer.error.data)
        return bytes(answer.result)

    @asynccontextmanager
    async def subscribe(
        self, method: str, params: Params, event: type[T]
    ) -> AsyncIterator["Subscription[T]"]:
        """Open a WebSocket of its own for one subscription; it ends with the block.

        The iterator ends when the node ends the subscription, and raises Unreachable when the
        connection breaks; the events since then are lost, so read the present state again.
        """
        with self._bare_errors():
            opening: AbstractAsyncContextManager[AsyncWebSocketSession] = aconnect_ws(
                "/",
                self._http,
                keepalive_ping_interval_seconds=KEEPALIVE_SECONDS,
                keepalive_ping_timeout_seconds=KEEPALIVE_SECONDS,
            )
            async with opening as socket:
                request = _request(next(self._ids), method, dict(params))
                await socket.send_text(request.decode())
                try:
                    text = await socket.receive_text(CALL_SECONDS)
                except TimeoutError as error:
                    raise Unreachable(
                        f"the node at {self.access.url} did not answer in time"
                    ) from error
                answer = _decode(text, _Answer, method)
                if answer.error is not None:
                    raise from_wire(answer.error.code, answer.error.message, answer.error.data)
                yield Subscription(socket, event, method, self._bare_errors)

    def _check_status(self, status: int, body: bytes) -> None:
        if status in (200, 204):
            return
        said = body[:300].decode("utf-8", "replace").strip()
        if status == 401:
            raise Unauthorized(
                f"the node at {self.access.url} does not accept this token; it makes a new one at "
                "each start: give --data-dir of that node, or set TDMLD_API_INFO=token:url"
            )
        raise Unreachable(f"{self.access.url} answered {status}: {said or 'no text'}")

    @contextmanager
    def _bare_errors(self) -> Iterator[None]:
        """Turn what the transport raises into our errors; leave everything else as it is."""
        try:
            yield
        except BaseExceptionGroup as group:
            error = _single(group)
            if error is None:
                raise
            raise self._translate(error) from group
        except (httpx.HTTPError, httpx.InvalidURL, HTTPXWSException) as error:
            raise self._translate(error) from error

    def _translate(self, error: BaseException) -> BaseException:
        if isinstance(error, WebSocketUpgradeError):
            try:
                self._check_status(error.response.status_code, b"")
            except RpcError as refused:
                return refused
        if isinstance(error, httpx.TimeoutException):
            return Unreachable(f"the node at {self.access.url} did not answer in time")
        if isinstance(error, httpx.ConnectError):
            return Unreachable(
                f"no node answers at {self.access.url}; is it running? "
                "Start it with: tdmld run --data-dir DIR"
            )
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL | HTTPXWSException):
            return Unreachable(
                f"the connection to {self.access.url} broke ({type(error).__name__})"
            )
        return error


class Subscription(Generic[T]):
    """Events of one subscription, as they come."""

    def __init__(
        self, socket: AsyncWebSocketSession, event: type[T], method: str, bare_errors: Any
    ) -> None:
        self._socket = socket
        self._event = event
        self._method = method
        self._bare_errors = bare_errors

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """The next event; waits for it, may be cancelled without losing one."""
        while True:
            with self._bare_errors():
                text = await self._socket.receive_text()
            pushed = _decode(text, _Answer, self._method).params
            if pushed is None:
                continue
            if pushed.error is not None:
                raise from_wire(pushed.error.code, pushed.error.message, pushed.error.data)
            if pushed.done:
                raise StopAsyncIteration
            if isinstance(pushed.result, msgspec.Raw):
                return _decode(bytes(pushed.result), self._event, self._method)


def _request(number: int, method: str, params: object) -> bytes:
    return msgspec.json.encode({"jsonrpc": "2.0", "id": number, "method": method, "params": params})


async def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > RESPONSE_BYTES:
            raise Unreachable(f"the answer is longer than {RESPONSE_BYTES} bytes")
    return bytes(body)


def _decode(raw: bytes | str, kind: type[T], method: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreachable(
            f"the answer to {method} is not what a node of this version says: {error}"
        ) from error


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one error that a group stands for; None when its members mean different things."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    for leaf in leaves:
        if not isinstance(leaf, Exception):
            return leaf  # a cancellation or an interrupt outranks the errors that it caused
    transport = (httpx.HTTPError, HTTPXWSException, Unreachable)
    if len(leaves) == 1 or all(isinstance(leaf, transport) for leaf in leaves):
        return leaves[0]
    return None
