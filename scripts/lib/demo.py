"""The demo: seven nodes, one job, audits, payment, and a model that plain Python loads.

Everything is real: separate `tdmld run` processes with their own keys, directories and owners, a
chain that they agree on, carriers that move tensors over libp2p, workers that compute. This file
only types what a person would type and looks at what comes out. It checks, at the end:

    the model against `tdmld reference` (one process, unsplit model): every state root of every
    segment that the chain knows, and the exported bytes; the held-out loss; that the exported
    ledger of a stopped node sums to the supply; that the submitter paid what others got plus burns.

The faults change nothing of that. A killed worker or carrier is made good by its own daemon; a
killed node, and a worker that an audit convicts, by the standby.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio
from jobrun import (
    RunFailed,
    client,
    same_files,
    same_roots,
    submitter,
    tdmld,
    wait_for_asks,
    watch,
)
from report import ROOT, Report, say

from tdmld import devnet
from tdmld.errors import UserError
from tdmld.node.ledgerfile import read_ledger
from tdmld.node.provenance import check
from tdmld.rpc.errors import RpcError
from tdmld.rpc.types import FINAL_JOB_STATES, AccountInfo, JobDetail
from tdmld.train.jobfile import load_job_file

NODES, VALIDATORS, SUBMITTER, BYSTANDER = 7, 4, 0, 1
"""Node 1 validates and takes no work: the one to kill."""
ASKS = range(2, NODES)
ROUND_OF_THE_KILL = 5
PATIENCE_SECONDS = 900.0
LIE_AT_STEP = 5
"""In `FLIP`: what was settled before may be paid."""
HELDOUT_BOUND = 2.45
"""Nats a byte; counting pairs of letters gives 2.5."""
PLAIN = ROOT / "scripts" / "lib" / "plain_loss.py"
FLIP = ROOT / "tests" / "faults" / "flip_gradient.py"


def short(text: str) -> str:
    return f"{text[:4]}..{text[-4:]}"


class Demo:
    """One demo in one directory."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.directory = directory
        self.job_file: Path = self._audited(options.job) if options.cheater else options.job
        self.lied = directory / "lied"
        settings: dict[str, object] = {"ask.standby_slots": 4}
        if options.cheater:
            settings["launcher"] = [sys.executable, str(FLIP), str(self.lied)]
        self.network = devnet.make_network(
            directory / "network",
            nodes=NODES,
            validators=VALIDATORS,
            asks=ASKS,
            settings=settings,
            parameters=json.loads(options.parameters),
        )
        self.names = {node.node: node.name for node in self.network.nodes}
        self.names |= {node.owner: node.name for node in self.network.nodes}
        self.killed = False
        self.standby = ""
        """The node that stood by first."""
        self.worker = ""
        """The node that was first to have slot 0."""
        self.daemons: dict[int, str] = {}
        """Owners by the process id of their daemon."""
        self.shown = ""
        self.began = time.monotonic()
        self.told: set[str] = set()

    def _audited(self, job: Path) -> Path:
        """The same job with every segment audited, so that a single lie is surely seen."""
        text = re.sub(r'audit_rate = ".*"', 'audit_rate = "1.0"', job.read_text())
        for name in re.findall(r'^(?:text|config) *= *"(.*)"', text, re.MULTILINE):
            text = text.replace(f'"{name}"', f'"{(job.parent / name).resolve()}"')
        made = self.directory / "audited.toml"
        made.write_text(text)
        return made

    def run(self) -> dict[str, Any]:
        network = self.network
        say(f"starting {NODES} nodes ({VALIDATORS} validate) in {network.directory}")
        with network:
            network.start_all()
            network.wait_ready(timeout_seconds=120)
            for index, node in enumerate(network.nodes):
                if process := network.process(index):
                    self.daemons[process.pid] = node.owner
            before = trio.run(self._balances)
            trio.run(wait_for_asks, network, ASKS)
            say(f"{len(ASKS)} nodes ask for work, and others can dial them")
            job = self._submit()
            detail = trio.run(watch, network, SUBMITTER, job, PATIENCE_SECONDS, self._look)
            found: dict[str, Any] = {"job": job}
            if detail.result is not None:
                found |= self._fetch(job)
            detail = trio.run(self._settled, job)
            found["state"] = detail.summary.state
            after = trio.run(self._balances)
            network.down()
        found |= self._account(detail, before, after)
        if "export_dir" in found:
            found |= self._verify(found)
        return found

    def _submit(self) -> str:
        said = submitter(self.network, SUBMITTER)
        job = str(tdmld("job", "submit", self.job_file, *said)["job"])
        say(f"job {job[:12]} is on the chain")
        return job

    async def _balances(self) -> dict[str, int]:
        async with client(self.network, SUBMITTER) as node:
            found = {}
            for row in self.network.nodes:
                account = await node.call("chain_account", {"address": row.owner}, AccountInfo)
                found[row.owner] = int(account.balance)
            return found

    def _look(self, detail: JobDetail) -> None:
        """Once a second while the job runs."""
        if not self.standby and detail.standbys:
            self.standby = detail.standbys[0].node
            self.worker = detail.slots[0].worker
        self._show(detail)
        self._maybe_kill(detail)

    async def _settled(self, job: str) -> JobDetail:
        """The job's last state, once it is final."""
        with trio.fail_after(60):
            async with client(self.network, SUBMITTER) as node:
                while True:
                    detail = await node.call("job_status", {"id": job}, JobDetail)
                    if detail.summary.state in FINAL_JOB_STATES:
                        return detail
                    await trio.sleep(0.2)

    def _show(self, detail: JobDetail) -> None:
        brief = detail.summary
        for audit in detail.audits:
            who = self.names.get(audit.auditor, "an auditor to be found")
            line = f"segment {audit.segment} of stage {audit.stage} by {who}: {audit.state}"
            if audit.state in ("drawn", "passed", "mismatch", "unaudited") and (
                line not in self.told
            ):
                self.told.add(line)
                say(f"            audit of {line}")
        audits: dict[str, int] = {}
        for audit in detail.audits:
            audits[audit.state] = audits.get(audit.state, 0) + 1
        loss = "" if brief.loss is None else f"  loss {brief.loss / 1e6:.3f}"
        told = "  ".join(
            [
                f"{brief.state:10}",
                *(
                    f"stage {slot.stage} {self.names.get(slot.worker, '?')} "
                    f"{slot.segment:2}/{brief.rounds} settled {slot.settled:2}"
                    for slot in detail.slots
                ),
                "audits "
                + (", ".join(f"{n} {state}" for state, n in sorted(audits.items())) or "none"),
                f"paid {brief.spent}",
            ]
        )
        for former in detail.former:
            who = self.names.get(former.node, "?")
            line = f"{who} lost stage {former.stage}: {former.cause}"
            if line not in self.told:
                self.told.add(line)
                say(f"            {line}")
        if told + loss != self.shown:
            self.shown = told + loss
            say(f"{time.monotonic() - self.began:6.0f} s    {told}{loss}")

    # faults ----------------------------------------------------------------------------------

    def _maybe_kill(self, detail: JobDetail) -> None:
        kind = self.options.kill
        reached = any(slot.segment >= self.options.kill_round for slot in detail.slots)
        if kind is None or self.killed or not reached:
            return
        self.killed = True
        if kind == "validator":
            say(f"killing the validator {self.network.nodes[BYSTANDER].name} with -9")
            self.network.kill(BYSTANDER)
            time.sleep(3)  # the network lives on without it for a while
            self.network.start(BYSTANDER)
            self.network.wait_ready([BYSTANDER])
            say("it is back")
            return
        slot = detail.slots[0]
        index = [node.node for node in self.network.nodes].index(slot.worker)
        if kind == "node":
            say(f"killing {self.network.nodes[index].name} with -9, for good")
            self.network.kill(index)
            return
        victims = list(self._processes(index, kind))
        if not victims:
            raise RunFailed(f"no {kind} process of {self.network.nodes[index].name} to kill")
        say(f"killing the {kind} of {self.network.nodes[index].name} with -9")
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    def _processes(self, index: int, kind: str) -> Iterator[int]:
        """The carrier or the workers of a node. Workers are forked, with their parent's name."""
        daemon = self.network.process(index)
        assert daemon is not None
        parents, words = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, ValueError):
                    stat = (entry / "stat").read_text()
                    parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
                    words[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
        children = {pid for pid, parent in parents.items() if parent == daemon.pid}
        if kind == "carrier":
            yield from (pid for pid in children if b"tdmld.node.carrier" in words[pid])
            return
        zygotes = {pid for pid in children if b"tdmld.node.zygote" in words[pid]}
        yield from (pid for pid, parent in parents.items() if parent in zygotes)
        yield from (pid for pid in children if b"tdmld.node.worker" in words[pid])

    def _liar(self) -> str:
        """Owner of the node whose worker flipped a bit; "" when none did."""
        if not self.lied.exists():
            return ""
        return self.daemons.get(int(self.lied.read_text()), "")

    # what came out ---------------------------------------------------------------------------

    def _fetch(self, job: str) -> dict[str, Any]:
        out = self.options.out / "model"
        shutil.rmtree(out, ignore_errors=True)
        fetched = tdmld("job", "fetch", job, out, *submitter(self.network, SUBMITTER))
        say(f"fetched the model into {fetched['directory']}")
        return {"export_dir": str(out), "provenance": str(out / "provenance.json")}

    def _account(
        self, detail: JobDetail, before: dict[str, int], after: dict[str, int]
    ) -> dict[str, Any]:
        """Money, from the exported ledger of the submitter's stopped node."""
        ledger = read_ledger(self.network.data_dir(SUBMITTER))
        paid = {who: int(amount) for who, amount in detail.payments.items() if int(amount)}
        submitter = self.network.nodes[SUBMITTER].owner
        spent = before[submitter] - after[submitter]
        exact = spent == sum(paid.values()) + ledger.burned and all(
            after[owner] - before[owner] == paid.get(owner, 0)
            for owner in before
            if owner != submitter
        )
        return {
            "rounds": detail.summary.rounds,
            "reason": detail.summary.reason,
            "audits_passed": sum(audit.state == "passed" for audit in detail.audits),
            "audits_mismatched": sum(audit.state == "mismatch" for audit in detail.audits),
            "auditors": len({a.auditor for a in detail.audits if a.state == "passed"}),
            "paid": paid,
            "spent": spent,
            "burned": ledger.burned,
            "spent_is_paid_plus_burned": exact,
            "supply_conserved": ledger.total == ledger.supply,
            "convicted": sorted({former.owner for former in detail.former if former.convicted}),
            "liar": self._liar(),
            "liar_settled": sum(former.settled for former in detail.former if former.convicted),
            "segment_steps": detail.segment_steps,
            "first_standby": self.standby,
            "first_worker": self.worker,
            "replacement": detail.slots[0].worker,
            "workers": sorted({slot.worker for slot in detail.slots}),
            "owners": {node.node: node.owner for node in self.network.nodes},
            "standby": [standby.node for standby in detail.standbys],
            "losses": [loss.loss / 1e6 for loss in detail.losses],
            "height": ledger.height,
        }

    def _verify(self, found: dict[str, Any]) -> dict[str, Any]:
        """Train again in one process and compare everything."""
        say("training the same spec in one process, unsplit, to compare every bit ...")
        reference = self.options.out / "reference"
        shutil.rmtree(reference, ignore_errors=True)
        made = tdmld("reference", self.job_file, "--out", reference)
        record = check(Path(found["provenance"]).read_bytes())
        export = Path(found["export_dir"])
        roots = json.loads(Path(made["roots"]).read_bytes())
        equal = record["result"] == made["result_id"] and same_roots(record, roots)
        equal = equal and same_files(export, Path(made["export_dir"]))
        sample = tdmld("evaluate", export, "--job", self.job_file, "--length", "240")
        return {
            "bitwise_reference": equal,
            "loss_plain": self._plain_loss(export),
            "loss_first": found["losses"][0],
            "loss_last": found["losses"][-1],
            "loss_heldout": sample["loss_heldout"],
            "loss_heldout_reference": made["loss_heldout"],
            "sample": sample["sample"],
        }

    def _plain_loss(self, export: Path) -> float:
        """The held-out loss by a Python process that knows transformers and nothing of tdmld."""
        job = load_job_file(self.job_file)
        arguments = [str(export), str(job.text_path), str(job.spec.data.sequence)]
        done = subprocess.run(
            [sys.executable, str(PLAIN), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RunFailed(f"plain Python cannot load the model: {done.stderr[-500:]}")
        return float(done.stdout)


def checks(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Everything that must hold, by name."""
    yield "the supply is conserved", found["supply_conserved"]
    yield (
        "the submitter paid what others got plus what was burned",
        found["spent_is_paid_plus_burned"],
    )
    if options.cheater:
        yield (
            "an audit found the flipped bit, and named who flipped it",
            (found["convicted"] == [found["liar"]]),
        )
        honest = found["liar_settled"]
        yield (
            "who cheated was paid for nothing from the lie on",
            (
                honest <= LIE_AT_STEP // found["segment_steps"]
                and (honest > 0 or found["liar"] not in found["paid"])
            ),
        )
        yield "the standby took the place", found["replacement"] == found["first_standby"]
    if options.kill == "node":
        yield "another node took the place", found["replacement"] != found["first_worker"]
    yield "the job is closed", found["state"] == "closed"
    yield "there is a model", "export_dir" in found
    if "export_dir" not in found:
        return
    yield "bit for bit the reference", found["bitwise_reference"]
    yield "at least two audits passed", found["audits_passed"] >= 2
    if not options.cheater and options.kill != "node":  # one of them may stand by now
        yield "at least two auditors", found["auditors"] >= 2
    owners = found["owners"]
    earners = {owners[node] for node in [*found["workers"], found["first_standby"]]}
    yield "workers and standby were paid", earners <= set(found["paid"])
    if options.bound:
        yield f"held-out loss below {HELDOUT_BOUND}", found["loss_heldout"] < HELDOUT_BOUND
    yield (
        "plain Python loads the model and measures the same loss",
        abs(found["loss_plain"] - found["loss_heldout"]) < 1e-4,
    )
    yield (
        "the held-out loss is the reference's",
        (found["loss_heldout"] == found["loss_heldout_reference"]),
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo-out", help="where model and reference go"
    )
    parser.add_argument("--tui", action="store_true", help="show the dashboard meanwhile")
    parser.add_argument(
        "--cheater", action="store_true", help="a worker flips one bit of one gradient, once"
    )
    parser.add_argument("--kill", choices=["validator", "worker", "carrier", "node"])
    parser.add_argument("--kill-round", type=int, default=ROUND_OF_THE_KILL, help=argparse.SUPPRESS)
    parser.add_argument(
        "--job", type=Path, default=ROOT / "examples" / "plays-3m.toml", help="another job file"
    )
    parser.add_argument("--parameters", default="{}", help="genesis parameters to replace, as JSON")
    options = parser.parse_args(arguments)
    options.bound = options.job == parser.get_default("job")
    options.out = options.out.absolute()
    options.job = options.job.absolute()
    return options


def dashboard(demo: Demo, result: dict[str, Any]) -> None:
    """Run the demo behind the dashboard of the submitter's node."""

    def behind() -> None:
        try:
            result.update(demo.run())
        except BaseException as error:
            result["error"] = error

    log = demo.directory / "demo.log"
    with log.open("w") as file:
        terminal, sys.stderr = sys.stderr, file
        thread = threading.Thread(target=behind)
        thread.start()
        try:
            data_dir = str(demo.network.data_dir(SUBMITTER))
            command = [sys.executable, "-m", "tdmld", "tui", "--data-dir", data_dir]
            while thread.is_alive() and not demo.network.ready(SUBMITTER):
                time.sleep(0.1)
            subprocess.run(command, cwd=ROOT, check=False)
            thread.join()
        finally:
            sys.stderr = terminal
    say(log.read_text())


def keep_network(demo: Demo, out: Path) -> None:
    """Keep the nodes' directories: their logs say what went wrong."""
    keep = out / "failed-network"
    shutil.rmtree(keep, ignore_errors=True)
    shutil.copytree(demo.network.directory, keep, ignore=shutil.ignore_patterns("LOCK"))
    say(f"the nodes' directories are kept in {keep}")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report("scripts/demo")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tdmld-demo-", ignore_cleanup_errors=True) as temporary:
        demo = Demo(options, Path(temporary))
        try:
            if options.tui:
                dashboard(demo, found)
                if isinstance(found.get("error"), BaseException):
                    raise found["error"]
            else:
                found = demo.run()
        except (RunFailed, RpcError, UserError, trio.TooSlowError) as error:
            say(f"the demo failed: {error or type(error).__name__}")
            keep_network(demo, options.out)
            return 1
        results = list(checks(options, found))
        if not all(holds for _, holds in results):
            keep_network(demo, options.out)
    say()
    for name, holds in results:
        say(f"  {'ok  ' if holds else 'FAIL'}  {name}")
    say()
    for key in ("state", "reason", "rounds", "audits_passed", "loss_first", "loss_last"):
        if key in found:
            say(f"  {key:16} {found[key]}")
    if "loss_heldout" in found:
        say(f"  {'loss_heldout':16} {found['loss_heldout']} nats a byte")
    say(f"  {'spent':16} {found['spent']} by {demo.names[demo.network.nodes[SUBMITTER].owner]}")
    for who, amount in sorted(found["paid"].items(), key=lambda row: -row[1]):
        say(f"  {'paid':16} {amount} to {demo.names.get(who, '?')} ({short(who)})")
    say(f"  {'burned':16} {found['burned']} in fees")
    say(f"  seconds          {report.seconds:.1f}")
    if "sample" in found:
        say("\n  the model writes:\n")
        say("    " + found["sample"].replace("\n", "\n    "))
    passed = all(holds for _, holds in results)
    report.document |= found | {"ok": passed}
    report.write(options.json)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
