"""`tdmld chain`: the running node's chain by RPC, a stopped node's as a file."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdmld.chain.genesis import genesis_bytes
from tdmld.cli import main
from tdmld.cli.exits import Exit
from tdmld.rpc.access import TOKEN_FILE, URL_FILE
from tests.chain.chainworld import ChainWorld, live_through_a_job
from tests.chain.second.auditor import audit, pack, unpack
from tests.rpc.conftest import serving_in_a_thread
from tests.rpc.fake import FakeBackend


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The data directory of a running node."""
    monkeypatch.delenv("TDMLD_API_INFO", raising=False)
    (tmp_path / "run").mkdir()
    with serving_in_a_thread(FakeBackend()) as running:
        (tmp_path / TOKEN_FILE).write_text("admin\n")
        (tmp_path / URL_FILE).write_text(running.server.url + "\n")
        yield tmp_path


def test_head_block_and_validators_of_a_running_node(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--data-dir", str(node)]
    assert main(["chain", "head", *place, "--json"]) == Exit.OK
    head = json.loads(capsys.readouterr().out)
    assert main(["chain", "head", *place]) == Exit.OK
    assert f"height {head['height']:,}" in capsys.readouterr().out
    assert main(["chain", "block", "2", *place, "--json"]) == Exit.OK
    block = json.loads(capsys.readouterr().out)
    assert block["height"] == 2
    assert main(["chain", "block", "2", *place]) == Exit.OK
    assert block["hash"] in capsys.readouterr().out
    assert main(["chain", "validators", *place, "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    weights = [int(validator["weight"]) for validator in found["validators"]]
    assert int(found["quorum"]) == sum(weights) * 2 // 3 + 1
    assert found["epoch"] == 2
    assert [(one["leads"], one["jailed"]) for one in found["validators"]] == [
        (True, 0),
        (False, 1000),
    ]
    assert main(["chain", "validators", *place]) == Exit.OK
    shown = capsys.readouterr().out
    assert "epoch 2" in shown
    assert "decide; as of height" in shown
    assert "at height 1,000" in shown


def test_validators_of_the_next_epoch_and_of_one_that_nobody_knows(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--data-dir", str(node)]
    assert main(["chain", "validators", "--epoch", "3", *place]) == Exit.OK
    assert "epoch 3, blocks 1,501 to 2,000" in capsys.readouterr().out
    assert main(["chain", "validators", "--epoch", "9", *place]) == Exit.NOT_FOUND
    assert "epoch 9" in capsys.readouterr().err


def test_heights_that_cannot_be(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--data-dir", str(node)]
    assert main(["chain", "block", "-1", *place]) == Exit.USAGE
    assert main(["chain", "block", str(2**60), *place]) == Exit.USAGE
    assert main(["chain", "block", "999", *place]) == Exit.NOT_FOUND
    assert "tdmld chain head" in capsys.readouterr().err


def make_node(directory: Path) -> ChainWorld:
    world = ChainWorld(directory / "chain")
    (directory / "genesis.json").write_bytes(genesis_bytes(world.genesis))
    live_through_a_job(world)
    return world


def test_a_stopped_nodes_chain_becomes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_node(tmp_path).close()
    out = tmp_path / "chain.jsonl"
    arguments = ["chain", "export", "--data-dir", str(tmp_path), "--out", str(out)]
    assert main([*arguments, "--json"]) == Exit.OK
    told = json.loads(capsys.readouterr().out)
    report = audit(out.read_bytes().splitlines(keepends=True), told["chain_id"])
    assert (report.height, report.transactions) == (told["height"], told["transactions"])
    assert told["supply_conserved"] is True
    assert told["supply"] == {place: str(amount) for place, amount in report.supply.items()}
    assert main(arguments) == Exit.OK
    assert f"{told['state_root']}" in capsys.readouterr().out


def test_a_running_nodes_chain_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_node(tmp_path)
    arguments = ["chain", "export", "--data-dir", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main(arguments) == Exit.FAILED
    told = capsys.readouterr().err
    assert "is running" in told
    assert "stop it" in told
    world.close()


def test_nor_does_a_directory_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chain", "export", "--data-dir", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main(arguments) == Exit.FAILED
    assert "has never run" in capsys.readouterr().err


def test_sums_that_do_not_agree_are_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_node(tmp_path)
    key = next(key for key, _ in world.chain.state_items() if key[:1] == b"a")
    account = unpack(world.chain.get(key) or b"")
    world.chain._db.put(b"s" + key, pack([account[0] + 1, *account[1:]]))
    world.close()
    arguments = ["chain", "export", "--data-dir", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main(arguments) == Exit.FAILED
    assert "DO NOT AGREE" in capsys.readouterr().out
