"""`tdmld doctor`: whether this node works and can be reached, why not, and what to type."""

import os
from collections.abc import Iterable
from pathlib import Path

from tdmld.cli import doctorchecks as checks
from tdmld.cli.common import AsJson, DataDir, emit, resolve_data_dir
from tdmld.cli.doctorchecks import Check
from tdmld.cli.exits import Exit
from tdmld.cli.node import connect
from tdmld.config import Config, load_config
from tdmld.errors import UserError
from tdmld.rpc.errors import RpcError
from tdmld.rpc.reachtypes import NetReachability
from tdmld.rpc.types import NodeStatus

ASK_SECONDS = 40.0
"""For a node that asks its witnesses again: it takes 20 s for that."""
_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "  - "}


async def doctor(*, data_dir: DataDir = None, refresh: bool = True, json: AsJson = False) -> Exit:
    """Whether this node works and can be reached, why not, and what to type.

    Exit code 1 when a check fails, 3 when all is well but the node does not run.

    Parameters
    ----------
    refresh: Let the node ask others to dial it again; else what it found before is shown.
    """
    found, running = await _examine(data_dir, refresh)
    failed = any(check.state == "fail" for check in found)
    code = Exit.FAILED if failed else Exit.OK if running else Exit.UNREACHABLE
    document = {
        "ok": code == Exit.OK,
        "running": running,
        "checks": [
            {"what": c.what.strip(), "state": c.state, "why": c.why, "next": c.next} for c in found
        ],
    }
    emit(document, render(found), as_json=json)
    return code


def render(found: Iterable[Check]) -> list[str]:
    """The lines for people."""
    rows = list(found)
    width = max((len(check.what) for check in rows), default=0)
    lines = []
    for check in rows:
        lines.append(f"{_MARKS[check.state]}  {check.what.ljust(width)}  {check.why}".rstrip())
        if check.next and check.state != "ok":
            lines.append(f"      {' ' * width}  next: {check.next}")
    return lines


async def _examine(data_dir: Path | None, refresh: bool) -> tuple[list[Check], bool]:
    """All checks, and whether the node runs."""
    found: list[Check] = []
    config: Config | None = None
    remote = data_dir is None and "TDMLD_API_INFO" in os.environ
    directory = resolve_data_dir(data_dir)
    if not remote:
        found += checks.directory(directory)
        if not directory.is_dir():
            return found, False
        config, problem = _config(directory)
        found.append(problem)
        if config is not None:
            found += checks.listening(config)
    try:
        async with connect(data_dir) as client:
            status = await client.call("node_status", {}, NodeStatus)
            found.append(Check("node", "ok", f"{status.node} runs, version {status.version}"))
            found += checks.standing(status, config is None or bool(config.peers))
            reach = await client.call(
                "net_reachability", {"refresh": refresh}, NetReachability, patience=ASK_SECONDS
            )
    except (RpcError, UserError) as error:
        process = None if remote else checks.holder(directory)
        if process is not None or remote:
            why = f"it does not answer: {error}"
            log = directory / "logs" / "daemon.jsonl"
            found.append(Check("node", "fail", why, "" if remote else f"tail {log}"))
            return found, True
        return [*found, *_not_running(directory, config)], False
    found.append(checks.clock(reach))
    found += checks.reach(reach)
    return found, True


def _config(directory: Path) -> tuple[Config | None, Check]:
    try:
        return load_config(directory), Check("configuration", "ok")
    except UserError as error:
        why = f"{error.what}: {error.why}" if error.why else error.what
        return None, Check("configuration", "fail", why, error.next)


def _not_running(directory: Path, config: Config | None) -> Iterable[Check]:
    if config is not None:
        yield from checks.ports(config)
    command = f"tdmld run --data-dir {directory}"
    yield Check("node", "warn", "it does not run: whether it can be reached is not known", command)
