"""The conformance vectors: current, complete, and what this implementation does."""

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tdmld.chain import (
    accounts,
    complaints,
    crypto,
    history,
    leader,
    ledger,
    merkle,
    records,
    transactions,
    vrf,
)
from tdmld.chain import blocks as chain_blocks
from tdmld.chain.accounts import (
    Facts,
)
from tdmld.chain.audits import auditor_commitment, is_drawn
from tdmld.chain.blocks import (
    Block,
    BlockLimits,
    Certificate,
    Committee,
    Header,
    Vote,
    beacon_input,
    beacon_mix,
    beacon_start,
    block_hash,
    check_block,
    check_child,
    first_header,
    follows,
    transactions_root,
    verify_certificate,
    verify_vote,
)
from tdmld.chain.codec import ZERO_HASH, Record, decode, encode
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import DecodeError, GenesisError, InvalidBlock
from tdmld.chain.execution import BlockContext, Execution
from tdmld.chain.genesis import (
    Genesis,
    chain_id,
    genesis_bytes,
    genesis_from_document,
    load_genesis,
    protocol_at,
    validators,
)
from tdmld.chain.ledger import apply_block, genesis_changes, recount
from tdmld.chain.records import (
    Due,
    Timer,
)
from tdmld.chain.reputation import reputation
from tdmld.chain.segments import seal
from tdmld.chain.transactions import Payload, decode_transaction, verify_transaction
from tdmld.chain.tree import Tree

ROOT = Path(__file__).resolve().parents[2]
VECTORS = sorted((ROOT / "tests" / "vectors").glob("*.json"))
LEDGERS = [path for path in VECTORS if path.stem.startswith("ledger-")]
TOTAL_BYTES = 2_500_000


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "tests" / "vectors" / f"{name}.json").read_text())
    return document


def unhex(found: dict[str, str]) -> dict[bytes, bytes]:
    return {bytes.fromhex(key): bytes.fromhex(value) for key, value in found.items()}


def root_of(state: dict[bytes, bytes]) -> bytes:
    leaves = sorted((sha256(key), sha256(value)) for key, value in state.items())
    return Tree({}.get).update(leaves)


def kind_of(name: str) -> type[Record]:
    for module in (records, accounts, transactions, complaints, chain_blocks):
        found = getattr(module, name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise AssertionError(name)


# ---- the files -----------------------------------------------------------------------------------


def test_the_files_are_what_the_generator_writes() -> None:
    program = runpy.run_path(str(ROOT / "scripts" / "lib" / "vectors.py"))
    assert program["stale"]() == [], "run scripts/vectors, and look at what has changed"
    assert {path.stem for path in VECTORS} == set(program["FILES"])


def test_the_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in VECTORS) < TOTAL_BYTES


# ---- the ledger ----------------------------------------------------------------------------------


def ledger_cases() -> list[Any]:
    found = []
    for path in LEDGERS:
        document, states = json.loads(path.read_text()), dict[str | None, dict[str, str]]()
        for group in document["groups"]:
            genesis = document["geneses"][group["chain_id"]]
            whole = {**states.get(group["from"], {}), **group["pre"]}
            group["pre"] = {key: value for key, value in whole.items() if value is not None}
            states[group["name"]] = group["pre"]
            for case in group["cases"]:
                name = f"{path.stem}: {group['name']}: {case['name']}"
                found.append(pytest.param(genesis, group, case, id=name))
    return found


def replay(genesis: Genesis, group: dict[str, Any], case: dict[str, Any]) -> ledger.BlockResult:
    chain, context = chain_id(genesis), case["context"]
    found = [decode_transaction(bytes.fromhex(raw), chain) for raw in case["transactions"]]
    assert all(verify_transaction(transaction, chain) for transaction in found)
    at = BlockContext(
        height=context["height"],
        view=context["view"],
        parent_view=context["parent_view"],
        time_ms=context["time_ms"],
        proposer=bytes.fromhex(context["proposer"]),
        beacon=bytes.fromhex(context["beacon"]),
    )
    return apply_block(unhex(group["pre"]).get, genesis, at, found)


