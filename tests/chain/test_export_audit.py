"""An export convinces an auditor that knows the specification only, and no forgery of it does."""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdmld.chain.genesis import genesis_bytes
from tdmld.node.chainerrors import StoreCorrupt, StoreError, StoreLocked
from tdmld.node.export import Exported, export_ledger
from tests.chain.chainworld import ChainWorld, live_through_a_job
from tests.chain.second import auditor
from tests.chain.second.auditor import Refused, audit, state_root
from tests.chain.second.executor import replay

Path_ = tuple[str | int, ...]
UNPROTECTED = {"reason"}
"""Words for people: nothing commits to them (FEE-5)."""


def make_node(directory: Path) -> ChainWorld:
    """A node's directory with a chain in it; close the world before it is exported."""
    world = ChainWorld(directory / "chain")
    (directory / "genesis.json").write_bytes(genesis_bytes(world.genesis))
    live_through_a_job(world)
    return world


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("node")
    make_node(directory).close()
    return directory


@pytest.fixture(scope="module")
def exported(node: Path) -> Exported:
    return export_ledger(node, node / "chain.jsonl")


@pytest.fixture(scope="module")
def lines(node: Path, exported: Exported) -> list[bytes]:
    return (node / "chain.jsonl").read_bytes().splitlines(keepends=True)


# ---- what is true --------------------------------------------------------------------------------


def test_an_honest_export_passes(lines: list[bytes], exported: Exported) -> None:
    report = audit(lines, exported.chain_id.hex())
    assert report.height == report.final == exported.height > 25
    assert report.vouched
    assert report.transactions == exported.transactions > 50
    assert report.entries == exported.entries
    assert report.supply == exported.counted == exported.recorded
    assert exported.conserved
    blocks = [row for row in map(json.loads, lines) if row["line"] == "block"]
    kinds = {one["kind"] for block in blocks for one in block["transactions"]}
    assert kinds >= {"transfer", "register", "offer", "commit", "audit_open", "fetched"}
    assert hashlib.sha256(b"".join(lines)).digest() == exported.sha256
    assert sum(map(len, lines)) == exported.size


def test_executing_the_blocks_gives_every_state_and_every_receipt(lines: list[bytes]) -> None:
    last = json.loads(lines[-1])
    assert state_root(replay(lines).state).hex() == last["state_root"]


