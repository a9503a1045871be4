"""A canary in the text of a sealed job: real daemons, and nothing of it where it must not be.

Six nodes: one validates and submits, four ask for work, one looks on. The text is full of a random
word. While the job runs, and after it, everything is searched that somebody could look at who has
no part in it; then the same search must find the word of a second job that is `open`.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from tdmld import devnet
from tdmld.rpc.access import read_access
from tdmld.rpc.client import Client
from tdmld.rpc.types import FINAL_JOB_STATES, JobDetail, NodeStatus
from tests.e2e.canary import Capture, Needles, forms

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "jobs"
NODES, SUBMITTER, BYSTANDER = 6, 0, 5
ASKS = range(1, BYSTANDER)
STORES = 3
"""Members that have fetched the text before the search begins: the submitter and two more."""
WINDOWS = {"interval_ms": 200, "segment_window": 400, "activate_window": 600, "audit_window": 300}
PATIENCE_SECONDS = 200.0

pytestmark = pytest.mark.e2e


T = TypeVar("T")
Where = tuple[str, str]
"""("daemon", "carrier" or "worker", name of the node)"""


@dataclass
class Seen:
    """What the searches found."""

    detail: JobDetail | None = None
    searched_live: bool = False
    """While the job ran: content goes when it is over."""
    in_files: list[str] = field(default_factory=list)
    in_databases: list[str] = field(default_factory=list)
    in_temporary: list[str] = field(default_factory=list)
    in_flows: list[str] = field(default_factory=list)
    in_memory: dict[Where, set[str]] = field(default_factory=dict)
    looked_at: set[Where] = field(default_factory=set)
    allowed: set[Where] = field(default_factory=set)
    """Processes that may have the text: those of members, and never a daemon."""
    captured: int = 0
    """Bytes."""
    in_clear: int = 0
    """Flows with the one thing that is said openly: which security to begin with."""
    lost_share: float = 0.0
    """Of the packets."""
    no_capture: str = ""
    no_memory: str = ""
    """Why the system did not let us look; empty when it did."""
    open_in_files: list[str] = field(default_factory=list)


class Hunt:
    """One network, one sealed job, one open one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.temporary = directory / "temporary"
        self.temporary.mkdir(parents=True)
        self.network = self.make_network(directory / "network")
        self.sealed, self.open = (secrets.token_hex(16) for _ in range(2))
        self.needles = Needles(self.sealed)
        self.deadline = time.monotonic() + PATIENCE_SECONDS

    def make_network(self, directory: Path) -> devnet.Devnet:
        return devnet.make_network(
            directory,
            nodes=NODES,
            validators=1,
            asks=ASKS,
            settings={"ask.standby_slots": 4},
            parameters=WINDOWS,
        )

    def job_file(self, name: str, word: str, privacy: str) -> Path:
        """A job of one segment a stage, both of them audited, whose text is full of `word`."""
        place = self.directory / name
        place.mkdir()
        lines = (f"{number} times it was said: {word}\n" for number in range(3000))
        (place / "text.txt").write_text("".join(lines))
        toml = (JOBS / "tiny.toml").read_text()
        for old, new in (
            ("../../data/shakespeare.txt", "text.txt"),
            ("config.json", str(JOBS / "config.json")),
            ("steps = 16", "steps = 2"),
            ("warmup = 2, decay_from = 12", "warmup = 1, decay_from = 1"),
            ('audit_rate = "0.5"', 'audit_rate = "1.0"'),
            ('init = "seed"', f'init = "seed"{privacy}'),
        ):
            assert old in toml
            toml = toml.replace(old, new)
        (place / "job.toml").write_text(toml)
        return place / "job.toml"

    def submit(self, job: Path) -> str:
        command = [sys.executable, "-m", "tdmld", "job", "submit", str(job), "--json"]
        command += ["--data-dir", str(self.network.data_dir(SUBMITTER))]
        command += ["--password-file", str(self.network.password_file(SUBMITTER))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["job"])

    def ask(self, index: int, method: str, parameters: dict[str, str], kind: type[T]) -> T:
        """What a node answers; a question takes its time, so asking again is no busy loop."""
        assert time.monotonic() < self.deadline, "it takes too long"

        async def call() -> T:
            async with Client(read_access(self.network.data_dir(index))) as client:
                return await client.call(method, parameters, kind)

        return trio.run(call)

    def look(self, job: str) -> JobDetail:
        """The job now."""
        return self.ask(SUBMITTER, "job_status", {"id": job}, JobDetail)

    def wait_for_asks(self, asks: range = ASKS) -> None:
        """Until everybody who looks for work can be matched, neighbours to neighbours."""
        needed = self.network.genesis().parameters.dial_receipts
        for index in asks:
            while True:
                offered = self.ask(index, "node_status", {}, NodeStatus).ask
                if offered is not None and offered.open >= needed:
                    break

    def run(self) -> Seen:
        with self.network:
            for index in range(NODES):
                self.network.start(index, environment={"TMPDIR": str(self.temporary)})
            self.network.wait_ready(timeout_seconds=120)
            self.wait_for_asks()
            capture, refused = self.listen()
            seen = self.follow(self.submit(self.job_file("sealed", self.sealed, "")))
            if capture is not None:
                self.take(capture, seen)
            seen.no_capture = refused
            self.submit(self.job_file("open", self.open, '\nprivacy = "open"'))
            seen.open_in_files = Needles(self.open).in_files(self.network.directory)
            self.network.down()
        seen.in_files += self.needles.in_files(self.network.directory)
        for index in range(NODES):
            chain = self.network.data_dir(index) / "chain"
            seen.in_databases += self.needles.in_database(chain)
        seen.in_temporary = self.needles.in_files(self.temporary)
        for place in (Path("/dev/shm"), Path("/var/tmp")):
            seen.in_temporary += self.needles.in_files(place) if place.is_dir() else []
        return seen

    def listen(self) -> tuple[Capture | None, str]:
        """Capture what goes from and to all nodes; or why the system does not let us."""
        ports = {port for n in self.network.nodes for port in (n.port, n.carrier_port)}
        try:
            return Capture(ports), ""
        except (PermissionError, AttributeError) as error:
            return None, str(error)

    def take(self, capture: Capture, seen: Seen) -> None:
        """Stop listening, and search what was heard."""
        capture.stop()
        seen.captured = sum(map(len, capture.flows.values()))
        seen.lost_share = capture.lost_share
        seen.in_clear = sum(b"/tls/1.0.0" in data for data in capture.flows.values())
        for flow, data in capture.flows.items():
            seen.in_flows += [f"{flow}: {name}" for name in self.needles.in_bytes(data)]

    def follow(self, job: str) -> Seen:
        """Search while the job runs, and once more when its model is there."""
        seen, detail = Seen(), self.look(job)
        while detail.summary.state not in FINAL_JOB_STATES and detail.result is None:
            if not seen.searched_live and (worker := self.worker_with_text()) is not None:
                # It waits while we look: nothing that it needs can go meanwhile.
                os.kill(worker, signal.SIGSTOP)
                try:
                    self.search_live(seen)
                finally:
                    os.kill(worker, signal.SIGCONT)
            detail = self.look(job)
        assert detail.result is not None, (detail.summary.state, detail.summary.reason)
        seen.detail = detail
        self.search_memory(seen)
        members = {slot.worker for slot in detail.slots}
        members |= {standby.node for standby in detail.standbys}
        members |= {audit.auditor for audit in detail.audits}
        members.add(self.network.nodes[SUBMITTER].node)
        seen.allowed = {
            (kind, node.name)
            for node in self.network.nodes
            for kind in ("carrier", "worker")
            if node.node in members
        }
        return seen

    def worker_with_text(self) -> int | None:
        """A worker process that has been given the text."""
        for index in range(len(self.network.nodes)):
            for pid, kind in self.processes(index):
                with suppress(OSError):
                    maps = Path(f"/proc/{pid}/maps").read_text() if kind == "worker" else ""
                    if "memfd:tdmld-text" in maps:
                        return pid
        return None

    def search_live(self, seen: Seen) -> None:
        """Once most members have fetched the sealed text: files, and the memory of everybody."""
        while sum(map(self.has_sealed, range(NODES))) < STORES:
            assert time.monotonic() < self.deadline, "members do not fetch the text"
            time.sleep(0.1)  # other processes' files have no event to wait for
        seen.in_files += self.needles.in_files(self.network.directory)
        self.search_memory(seen)
        seen.searched_live = True

    def has_sealed(self, index: int) -> bool:
        """Whether a node has sealed content on its disk."""
        return any((self.network.data_dir(index) / "content" / "sealed").glob("*/0.*/*"))

    def search_memory(self, seen: Seen) -> None:
        """Of all daemons, carriers and workers."""
        for index, node in enumerate(self.network.nodes):
            for pid, kind in self.processes(index):
                try:
                    found = self.needles.in_process(pid)
                except PermissionError as error:
                    seen.no_memory = str(error)
                    return
                seen.looked_at.add((kind, node.name))
                if found:
                    seen.in_memory.setdefault((kind, node.name), set()).update(found)

    def processes(self, index: int) -> Iterator[tuple[int, str]]:
        """(process id, "daemon", "carrier", "zygote" or "worker") of a node. What the zygote
        forked is a worker, too."""
        daemon = self.network.process(index)
        assert daemon is not None
        yield daemon.pid, "daemon"
        for pid in _children(daemon.pid):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if kind := re.search(rb"tdmld\.node\.(carrier|worker|zygote)\0", words):
                    yield pid, kind[1].decode()
                    yield from ((forked, "worker") for forked in _children(pid))