@pytest.mark.parametrize(("document", "group", "case"), ledger_cases())
def test_ledger(document: dict[str, Any], group: dict[str, Any], case: dict[str, Any]) -> None:
    genesis = genesis_from_document(document)
    assert chain_id(genesis).hex() == group["chain_id"]
    state = unhex(group["pre"])
    assert root_of(state).hex() == group["root"]
    result = replay(genesis, group, case)
    assert {
        key.hex(): None if value is None else value.hex() for key, value in result.changes.items()
    } == case["changes"]
    assert [{"ok": r.ok, "reason": r.reason} for r in result.receipts] == case["receipts"]
    for key, value in result.changes.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    assert root_of(state).hex() == case["root"]
    recount(state.items())


def test_names_are_unique_and_every_case_cites_a_rule() -> None:
    for path in LEDGERS:
        names = [
            (group["name"], case["name"])
            for group in json.loads(path.read_text())["groups"]
            for case in group["cases"]
            if case["rules"]
        ]
        assert max(Counter(names).values()) == 1
        assert len(names) == sum(len(g["cases"]) for g in json.loads(path.read_text())["groups"])


def test_every_transaction_succeeds_somewhere_and_fails_somewhere() -> None:
    seen: Counter[tuple[type, bool]] = Counter()
    for parameters in ledger_cases():
        _, group, case = parameters.values
        chain = bytes.fromhex(group["chain_id"])
        for raw, receipt in zip(case["transactions"], case["receipts"], strict=True):
            payload = decode_transaction(bytes.fromhex(raw), chain).payload
            seen[type(payload), receipt["ok"]] += 1
    assert set(seen) == {(kind, ok) for kind in Payload.__args__ for ok in (True, False)}


def test_every_timer_comes_due_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set[Timer]()
    true = dict(ledger._DUE)

    def noting(run: Execution, entry: Due) -> None:
        seen.add(entry.timer)
        true[entry.timer](run, entry)

    monkeypatch.setattr(ledger, "_DUE", dict.fromkeys(true, noting))
    for parameters in ledger_cases():
        document, group, case = parameters.values
        replay(genesis_from_document(document), group, case)
    assert seen == set(Timer)


def test_every_status_is_reached_somewhere() -> None:
    """Of jobs, segments and audits; what is written between (matched, drawn) is in pre-states."""
    seen: dict[str, set[str]] = {"j": set(), "g": set(), "u": set()}
    reasons, proofs = set[str](), set[str]()
    for parameters in ledger_cases():
        _, group, case = parameters.values
        for rows in (group["pre"], case["changes"]):
            for key, value in rows.items():
                letter = chr(int(key[:2], 16))
                if value is None or letter not in seen:
                    continue
                raw = bytes.fromhex(value)
                if letter == "j":
                    job = decode(records.Job, raw, 1 << 20)
                    seen[letter].add(job.status)
                    reasons.add(job.reason)
                elif letter == "g":
                    segment = decode(records.Segment, raw, 1 << 20)
                    seen[letter].add(segment.status)
                    proofs.add(segment.proof)
                else:
                    seen[letter].add(decode(records.Audit, raw, 1 << 20).status)
    assert seen["j"] == set(records.JobStatus)
    assert seen["g"] == set(records.SegmentStatus)
    assert seen["u"] == set(records.AuditStatus)
    assert reasons == set(records.CloseReason)
    assert proofs == set(records.ProofStatus)


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", load("encoding")["records"], ids=lambda row: row["kind"])
def test_records_have_one_spelling(row: dict[str, Any]) -> None:
    raw = bytes.fromhex(row["bytes"])
    found = decode(kind_of(row["kind"]), raw, len(raw))
    assert encode(found) == raw
    assert list(row["value"]) == sorted(found.__struct_fields__)


@pytest.mark.parametrize("row", load("encoding")["refused"], ids=lambda row: row["name"])
def test_other_bytes_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        decode(kind_of(row["kind"]), bytes.fromhex(row["bytes"]), 1 << 20)


