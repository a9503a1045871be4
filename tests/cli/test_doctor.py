"""`tdmld doctor`: each thing that can be wrong has a line with its remedy."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tdmld import keys
from tdmld.chain.genesis import genesis_bytes
from tdmld.cli import doctorchecks, main
from tdmld.cli.exits import Exit
from tdmld.rpc.access import TOKEN_FILE, URL_FILE
from tdmld.rpc.reachtypes import NetReachability, ProcessReach, RouterInfo, TrialInfo
from tdmld.rpc.types import NodeStatus
from tests.chain.world import make_genesis
from tests.rpc.conftest import serving_in_a_thread
from tests.rpc.fake import REACHABILITY, FakeBackend, node_status

CLOSED = ProcessReach(
    state="closed", listening=("/ip4/0.0.0.0/tcp/4002",), announced=(), relayed=()
)
NO = TrialInfo(reached=False, why="Connection refused")


class Reachable(FakeBackend):
    """A node whose reachability a test sets."""

    reachability: NetReachability = REACHABILITY
    refreshed: bool | None = None

    async def net_reachability(self, refresh: bool = False) -> NetReachability:
        self.refreshed = refresh
        return self.reachability


class Patient:
    """A person at a node's directory."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self._capsys = directory, capsys

    def __call__(self, *arguments: str, expect: int = Exit.OK) -> str:
        code = main(["doctor", "--data-dir", str(self.directory), *arguments])
        out, err = self._capsys.readouterr()
        assert code == expect, out + err
        return str(out)

    def checks(self, *, expect: int = Exit.OK) -> dict[str, Any]:
        document = json.loads(self("--json", expect=expect))
        assert document["ok"] is (expect == Exit.OK)
        return {check["what"]: check for check in document["checks"]}

    def settings(self, text: str) -> None:
        (self.directory / "tdmld.toml").write_text(text)


@pytest.fixture
def patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Patient:
    """A sound node that does not run."""
    monkeypatch.delenv("TDMLD_API_INFO", raising=False)
    directory = tmp_path / "node"
    (directory / "run").mkdir(parents=True)
    (directory / "keys").mkdir()
    (directory / "genesis.json").write_bytes(genesis_bytes(make_genesis()))
    keys.create_node_key(directory / "keys" / "node.key")
    found = Patient(directory, capsys)
    found.settings('listen = ["/ip4/0.0.0.0/tcp/4001"]\ncarrier_listen = "/ip4/0.0.0.0/tcp/4002"\n')
    return found


@pytest.fixture
def backend() -> Reachable:
    return Reachable()


@pytest.fixture
def running(patient: Patient, backend: Reachable) -> Iterator[Patient]:
    """The same node, which runs."""
    with serving_in_a_thread(backend) as served:
        (patient.directory / TOKEN_FILE).write_text("admin\n")
        (patient.directory / URL_FILE).write_text(served.server.url + "\n")
        yield patient


# a node that does not run ------------------------------------------------------------------------


def test_a_sound_node_that_does_not_run_is_told_how_to_start(patient: Patient) -> None:
    found = patient.checks(expect=Exit.UNREACHABLE)
    assert {check["state"] for check in found.values()} == {"ok", "warn"}
    assert found["node"]["next"] == f"tdmld run --data-dir {patient.directory}"


def test_no_directory(patient: Patient) -> None:
    patient.directory = patient.directory / "missing"
    shown = patient(expect=Exit.FAILED)
    assert "FAIL  data directory" in shown
    assert f"tdmld init --data-dir {patient.directory}" in shown


def test_a_missing_genesis_and_an_open_key_file(patient: Patient) -> None:
    (patient.directory / "genesis.json").unlink()
    (patient.directory / "keys" / "node.key").chmod(0o644)
    found = patient.checks(expect=Exit.FAILED)
    assert found["genesis"]["state"] == found["node key"]["state"] == "fail"
    assert "chmod 600" in found["node key"]["next"]


def test_a_wrong_setting_is_named(patient: Patient) -> None:
    patient.settings("lisen = 3")
    found = patient.checks(expect=Exit.FAILED)["configuration"]
    assert "lisen" in found["why"]
    assert "did you mean listen" in found["next"]


def test_loopback_only_says_what_to_set(patient: Patient) -> None:
    patient.settings("")
    found = patient.checks(expect=Exit.UNREACHABLE)["daemon listens"]
    assert found["state"] == "warn"
    assert 'listen = ["/ip4/0.0.0.0/tcp/4001"]' in found["next"]


