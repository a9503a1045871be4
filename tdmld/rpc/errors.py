"""Everything that can go wrong in a JSON-RPC call, with its code on the wire.

    RpcError                  root: its code, text and data reach the caller; nothing else ever does
    ├── ParseError            -32700  the bytes are not JSON
    ├── InvalidRequest        -32600  JSON, but not a JSON-RPC 2.0 request
    ├── MethodNotFound        -32601
    ├── InvalidParams         -32602  names the parameter
    ├── InternalError         -32603  opaque; its correlation id is in the node's log
    ├── NotFound              -32001  no such block, job, transaction
    ├── Refused               -32002  a rule of chain or node says no: funds, nonce, spec, stake
    ├── Forbidden             -32003  the token lacks the scope
    ├── NotReady              -32004  syncing, starting, stopping: the same call may succeed later
    ├── LimitExceeded         -32005  batch, subscriptions, size
    └── Unreachable           (client side only) nobody answers, or who answers is not a node
        └── Unauthorized      the node answers, but does not know the token

A backend raises NotFound, Refused, NotReady and InvalidParams with a text that names cause and
remedy. Any other exception of a backend is a bug and is shown to nobody but the log.
"""

from typing import Any, ClassVar


class RpcError(Exception):
    """An error meant for the caller. `data` must be JSON or None."""

    code: ClassVar[int] = -32000
    default: ClassVar[str] = "the node refused the call"

    def __init__(self, message: str = "", *, data: Any = None) -> None:
        self.message = message or self.default
        self.data = data
        super().__init__(self.message)


class ParseError(RpcError):
    """The body is not JSON."""

    code = -32700
    default = "parse error: the body is not JSON"


class InvalidRequest(RpcError):
    """JSON, but not a JSON-RPC 2.0 request object."""

    code = -32600
    default = "not a JSON-RPC 2.0 request"


class MethodNotFound(RpcError):
    """There is no such method; rpc.discover lists them."""

    code = -32601
    default = "method not found"


class InvalidParams(RpcError):
    """A parameter is missing, unknown or of the wrong type or size; the text names it."""

    code = -32602
    default = "invalid params"


class InternalError(RpcError):
    """A bug of the node. `data` carries a correlation id that stands in its log."""

    code = -32603
    default = "internal error; the node's log knows more under this correlation id"


class NotFound(RpcError):
    """The thing asked for does not exist (here, yet)."""

    code = -32001
    default = "not found"


class Refused(RpcError):
    """A rule says no: not enough funds, a wrong nonce, a spec that does not fit its data."""

    code = -32002
    default = "refused"


class Forbidden(RpcError):
    """The token is known, but its scope is too small."""

    code = -32003
    default = "the token lacks the scope for this method"


class NotReady(RpcError):
    """The node cannot answer now (starting, syncing, stopping); try again later."""

    code = -32004
    default = "the node is not ready"


class LimitExceeded(RpcError):
    """More than the server is willing to do for one caller."""

    code = -32005
    default = "limit exceeded"


class Unreachable(RpcError):
    """Client side: no node answers at the address. The text says what to type next."""

    default = "cannot reach the node"


class Unauthorized(Unreachable):
    """Client side: something answers but does not accept the token."""

    default = "the node does not accept this token"


class ServerError(RpcError):
    """Client side: an error code this version does not know; `number` keeps it."""

    def __init__(self, message: str = "", *, data: Any = None, number: int = 0) -> None:
        super().__init__(message, data=data)
        self.number = number


_BY_CODE: dict[int, type[RpcError]] = {
    kind.code: kind
    for kind in (
        ParseError,
        InvalidRequest,
        MethodNotFound,
        InvalidParams,
        InternalError,
        NotFound,
        Refused,
        Forbidden,
        NotReady,
        LimitExceeded,
    )
}


def from_wire(code: int, message: str, data: Any = None) -> RpcError:
    """The exception for an error object that came from a server."""
    kind = _BY_CODE.get(code)
    if kind is None:
        return ServerError(message, data=data, number=code)
    return kind(message, data=data)
