"""Real daemons: a node begins with another's state, and a proof is checked without any node."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdmld import devnet
from tdmld.chain.light import read_bundle

pytestmark = pytest.mark.e2e


def tdmld(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tdmld", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def height(data_dir: Path) -> int:
    """The command takes its time: asking again is no busy loop."""
    asked = tdmld("chain", "head", "--json", "--data-dir", data_dir)
    assert asked.returncode == 0, asked.stderr
    found: int = json.loads(asked.stdout)["height"]
    return found


def test_a_daemon_joins_by_snapshot_and_gives_proofs(tmp_path: Path) -> None:
    network = devnet.make_network(
        tmp_path / "network",
        nodes=2,
        validators=1,
        asks=[],
        parameters={"heartbeat_ms": 500, "epoch_blocks": 2},
    )
    genesis = network.data_dir(0) / "genesis.json"
    owner, proof = network.nodes[0].owner, tmp_path / "proof"
    deadline = time.monotonic() + 60
    with network:
        network.start(0)
        network.wait_ready([0])
        while height(network.data_dir(0)) < 6:  # some epochs
            assert time.monotonic() < deadline
        network.start(1, "--sync", "snapshot")
        network.wait_ready([1])
        assert "began with" in (network.data_dir(1) / "logs" / "daemon.jsonl").read_text()
        where = ("--data-dir", network.data_dir(1))
        fetched = tdmld("light", "fetch", "account", owner, "--out", proof, *where)
        assert fetched.returncode == 0, fetched.stderr
    checked = tdmld("light", "verify", proof, f"account/{owner}", "--genesis", genesis)
    assert checked.returncode == 0, checked.stderr
    assert f"proven: {owner} has 1000000000" in checked.stdout
    assert len(read_bundle(proof.read_bytes()).turns) > 0
    raw = bytearray(proof.read_bytes())
    raw[len(raw) // 2] ^= 1
    proof.write_bytes(raw)
    assert tdmld("light", "verify", proof, "--genesis", genesis).returncode == 5
