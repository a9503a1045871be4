"""An export over epochs: its auditor follows the validators from genesis to the last one, by the
headers (section 17, point 2) and by executing the blocks (point 8)."""

import json
from typing import Any

import pytest

from tdmld.chain.blocks import Kind, sign_vote
from tdmld.chain.genesis import genesis_bytes
from tdmld.node.export import export_ledger
from tests.chain.chainworld import EPOCH, ChainWorld, epochs_genesis, live_through_epochs
from tests.chain.second import executor
from tests.chain.second.auditor import audit
from tests.chain.second.committees import VIEWS, table
from tests.chain.second.executor import replay
from tests.chain.second.formats import H, Refused, pack, unpack
from tests.chain.second.trees import state_root
from tests.chain.test_export_audit import seal
from tests.chain.world import node_key

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("node")
    world = ChainWorld(directory / "chain", epochs_genesis())
    (directory / "genesis.json").write_bytes(genesis_bytes(world.genesis))
    live_through_epochs(world)
    world.close()
    export_ledger(directory, directory / "out")
    return (directory / "out").read_bytes().splitlines(keepends=True)


@pytest.fixture
def rows(lines: list[bytes]) -> Rows:
    return [json.loads(line) for line in lines]


def block(rows: Rows, height: int) -> dict[str, Any]:
    return next(row for row in rows if row["line"] == "block" and row["height"] == height)


def set_of(rows: Rows, epoch: int) -> dict[str, Any]:
    key = (b"v" + epoch.to_bytes(8, "big")).hex()
    return next(row for row in rows if row.get("key") == key)


def test_the_export_passes_and_its_blocks_elect_who_the_headers_name(lines: list[bytes]) -> None:
    report = audit(lines)
    assert report.height == report.final == 4 * EPOCH + 1
    assert report.vouched
    run = replay(lines)
    sets = [[(seat["node"], seat["leads"]) for seat in run.seats(epoch)] for epoch in range(6)]
    assert sets[0] == sets[1]
    assert (node_key(1).public, False) in sets[2], "jailed: it votes and does not lead"
    assert (node_key(1).public, True) in sets[3], "it has returned"
    assert (node_key(5).public, True) in sets[2], "the newcomer"
    assert node_key(2).public not in dict(sets[3]), "who voted twice"
    assert node_key(3).public not in dict(sets[2]), "who unbound"
    for epoch in range(5):
        header = block([json.loads(line) for line in lines], epoch * EPOCH + 1)["header"]
        assert header["validators"] == run.set_id(epoch).hex()
        assert header["next_validators"] == run.set_id(epoch + 1).hex()
    entries = {key[:1] for key in run.db}
    assert entries >= {b"v", b"e", b"x", b"w"}
    assert not entries & {b"b"}, "all that unbound was withdrawn"


def test_who_is_jailed_leads_no_view_and_still_votes(rows: Rows) -> None:
    seats = unpack(bytes.fromhex(set_of(rows, 2)["value"]))[1]
    leaders = table(tuple((weight, leads) for _, _, weight, leads in seats))
    idle = [index for index, seat in enumerate(seats) if not seat[3]]
    assert idle
    assert not set(idle) & set(leaders)
    second = [row for row in rows if row["line"] == "block" and row["height"] > 2 * EPOCH][:EPOCH]
    assert all(row["header"]["proposer"] != seats[idle[0]][0].hex() for row in second)
    certificates = [row["certificate"] for row in second if row["certificate"]]
    assert any(idle[0] == voter for found in certificates for voter, _ in found["signatures"])


@pytest.mark.parametrize("epoch", [1, 2, 4])
@pytest.mark.parametrize("change", ["weight", "leads", "seat"])
def test_no_other_set_of_validators_passes(rows: Rows, epoch: int, change: str) -> None:
    """The forger mends every root of the state that no header has named yet."""
    row = set_of(rows, epoch)
    number, seats = unpack(bytes.fromhex(row["value"]))
    if change == "weight":
        seats[0][2] += 1
    elif change == "leads":
        seats[0][3] = not seats[0][3]
    else:
        seats.pop()
    row["value"] = pack([number, seats]).hex()
    state = {
        bytes.fromhex(one["key"]): bytes.fromhex(one["value"])
        for one in rows
        if one["line"] == "state"
    }
    block(rows, 4 * EPOCH + 1)["state_root"] = rows[-1]["state_root"] = state_root(state).hex()
    with pytest.raises(Refused, match="validators"):
        audit(seal(rows))


def certify(rows: Rows, height: int, view: int) -> None:
    """Another certificate for a block, of `view`, by all who sat in the epoch of that view."""
    row = block(rows, height)
    seats = unpack(bytes.fromhex(set_of(rows, view // VIEWS)["value"]))[1]
    keys = {node_key(index).public: node_key(index) for index in range(20)}
    chain, name = bytes.fromhex(rows[0]["chain_id"]), bytes.fromhex(row["hash"])
    votes = [
        sign_vote(keys[seat[0]], chain, Kind.FINALIZE, view, name, index)
        for index, seat in enumerate(seats)
    ]
    signatures = [[vote.voter, vote.signature.hex()] for vote in votes]
    row["certificate"] = {
        "kind": 2,
        "view": view,
        "hash": row["hash"],
        "signatures": signatures,
    }


def test_the_last_block_of_an_epoch_may_be_final_by_a_later_view_of_it(rows: Rows) -> None:
    """EPOCH-6, BLK-12."""
    view = block(rows, 2 * EPOCH)["header"]["view"]
    certify(rows, 2 * EPOCH, view + 9)
    assert audit(seal(rows)).final == 4 * EPOCH + 1


@pytest.mark.parametrize(
    ("height", "later"), [(2 * EPOCH - 1, 9), (2 * EPOCH, VIEWS), (2 * EPOCH, -1)]
)
def test_no_other_block_is_and_in_no_other_view(rows: Rows, height: int, later: int) -> None:
    certify(rows, height, block(rows, height)["header"]["view"] + later)
    with pytest.raises(Refused, match=f"certificate of block {height}"):
        audit(seal(rows))


def test_an_epoch_begins_with_a_final_block_only(rows: Rows) -> None:
    block(rows, 2 * EPOCH)["certificate"] = None
    with pytest.raises(Refused, match=f"block {2 * EPOCH + 1}: its epoch has not begun"):
        audit(seal(rows))


def test_an_execution_that_elects_others_is_noticed(
    lines: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the state's roots alone: the headers name who was elected."""
    monkeypatch.setattr(executor, "state_root", lambda _: Named())
    replay(lines)
    monkeypatch.setattr(executor.Executor, "jail_absent", lambda *_: None)
    with pytest.raises(Refused, match=f"block {EPOCH + 1}: next_validators were not elected"):
        replay(lines)


class Named(bytes):
    """A root that equals every root."""

    def hex(self, *_: Any) -> Any:
        return self

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = bytes.__hash__


def test_the_header_commits_to_the_set_that_a_light_client_needs(rows: Rows) -> None:
    """EPOCH-2: the id of a set stands in every header of the epoch before it."""
    for height in range(EPOCH + 1, 2 * EPOCH + 1):
        named = block(rows, height)["header"]["next_validators"]
        assert named == H(bytes.fromhex(set_of(rows, 2)["value"])).hex()
