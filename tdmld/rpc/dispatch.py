"""JSON-RPC 2.0: bytes in, bytes out.

One `Session` serves one HTTP request or one WebSocket. It knows scopes, batches and subscriptions,
and nothing of sockets. Rules, each with a test:

    RPC-1   a request without id is a notification: it runs, and is never answered
    RPC-2   the members of a batch run side by side; the answers keep the order of the requests
    RPC-3   an empty batch, or a junk member of one, is an invalid request
    RPC-4   params may be positional or named; unknown ones are refused
    RPC-5   only an RpcError's text reaches the caller; anything else becomes an opaque -32603
            whose correlation id stands in the log beside the traceback
    RPC-6   a method needs the token's scope to be at least its own
    RPC-7   the answer to a subscription leaves before its first event
    RPC-8   a subscription that ends says so; one that fails says why

Pushed events are notifications of `rpc_subscription`:
`{"subscription": "0x1", "result": ...}`, at the end `{"subscription": "0x1", "done": true}`, after
a failure `{"subscription": "0x1", "error": {...}}`.
"""

import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from tdmld.rpc import limits
from tdmld.rpc.access import Scope
from tdmld.rpc.errors import (
    Forbidden,
    InternalError,
    InvalidParams,
    InvalidRequest,
    LimitExceeded,
    MethodNotFound,
    ParseError,
    RpcError,
)
from tdmld.rpc.openrpc import document
from tdmld.rpc.registry import Method, Registry

log = logging.getLogger(__name__)

PUSH = "rpc_subscription"
UNSUBSCRIBE = "rpc_unsubscribe"
DISCOVER = "rpc.discover"


class Request(msgspec.Struct):
    """A request object as it arrives."""

    method: str
    jsonrpc: str
    params: list[Any] | dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    id: int | str | msgspec.UnsetType | None = msgspec.UNSET


@dataclass
class Reply:
    """What to send, and what may begin once it is queued (RPC-7)."""

    raw: bytes | None
    begin: list[trio.Event] = field(default_factory=list)


Push = Callable[[bytes], None]
"""Queues a message without waiting; what it does with a slow peer is its own affair."""


