"""A network of real nodes on one machine: directories, keys, ports, one genesis, processes.

    network = make_network(directory, nodes=7, validators=4)
    with network:                      # stops whatever runs at the end
        network.start_all()
        network.wait_ready()
        network.kill(3)

Every node is a `tdmld run` with a directory of its own (node0, node1, ...), an owner of its own and
the same genesis; the first ones validate. Nothing of it is special: a node cannot know that it
belongs to a devnet. Owners' keystores cost next to nothing to open and their passwords lie beside
them: this is money of no value. The calls block (a few times at most as long as their time-outs);
under trio use `trio.to_thread.run_sync`.
"""

import contextlib
import http.client
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from tdmld import keys, processes
from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import Genesis, genesis_bytes, genesis_from_document, load_genesis
from tdmld.config import CONFIG_FILE, config_toml, load_config
from tdmld.errors import UserError
from tdmld.files import read_file, write_file

NETWORK_FILE = "devnet.json"
PASSWORD_FILE = "keys/owner.password"
RECORD_FILE = "run/devnet.json"
OUTPUT_FILE = "logs/output.log"
NODES_MAX = 64
_PORTS = range(20000, 32000)
"""Below the range from which systems take ports for outgoing connections."""
_LOG_TAIL_BYTES = 2000
_PROBE_SECONDS = 0.2


@dataclass(frozen=True)
class DevnetNode:
    """One node of the network. Addresses are PeerId strings; ports are on 127.0.0.1."""

    name: str
    owner: str
    node: str
    port: int
    carrier_port: int
    rpc_port: int
    validator: bool
    asks: bool

    @property
    def rpc_url(self) -> str:
        return f"http://127.0.0.1:{self.rpc_port}"


