"""Methods by name: their parameters, results and scopes, all taken from type hints.

A method is declared by a function of an interface class (`Backend`) and answered by the attribute
of that name of whatever object serves. The declaration's signature makes a msgspec Struct with
which parameters are checked before the backend sees them; its annotations and docstring make the
OpenRPC document. One declared as `-> AsyncIterator[T]` is a subscription.
"""

import inspect
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import msgspec

from tdmld.rpc.access import Scope
from tdmld.rpc.errors import InvalidParams


@dataclass(frozen=True)
class Method:
    """One entry of the registry."""

    name: str
    attribute: str
    scope: Scope
    params: type[msgspec.Struct]
    result: Any
    """The type of the result, or of each event of a subscription."""
    stream: bool
    summary: str
    description: str

    def call(self, backend: object, arguments: dict[str, Any]) -> Any:
        """A coroutine of the result, or an async iterator of a subscription's events."""
        return getattr(backend, self.attribute)(**arguments)

    def bind(self, raw: object) -> dict[str, Any]:
        """Positional or named params as checked keyword arguments; InvalidParams."""
        names = self.params.__struct_fields__
        if raw is msgspec.UNSET:
            raw = {}
        if isinstance(raw, list):
            if len(raw) > len(names):
                raise InvalidParams(f"{self.name} takes {len(names)} params, not {len(raw)}")
            raw = dict(zip(names, raw, strict=False))
        try:
            bound = msgspec.convert(raw, self.params)
        except (msgspec.ValidationError, RecursionError) as error:
            raise InvalidParams(f"{self.name}: {error}") from error
        return {name: getattr(bound, name) for name in names}


class Registry:
    """All methods of a server."""

    def __init__(self) -> None:
        self.methods: dict[str, Method] = {}

    def add(self, name: str, declaration: Callable[..., Any], scope: Scope) -> None:
        """Register the function of an interface class; its `self` is no part of the RPC."""
        signature = inspect.signature(declaration, eval_str=True)
        parameters = list(signature.parameters.values())[1:]
        fields: list[Any] = [
            (parameter.name, parameter.annotation)
            if parameter.default is parameter.empty
            else (parameter.name, parameter.annotation, parameter.default)
            for parameter in parameters
        ]
        # Struct names must differ from each other, or schema generation collides.
        params = msgspec.defstruct(f"{name}_params", fields, forbid_unknown_fields=True)
        result = signature.return_annotation
        stream = get_origin(result) is AsyncIterator
        text = inspect.getdoc(declaration) or ""
        summary, _, description = text.partition("\n")
        self.methods[name] = Method(
            name=name,
            attribute=declaration.__name__,
            scope=scope,
            params=params,
            result=get_args(result)[0] if stream else result,
            stream=stream,
            summary=summary,
            description=" ".join(description.split()),
        )