def test_genesis() -> None:
    vector = load("genesis")
    found = genesis_from_document(vector["document"])
    assert genesis_bytes(found).decode() == vector["canonical"]
    assert load_genesis(vector["canonical"].encode()) == found
    assert chain_id(found).hex() == vector["chain_id"]
    state = genesis_changes(found)
    assert state == unhex(vector["state"])
    assert root_of(state).hex() == vector["state_root"]
    header = first_header(chain_id(found), protocol_at(found, 0), found.time_ms, root_of(state))
    assert encode(header).hex() == vector["header_bytes"]
    assert block_hash(header).hex() == vector["hash"]


@pytest.mark.parametrize("row", load("genesis")["refused"], ids=lambda row: row["name"])
def test_documents_that_found_nothing(row: dict[str, Any]) -> None:
    with pytest.raises(GenesisError):
        load_genesis(json.dumps(row["document"]).encode())


# ---- blocks --------------------------------------------------------------------------------------


def header_of(row: dict[str, Any]) -> Header:
    values = [
        bytes.fromhex(row[name]) if isinstance(row[name], str) else row[name]
        for name in Header.__struct_fields__
    ]
    return Header(*values)


def test_a_block() -> None:
    vector = load("blocks")
    header = header_of(vector["header"])
    assert encode(header).hex() == vector["header_bytes"]
    assert block_hash(header).hex() == vector["hash"]
    raws = [bytes.fromhex(row["raw"]) for row in vector["transactions"]]
    assert [sha256(raw).hex() for raw in raws] == [row["id"] for row in vector["transactions"]]
    assert transactions_root(raws) == header.tx_root
    block = Block(header, bytes.fromhex(vector["signature"]), tuple(raws))
    assert encode(block).hex() == vector["block_bytes"]
    chain = committee().chain_id
    assert beacon_mix(chain, beacon_start(chain), header).hex() == vector["mix"]
    assert committee().quorum == vector["quorum"]


def committee() -> Committee:
    vector = load("blocks")
    genesis = genesis_from_document(vector["genesis"])
    found = Committee.of(chain_id(genesis), [(v.node, v.stake) for v in validators(genesis)])
    assert [node.hex() for node in found.nodes] == [row["node"] for row in vector["committee"]]
    return found


@pytest.mark.parametrize("row", load("blocks")["bodies"], ids=lambda row: row["name"])
def test_blocks_by_themselves(row: dict[str, Any]) -> None:
    vector, members = load("blocks"), committee()
    parameters = genesis_from_document(vector["genesis"]).parameters
    limits = BlockLimits(parameters.block_bytes, parameters.block_transactions, 1)
    block = decode(Block, bytes.fromhex(row["bytes"]), 1 << 20)
    place = members.leader(block.header.view)
    assert place == vector["leader"]
    try:
        check_block(members, place, block, limits)
    except InvalidBlock:
        assert not row["valid"]
    else:
        assert row["valid"]


@pytest.mark.parametrize("row", load("blocks")["children"], ids=lambda row: row["name"])
def test_children(row: dict[str, Any]) -> None:
    vector = load("blocks")
    parent = header_of(row.get("parent", vector["header"]))
    try:
        check_child(parent, block_hash(parent), header_of(row["header"]), 500)
    except InvalidBlock:
        assert not row["valid"]
    else:
        assert row["valid"]


@pytest.mark.parametrize("row", load("blocks")["votes"], ids=lambda row: row["name"])
def test_votes(row: dict[str, Any]) -> None:
    vote = decode(Vote, bytes.fromhex(row["bytes"]), 1 << 20)
    assert verify_vote(committee(), vote) is row["valid"]


@pytest.mark.parametrize("row", load("blocks")["certificates"], ids=lambda row: row["name"])
def test_certificates(row: dict[str, Any]) -> None:
    found = decode(Certificate, bytes.fromhex(row["bytes"]), 1 << 20)
    assert verify_certificate(committee(), found) is row["valid"]


