"""A genesis document either founds a chain or names the field that is wrong."""

import json
from typing import Any

import pytest

from tdmld.chain.crypto import KeyPair, address, sha256
from tdmld.chain.errors import GenesisError
from tdmld.chain.genesis import (
    Genesis,
    Parameters,
    chain_id,
    genesis_bytes,
    genesis_document,
    genesis_from_document,
    genesis_from_toml,
    load_genesis,
    node_owners,
    protocol_at,
    supply,
    validators,
)

OWNERS = [KeyPair(bytes([1, i] * 16)) for i in range(4)]
NODES = [KeyPair(bytes([2, i] * 16)) for i in range(4)]


def document() -> dict[str, Any]:
    return {
        "chain": "tdmld-test-1",
        "time": "2026-01-01T00:00:00Z",
        "protocol": [[0, 1]],
        "accounts": [[o.address, 1000] for o in OWNERS],
        "validators": [
            [o.address, n.address, 100] for o, n in zip(OWNERS[:3], NODES[:3], strict=True)
        ],
        "work_stakes": [[OWNERS[3].address, 50]],
        "nodes": [[OWNERS[3].address, NODES[3].address]],
        "mature_classes": ["*"],
        "parameters": {"interval_ms": 250},
    }


def load(value: object) -> Genesis:
    return load_genesis(json.dumps(value).encode())


def test_reads_what_was_written() -> None:
    genesis = load(document())
    assert genesis.chain == "tdmld-test-1"
    assert genesis.time_ms == 1_767_225_600_000
    assert dict(genesis.accounts) == {o.public: 1000 for o in OWNERS}
    assert [v.stake for v in validators(genesis)] == [100] * 3
    assert [v.owner for v in validators(genesis)] == sorted(o.public for o in OWNERS[:3])
    assert node_owners(genesis) == {n.public: o.public for o, n in zip(OWNERS, NODES, strict=True)}
    assert genesis.parameters == Parameters(interval_ms=250)
    assert genesis.parameters.unbonding == (1000, 3600)
    assert supply(genesis) == 4 * 1000 + 3 * 100 + 50


def test_the_canonical_document_reads_back_to_the_same_bytes() -> None:
    genesis = load(document())
    raw = genesis_bytes(genesis)
    assert raw.isascii()
    assert b" " not in raw
    assert load_genesis(raw) == genesis
    assert genesis_bytes(load_genesis(raw)) == raw
    assert chain_id(genesis) == sha256(raw)


def test_order_and_spacing_do_not_change_the_chain_id() -> None:
    other = document()
    for rows in ("accounts", "validators"):
        other[rows].reverse()
    other = dict(reversed(other.items()))
    assert chain_id(load_genesis(json.dumps(other, indent=2).encode())) == chain_id(
        load(document())
    )


@pytest.mark.parametrize(
    "change",
    [{"chain": "tdmld-test-2"}, {"time": "2026-01-01T00:00:00.001Z"}, {"parameters": {}}],
    ids=["name", "time", "parameters"],
)
def test_content_changes_the_chain_id(change: dict[str, object]) -> None:
    assert chain_id(load(document() | change)) != chain_id(load(document()))


def test_milliseconds_survive() -> None:
    genesis = load(document() | {"time": "2026-01-01T00:00:00.042Z"})
    assert genesis.time_ms % 1000 == 42
    assert genesis_document(genesis)["time"] == "2026-01-01T00:00:00.042Z"


def test_toml_says_the_same_as_json() -> None:
    lines = [f"{k} = {json.dumps(v)}" for k, v in document().items() if not isinstance(v, dict)]
    text = "\n".join([*lines, "[parameters]", "interval_ms = 250"])
    assert genesis_from_toml(text.encode()) == load(document())


def test_protocol_versions_come_into_force_by_height() -> None:
    genesis = load(document() | {"protocol": [[0, 1], [100, 2]]})
    assert [protocol_at(genesis, h) for h in (0, 99, 100, 5000)] == [1, 1, 2, 2]


