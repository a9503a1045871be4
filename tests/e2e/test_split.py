"""A split job: the submitter's node works in the first stage itself, and shows its text to nobody.

The job goes on from given weights, of which the first stage's stay where they are, too.

Seven nodes: the first one validates, submits and asks for work like the five behind it; the last
one looks on. The text is full of a random word, which fits into a window of training: as text,
tokens or labels it may be in the memory of the submitter's own carrier and worker, nowhere else.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tdmld import devnet
from tdmld.rpc.types import FINAL_JOB_STATES, JobDetail
from tests.e2e.test_sealed import PATIENCE_SECONDS, ROOT, SUBMITTER, WINDOWS, Hunt, Seen

NODES, BYSTANDER = 7, 6

pytestmark = pytest.mark.e2e


@dataclass
class SplitSeen(Seen):
    """What the search found, and what the job came to."""

    reference: str = ""
    """The result id of one process that trained alone."""
    fetched: str = ""
    """The result id of what was fetched."""
    slots: list[str] = field(default_factory=list)
    """Nodes, by slot."""
    source: str = ""
    audited: set[int] = field(default_factory=set)
    """Stages."""


class SplitHunt(Hunt):
    """One network, one split job."""

    def make_network(self, directory: Path) -> devnet.Devnet:
        return devnet.make_network(
            directory,
            nodes=NODES,
            validators=1,
            asks=range(BYSTANDER),
            settings={"ask.standby_slots": 4},
            parameters=WINDOWS,
        )

    def job_file(self, name: str, word: str, privacy: str) -> Path:
        """Three stages in a ring, four steps in two segments, every segment audited, from weights
        that were trained before."""
        path = super().job_file(name, word, privacy)
        config = json.loads((ROOT / "tests" / "jobs" / "config.json").read_text())
        (path.parent / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        toml = path.read_text()
        for old, new in (
            (str(ROOT / "tests" / "jobs" / "config.json"), "config.json"),
            ("sequence = 16", "sequence = 64"),
            ("steps = 2\n", "steps = 4\n"),
            ("cuts = [0, 1, 2]", "cuts = [0, 1, 2, 3]"),
        ):
            assert old in toml
            toml = toml.replace(old, new, 1)
        path.write_text(toml)
        before = self.tdmld("reference", path, "--out", self.directory / "before")
        assert 'init = "seed"' in toml
        path.write_text(toml.replace('init = "seed"', f'init = "{before["export_dir"]}"'))
        return path

    def tdmld(self, *arguments: object) -> dict[str, object]:
        command = [sys.executable, "-m", "tdmld", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def run_split(self) -> SplitSeen:
        job_file = self.job_file("split", self.sealed, '\nprivacy = "split"')
        self.deadline = time.monotonic() + 2 * PATIENCE_SECONDS
        with self.network:
            for index in range(NODES):
                self.network.start(index, environment={"TMPDIR": str(self.temporary)})
            self.network.wait_ready(timeout_seconds=120)
            self.wait_for_asks(range(BYSTANDER))
            capture, refused = self.listen()
            seen = SplitSeen(no_capture=refused)
            job = self.submit(job_file)
            detail = self.watch(job, seen)
            self.look_back(seen, detail)
            if capture is not None:
                self.take(capture, seen)
            out = self.directory / "model"
            done = self.tdmld(
                "job", "fetch", job, out, "--no-receipt",
                "--data-dir", self.network.data_dir(SUBMITTER),
            )  # fmt: skip
            seen.fetched = str(done["result_id"])
            self.network.down()
        seen.in_files += self.elsewhere()
        for index in range(NODES):
            chain = self.network.data_dir(index) / "chain"
            seen.in_databases += self.needles.in_database(chain)
        seen.in_temporary = self.needles.in_files(self.temporary)
        made = self.tdmld("reference", job_file, "--out", self.directory / "reference")
        seen.reference = str(made["result_id"])
        shutil.rmtree(self.directory / "reference")
        return seen

    def watch(self, job: str, seen: SplitSeen) -> JobDetail:
        """Search twice while the job runs, and once more when its model is there."""
        detail, searched = self.look(job), False
        while detail.summary.state not in FINAL_JOB_STATES and detail.result is None:
            if not seen.searched_live and (worker := self.worker_with_text()) is not None:
                os.kill(worker, signal.SIGSTOP)
                try:
                    seen.in_files += self.elsewhere()
                    self.search_memory(seen)
                finally:
                    os.kill(worker, signal.SIGCONT)
                seen.searched_live = True
            if detail.losses and not searched:
                self.search_memory(seen)  # activations and gradients have gone round
                searched = True
            detail = self.look(job)
        assert detail.result is not None, (detail.summary.state, detail.summary.reason)
        self.search_memory(seen)
        return detail

    def look_back(self, seen: SplitSeen, detail: JobDetail) -> None:
        seen.detail = detail
        seen.source = self.network.nodes[SUBMITTER].node
        seen.slots = [slot.worker for slot in detail.slots]
        seen.audited = {audit.stage for audit in detail.audits}
        name = self.network.nodes[SUBMITTER].name
        seen.allowed = {("carrier", name), ("worker", name)}

    def elsewhere(self) -> list[str]:
        """Files of the network that hold the word. The submitter's own are among them: its text
        lies sealed there."""
        return self.needles.in_files(self.network.directory)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> SplitSeen:
    return SplitHunt(tmp_path_factory.mktemp("split")).run_split()


def test_the_source_worked_in_the_first_stage_and_others_in_the_rest(seen: SplitSeen) -> None:
    assert seen.detail is not None
    assert seen.slots[0] == seen.source
    assert len(set(seen.slots)) == 3


def test_the_result_is_the_reference_s_bit_for_bit(seen: SplitSeen) -> None:
    assert seen.detail is not None
    assert seen.detail.result is not None
    assert seen.detail.result.id == seen.reference == seen.fetched


def test_all_slots_but_the_source_s_own_were_audited(seen: SplitSeen) -> None:
    assert seen.detail is not None
    assert seen.audited == {1, 2}
    assert {audit.state for audit in seen.detail.audits} == {"passed"}


def test_no_token_and_no_label_is_in_a_file_or_a_database(seen: SplitSeen) -> None:
    assert seen.searched_live
    assert seen.in_files == seen.in_databases == seen.in_temporary == []


def test_tokens_and_labels_are_in_the_submitter_s_own_processes_alone(seen: SplitSeen) -> None:
    if seen.no_memory:
        pytest.skip(f"looking into processes is forbidden here: {seen.no_memory}")
    assert {("daemon", f"node{index}") for index in range(NODES)} <= seen.looked_at
    workers = {name for kind, name in seen.looked_at if kind == "worker"}
    assert len(workers) >= 3, "workers of the other stages were searched, too"
    assert seen.in_memory.keys() <= seen.allowed
    assert ("worker", "node0") in seen.in_memory


def test_no_token_and_no_label_is_on_the_wire(seen: SplitSeen) -> None:
    if seen.no_capture:
        pytest.skip(f"listening on the loopback interface is forbidden here: {seen.no_capture}")
    assert seen.captured > 1_000_000
    assert seen.lost_share < 0.01
    assert seen.in_flows == []
