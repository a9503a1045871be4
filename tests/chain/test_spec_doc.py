"""docs/spec/chain.md says what the code does, as far as a program can compare them."""

import ast
import inspect
import json
import re
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from tdmld.chain import (
    accounts,
    audits,
    blocks,
    complaints,
    consensus,
    crypto,
    genesis,
    jobs,
    leader,
    light,
    limits,
    market,
    pacing,
    records,
    segments,
    slashing,
    transactions,
    tree,
    turns,
)
from tdmld.chain.codec import Record
from tdmld.chain.records import (
    FINAL,
    AuditStatus,
    Cause,
    CloseReason,
    JobStatus,
    ProofStatus,
    SegmentStatus,
    Timer,
)
from tdmld.node import export, validator
from tests.chain.test_vectors import VECTORS
from tests.chain.world import World, node_key, owner_key

ROOT = Path(__file__).resolve().parents[2]
SPEC = (ROOT / "docs" / "spec" / "chain.md").read_text()
RULE = r"[A-Z]+-[0-9]+"
RULES = re.findall(rf"^- \*\*({RULE})\.\*\*", SPEC, re.M)


def records_of(*modules: ModuleType) -> list[type[Record]]:
    return [
        found
        for module in modules
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, Record) and found.__module__ == module.__name__
    ]


@pytest.mark.parametrize(
    "record",
    records_of(blocks, transactions, complaints, records, accounts, tree, light, turns),
    ids=lambda record: record.__name__,
)
def test_every_record_stands_there_with_its_tag_and_fields(record: type[Record]) -> None:
    tag = record.__struct_config__.tag
    fields = ([] if tag is None else [f'"{tag}"']) + list(record.__struct_fields__)
    assert f"`{record.__name__}` = `[{', '.join(fields)}]`" in SPEC


def test_no_record_stands_there_that_the_code_has_not() -> None:
    modules = (blocks, transactions, complaints, records, accounts, tree, light, turns)
    known = {record.__name__ for record in records_of(*modules)}
    assert set(re.findall(r"^- `(\w+)` = `\[", SPEC, re.M)) <= known


def table(head: str) -> list[list[str]]:
    """The rows below a table's head, by their first three cells without back-ticks."""
    _, _, rest = SPEC.partition(f"| {head} |")
    assert rest, f"no table {head!r}"
    rows = rest.partition("\n\n")[0].split("\n")[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def test_every_parameter_stands_there_with_its_default_and_bounds() -> None:
    wanted = {}
    for field in msgspec.structs.fields(genesis.Parameters):
        default = field.default
        bounds = str(default)
        if isinstance(default, tuple):
            default = list(default)
        else:
            low, high = field.type.__metadata__[0].ge, field.type.__metadata__[0].le
            bounds = f"{low} to {'2^63 - 1' if high == 2**63 - 1 else high}"
        wanted[field.name] = (str(default), bounds)
    found = {row[0]: (row[1], row[2]) for row in table("parameter")}
    assert found.keys() == wanted.keys()
    for name, (default, bounds) in wanted.items():
        assert found[name][0] == default
        assert name == "unbonding" or found[name][1] == bounds
    assert all(all(row) for row in table("parameter")), "every parameter has its reason"


def test_every_limit_stands_there_with_its_value() -> None:
    wanted = {name: str(value) for name, value in vars(limits).items() if name.isupper()}
    assert {row[0]: row[1] for row in table("limit")} == wanted


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("Values of `Job` status", JobStatus),
        ("Values of `Job` reason", CloseReason),
        ("Values of `Segment` status", SegmentStatus),
        ("Values of `Segment` proof", ProofStatus),
        ("Values of `Audit` status", AuditStatus),
        ("Values of `Due` timer", Timer),
        ("Values of `Former` cause", Cause),
    ],
)
def test_every_status_stands_there(line: str, values: type[StrEnum]) -> None:
    (text,) = re.findall(rf"^{re.escape(line)}: (.*)$", SPEC, re.M)
    assert re.findall(r"`(\w+)`", text) == [value.value for value in values if value.value]


def test_final_statuses_are_named_as_final() -> None:
    assert f"final: {', '.join(f'`{s}`' for s in JobStatus if s in FINAL)}." in SPEC


def test_every_timer_stands_in_the_table_of_due_entries() -> None:
    assert [row[0] for row in table("timer")] == [timer.value for timer in Timer]


def test_every_key_of_the_state_stands_there() -> None:
    """Those that state.py and due.py write, by their letters, against those of real states."""
    listed = {row[0].partition("`")[0] for row in table("key | record")}
    world = World()
    world.all_ask()
    world.play_until(world.submit(audit_rate=1_000_000))
    lanes = {"lanes": 2, "lane_mode": transactions.LaneMode.DILOCO, "audit_rate": 0}
    world.play_until(world.submit(stages=world.offer().stages[:1], **lanes))
    world.play_until(world.submit(audit_rate=1_000_000), JobStatus.ACTIVE)
    world.do(owner_key(1), transactions.Unbond("work", 1))
    node, chain = node_key(0), world.chain_id
    votes = [
        blocks.sign_vote(node, chain, blocks.Kind.NOTARIZE, 1, bytes([n]) * 32, 0) for n in (1, 2)
    ]
    world.block(passed=1)
    world.do(owner_key(1), slashing.from_votes(node.public, *votes))
    assert {chr(key[0]) for key in world.store} == listed


