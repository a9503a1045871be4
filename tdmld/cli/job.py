"""`tdmld job submit|estimate|recut|list|status|watch|fetch`"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from tdmld.chain.transactions import Fetched
from tdmld.cli.common import AsJson, DataDir, PasswordFile, emit
from tdmld.cli.exits import Exit
from tdmld.cli.jobtext import event_line, render_job, render_list
from tdmld.cli.node import (
    connect,
    fee_floor,
    has_keystore,
    load_account,
    load_rules,
    open_owner_key,
    owner,
    send,
)
from tdmld.cli.password import has_password
from tdmld.cli.text import job_id, size
from tdmld.errors import UserError
from tdmld.rpc.client import Client
from tdmld.rpc.errors import NotReady
from tdmld.rpc.types import (
    FINAL_JOB_STATES,
    FetchedResult,
    JobDetail,
    JobEvent,
    JobSummary,
    NodeStatus,
    Published,
)

app = App(name="job", help="Submit, follow and fetch training jobs.", help_format="plaintext")
app.command(
    "tdmld.cli.recut:recut",
    name="recut",
    help="Make of a boundary what another job begins with.",
)
app.command(
    "tdmld.cli.estimate:estimate", name="estimate", help="Tell what a job will take, beforehand."
)

JobId = Annotated[str, Parameter(help="The job's id, or enough of its first characters.")]
PUBLISH_SECONDS = 600.0
"""The node reads and cuts the whole text."""


@app.command
async def submit(
    file: Path,
    /,
    *,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    wait: Annotated[bool, Parameter(negative="")] = False,
    json: AsJson = False,
) -> int:
    """Offer a training job on the chain; its money is locked until it is done.

    Prints the job's id. The node takes a copy of the text and serves it to the job's workers.

    Parameters
    ----------
    file: The job file (TOML).
    wait: Stay until the model is ready; exit 1 if the job fails.
    """
    from tdmld.cli.offer import check_funds, estimate, lock, make_offer, read_job_file

    job = read_job_file(file)
    async with connect(data_dir) as client:
        status = await client.call("node_status", {}, NodeStatus)
        _check_ready(status)
        rules = await load_rules(client)
        account = await load_account(client, owner(data_dir))
        offer = make_offer(job, status)
        locked, fee = lock(offer, rules), fee_floor(rules)
        _progress(*estimate(job, offer, locked, fee))
        check_funds(locked, fee, int(account.balance), account.address)
        key = await open_owner_key(data_dir, password_file)
        _progress("handing text and spec to the node ...")
        params = {"spec": job.raw.decode(), "text_path": str(job.text_path.resolve())}
        if job.given_path is not None:
            params["given_path"] = str(job.given_path.resolve())
        published = await client.call(
            "job_publish", {**params, "name": job.name}, Published, patience=PUBLISH_SECONDS
        )
        _progress(f"  {published.shards} shards, {size(published.size)}; waiting for the chain ...")
        done = await send(client, key, offer, rules, account)
        document = {
            "job": done.id,
            "name": job.name,
            "spec_id": published.spec_id,
            "block": done.block,
            "locked": str(locked.total + fee),
        }
        if not wait:
            text = [done.id, f"next: tdmld job watch {done.id[:12]}"]
            emit(document, text[:1], as_json=json)
            _progress(text[1])
            return Exit.OK
        _progress(f"job {done.id}")
        detail = await _follow(client, done.id, lambda event: _progress(event_line(event)))
    emit(document | {"detail": msgspec.to_builtins(detail)}, render_job(detail), as_json=json)
    return _verdict(detail)


@app.command(name="list")
async def list_jobs(*, data_dir: DataDir = None, json: AsJson = False) -> None:
    """List the jobs of the chain, newest first."""
    async with connect(data_dir) as client:
        jobs = await client.call("job_list", {}, tuple[JobSummary, ...])
    emit(msgspec.to_builtins(jobs), render_list(jobs), as_json=json)


@app.command
async def status(job: JobId, /, *, data_dir: DataDir = None, json: AsJson = False) -> None:
    """Show where a job stands: slots, audits, loss, money."""
    async with connect(data_dir) as client:
        detail = await _load(client, await _resolve(client, job))
    emit(msgspec.to_builtins(detail), render_job(detail), as_json=json)


@app.command
async def watch(job: JobId, /, *, data_dir: DataDir = None, json: AsJson = False) -> int:
    """Show a job's events as they come, until its model is ready or it failed (then exit 1).

    With --json one JSON object a line; the last one is the job as `job status --json` shows it.
    """

    def show(event: JobEvent) -> None:
        line = msgspec.json.encode(event).decode() if json else event_line(event)
        print(line, flush=True)

    async with connect(data_dir) as client:
        detail = await _follow(client, await _resolve(client, job), show)
    if json:
        print(msgspec.json.encode(detail).decode(), flush=True)
    else:
        print("\n".join(["", *render_job(detail)]), flush=True)
    return _verdict(detail)


@app.command
async def fetch(
    job: JobId,
    out: Path = Path(),
    /,
    *,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    receipt: Annotated[bool, Parameter(negative="--no-receipt")] = True,
    job_file: Path | None = None,
    json: AsJson = False,
) -> None:
    """Fetch a finished job's model, verified, as a directory that from_pretrained loads.

    The submitter also signs a receipt, which closes the job and gives the rest of the money back.

    Parameters
    ----------
    out: Where to put it (default: a directory named by the job's id).
    receipt: Sign the receipt, if the owner's keystore is here and its password is at hand.
    job_file: The job file: the tokenizer of its data is put beside the model.
    """
    named = tokenizer = None
    if job_file is not None:
        from tdmld.cli.offer import read_job_file
        from tdmld.train.spec import spec_id

        named = read_job_file(job_file)
        tokenizer = named.tokenizer_path
    async with connect(data_dir) as client:
        detail = await _load(client, await _resolve(client, job))
        brief = detail.summary
        if named is not None and spec_id(named.raw).hex() != detail.spec_id:
            raise UserError(
                f"{job_file} is not the file of job {brief.id[:12]}",
                why="its spec is another one",
                next="name the file as it was submitted, or leave it out",
                exit_code=Exit.USAGE,
            )
        target = (out if out != Path() else Path(brief.id[:12])).absolute()
        _progress(f"fetching {brief.name or brief.id[:12]} into {target} ...")
        params = {"id": brief.id, "out_dir": str(target)}
        found = await client.call("job_fetch", params, FetchedResult, patience=None)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, Path(found.directory) / tokenizer.name)
        transaction = None
        if receipt and brief.state == "finishing" and has_keystore(data_dir, brief.submitter):
            if has_password(password_file):
                key = await open_owner_key(data_dir, password_file)
                account = await load_account(client, brief.submitter)
                payload = Fetched(bytes.fromhex(brief.id))
                done = await send(client, key, payload, await load_rules(client), account)
                transaction = done.id
            else:
                _progress(
                    "no receipt was signed: no password file and no terminal; "
                    "the job closes by itself later"
                )
    lines = [found.directory]
    lines += [f"  {file.name:<28}{size(file.size):>12}" for file in found.files]
    if transaction is not None:
        lines.append(f"receipt signed: {transaction}")
    emit(msgspec.to_builtins(found) | {"receipt": transaction}, lines, as_json=json)


async def _follow(client: Client, id: str, show: Callable[[JobEvent], None]) -> JobDetail:
    """Show events until the job needs no more waiting; its last state."""
    async with client.subscribe("job_subscribe", {"id": id}, JobEvent) as events:
        # Subscribed first, looked second: nothing can happen unseen in between.
        detail = await _load(client, id)
        if not _ready(detail):
            async for event in events:
                show(event)
                if event.kind in ("state", "result"):
                    detail = await _load(client, id)
                    if _ready(detail):
                        break
    return await _load(client, id)


async def _load(client: Client, id: str) -> JobDetail:
    return await client.call("job_status", {"id": id}, JobDetail)


async def _resolve(client: Client, given: str) -> str:
    """A full id from its beginning."""
    wanted = job_id(given)
    if len(wanted) == 64:
        return wanted
    if not wanted or not set(wanted) <= set("0123456789abcdef"):
        raise UserError(f"{given!r} is not a job id", next="tdmld job list", exit_code=Exit.USAGE)
    jobs = await client.call("job_list", {}, tuple[JobSummary, ...])
    found = [one.id for one in jobs if one.id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"no job begins with {wanted}" if not found else f"{len(found)} jobs begin with {wanted}",
        next="tdmld job list" if not found else "give more of the id",
        exit_code=Exit.NOT_FOUND,
    )


def _ready(detail: JobDetail) -> bool:
    return detail.summary.state in FINAL_JOB_STATES or detail.result is not None


def _verdict(detail: JobDetail) -> Exit:
    return Exit.FAILED if detail.summary.state in ("refunded", "expired") else Exit.OK


def _check_ready(status: NodeStatus) -> None:
    if status.syncing:
        raise NotReady("the node is still catching up with the chain; wait, then: tdmld status")
    if not status.session:
        raise NotReady("the node has no carrier, so it cannot serve data; look into its logs")


def _progress(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
