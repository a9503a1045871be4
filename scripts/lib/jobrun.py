"""One job on a network of real nodes, as its submitter sees it: what demo and benchmarks share."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import trio
from report import ROOT

from tdmld.devnet import Devnet
from tdmld.rpc.access import read_access
from tdmld.rpc.client import Client
from tdmld.rpc.types import FINAL_JOB_STATES, JobDetail, NodeStatus

POLL_SECONDS = 1.0
ASK_SECONDS = 120.0


class RunFailed(Exception):
    """The network or a command did not do what it must; the text says what."""


def tdmld(*arguments: str | Path) -> dict[str, Any]:
    """Run a command of tdmld with --json; its document."""
    command = [sys.executable, "-m", "tdmld", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=sys.stderr, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise RunFailed(f"`tdmld {' '.join(map(str, arguments))}` exited {done.returncode}")
    return dict(json.loads(done.stdout))


def submitter(network: Devnet, index: int) -> tuple[str | Path, ...]:
    """Options that make a command speak for the owner of node `index`."""
    return (
        *("--data-dir", network.data_dir(index)),
        *("--password-file", network.password_file(index)),
    )


def client(network: Devnet, index: int) -> Client:
    """A client of node `index`; open it with `async with`."""
    return Client(read_access(network.data_dir(index)))


async def wait_for_asks(network: Devnet, indices: Collection[int]) -> None:
    """Return when these nodes ask for work, and others can dial them. A matching looks at the asks
    that stand, once. RunFailed after ASK_SECONDS."""
    with trio.move_on_after(ASK_SECONDS):
        for index in indices:
            async with client(network, index) as node:
                while True:
                    status = await node.call("node_status", {}, NodeStatus)
                    if status.ask is not None and status.ask.open:
                        break
                    await trio.sleep(POLL_SECONDS)
        return
    raise RunFailed(f"not every node asked for work within {ASK_SECONDS:g} s")


async def watch(
    network: Devnet, index: int, job: str, seconds: float, show: Callable[[JobDetail], None]
) -> JobDetail:
    """Follow a job until its result can be fetched or it is over. RunFailed after `seconds`."""
    with trio.move_on_after(seconds):
        async with client(network, index) as node:
            while True:
                detail = await node.call("job_status", {"id": job}, JobDetail)
                show(detail)
                known = detail.result is not None and len(detail.result.holders) > 1
                if known or detail.summary.state in FINAL_JOB_STATES:
                    return detail
                await trio.sleep(POLL_SECONDS)
    raise RunFailed(f"job {job[:12]} was not over within {seconds:g} s")


def same_roots(record: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Whether every state root of a provenance record is the reference's, and none is missing."""
    boundaries = reference["boundaries"]
    compared = 0
    for slot in record["slots"]:
        name = f"{slot['lane']}.{slot['stage']}"
        for segment in slot["segments"]:
            expected = boundaries[segment["segment"] + 1][name]
            if expected != [segment["end_shared"], segment["end_lane"]]:
                return False
            compared += 1
    return compared == (len(boundaries) - 1) * len(boundaries[0])


def same_files(export: Path, made: Path) -> bool:
    """Whether two results hold the same model."""
    return all(
        (export / name).read_bytes() == (made / name).read_bytes()
        for name in ("model.safetensors", "config.json")
    )