def _children(pid: int) -> list[int]:
    """Of a process, but for those that it began in other threads."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Hunt(tmp_path_factory.mktemp("sealed")).run()


def test_the_search_finds_every_form(tmp_path: Path) -> None:
    word = secrets.token_hex(16)
    for number, form in enumerate(forms(word).values()):
        (tmp_path / str(number)).write_bytes(b"x" * (1 << 23) + form[:9])
        with (tmp_path / str(number)).open("ab") as file:
            file.write(form[9:])
    found = Needles(word).in_files(tmp_path)
    assert {line.rpartition(": ")[2] for line in found} == set(forms(word))


def test_the_job_was_trained_and_audited(seen: Seen) -> None:
    assert seen.detail is not None
    assert seen.detail.summary.state in ("finishing", "closed")
    assert {audit.state for audit in seen.detail.audits} == {"passed"}


def test_the_text_is_in_no_file_and_no_database_of_any_node(seen: Seen) -> None:
    assert seen.searched_live
    assert seen.in_files == seen.in_databases == []


def test_the_text_is_in_no_temporary_file(seen: Seen) -> None:
    assert seen.in_temporary == []


def test_the_text_is_in_the_memory_of_members_and_of_nobody_else(seen: Seen) -> None:
    if seen.no_memory:
        pytest.skip(f"looking into processes is forbidden here: {seen.no_memory}")
    assert {("daemon", f"node{index}") for index in range(NODES)} <= seen.looked_at
    assert ("carrier", f"node{BYSTANDER}") in seen.looked_at - seen.allowed
    assert "worker" in {kind for kind, _ in seen.in_memory}
    assert {
        where: forms for where, forms in seen.in_memory.items() if where not in seen.allowed
    } == {}


def test_the_text_is_not_on_the_wire(seen: Seen) -> None:
    if seen.no_capture:
        pytest.skip(f"listening on the loopback interface is forbidden here: {seen.no_capture}")
    assert seen.captured > 1_000_000
    assert seen.in_clear > NODES
    assert seen.lost_share < 0.01  # the word stands in the text thousands of times
    assert seen.in_flows == []


def test_the_same_search_finds_the_text_of_an_open_job(seen: Seen) -> None:
    assert any("/content/" in line and line.endswith(": text") for line in seen.open_in_files)