A, B = OWNERS[0].address, NODES[0].address
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("unknown key", {"acounts": []}, "acounts"),
    ("chain name", {"chain": "Has Blanks"}, "chain"),
    ("time", {"time": "yesterday"}, "time: 'yesterday' is not a UTC time"),
    ("time zone", {"time": "2026-01-01T00:00:00+01:00"}, "time: "),
    ("no such day", {"time": "2026-02-30T00:00:00Z"}, "time: "),
    ("before 1970", {"time": "1969-12-31T23:59:59Z"}, "before 1970"),
    ("negative balance", {"accounts": [[A, -1]]}, r"accounts\[\.\.\.\]\[1\]|accounts\[0\]\[1\]"),
    ("balance as text", {"accounts": [[A, "5"]]}, "accounts"),
    ("balance as truth", {"accounts": [[A, True]]}, "accounts"),
    ("account twice", {"accounts": [[A, 1], [A, 2]]}, f"accounts: {A} stands twice"),
    ("not an address", {"accounts": [["nobody", 1]]}, r"accounts\[0\]\[0\]: "),
    ("not base58", {"accounts": [["0OIl", 1]]}, r"accounts\[0\]\[0\]: .*not base58"),
    ("no validators", {"validators": []}, "validators"),
    ("stake of zero", {"validators": [[A, B, 0]]}, "validators"),
    ("short row", {"validators": [[A, B]]}, "validators"),
    (
        "validating owner twice",
        {"validators": [[A, B, 1], [A, NODES[1].address, 1]]},
        f"validators: {A} stands twice",
    ),
    (
        "validating node twice",
        {"validators": [[A, B, 1], [OWNERS[1].address, B, 1]]},
        f"validators: {B} stands twice",
    ),
    ("node key is owner key", {"validators": [[A, A, 1]]}, "is a node and an owner"),
    (
        "node of two owners",
        {"nodes": [[OWNERS[3].address, B]]},
        "a node works for one owner",
    ),
    ("node twice", {"nodes": [[A, NODES[3].address]] * 2}, "nodes: .* stands twice"),
    ("work stake twice", {"work_stakes": [[A, 1], [A, 1]]}, "work_stakes: .* stands twice"),
    ("supply", {"accounts": [[A, 2**62], [OWNERS[1].address, 2**62]]}, r"below 2\*\*63"),
    ("amount too great", {"accounts": [[A, 2**63]]}, "accounts"),
    ("class twice", {"mature_classes": ["a", "a"]}, "mature_classes: a stands twice"),
    ("class name", {"mature_classes": [""]}, "mature_classes"),
    ("protocol not from 0", {"protocol": [[5, 1]]}, "protocol: the first row"),
    ("protocol empty", {"protocol": []}, "protocol: the first row"),
    ("protocol descends", {"protocol": [[0, 1], [9, 2], [8, 3]]}, "protocol: heights"),
    (
        "auditor unknown",
        {"auditors": [KeyPair(bytes(32)).address]},
        "auditors: .* has no account",
    ),
    ("unknown parameter", {"parameters": {"intervall_ms": 1}}, "parameters.intervall_ms: no such"),
    ("parameter of zero", {"parameters": {"draw_delay": 0}}, "parameters.draw_delay: "),
    ("parameter too great", {"parameters": {"block_bytes": 2**40}}, "parameters.block_bytes: "),
    ("unbonding", {"parameters": {"unbonding": [1]}}, "parameters.unbonding: "),
    (
        "leader away",
        {"parameters": {"leader_away_ms": 9000}},
        "parameters.leader_away_ms: must not exceed",
    ),
    (
        "interval",
        {"parameters": {"interval_ms": 50000}},
        "parameters.interval_ms: must not exceed",
    ),
]


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in BAD], ids=[r[0] for r in BAD])
def test_names_the_bad_field(change: dict[str, Any], text: str) -> None:
    with pytest.raises(GenesisError, match=text):
        load(document() | change)


def test_names_the_missing_field() -> None:
    bad = document()
    del bad["validators"]
    with pytest.raises(GenesisError, match="validators"):
        load(bad)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"chain": "a", "chain": "b"}', "'chain' stands twice"),
        (b'{"chain": 1.5}', "1.5 is not an integer"),
        (b'{"chain": NaN}', "NaN is not an integer"),
        (b"9" * 5000, "not JSON"),
        (b"[]", "Expected `object`"),
        (b" " * (5 << 20), "at most"),
    ],
    ids=["empty", "binary", "deep", "duplicate", "float", "nan", "long", "list", "large"],
)
def test_refuses_hostile_bytes(raw: bytes, text: str) -> None:
    with pytest.raises(GenesisError, match=text):
        load_genesis(raw)


def test_a_document_can_be_given_as_an_object() -> None:
    assert address(genesis_from_document(document()).accounts[0][0]).startswith("12D3Koo")
