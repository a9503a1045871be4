"""What a real node does with what is wrong: a clear error, nothing harmed, the daemon alive."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from tdmld import devnet
from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import chain_id
from tdmld.chain.transactions import Transfer, sign_transaction
from tdmld.p2p import Host, PeerInfo, open_host
from tdmld.p2p.errors import P2PError
from tdmld.rpc.access import read_access

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "jobs" / "tiny.toml"

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[devnet.Devnet]:
    """One validator that runs, and one node that does not."""
    made = devnet.make_network(
        tmp_path_factory.mktemp("bad") / "network",
        nodes=2,
        validators=1,
        asks=[],
        balance=2_000_000,
    )
    with made:
        made.start(0)
        made.wait_ready([0])
        yield made
        assert made.ready(0), made.log_tail(0)


def tdmld(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tdmld", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def submit(network: devnet.Devnet, job: Path) -> subprocess.CompletedProcess[str]:
    where = ("--data-dir", network.data_dir(0), "--password-file", network.password_file(0))
    return tdmld("job", "submit", job, *where)


def job_with(tmp_path: Path, old: str, new: str) -> Path:
    text = TINY.read_text()
    assert old in text
    job = tmp_path / "job.toml"
    job.write_text(text.replace(old, new).replace("../../data", str(ROOT / "data")))
    (tmp_path / "config.json").write_text((TINY.parent / "config.json").read_text())
    return job


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ('family = "llama"', 'family = "mamba"', "family"),
        ("steps = 16", "steps = 15", "segment_steps"),
        ("cuts = [0, 1, 2]", "cuts = [0, 2, 1]", "cuts"),
        ('wire = "bf16"', 'wire = "fp8"', "wire"),
        ("seed = 7", "sed = 7", "sed"),
        ("state_every = 2", "state_every = 7", "state_every"),
    ],
)
def test_a_malformed_job_names_the_field(
    network: devnet.Devnet, tmp_path: Path, old: str, new: str, names: str
) -> None:
    done = submit(network, job_with(tmp_path, old, new))
    assert done.returncode == 2
    assert names in done.stderr
    assert "Traceback" not in done.stderr


def test_too_little_money_says_how_much_is_missing(network: devnet.Devnet, tmp_path: Path) -> None:
    job = job_with(tmp_path, "slot_price_max = 40000", "slot_price_max = 400000")
    done = submit(network, job)
    assert done.returncode == 5
    assert "missing" in done.stderr or "more" in done.stderr, done.stderr


def test_a_wrong_token_is_refused(network: devnet.Devnet, tmp_path: Path) -> None:
    url = read_access(network.data_dir(0)).url
    done = subprocess.run(
        [sys.executable, "-m", "tdmld", "status"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"TDMLD_API_INFO": f"wrong:{url}"},
    )
    assert done.returncode == 5
    assert "token" in done.stderr


def test_no_node_says_how_to_start_one(network: devnet.Devnet) -> None:
    done = tdmld("status", "--data-dir", network.data_dir(1))
    assert done.returncode == 3
    assert "tdmld run" in done.stderr


def test_a_transaction_of_another_chain_is_refused(network: devnet.Devnet) -> None:
    owner = network.owner_key(0)
    raw = sign_transaction(owner, bytes(32), Transfer(owner.public, 1), nonce=0, fee=10)
    access = read_access(network.data_dir(0))
    answer = httpx.post(
        access.url,
        headers={"authorization": f"Bearer {access.token}"},
        json={"jsonrpc": "2.0", "id": 1, "method": "chain_submit", "params": {"raw": raw.hex()}},
    ).json()
    assert "chain" in answer["error"]["message"]


def test_a_second_daemon_on_one_directory_is_refused(network: devnet.Devnet) -> None:
    done = tdmld("run", "--data-dir", network.data_dir(0))
    assert done.returncode != 0
    assert "another daemon runs" in done.stderr


def test_a_port_in_use_is_named(network: devnet.Devnet) -> None:
    taken = network.nodes[0]
    done = tdmld("run", "--data-dir", network.data_dir(1), "--rpc-listen", taken.rpc_url[7:])
    assert done.returncode != 0
    assert str(taken.rpc_port) in done.stderr
    listen = f"/ip4/127.0.0.1/tcp/{taken.port}"
    done = tdmld("run", "--data-dir", network.data_dir(1), "--listen", listen)
    assert done.returncode != 0
    assert str(taken.port) in done.stderr


def test_a_damaged_key_file_is_named(network: devnet.Devnet) -> None:
    path = network.data_dir(1) / "keys" / "node.key"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        done = tdmld("run", "--data-dir", network.data_dir(1))
    finally:
        path.write_bytes(whole)
    assert done.returncode != 0
    assert "node.key" in done.stderr


def test_a_damaged_database_is_named(network: devnet.Devnet) -> None:
    network.start(1)
    network.wait_ready([1])
    network.stop(1)
    chain = network.data_dir(1) / "chain"
    for file in [*chain.glob("*.log"), *chain.glob("*.sst"), *chain.glob("MANIFEST-*")]:
        file.write_bytes(b"\xff" * max(64, file.stat().st_size))
    done = tdmld("run", "--data-dir", network.data_dir(1))
    assert done.returncode != 0
    assert str(chain) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_said_at_the_start(network: devnet.Devnet, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        (small / "keys").mkdir(mode=0o700)
        for name in ("genesis.json", "tdmld.toml", "keys/node.key"):
            (small / name).write_bytes((network.data_dir(1) / name).read_bytes())
        (small / "keys" / "node.key").chmod(0o600)
        done = tdmld("run", "--data-dir", small)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert done.returncode != 0
    assert "full" in done.stderr


async def test_hostile_messages_close_their_stream_and_nothing_else(
    network: devnet.Devnet,
) -> None:
    short = chain_id(network.genesis()).hex()[:8]
    target = network.nodes[0]
    async with open_host(KeyPair(os.urandom(32)).seed) as host:
        host.add_peer(PeerInfo(target.node, (f"/ip4/127.0.0.1/tcp/{target.port}",)))
        for protocol in ("consensus", "sync", "peers"):
            for garbage in (b"", b"\xc1" * 100, os.urandom(1 << 16), bytes(40 << 20)):
                with trio.move_on_after(5):
                    await _send(host, target.node, f"/tdmld/{short}/{protocol}/1", garbage)
        with pytest.raises(P2PError):
            await host.open_stream(target.node, "/tdmld/00000000/sync/1")
    done = tdmld("status", "--data-dir", network.data_dir(0), "--json")
    assert json.loads(done.stdout)["node"] == target.node


async def _send(host: Host, peer: str, protocol: str, garbage: bytes) -> None:
    try:
        async with await host.open_stream(peer, protocol) as stream:
            await stream.send(garbage)
            await stream.receive(1 << 20)
    except P2PError:
        return
