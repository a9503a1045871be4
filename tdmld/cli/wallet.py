"""`tdmld wallet balance|send`"""

from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from tdmld.chain.crypto import public_key
from tdmld.chain.errors import DecodeError
from tdmld.chain.transactions import Transfer
from tdmld.cli.common import AsJson, DataDir, PasswordFile, emit
from tdmld.cli.exits import Exit
from tdmld.cli.node import (
    connect,
    fee_floor,
    load_account,
    load_rules,
    open_owner_key,
    owner,
    send,
)
from tdmld.cli.text import short, units
from tdmld.errors import UserError
from tdmld.keys import KeyFileError
from tdmld.rpc.client import Client
from tdmld.rpc.types import AccountInfo, NodeStatus

app = App(name="wallet", help="The owner's money.", help_format="plaintext")


@app.command
async def balance(
    address: str | None = None, /, *, data_dir: DataDir = None, json: AsJson = False
) -> None:
    """Show what an account has: by default the owner's of this directory.

    Parameters
    ----------
    address: Another account (12D3Koo...).
    """
    if address is not None:
        check_address(address)
    async with connect(data_dir) as client:
        chosen = address or await _default_address(client, data_dir)
        account = await load_account(client, chosen)
    emit(msgspec.to_builtins(account), render(account), as_json=json)


@app.command(name="send")
async def send_money(
    to: str,
    amount: Annotated[int, Parameter(help="Units, a whole number above zero.")],
    /,
    *,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    json: AsJson = False,
) -> None:
    """Send money from the owner's account and wait until it is final.

    Parameters
    ----------
    to: The receiver's address (12D3Koo...).
    """
    receiver = check_address(to)
    if not 0 < amount < 2**63:
        raise UserError(
            f"{amount} cannot be sent", next="give a whole number above zero", exit_code=Exit.USAGE
        )
    async with connect(data_dir) as client:
        rules = await load_rules(client)
        account = await load_account(client, owner(data_dir))
        cost = amount + fee_floor(rules)
        if cost > int(account.balance):
            raise UserError(
                f"{short(account.address)} has {units(account.balance)}, not enough to send "
                f"{units(amount)}",
                why=f"with the fee of {fee_floor(rules)} it takes {units(cost)}",
                exit_code=Exit.REFUSED,
            )
        key = await open_owner_key(data_dir, password_file)
        status = await send(client, key, Transfer(receiver, amount), rules, account)
    document = msgspec.to_builtins(status) | {"to": to, "amount": str(amount)}
    text = f"sent {units(amount)} to {to}; final in block {status.block}, transaction {status.id}"
    emit(document, text, as_json=json)


def check_address(text: str) -> bytes:
    """The key behind an address; UserError when it is none."""
    try:
        return public_key(text)
    except DecodeError as error:
        raise UserError(
            f"{text} is not an address",
            why=str(error),
            next="addresses look like 12D3KooW... and have 52 characters",
            exit_code=Exit.USAGE,
        ) from error


def render(account: AccountInfo) -> list[str]:
    """The lines for people."""
    rows = [
        ("balance", account.balance),
        ("locked", account.locked),
        ("work stake", account.work_stake),
        ("vote stake", account.vote_stake),
        ("unbonding", account.unbonding),
    ]
    return [
        account.address,
        *(f"  {name:<11}{units(value):>22}" for name, value in rows),
        f"as of height {account.height:,}",
    ]


async def _default_address(client: Client, data_dir: DataDir) -> str:
    try:
        return owner(data_dir)
    except KeyFileError:
        return (await client.call("node_status", {}, NodeStatus)).owner