def test_every_domain_stands_there() -> None:
    rows = {row[0] for row in table("domain")}
    assert rows == {
        blocks.PROPOSAL_DOMAIN,
        blocks.VOTE_DOMAIN,
        blocks.BEACON_DOMAIN,
        transactions.DOMAIN,
        transactions.REGISTER_DOMAIN,
        transactions.DIAL_DOMAIN,
    }
    assert crypto.signing_bytes("x", b"I", b"M") == b"tdmld\0x\0IM"
    assert '`"tdmld" ‖ 00 ‖ domain ‖ 00 ‖ chain id ‖ message`' in SPEC


def test_rules_are_numbered_without_gaps_and_once() -> None:
    assert RULES
    numbers: dict[str, list[int]] = {}
    for rule in RULES:
        group, _, number = rule.rpartition("-")
        numbers.setdefault(group, []).append(int(number))
    for group, found in numbers.items():
        assert found == list(range(1, len(found) + 1)), group


def test_rules_that_are_cited_exist() -> None:
    names = set(RULES)
    outside = {"UTF-8", "SHA-256", "BLAKE3-256", "ED25519-SHA512"}
    for cited in set(re.findall(rf"\b({RULE})\b", SPEC)) - outside:
        assert cited in names, cited
    for path in VECTORS:
        for cited in re.findall(rf'"({RULE})"', path.read_text()):
            assert cited in names, f"{path.name}: {cited}"


@pytest.mark.parametrize(
    ("module", "letter", "last"), [(consensus, "S", 11), (pacing, "P", 8), (validator, "N", 9)]
)
def test_rules_with_names_from_the_code_are_still_there(
    module: ModuleType, letter: str, last: int
) -> None:
    assert module.__doc__ is not None
    found = re.findall(rf"^  {letter}(\d+) ", module.__doc__, re.M)
    assert [int(number) for number in found] == list(range(1, last + 1))
    assert f"{letter}{last}" in SPEC


def test_constants_of_consensus_are_those_of_the_page() -> None:
    assert f"With {consensus.MAX_DEPTH} notarized views" in SPEC
    assert f"at most {consensus.MAX_VARIANTS} blocks a validator" in SPEC
    assert f"to {consensus.AHEAD} views ahead" in SPEC
    assert f"sum to at most {leader.MAX_PERIOD}" in SPEC
    assert validator.MAX_FUTURE_MS == 10_000
    assert "10 s ahead of their clocks" in SPEC
    assert f"1 to {genesis.VALIDATORS_MAX};" in SPEC
    assert f"at most {genesis.GENESIS_BYTES_MAX >> 20} MiB" in SPEC
    assert export.FORMAT in SPEC


_NAMES = {  # what the code calls it -> what the page calls it
    "limits.MATCH_TRIES": "MATCH_TRIES",
    "found.slot": "slot",
    "entry.slot": "slot",
    "segment": "committed",  # jobs.stall
    "run.parameters.segment_window": "segment_window",
    "job.deadline": "deadline",
    "audit.attempt": "attempt",
    "number": "segment",
    "min(slot, other_slot)": "lower slot",
    "max(slot, other_slot)": "higher slot",
    "entry.segment": "segment",
    "sworn.segment": "segment",
    "party": "slot",
}


def texts(module: ModuleType) -> set[str]:
    """What the module writes into `detail` and `note`, with the page's names in the holes."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        values: list[ast.expr] = []
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "detail":
            values = [node.value]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "refund",
            "end",
            "_go_on",
            "_no_verdict",
        ):
            values = [a for a in node.args if isinstance(a, ast.Constant | ast.JoinedStr)]
        for value in values:
            parts = value.values if isinstance(value, ast.JoinedStr) else [value]
            text = ""
            for part in parts:
                if isinstance(part, ast.FormattedValue):
                    name = ast.unparse(part.value)
                    text += f"{{{_NAMES.get(name, name)}}}"
                else:
                    assert isinstance(part, ast.Constant)
                    text += str(part.value)
            found.add(text)
    return found


@pytest.mark.parametrize("module", [market, jobs, segments, audits], ids=lambda m: m.__name__)
def test_every_text_that_stands_in_the_state_stands_there(module: ModuleType) -> None:
    found = texts(module)
    assert found
    for text in found:
        assert f"`{text}`" in SPEC, text


def test_the_export_has_the_fields_that_the_page_names() -> None:
    part = SPEC.partition("## 16 Export")[2].partition("## 17")[0]
    named = set(re.findall(r"`(\w+)`", part))
    source = inspect.getsource(export)
    written = set(re.findall(r'^ +"(\w+)":', source, re.M))
    assert written - named == {"line"}


def test_vectors_cite_rules_of_every_part() -> None:
    cited = {
        rule.partition("-")[0]
        for path in VECTORS
        for rule in re.findall(rf'"({RULE})"', path.read_text())
    }
    elsewhere = {"EXPORT", "BEACON", "HIST", "PROOF", "SNAP"}
    assert cited >= {rule.partition("-")[0] for rule in RULES} - elsewhere
    assert all(json.loads(path.read_text()) for path in VECTORS)