class Session:
    """The dispatcher of one connection.

    `nursery` and `push` are given for a WebSocket only: subscriptions live in that nursery and die
    with it. Cancelling `handle` cancels the backend calls it started.
    """

    def __init__(
        self,
        registry: Registry,
        backend: object,
        scope: Scope,
        *,
        nursery: trio.Nursery | None = None,
        push: Push | None = None,
    ) -> None:
        self._registry = registry
        self._backend = backend
        self._scope = scope
        self._nursery = nursery
        self._push = push
        self._subscriptions: dict[str, trio.CancelScope] = {}
        self._count = 0

    async def handle(self, raw: bytes) -> Reply:
        """Answer one message; `raw` is already below the size limit."""
        try:
            message = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError):
            return Reply(_error(None, ParseError()))
        begin: list[trio.Event] = []
        if not isinstance(message, list):
            return Reply(await self._one(message, begin), begin)
        if not message:
            return Reply(_error(None, InvalidRequest("a batch must not be empty")))
        if len(message) > limits.BATCH_CALLS:
            text = f"a batch has at most {limits.BATCH_CALLS} members, not {len(message)}"
            return Reply(_error(None, LimitExceeded(text)))
        answers: list[bytes | None] = [None] * len(message)

        async def answer(index: int) -> None:
            answers[index] = await self._one(message[index], begin)

        async with trio.open_nursery() as nursery:
            for index in range(len(message)):
                nursery.start_soon(answer, index)
        given = [one for one in answers if one is not None]
        return Reply(b"[" + b",".join(given) + b"]" if given else None, begin)

    async def _one(self, raw: object, begin: list[trio.Event]) -> bytes | None:
        """One member of a batch, or the only one."""
        try:
            request = msgspec.convert(raw, Request)
        except (msgspec.ValidationError, RecursionError) as error:
            return _error(_usable_id(raw), InvalidRequest(f"not a JSON-RPC 2.0 request: {error}"))
        if request.jsonrpc != "2.0":
            return _error(_usable_id(raw), InvalidRequest('jsonrpc must be "2.0"'))
        if isinstance(request.id, str) and len(request.id) > limits.ID_CHARACTERS:
            return _error(None, InvalidRequest(f"id is longer than {limits.ID_CHARACTERS}"))
        try:
            result = await self._call(request, begin)
            answer = msgspec.json.encode({"jsonrpc": "2.0", "id": request.id, "result": result})
        except RpcError as error:
            answer = _error(request.id, error)
        except Exception as error:  # Supervised boundary (RPC-5): a bug of one method stays there.
            answer = _error(request.id, _opaque(error, request.method))
        return None if request.id is msgspec.UNSET else answer

    async def _call(self, request: Request, begin: list[trio.Event]) -> object:
        if request.method == DISCOVER:
            return document(self._registry)
        if request.method == UNSUBSCRIBE:
            return self._unsubscribe(request.params)
        method = self._registry.methods.get(request.method)
        if method is None:
            raise MethodNotFound(f"no method {request.method[:100]!r}; rpc.discover lists them")
        if self._scope < method.scope:
            need, have = method.scope.name.lower(), self._scope.name.lower()
            raise Forbidden(f"{method.name} needs scope {need}, the token has {have}")
        arguments = method.bind(request.params)
        if not method.stream:
            return await method.call(self._backend, arguments)
        return self._subscribe(method, arguments, begin)

    def _subscribe(self, method: Method, arguments: dict[str, Any], begin: list[trio.Event]) -> str:
        if self._nursery is None or self._push is None:
            raise InvalidRequest(f"{method.name} is a subscription and needs the WebSocket")
        if len(self._subscriptions) >= limits.SUBSCRIPTIONS:
            raise LimitExceeded(f"at most {limits.SUBSCRIPTIONS} subscriptions a connection")
        self._count += 1
        name = f"0x{self._count:x}"
        started = trio.Event()
        begin.append(started)
        events = method.call(self._backend, arguments)
        self._subscriptions[name] = trio.CancelScope()
        self._nursery.start_soon(self._pump, method.name, name, events, started, self._push)
        return name

    def _unsubscribe(self, params: object) -> bool:
        if isinstance(params, dict):
            params = list(params.values())
        if not isinstance(params, list) or len(params) != 1 or not isinstance(params[0], str):
            raise InvalidParams(f"{UNSUBSCRIBE} takes one subscription id")
        scope = self._subscriptions.pop(params[0], None)
        if scope is not None:
            scope.cancel()
        return scope is not None

    async def _pump(
        self,
        method: str,
        name: str,
        events: AsyncIterator[Any],
        started: trio.Event,
        push: Push,
    ) -> None:
        """Move events from the backend's generator to the socket's queue until either ends."""
        end: dict[str, Any] = {"subscription": name}
        with self._subscriptions[name] as scope:
            try:
                await started.wait()
                async for event in events:
                    push(_notification({"subscription": name, "result": event}))
                end["done"] = True
            except RpcError as error:
                end["error"] = _error_object(error)
            except Exception as error:  # Supervised boundary (RPC-5), as for calls.
                end["error"] = _error_object(_opaque(error, method))
            finally:
                self._subscriptions.pop(name, None)
                # A generator left alone would be closed by the garbage collector, at any time.
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    if (close := getattr(events, "aclose", None)) is not None:
                        await close()
        if not scope.cancelled_caught:
            push(_notification(end))


def _opaque(error: Exception, method: str) -> InternalError:
    correlation = secrets.token_hex(6)
    log.error(
        "rpc method failed",
        exc_info=error,
        extra={"method": method[:100], "correlation": correlation},
    )
    return InternalError(data={"correlation": correlation})


def _usable_id(raw: object) -> int | str | None:
    given = raw.get("id") if isinstance(raw, dict) else None
    if isinstance(given, bool) or not isinstance(given, int | str):
        return None
    if isinstance(given, str) and len(given) > limits.ID_CHARACTERS:
        return None
    return given


def _error_object(error: RpcError) -> dict[str, Any]:
    found: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.data is not None:
        found["data"] = error.data
    return found


def _error(id: object, error: RpcError) -> bytes:
    id = None if id is msgspec.UNSET else id
    return msgspec.json.encode({"jsonrpc": "2.0", "id": id, "error": _error_object(error)})


def _notification(params: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"jsonrpc": "2.0", "method": PUSH, "params": params})
