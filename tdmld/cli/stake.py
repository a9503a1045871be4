"""`tdmld stake show|bond|unbond|withdraw|nominate`: the owner's stake, and who votes for it."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from tdmld.chain.blocks import epoch_of
from tdmld.chain.transactions import Bond, Nominate, Payload, Unbond, Withdraw
from tdmld.cli.common import AsJson, DataDir, PasswordFile, emit, table
from tdmld.cli.exits import Exit
from tdmld.cli.node import (
    check_address,
    check_amount,
    check_funds,
    choose_address,
    connect,
    load_account,
    load_keys,
    load_rules,
    load_stake,
    open_owner_key,
    owner,
    send,
)
from tdmld.cli.text import short, span, units
from tdmld.errors import UserError
from tdmld.rpc.client import Client
from tdmld.rpc.staketypes import Bucket, NodeKeyInfo, StakeInfo, UnbondingInfo
from tdmld.rpc.types import AccountInfo, ChainParameters, NodeStatus, TransactionStatus

app = App(name="stake", help="The owner's stake.", help_format="plaintext")

Amount = Annotated[int, Parameter(help="Units, a whole number above zero.")]
BucketName = Annotated[
    Bucket, Parameter(help="vote: it validates, and is burned for double votes. work: for jobs.")
]


@app.command
async def show(
    address: str | None = None, /, *, data_dir: DataDir = None, json: AsJson = False
) -> None:
    """Show stake, seats, what unbinds and when, offences: by default the owner's of this directory.

    Parameters
    ----------
    address: Another owner (12D3Koo...).
    """
    if address is not None:
        check_address(address)
    async with connect(data_dir) as client:
        found = await load_stake(client, await choose_address(client, address, data_dir))
    emit(msgspec.to_builtins(found), render(found), as_json=json)


@app.command
async def bond(
    bucket: BucketName,
    amount: Amount,
    /,
    *,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    json: AsJson = False,
) -> None:
    """Bind money of the owner as stake, and wait until that is final."""
    check_amount(amount, "bonded")
    async with connect(data_dir) as client:
        rules, account = await _begin(client, data_dir)
        check_funds(account, rules, amount, f"to bond {units(amount)}")
        before = await load_stake(client, account.address)
        payload = Bond(bucket, amount)
        status = await _do(client, data_dir, password_file, payload, rules, account)
    lines = [f"bonded {units(amount)} as {bucket} stake; {_where(status)}"]
    if bucket == "vote" and before.nominee:
        lines.append(f"it votes from epoch {_decided(status, rules):,} on, at the earliest")
    elif bucket == "vote":
        lines.append("no node votes for it yet: tdmld stake nominate")
    _tell(status, {"bucket": bucket, "amount": str(amount)}, lines, as_json=json)


@app.command
async def unbond(
    bucket: BucketName,
    amount: Amount,
    /,
    *,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    json: AsJson = False,
) -> None:
    """Take stake out of a bucket. It can be withdrawn when both unbonding windows are over."""
    check_amount(amount, "unbonded")
    async with connect(data_dir) as client:
        rules, account = await _begin(client, data_dir)
        bound = int(account.vote_stake if bucket == "vote" else account.work_stake)
        if amount > bound:
            raise UserError(
                f"{short(account.address)} has {units(bound)} of {bucket} stake, not "
                f"{units(amount)}",
                next="tdmld stake show",
                exit_code=Exit.REFUSED,
            )
        check_funds(account, rules, 0, "to unbond")
        payload = Unbond(bucket, amount)
        status = await _do(client, data_dir, password_file, payload, rules, account)
        found = await load_stake(client, account.address)
    lines = [f"unbonding {units(amount)} of {bucket} stake; {_where(status)}"]
    if bucket == "vote":
        last = _decided(status, rules) - 1
        lines.append(f"it may vote until epoch {last:,} is over: keep the node running until then")
    entries = [entry for entry in found.unbonding if entry.bucket == bucket]
    for entry in sorted(entries, key=lambda entry: entry.epoch)[-1:]:
        lines.append(f"{units(entry.amount)} {_when(found, entry)}")
    lines.append("then: tdmld stake withdraw")
    _tell(status, {"bucket": bucket, "amount": str(amount)}, lines, as_json=json)


@app.command
async def withdraw(
    *,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    json: AsJson = False,
) -> None:
    """Bring everything whose unbonding windows are over back to the balance."""
    async with connect(data_dir) as client:
        rules, account = await _begin(client, data_dir)
        found = await load_stake(client, account.address)
        ready = sum(int(entry.amount) for entry in found.unbonding if entry.ready)
        if not found.unbonding:
            raise UserError(
                f"nothing of {short(account.address)} unbinds",
                next="tdmld stake unbond vote AMOUNT",
                exit_code=Exit.REFUSED,
            )
        if not ready:
            first = min(found.unbonding, key=lambda entry: entry.epoch)
            raise UserError(
                "nothing can be withdrawn yet",
                why=f"{units(first.amount)} of {first.bucket} stake {_when(found, first)}",
                next="the same again then; tdmld stake show",
                exit_code=Exit.REFUSED,
            )
        check_funds(account, rules, 0, "to withdraw")
        status = await _do(client, data_dir, password_file, Withdraw(), rules, account)
    line = f"withdrew {units(ready)} to the balance; {_where(status)}"
    _tell(status, {"amount": str(ready)}, [line], as_json=json)


@app.command
async def nominate(
    node: str | None = None,
    /,
    *,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    json: AsJson = False,
) -> None:
    """Name the node that votes for the owner's vote stake; a later one replaces it.

    Parameters
    ----------
    node: A node key of the owner (12D3Koo..., see tdmld keys list); by default the running node's.
    """
    if node is not None:
        check_address(node)
    async with connect(data_dir) as client:
        rules, account = await _begin(client, data_dir)
        chosen = node or (await client.call("node_status", {}, NodeStatus)).node
        _check_key(chosen, account, await load_keys(client, account.address))
        least = rules.parameters.get("vote_stake_min", 1)
        if isinstance(least, int) and int(account.vote_stake) < least:
            raise UserError(
                f"{short(account.address)} has {units(account.vote_stake)} of vote stake",
                why=f"a validator needs at least {units(least)}",
                next="tdmld stake bond vote AMOUNT",
                exit_code=Exit.REFUSED,
            )
        check_funds(account, rules, 0, "to nominate")
        payload = Nominate(check_address(chosen))
        status = await _do(client, data_dir, password_file, payload, rules, account)
    lines = [
        f"{chosen} votes for {units(account.vote_stake)}; {_where(status)}",
        f"from epoch {_decided(status, rules):,} on, at the earliest: tdmld stake show",
    ]
    _tell(status, {"node": chosen}, lines, as_json=json)


def render(found: StakeInfo) -> list[str]:
    """The lines for people."""
    total = sum(int(entry.amount) for entry in found.unbonding)
    rows = (
        ("vote stake", found.vote_stake),
        ("work stake", found.work_stake),
        ("unbonding", total),
    )
    lines = [
        found.address,
        *(f"  {name:<11}{units(value):>22}" for name, value in rows),
        f"  nominated  {found.nominee or 'none: tdmld stake nominate'}",
        "",
        f"epoch {found.epoch:,} (to block {found.epoch_end:,}): {_seat(found, found.epoch)}",
        f"epoch {found.epoch + 1:,} (fixed already): {_seat(found, found.epoch + 1)}",
    ]
    if found.unbonding:
        lines.append("")
        lines += table(
            ("unbonding", "amount", "from block", "after", "left"),
            [
                (
                    entry.bucket,
                    units(entry.amount),
                    units(entry.from_height),
                    entry.after or f"epoch {entry.epoch:,} has begun",
                    _left(found, entry),
                )
                for entry in found.unbonding
            ],
        )
    if found.offences:
        lines.append("")
        lines += table(
            ("voted twice", "in epoch", "proven at", "burned"),
            [
                (one.node, units(one.epoch), units(one.height), units(one.burned))
                for one in found.offences
            ],
        )
    return [*lines, f"as of height {found.height:,}, {found.time}"]


def _seat(found: StakeInfo, epoch: int) -> str:
    seats = [seat for seat in found.seats if seat.epoch == epoch]
    return "; ".join(
        f"{short(seat.node)} votes with {units(seat.weight)} of {units(seat.total)} "
        f"({100 * int(seat.weight) / int(seat.total):.1f} %)"
        + ("" if seat.leads else ", without turns to lead (jailed)")
        for seat in seats
    ) or ("no seat")


def _left(found: StakeInfo, entry: UnbondingInfo) -> str:
    """What is still to pass, by the chain's clock."""
    if entry.ready:
        return "ready"
    blocks = max(0, entry.from_height - found.height - 1)
    left = [f"{blocks:,} blocks"] if blocks else []
    if entry.after:
        seconds = (_moment(entry.after) - _moment(found.time)).total_seconds()
        left += [span(seconds)] if seconds >= 0 else []
    return ", ".join(left) or "the next block"