class Devnet:
    """A network that lies in a directory; makes, finds and ends its processes."""

    def __init__(self, directory: Path, nodes: Sequence[DevnetNode]) -> None:
        self.directory = directory
        self.nodes = tuple(nodes)
        self.program: Sequence[str] = (sys.executable, "-m", "tdmld")
        """What is started with `run --data-dir ...`; a test may put a program of its own here."""
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The network that `make_network` left in `directory`; UserError when there is none."""
        directory = directory.absolute()
        try:
            found = json.loads(read_file(directory / NETWORK_FILE, 1 << 20))
            return cls(directory, [DevnetNode(**row) for row in found["nodes"]])
        except FileNotFoundError as error:
            raise UserError(
                f"there is no network in {directory}",
                next=f"tdmld devnet up --directory {directory}",
                exit_code=4,
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{directory / NETWORK_FILE} is damaged", why=str(error), next="make a new network"
            ) from error

    def data_dir(self, index: int) -> Path:
        """The directory of node `index`: what `--data-dir` takes."""
        return self.directory / self.nodes[index].name

    def password_file(self, index: int) -> Path:
        """Where the password of the owner of node `index` stands."""
        return self.data_dir(index) / PASSWORD_FILE

    def owner_key(self, index: int) -> KeyPair:
        """The opened owner key of node `index`."""
        password = read_file(self.password_file(index), 1024).strip()
        return keys.load_owner_key(self.data_dir(index) / keys.OWNER_KEYSTORE, password)

    def genesis(self) -> Genesis:
        """The genesis that all nodes share."""
        return load_genesis((self.data_dir(0) / "genesis.json").read_bytes())

    def process(self, index: int) -> processes.Process | None:
        """The running process of node `index`, whoever started it."""
        return processes.recorded(self.data_dir(index) / RECORD_FILE)

    def start(self, index: int, *arguments: str, environment: Mapping[str, str] = {}) -> bool:
        """Start `tdmld run` for node `index`, with more `arguments`; False when it runs already.

        `environment` is added to this process's own, from which TDMLD_* are left out.
        """
        if self.process(index) is not None:
            return False
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TDMLD_")}
        data_dir = self.data_dir(index)
        command = [*self.program, "run", "--data-dir", str(data_dir), *arguments]
        _, child = processes.start(
            command,
            record=data_dir / RECORD_FILE,
            output=data_dir / OUTPUT_FILE,
            environment=kept | dict(environment),
        )
        self._children[index] = child
        return True

    def start_all(self) -> list[int]:
        """Start every node that does not run; their indices."""
        return [index for index in range(len(self.nodes)) if self.start(index)]

    def stop(self, index: int, grace_seconds: float = 15.0) -> processes.Ending:
        """SIGTERM, then SIGKILL; returns when the node has ended."""
        process = self.process(index)
        ending = processes.stop(process, grace_seconds) if process else "gone"
        self._reap(index)
        return ending

    def kill(self, index: int) -> None:
        """kill -9 of the daemon of node `index` alone; returns when it is dead."""
        if process := self.process(index):
            processes.kill(process)
        self._reap(index)

    def down(self, grace_seconds: float = 15.0) -> dict[str, processes.Ending]:
        """Stop all nodes at once; how each of them ended."""
        running = [(i, process) for i in range(len(self.nodes)) if (process := self.process(i))]
        for _, process in running:
            processes.terminate(process)
        deadline = time.monotonic() + grace_seconds
        endings: dict[str, processes.Ending] = {node.name: "gone" for node in self.nodes}
        for index, process in running:
            left = max(0.0, deadline - time.monotonic())
            endings[self.nodes[index].name] = processes.stop(process, left, told=True)
        for index in range(len(self.nodes)):
            self._reap(index)
        return endings

    def ready(self, index: int) -> bool:
        """Whether node `index` says of itself (GET /readyz) that it is ready."""
        connection = http.client.HTTPConnection("127.0.0.1", self.nodes[index].rpc_port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_ready(
        self, indices: Collection[int] | None = None, timeout_seconds: float = 60.0
    ) -> None:
        """Return when all (or these) nodes are ready.

        UserError when one of them has ended, with the end of what it wrote, or after the time-out
        (exit code 6).
        """
        waiting = set(range(len(self.nodes)) if indices is None else indices)
        deadline = time.monotonic() + timeout_seconds
        while True:
            waiting = {index for index in waiting if not self.ready(index)}
            if not waiting:
                return
            for index in waiting:
                if self.process(index) is None:
                    raise UserError(
                        f"{self.nodes[index].name} ended while it was waited for",
                        why=self.log_tail(index) or "it wrote nothing",
                        next=f"read {self.data_dir(index) / 'logs'}",
                    )
            if time.monotonic() > deadline:
                names = ", ".join(self.nodes[index].name for index in sorted(waiting))
                raise UserError(
                    f"not ready after {timeout_seconds:g} s: {names}",
                    why="; ".join(filter(None, map(self.log_tail, sorted(waiting)[:1]))),
                    next=f"read {self.data_dir(min(waiting)) / 'logs'}, or give it longer",
                    exit_code=6,
                )
            time.sleep(_PROBE_SECONDS)  # another process's readiness has no event to wait for

    def log_tail(self, index: int) -> str:
        """The end of what node `index` wrote on its stdout and stderr."""
        with contextlib.suppress(OSError), (self.data_dir(index) / OUTPUT_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace").strip()
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def _reap(self, index: int) -> None:
        child = self._children.pop(index, None)
        if child is not None:
            child.wait(timeout=30)


def make_network(
    directory: Path,
    *,
    nodes: int = 7,
    validators: int = 4,
    asks: Collection[int] | None = None,
    balance: int = 1_000_000_000,
    vote_stake: int = 100_000_000,
    work_stake: int = 50_000_000,
    parameters: Mapping[str, object] = {},
    settings: Mapping[str, object] = {},
    node_settings: Mapping[int, Mapping[str, object]] = {},
    chain: str = "tdmld-local-1",
) -> Devnet:
    """Make the directories, keys, settings and genesis of a new network; starts nothing.

    Nodes 0 .. validators-1 validate. `asks`: which nodes ask for work (default: all); the others
    can submit, and audit nothing. Amounts are for each owner. `parameters` replace genesis
    defaults and `dial_receipts`, which is 1: nodes of a devnet dial each other, too. `settings` and
    `node_settings[index]` are put into tdmld.toml (keys as for
    `load_config`). UserError when `directory` is not empty or the numbers make no network.
    """
    if not 1 <= validators <= nodes <= NODES_MAX:
        raise UserError(
            f"{validators} validators of {nodes} nodes make no network",
            why=f"1 <= validators <= nodes <= {NODES_MAX}",
            exit_code=2,
        )
    directory = directory.absolute()
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{directory} is not empty", next="choose another directory, or remove it yourself"
        )
    ports = _free_ports(3 * nodes)
    asking = set(range(nodes) if asks is None else asks)
    rows = []
    for index in range(nodes):
        node, owner = _make_keys(directory / f"node{index}")
        rows.append(
            DevnetNode(
                name=f"node{index}",
                owner=owner.address,
                node=node.address,
                port=next(ports),
                carrier_port=next(ports),
                rpc_port=next(ports),
                validator=index < validators,
                asks=index in asking,
            )
        )
    rules: dict[str, object] = {"dial_receipts": min(1, nodes - 1), **parameters}
    genesis = genesis_from_document(
        {
            "chain": chain,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "accounts": [[row.owner, balance] for row in rows],
            "validators": [[row.owner, row.node, vote_stake] for row in rows if row.validator],
            "work_stakes": [[row.owner, work_stake] for row in rows] if work_stake else [],
            "nodes": [[row.owner, row.node] for row in rows if not row.validator],
            "mature_classes": ["*"],
            "parameters": rules,
        }
    )
    for index, row in enumerate(rows):
        data_dir = directory / row.name
        write_file(data_dir / "genesis.json", genesis_bytes(genesis) + b"\n")
        values = _settings(index, rows) | dict(settings) | dict(node_settings.get(index, {}))
        write_file(data_dir / CONFIG_FILE, config_toml(values).encode())
        load_config(data_dir, {}, {})
    document = {"version": 1, "nodes": [asdict(row) for row in rows]}
    write_file(directory / NETWORK_FILE, json.dumps(document, indent=2).encode())
    return Devnet(directory, rows)


def _make_keys(data_dir: Path) -> tuple[KeyPair, KeyPair]:
    for name in ("keys", "content", "jobs", "logs", "run"):
        (data_dir / name).mkdir(mode=0o700, parents=True)
    password = secrets.token_urlsafe(16).encode()
    write_file(data_dir / PASSWORD_FILE, password + b"\n", mode=0o600)
    owner = keys.create_owner_key(data_dir / keys.OWNER_KEYSTORE, password, keys.MINIMUM)
    return keys.create_node_key(data_dir / keys.NODE_KEY), owner


def _settings(index: int, rows: Sequence[DevnetNode]) -> dict[str, object]:
    own = rows[index]
    return {
        "listen": [f"/ip4/127.0.0.1/tcp/{own.port}"],
        "carrier_listen": f"/ip4/127.0.0.1/tcp/{own.carrier_port}",
        "rpc_listen": f"127.0.0.1:{own.rpc_port}",
        "peers": [f"/ip4/127.0.0.1/tcp/{r.port}/p2p/{r.node}" for r in rows if r is not own],
        "ask.enabled": own.asks,
    }


def _free_ports(count: int) -> Iterator[int]:
    """`count` ports that nobody listens on now, held until all are found."""
    found: list[socket.socket] = []
    try:
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            candidate = socket.socket()
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                candidate.close()
            else:
                found.append(candidate)
        if len(found) < count:
            raise UserError(f"no {count} free ports on 127.0.0.1", why="others hold them")
        return iter([held.getsockname()[1] for held in found])
    finally:
        for held in found:
            held.close()
