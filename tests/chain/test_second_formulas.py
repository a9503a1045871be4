"""The second ledger, written from docs/spec/chain.md alone, on the vectors that need no ledger:
bytes, trees, genesis, certificates, turns, histories, the beacon."""

import json
from typing import Any

import pytest

from tests.chain.second.auditor import check_certificate
from tests.chain.second.beacon import first_mix, next_mix, vrf_output
from tests.chain.second.committees import table, tainted, turns
from tests.chain.second.formats import (
    H,
    Refused,
    canonical,
    header_of,
    key_of,
    pack,
    signed,
    u32,
    unpack,
)
from tests.chain.second.genesis import Genesis, first_state
from tests.chain.second.records import B
from tests.chain.second.trees import History, merkle, state_root
from tests.chain.test_vectors import load, rows, unhex


@pytest.mark.parametrize("row", load("encoding")["records"], ids=lambda row: row["kind"])
def test_one_spelling(row: dict[str, Any]) -> None:
    raw = bytes.fromhex(row["bytes"])
    assert pack(unpack(raw)) == raw


@pytest.mark.parametrize(
    "row",
    [row for row in load("encoding")["refused"] if row["rules"] == ["ENC-3"]],
    ids=lambda row: row["name"],
)
def test_other_spellings(row: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        unpack(bytes.fromhex(row["bytes"]))


def test_genesis() -> None:
    vector = load("genesis")
    document = vector["canonical"].encode()
    assert H(document).hex() == vector["chain_id"]
    state, _ = first_state(json.loads(document))
    assert canonical(json.loads(document)) == document
    assert state == unhex(vector["state"])
    assert state_root(state).hex() == vector["state_root"]
    assert H(pack(header_of(vector["header"]))).hex() == vector["hash"]


@pytest.mark.parametrize("row", load("blocks")["certificates"], ids=lambda row: row["name"])
def test_certificates(row: dict[str, Any]) -> None:
    vector = load("blocks")
    document, header = vector["genesis"], header_of(vector["header"])
    genesis = Genesis(H(canonical(document)), document, first_state(document)[1])
    try:
        check_certificate(genesis, row["certificate"], header, bytes.fromhex(vector["hash"]))
    except Refused:
        assert not row["valid"]
    else:
        assert row["valid"]


def test_keys_and_signatures() -> None:
    for row in rows("addresses"):
        assert key_of(row["address"]).hex() == row["key"]
    for row in rows("signatures"):
        key, chain, message, signature = (
            bytes.fromhex(row[name]) for name in ("key", "chain_id", "message", "signature")
        )
        assert signed(key, row["domain"], chain, message, signature) is row["valid"]


def test_trees() -> None:
    for row in rows("merkle"):
        assert merkle([bytes.fromhex(leaf) for leaf in row["leaves"]]).hex() == row["root"]
    for row in rows("state_trees"):
        state = unhex(row["state"])
        assert (state_root(state) if state else bytes(32)).hex() == row["root"], row["name"]


def test_histories() -> None:
    history = History()
    for row in rows("histories"):
        found = [(bytes.fromhex(one["id"]), one["ok"]) for one in row["transactions"]]
        outcomes = merkle([key + bytes((ok,)) + u32(len(found)) for key, ok in found])
        assert outcomes.hex() == row["outcomes_root"]
        history.append(bytes.fromhex(row["block"]) + outcomes)
        assert history.root.hex() == row["history_root"]


def test_turns() -> None:
    for row in rows("rotations"):
        seats = tuple(zip(row["stakes"], row["leads"], strict=True))
        leaders = table(seats)
        assert turns(seats) == row["seats"] == [leaders.count(i) for i in range(len(seats))]
        assert len(leaders) == row["period"]
        early = [leaders[view % len(leaders)] for view in range(1, 41)]
        assert early == row["leaders_from_view_1"]
        assert leaders[1_000_000 % len(leaders)] == row["leader_of_view_1000000"]


def test_taints() -> None:
    for row in rows("views"):
        assert tainted(row["parent_view"], row["view"]) is row["tainted"]


def test_beacon() -> None:
    vector = load("crypto")["beacon"]
    chain, proposer = bytes.fromhex(vector["chain_id"]), bytes.fromhex(vector["proposer"])
    mix = first_mix(chain)
    assert mix.hex() == vector["mix_0"]
    for row in vector["heights"]:
        mix = next_mix(chain, mix, row["height"], proposer, bytes.fromhex(row["proof"]))
        assert mix.hex() == row["mix"]
    for row in rows("vrf"):
        shown = (bytes.fromhex(row[name]) for name in ("key", "input", "proof"))
        try:
            output = vrf_output(*shown).hex()
        except Refused:
            output = None
        assert output == row["output"], row["name"]


def test_digests() -> None:
    vector = load("crypto")["digests"]
    salt, root = bytes.fromhex(vector["salt"]), bytes.fromhex(vector["list_root"])
    assert B(salt, bytes.fromhex(vector["steps_root"])).hex() == vector["seal"]
    found = B(root, salt, bytes.fromhex(vector["auditor"]))
    assert found.hex() == vector["auditor_commitment"]
