"""The network's files, and its processes: found again, stopped, killed, never a stranger."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdmld import keys, processes
from tdmld.chain.genesis import validators
from tdmld.cli import main
from tdmld.config import load_config
from tdmld.devnet import RECORD_FILE, Devnet, make_network
from tdmld.errors import UserError

FAKE = (sys.executable, str(Path(__file__).with_name("fake_node.py")))


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Devnet]:
    with make_network(tmp_path / "net", nodes=2, validators=1) as made:
        made.program = FAKE
        yield made


def test_a_network_has_one_genesis_and_many_owners(tmp_path: Path) -> None:
    made = make_network(
        tmp_path / "net",
        nodes=4,
        validators=3,
        asks=[1, 2],
        parameters={"interval_ms": 100},
        settings={"log_level": "debug"},
        node_settings={2: {"ask.price": 7, "launcher": ["nice"]}},
    )
    assert len({made.data_dir(i).joinpath("genesis.json").read_bytes() for i in range(4)}) == 1
    genesis = made.genesis()
    assert genesis.parameters.interval_ms == 100
    assert len(validators(genesis)) == 3
    assert len({node.owner for node in made.nodes}) == 4
    configs = [load_config(made.data_dir(i), {}, {}) for i in range(4)]
    assert [c.ask.enabled for c in configs] == [False, True, True, False]
    assert (configs[2].ask.price, configs[2].launcher) == (7, ("nice",))
    assert {c.log_level for c in configs} == {"debug"}
    ports = [n.port for n in made.nodes] + [n.carrier_port for n in made.nodes]
    ports += [n.rpc_port for n in made.nodes]
    assert len(set(ports)) == 12
    for index, node in enumerate(made.nodes):
        assert keys.load_node_key(made.data_dir(index) / keys.NODE_KEY).address == node.node
        assert made.owner_key(index).address == node.owner
        assert made.password_file(index).stat().st_mode & 0o777 == 0o600
        others = {n.node for n in made.nodes if n is not node}
        assert {peer for peer, _ in configs[index].bootstrap()} == others


def test_a_network_can_be_opened_again(tmp_path: Path) -> None:
    made = make_network(tmp_path / "net", nodes=2, validators=2)
    assert Devnet.open(tmp_path / "net").nodes == made.nodes
    with pytest.raises(UserError, match="is not empty"):
        make_network(tmp_path / "net")
    with pytest.raises(UserError, match="there is no network"):
        Devnet.open(tmp_path)


@pytest.mark.parametrize(("nodes", "count"), [(1, 2), (0, 0), (2, 0), (1000, 1)])
def test_numbers_that_make_no_network(tmp_path: Path, nodes: int, count: int) -> None:
    with pytest.raises(UserError, match="make no network"):
        make_network(tmp_path / "net", nodes=nodes, validators=count)


def test_nodes_start_once_become_ready_and_stop(network: Devnet) -> None:
    assert network.start_all() == [0, 1]
    assert network.start_all() == []
    network.wait_ready(timeout_seconds=20)
    again = Devnet.open(network.directory)
    assert again.process(1) == network.process(1)
    assert network.stop(0) == "stopped"
    assert not network.ready(0)
    assert network.ready(1)
    network.kill(1)
    assert network.process(1) is None
    assert network.start(1)
    network.wait_ready([1], timeout_seconds=20)
    assert network.down() == {"node0": "gone", "node1": "stopped"}


def test_who_does_not_listen_is_killed(network: Devnet) -> None:
    network.start(0, "--stubborn")
    network.wait_ready([0], timeout_seconds=20)
    assert network.down(grace_seconds=0.2) == {"node0": "killed", "node1": "gone"}


def test_a_node_that_ends_is_reported_with_its_words(network: Devnet) -> None:
    network.start(0, "--broken")
    with pytest.raises(UserError, match=r"node0 ended(.|\n)*the database is corrupt"):
        network.wait_ready([0], timeout_seconds=20)


def test_waiting_has_an_end(network: Devnet) -> None:
    network.start(0)
    network.start(1)
    with pytest.raises(UserError, match="not ready after 0 s") as caught:
        network.wait_ready(timeout_seconds=0)
    assert caught.value.exit_code == 6


def test_a_stranger_with_the_same_id_is_left_alone(network: Devnet) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        record = network.data_dir(0) / RECORD_FILE
        record.write_text(json.dumps({"pid": stranger.pid, "started": "1"}))
        assert network.process(0) is None
        assert network.stop(0) == "gone"
        assert processes.stop(processes.Process(stranger.pid, "1"), 0.0) == "gone"
        processes.kill(processes.Process(stranger.pid, "1"), session=True)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.communicate()


@pytest.mark.parametrize("text", ["", "{}", '{"pid": "x", "started": 1}', "[1]", "x" * 5000])
def test_a_damaged_record_names_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "record").write_text(text)
    assert processes.recorded(tmp_path / "record") is None


def test_a_process_is_told_by_its_start() -> None:
    mark = processes.start_mark(os.getpid())
    assert mark
    assert processes.Process(os.getpid(), mark).alive
    assert not processes.Process(os.getpid(), mark + "0").alive
    assert processes.start_mark(2**22 + 1) is None


def test_down_and_status_by_command(network: Devnet, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--directory", str(network.directory)]
    network.start_all()
    network.wait_ready(timeout_seconds=20)
    assert main(["devnet", "status", *place, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["nodes"]
    assert [(row["name"], row["state"]) for row in rows] == [("node0", "ready"), ("node1", "ready")]
    assert main(["devnet", "down", *place]) == 0
    assert "node1  stopped" in capsys.readouterr().out
    assert main(["devnet", "status", *place]) == 1
    assert "down" in capsys.readouterr().out


def test_status_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devnet", "status", "--directory", str(tmp_path)]) == 4
    assert "tdmld devnet up" in capsys.readouterr().err


def test_up_with_other_numbers_is_refused(
    network: Devnet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devnet", "up", "--directory", str(network.directory), "--nodes", "5"]) == 2
    assert "has 2 nodes" in capsys.readouterr().err