def _when(found: StakeInfo, entry: UnbondingInfo) -> str:
    """ "can be withdrawn from ... on"."""
    if entry.ready:
        return "can be withdrawn now"
    begin = entry.after or f"the time window that begins with epoch {entry.epoch:,}"
    return (
        f"can be withdrawn from block {entry.from_height:,} on and after {begin} "
        f"(left: {_left(found, entry)})"
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _check_key(node: str, account: AccountInfo, known: tuple[NodeKeyInfo, ...]) -> None:
    """UserError for a key that cannot be nominated."""
    key = next((key for key in known if key.node == node), None)
    if key is None:
        raise UserError(
            f"{node} is not registered to {short(account.address)}",
            next="tdmld keys register",
            exit_code=Exit.REFUSED,
        )
    if key.revoked or key.convicted:
        raise UserError(
            f"{node} cannot validate any more",
            why=f"it was revoked at height {key.revoked:,}"
            if key.revoked
            else f"it voted twice, as was proven at height {key.convicted:,}",
            next="register another key: tdmld keys register --node-key FILE",
            exit_code=Exit.REFUSED,
        )


def _decided(status: TransactionStatus, rules: ChainParameters) -> int:
    """The first epoch whose validators are chosen after the transaction (EPOCH-2)."""
    blocks = rules.parameters.get("epoch_blocks", 1)
    return epoch_of(status.block or 1, blocks if isinstance(blocks, int) else 1) + 2


async def _begin(client: Client, data_dir: Path | None) -> tuple[ChainParameters, AccountInfo]:
    return await load_rules(client), await load_account(client, owner(data_dir))


async def _do(
    client: Client,
    data_dir: Path | None,
    password_file: Path | None,
    payload: Payload,
    rules: ChainParameters,
    account: AccountInfo,
) -> TransactionStatus:
    key = await open_owner_key(data_dir, password_file)
    return await send(client, key, payload, rules, account)


def _where(status: TransactionStatus) -> str:
    return f"final in block {status.block}, transaction {status.id}"


def _tell(
    status: TransactionStatus, more: dict[str, str], lines: list[str], *, as_json: bool
) -> None:
    emit(msgspec.to_builtins(status) | more, lines, as_json=as_json)
