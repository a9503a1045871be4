"""The committed RPC reference is what the code says."""

from pathlib import Path

from tdmld.rpc.methods import registry
from tdmld.rpc.openrpc import text

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "openrpc.json"


def test_the_committed_document_is_current() -> None:
    assert REFERENCE.read_text() == text(registry()), (
        "stale; make it anew with: python -m tdmld.rpc.openrpc > docs/reference/openrpc.json"
    )


def test_every_method_has_a_summary_and_a_scope() -> None:
    for method in registry().methods.values():
        assert method.summary.endswith("."), method.name
        assert method.scope.name
