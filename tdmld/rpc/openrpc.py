"""The OpenRPC 1.3 document of a registry, generated from type hints and docstrings.

`python -m tdmld.rpc.openrpc` prints it; docs/reference/openrpc.json is its output, and a test
fails when that file is stale.
"""

import sys
from typing import Any

import msgspec

from tdmld import __version__
from tdmld.rpc.registry import Registry


def document(registry: Registry) -> dict[str, Any]:
    """What `rpc.discover` answers."""
    types: list[Any] = []
    for method in registry.methods.values():
        types += [method.params, method.result]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    entries: list[dict[str, Any]] = []
    pairs = iter(schemas)
    for method in registry.methods.values():
        reference, result = next(pairs), next(pairs)
        params = components.pop(reference["$ref"].rsplit("/", 1)[1])
        required = params.get("required", [])
        entry: dict[str, Any] = {
            "name": method.name,
            "summary": method.summary,
            "x-scope": method.scope.name.lower(),
            "params": [
                {"name": name, "required": name in required, "schema": schema}
                for name, schema in params["properties"].items()
            ],
        }
        if method.description:
            entry["description"] = method.description
        if method.stream:
            entry["result"] = {"name": "subscription", "schema": {"type": "string"}}
            entry["x-event"] = result
        else:
            entry["result"] = {"name": "result", "schema": result}
        entries.append(entry)
    return {
        "openrpc": "1.3.2",
        "info": {
            "title": "tdmld",
            "version": __version__,
            "description": "A node's JSON-RPC 2.0: POST / and WebSocket /, with a bearer token. "
            "Subscriptions need the WebSocket; events arrive as rpc_subscription, "
            "rpc_unsubscribe ends one.",
        },
        "methods": entries,
        "components": {"schemas": components},
    }


def text(registry: Registry) -> str:
    """The document as it stands in docs/reference/openrpc.json."""
    raw = msgspec.json.encode(document(registry), order="deterministic")
    return msgspec.json.format(raw, indent=2).decode() + "\n"


if __name__ == "__main__":
    from tdmld.rpc.methods import registry

    sys.stdout.write(text(registry()))