def test_the_auditor_knows_nothing_of_the_node() -> None:
    sources = sorted(Path(auditor.__file__).parent.glob("*.py"))
    assert len(sources) == 14
    imported = {
        name
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    foreign = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    own = {f"tests.chain.second.{source.stem}" for source in sources}
    assert foreign - own == {"nacl", "nacl.exceptions", "blake3"}


def test_two_nodes_and_two_exports_write_the_same_bytes(
    node: Path, lines: list[bytes], tmp_path: Path
) -> None:
    export_ledger(node, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"".join(lines)
    make_node(tmp_path).close()
    export_ledger(tmp_path, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"".join(lines)


def test_the_chain_must_be_the_one_that_was_asked_for(lines: list[bytes]) -> None:
    with pytest.raises(Refused, match="not 00"):
        audit(lines, "00" * 32)


# ---- accidents -----------------------------------------------------------------------------------


def test_one_flipped_byte_in_any_line_is_noticed(lines: list[bytes]) -> None:
    for number, line in enumerate(lines):
        at = (number * 7919) % len(line)
        broken = line[:at] + bytes((line[at] ^ 1,)) + line[at + 1 :]
        with pytest.raises(Refused):
            audit([*lines[:number], broken, *lines[number + 1 :]])


# ---- forgers, who mend the digest ----------------------------------------------------------------


def seal(rows: list[dict[str, Any]]) -> list[bytes]:
    """The lines with a digest that fits."""
    raws = [auditor.canonical(row) + b"\n" for row in rows[:-1]]
    end = {**rows[-1], "sha256": hashlib.sha256(b"".join(raws)).hexdigest()}
    return [*raws, auditor.canonical(end) + b"\n"]


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every number and text inside, with the way to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    elif value is not None and value != "":
        yield path, value


def changed(value: Any) -> Any:
    """Another value of the same look."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    swap = {"0": "1", "a": "b", "1": "0", "b": "a"}
    return value[:-1] + swap.get(value[-1], "0")


def with_leaf(row: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    copy: Any = json.loads(json.dumps(row))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return dict(copy)


def chosen(rows: list[dict[str, Any]]) -> Iterator[int]:
    """Lines of every kind: genesis, a block with a certificate and much in it, one without, an
    entry of each letter, the end."""
    yield 0
    blocks = [n for n, row in enumerate(rows) if row["line"] == "block"]
    for sealed in (True, False):
        fit = [n for n in blocks if (rows[n]["certificate"] is not None) is sealed]
        yield max(fit, key=lambda n: len({one["kind"] for one in rows[n]["transactions"]}))
    seen = set()
    for number, row in enumerate(rows):
        if row["line"] == "state" and row["key"][:2] not in seen:
            seen.add(row["key"][:2])
            yield number
    yield len(rows) - 1


def first_of_kind(block: dict[str, Any]) -> set[int]:
    """Places of the first transaction of each kind."""
    kinds = [one["kind"] for one in block["transactions"]]
    return {kinds.index(kind) for kind in kinds}


def test_no_field_of_any_kind_of_line_can_be_changed(lines: list[bytes]) -> None:
    rows = [json.loads(line) for line in lines]
    tried = 0
    for number in chosen(rows):
        for path, value in leaves(rows[number]):
            if path[-1] in UNPROTECTED or (path == ("sha256",) and number == len(rows) - 1):
                continue
            if (
                path[0] == "transactions"
                and path[1:]
                and path[1] not in first_of_kind(rows[number])
            ):
                continue
            forged = with_leaf(rows[number], path, changed(value))
            tried += 1
            try:
                audit(seal([*rows[:number], forged, *rows[number + 1 :]]))
            except Refused:
                continue
            pytest.fail(f"line {number}: {path} was {value}, and nobody noticed")
    assert tried > 200


@pytest.mark.parametrize("kind", ["block", "state"])
def test_no_line_can_be_left_out_doubled_or_moved(lines: list[bytes], kind: str) -> None:
    rows = [json.loads(line) for line in lines]
    numbers = [n for n, row in enumerate(rows) if row["line"] == kind]
    for number in (numbers[0], numbers[len(numbers) // 2], numbers[-1]):
        others = [*rows[:number], *rows[number + 1 :]]
        for forged in (
            others,
            [*rows[:number], rows[number], *rows[number:]],
            [*others[: number - 1], rows[number], *others[number - 1 :]],
        ):
            with pytest.raises(Refused):
                audit(seal(forged))


def test_another_state_convinces_only_where_no_header_names_it(lines: list[bytes]) -> None:
    """Money is moved and every sum mended: the last header still names the true state."""
    rows = [json.loads(line) for line in lines]
    accounts = [n for n, row in enumerate(rows) if row.get("key", "").startswith("61")]
    for number, more in zip(accounts[:2], (5, -5), strict=True):
        account = auditor.unpack(bytes.fromhex(rows[number]["value"]))
        account[0] += more
        rows[number]["value"] = auditor.pack(account).hex()
    state = {
        bytes.fromhex(row["key"]): bytes.fromhex(row["value"])
        for row in rows
        if row["line"] == "state"
    }
    root = auditor.state_root(state).hex()
    last = next(row for row in reversed(rows) if row["line"] == "block")
    rows[-1]["state_root"] = last["state_root"] = root
    assert not audit(seal(rows)).vouched
    with pytest.raises(Refused, match="gives the state"):
        replay(seal(rows))


def test_a_forged_receipt_contradicts_the_history(lines: list[bytes]) -> None:
    """HIST-3: a later header vouches for every `ok`, whatever else is mended."""
    rows = [json.loads(line) for line in lines]
    blocks = [row for row in rows if row["line"] == "block"]
    block = next(row for row in blocks if row["transactions"])
    assert block["height"] <= blocks[-1]["header"]["state_height"]
    block["transactions"][0] |= {"ok": False, "reason": "no"}
    with pytest.raises(Refused, match=f"the history up to {block['height']}"):
        audit(seal(rows))
    with pytest.raises(Refused, match="receipts"):
        replay(seal(rows))


# ---- the exporter --------------------------------------------------------------------------------


def test_a_running_node_is_not_exported(tmp_path: Path) -> None:
    world = make_node(tmp_path)
    with pytest.raises(StoreLocked):
        export_ledger(tmp_path, tmp_path / "out")
    world.close()
    assert not list(tmp_path.glob("*out*"))


def test_a_directory_without_a_chain_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="never run"):
        export_ledger(tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_chain_with_a_hole_gives_no_file(tmp_path: Path) -> None:
    world = make_node(tmp_path)
    world.chain._db.delete(b"b" + (7).to_bytes(8, "big"))
    world.close()
    with pytest.raises(StoreCorrupt, match="block 7 is missing"):
        export_ledger(tmp_path, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_database_of_before_outcomes_were_kept_says_so(tmp_path: Path) -> None:
    world = make_node(tmp_path)
    world.chain._db.delete(b"e" + (1).to_bytes(8, "big"))
    world.close()
    with pytest.raises(StoreCorrupt, match="older version"):
        export_ledger(tmp_path, tmp_path / "out")


def test_sums_that_do_not_agree_are_told_and_still_exported(tmp_path: Path) -> None:
    world = make_node(tmp_path)
    key = next(key for key, _ in world.chain.state_items() if key[:1] == b"a")
    account = auditor.unpack(world.chain.get(key) or b"")
    account[0] += 1
    world.chain._db.put(b"s" + key, auditor.pack(account))
    world.close()
    found = export_ledger(tmp_path, tmp_path / "out")
    assert not found.conserved
    assert found.counted["balances"] == found.recorded["balances"] + 1
    with pytest.raises(Refused):
        audit((tmp_path / "out").read_bytes().splitlines(keepends=True))
