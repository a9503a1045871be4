"""Real nodes behind routers that translate addresses, with no open port, in network namespaces.

Node 0 validates, submits and relays; node 1 is public, too; 2 and 3 sit behind routers of their
own. Only the public nodes' addresses are known to anybody at the start.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tdmld import devnet
from tdmld.config import CONFIG_FILE, config_toml
from tdmld.files import write_file
from tests.p2p.netns import Internet, forbidden, internet

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = {"interval_ms": 200, "segment_window": 100, "activate_window": 600, "audit_window": 400}
SUBMITTER, OPEN, LEFT, RIGHT = range(4)
PLACES = {SUBMITTER: "203.0.113.10", OPEN: "203.0.113.11", LEFT: "10.0.1.2", RIGHT: "10.0.2.2"}
STATE_BYTES = 100_000
"""Less than the moments of one stage take; a relay's other business is far below it."""
NO_MEMORY = {"ask.memory": 0}
"""It is matched to no slot: it stands by and audits."""
_REASON = forbidden()

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(_REASON is not None, reason=f"no network namespaces: {_REASON}"),
]


class Town:
    """Four nodes, each in a namespace."""

    def __init__(self, net: Internet, network: devnet.Devnet) -> None:
        self.net, self.network = net, network

    def tdmld(self, index: int, *arguments: object) -> Any:
        """Run a command of tdmld where node `index` is; its document."""
        return self.call(index, *arguments, "--json")

    def call(self, index: int, *arguments: object) -> Any:
        """The same, of a command that always gives a document."""
        where = ("--data-dir", self.network.data_dir(index))
        words = [sys.executable, "-m", "tdmld", *map(str, (*arguments, *where))]
        done = subprocess.run(
            self.net.argv(str(index), words),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, f"{arguments} at node {index}: {done.stderr}"
        return json.loads(done.stdout)

    def start(self, index: int) -> None:
        program = self.net.argv(str(index), [sys.executable, "-m", "tdmld"])
        self.network.program = program
        self.network.start(index)

    def wait(self, index: int, what: str, *arguments: object, until: Any) -> Any:
        """The document of a command once `until` holds for it. Another process's progress has no
        event to wait for; each asking takes a second."""
        deadline = time.monotonic() + 240
        while True:
            try:
                found = self.tdmld(index, *arguments)
                if until(found):
                    return found
            except AssertionError:
                if self.network.process(index) is None:
                    raise
                found = None
            assert time.monotonic() < deadline, (what, found, self.network.log_tail(index))

    def asking(self, index: int) -> dict[str, Any]:
        """A node's ask, once it stands on the chain."""
        status = self.wait(index, "asks", "status", until=lambda found: found["ask"] is not None)
        return dict(status["ask"])

    def job(self, tmp_path: Path) -> str:
        """A tiny job, every segment audited; its id."""
        text = (ROOT / "tests" / "jobs" / "tiny.toml").read_text()
        for old, new in (
            ('audit_rate = "0.5"', 'audit_rate = "1.0"'),
            ("steps = 16", "steps = 4"),
            ("warmup = 2, decay_from = 12", "warmup = 1, decay_from = 3"),
            ('"config.json"', f'"{ROOT / "tests" / "jobs" / "config.json"}"'),
            ('"../../data/', f'"{ROOT / "data"}/'),
        ):
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "job.toml"
        file.write_text(text)
        password = ("--password-file", self.network.password_file(SUBMITTER))
        return str(self.tdmld(SUBMITTER, "job", "submit", file, *password)["job"])

    def finished(self, job: str) -> dict[str, Any]:
        """The job once its result is known to two holders."""

        def over(found: Mapping[str, Any]) -> bool:
            assert found["summary"]["state"] not in ("refunded", "expired"), found["summary"]
            return found["result"] is not None and len(found["result"]["holders"]) > 1

        return dict(self.wait(SUBMITTER, "the result", "job", "status", job, until=over))

    def fetched(self, job: str, out: Path) -> None:
        password = ("--password-file", self.network.password_file(SUBMITTER))
        self.tdmld(SUBMITTER, "job", "fetch", job, out, *password)
        assert (out / "model.safetensors").stat().st_size > 0

    def names(self, nodes: list[str]) -> list[int]:
        return [[row.node for row in self.network.nodes].index(node) for node in nodes]


@contextmanager
def town(
    tmp_path: Path, *, random_ports: bool, settings: Mapping[int, Mapping[str, object]]
) -> Iterator[Town]:
    network = devnet.make_network(
        tmp_path / "network",
        nodes=4,
        validators=1,
        asks=[OPEN, LEFT, RIGHT],
        parameters={**WINDOWS, "dial_receipts": 1},
    )
    public = [SUBMITTER, OPEN]
    for index, node in enumerate(network.nodes):
        values = {
            "listen": [f"/ip4/{PLACES[index]}/tcp/4001"],
            "carrier_listen": f"/ip4/{PLACES[index]}/tcp/4002",
            "rpc_listen": f"127.0.0.1:{node.rpc_port}",
            "peers": [
                f"/ip4/{PLACES[other]}/tcp/4001/p2p/{network.nodes[other].node}"
                for other in public
                if other != index
            ],
            "ask.enabled": node.asks,
            "ask.standby_slots": 4,
            "ask.audit_capacity": 4,
            "upnp": False,
            "mdns": False,
            **settings.get(index, {}),
        }
        write_file(network.data_dir(index) / CONFIG_FILE, config_toml(values).encode())
    with internet() as net, network:
        for index in public:
            net.public(str(index), PLACES[index])
        for index, router in ((LEFT, "203.0.113.2"), (RIGHT, "203.0.113.3")):
            inside = PLACES[index].rsplit(".", 1)[0]
            net.router(f"router{index}", router, inside, random_ports=random_ports)
            net.behind(f"router{index}", str(index), PLACES[index])
        made = Town(net, network)
        for index in range(4):
            made.start(index)
        yield made


def test_a_node_with_no_open_port_stands_by_and_audits_through_a_relay(tmp_path: Path) -> None:
    """Both closed nodes sit behind routers through which no hole can be punched: the worker's
    state and frames reach the standby, who audits them, through a relay or not at all."""
    with town(tmp_path, random_ports=True, settings={RIGHT: NO_MEMORY}) as made:
        assert made.asking(OPEN)["open"] >= 1
        for index in (LEFT, RIGHT):
            assert made.asking(index)["open"] == 0
        job = made.job(tmp_path)
        found = made.finished(job)
        assert sorted(made.names([slot["worker"] for slot in found["slots"]])) == [OPEN, LEFT]
        assert made.names([standby["node"] for standby in found["standbys"]]) == [RIGHT]
        passed = [audit for audit in found["audits"] if audit["state"] == "passed"]
        assert set(made.names([audit["auditor"] for audit in passed])) == {RIGHT}
        assert {audit["stage"] for audit in passed} == {0, 1}
        made.fetched(job, tmp_path / "model")
        relays = [made.call(index, "rpc", "net_reachability") for index in (SUBMITTER, OPEN)]
        carried = sum(found["relaying"]["carried"] for found in relays)
        assert carried > STATE_BYTES, "the copies came through a relay"


@pytest.mark.slow
def test_two_nodes_with_no_open_port_train_when_a_hole_is_punched(tmp_path: Path) -> None:
    """They are neighbours in the pipeline, which the chain allows because each has the other's
    receipt that their carriers are connected directly."""
    with town(tmp_path, random_ports=False, settings={OPEN: NO_MEMORY}) as made:
        made.asking(OPEN)
        for index in (LEFT, RIGHT):
            ask = made.asking(index)
            assert (ask["open"], len(ask["paths"])) == (0, 1)
        job = made.job(tmp_path)
        found = made.finished(job)
        assert sorted(made.names([slot["worker"] for slot in found["slots"]])) == [LEFT, RIGHT]
        made.fetched(job, tmp_path / "model")
        for index in (LEFT, RIGHT):
            assert made.call(index, "rpc", "net_reachability")["punched"] >= 1