# ---- hashes, keys, draws -------------------------------------------------------------------------


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load("crypto")[name]
    return found


def test_addresses_and_signatures() -> None:
    for row in rows("addresses"):
        assert crypto.address(bytes.fromhex(row["key"])) == row["address"]
    for row in rows("signatures"):
        message, chain = bytes.fromhex(row["message"]), bytes.fromhex(row["chain_id"])
        assert crypto.signing_bytes(row["domain"], chain, message).hex() == row["signed"]
        signature, key = bytes.fromhex(row["signature"]), bytes.fromhex(row["key"])
        assert crypto.verify(key, row["domain"], chain, message, signature) is row["valid"]


def test_trees() -> None:
    for row in rows("merkle"):
        assert merkle.root([bytes.fromhex(leaf) for leaf in row["leaves"]]).hex() == row["root"]
    for row in rows("state_trees"):
        assert root_of(unhex(row["state"])).hex() == row["root"], row["name"]


def test_rotations() -> None:
    for row in rows("rotations"):
        rotation = leader.Rotation(row["stakes"], row["leads"])
        assert list(rotation.turns) == row["seats"]
        assert rotation.period == row["period"]
        leaders = [rotation.leader(view) for view in range(1, 41)]
        assert leaders == row["leaders_from_view_1"]
        assert rotation.leader(1_000_000) == row["leader_of_view_1000000"]


def test_views() -> None:
    for row in rows("views"):
        assert follows(row["parent_view"], row["view"]) is not row["tainted"]


def test_histories() -> None:
    leaves = []
    for row in rows("histories"):
        outcomes = [(bytes.fromhex(one["id"]), one["ok"]) for one in row["transactions"]]
        outcomes_root = history.outcomes_root(outcomes)
        assert outcomes_root.hex() == row["outcomes_root"]
        leaves.append(history.leaf(bytes.fromhex(row["block"]), outcomes_root))
        assert merkle.root(leaves).hex() == row["history_root"]


def test_beacon() -> None:
    vector = load("crypto")["beacon"]
    chain, proposer = bytes.fromhex(vector["chain_id"]), bytes.fromhex(vector["proposer"])
    mix = beacon_start(chain)
    assert mix.hex() == vector["mix_0"]
    for row in vector["heights"]:
        assert beacon_input(chain, mix, row["height"]).hex() == row["input"]
        header = Header(
            1, row["height"], 0, 0, ZERO_HASH, 0, proposer, bytes.fromhex(row["proof"]),
            ZERO_HASH, 0, *[ZERO_HASH] * 4,
        )  # fmt: skip
        mix = beacon_mix(chain, mix, header)
        assert mix.hex() == row["mix"]
    for row in rows("vrf"):
        output = vrf.verify(
            bytes.fromhex(row["key"]), bytes.fromhex(row["input"]), bytes.fromhex(row["proof"])
        )
        assert (None if output is None else output.hex()) == row["output"], row["name"]


def test_draws_digests_and_reputation() -> None:
    class Stub:
        """What `is_drawn` needs of a job."""

        def __init__(self, row: dict[str, Any]) -> None:
            self.id, self.audit_rate = bytes.fromhex(row["job"]), row["audit_rate"]

        def is_own(self, _: int) -> bool:
            return False

    for row in rows("draws"):
        found = is_drawn(
            bytes.fromhex(row["mix"]), row["tainted"], Stub(row), row["slot"], row["segment"]  # type: ignore[arg-type]
        )  # fmt: skip
        assert found is row["drawn"]
    vector = load("crypto")["digests"]
    root, salt = bytes.fromhex(vector["list_root"]), bytes.fromhex(vector["salt"])
    assert seal(salt, bytes.fromhex(vector["steps_root"])).hex() == vector["seal"]
    found_hash = auditor_commitment(root, salt, bytes.fromhex(vector["auditor"]))
    assert found_hash.hex() == vector["auditor_commitment"]
    for row in rows("reputations"):
        assert reputation(Facts(**row["facts"])) == row["reputation"]