def test_a_port_that_changes_cannot_be_forwarded(patient: Patient) -> None:
    patient.settings('listen = ["/ip4/0.0.0.0/tcp/0"]')
    found = patient.checks(expect=Exit.UNREACHABLE)["daemon listens"]
    assert "another port at every start" in found["why"]


def test_a_port_that_another_program_has(patient: Patient) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        patient.settings(f'rpc_listen = "127.0.0.1:{port}"')
        found = patient.checks(expect=Exit.FAILED)[f"port {port}"]
        assert "another program listens there" in found["why"]
        assert "ss -ltnp" in found["next"]


@pytest.mark.parametrize(("free", "state"), [(1 << 20, "fail"), (1 << 30, "warn"), (1 << 40, "ok")])
def test_disk_space(free: int, state: str) -> None:
    assert doctorchecks.disk(free, Path("/x")).state == state


# a node that runs --------------------------------------------------------------------------------


def test_a_healthy_node_is_well(running: Patient, backend: Reachable) -> None:
    shown = running()
    assert "FAIL" not in shown
    assert "warn" not in shown
    assert "reached at /ip4/203.0.113.7/tcp/4002" in shown
    assert "there is a router between" in shown
    assert "forwards /ip4/203.0.113.7/tcp/4002" in shown
    assert backend.refreshed is True
    running("--no-refresh")
    assert backend.refreshed is False


def change(backend: Reachable, **changes: object) -> None:
    backend.reachability = msgspec.structs.replace(REACHABILITY, **changes)


def test_a_node_behind_a_router_is_told_which_ports_to_open(
    running: Patient, backend: Reachable
) -> None:
    witness = msgspec.structs.replace(REACHABILITY.witnesses[0], carrier=NO)
    change(
        backend,
        carrier=CLOSED,
        witnesses=(witness,),
        router=RouterInfo(state="failed", why="no router answers to UPnP on this network"),
        open_receipts=0,
    )
    found = running.checks()
    assert found["carrier can be dialled"]["state"] == "warn"
    assert "4002" in found["carrier can be dialled"]["next"]
    assert found["router (UPnP)"]["state"] == "warn"
    assert found["reached through relays"]["state"] == "warn"
    assert "standby and audits only" in found["receipts for work"]["why"]
    (trial,) = [check for what, check in found.items() if what.startswith("carrier from")]
    assert (trial["state"], trial["why"]) == ("warn", "Connection refused")


def test_a_node_behind_relays_and_holes(running: Patient, backend: Reachable) -> None:
    relayed = msgspec.structs.replace(CLOSED, relayed=("/ip4/1.2.3.4/tcp/1/p2p/x/p2p-circuit",))
    change(
        backend, carrier=relayed, open_receipts=0, pair_receipts=1, carriers_relayed=1, punched=2
    )
    found = running.checks()
    assert found["reached through relays"]["state"] == "ok"
    assert "4 of 5 connections are direct, 2 holes were punched" in found["direct paths"]["why"]
    assert "only beside nodes with a proved path" in found["receipts for work"]["why"]


def test_a_router_behind_a_router(running: Patient, backend: Reachable) -> None:
    router = RouterInfo(state="forwards", addresses=("/ip4/100.64.0.2/tcp/1",), public=False)
    change(backend, router=router)
    assert "the provider" in running.checks()["router (UPnP)"]["next"]


@pytest.mark.parametrize(("offset", "state"), [(200.0, "ok"), (-5e3, "warn"), (9e4, "fail")])
def test_the_clock_is_compared(
    running: Patient, backend: Reachable, offset: float, state: str
) -> None:
    change(
        backend,
        witnesses=(msgspec.structs.replace(REACHABILITY.witnesses[0], clock_ms=offset),),
    )
    found = running.checks(expect=Exit.FAILED if state == "fail" else Exit.OK)["clock"]
    assert found["state"] == state


def test_no_peers(running: Patient, backend: Reachable) -> None:
    backend.status = msgspec.structs.replace(node_status(), peers=0)
    unknown = ProcessReach(state="unknown", listening=(), announced=(), relayed=())
    change(backend, witnesses=(), daemon=unknown, carrier=unknown)
    found = running.checks(expect=Exit.FAILED)
    assert "peers = [" in found["peers"]["next"]
    assert found["clock"]["state"] == "skip"
    assert found["daemon can be dialled"]["why"] == "nobody to try"


def test_a_node_that_catches_up(running: Patient, backend: Reachable) -> None:
    status: NodeStatus = msgspec.structs.replace(node_status(), syncing=True)
    backend.status = status
    assert running.checks()["chain"]["state"] == "warn"
