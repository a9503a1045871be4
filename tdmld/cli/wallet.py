"""`tdmld wallet balance|send`"""

from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from tdmld.chain.transactions import Transfer
from tdmld.cli.common import AsJson, DataDir, PasswordFile, emit
from tdmld.cli.node import (
    check_address,
    check_amount,
    check_funds,
    choose_address,
    connect,
    load_account,
    load_rules,
    open_owner_key,
    owner,
    send,
)
from tdmld.cli.text import units
from tdmld.rpc.types import AccountInfo

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
        account = await load_account(client, await choose_address(client, address, data_dir))
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
    check_amount(amount, "sent")
    async with connect(data_dir) as client:
        rules = await load_rules(client)
        account = await load_account(client, owner(data_dir))
        check_funds(account, rules, amount, f"to send {units(amount)}")
        key = await open_owner_key(data_dir, password_file)
        status = await send(client, key, Transfer(receiver, amount), rules, account)
    document = msgspec.to_builtins(status) | {"to": to, "amount": str(amount)}
    text = f"sent {units(amount)} to {to}; final in block {status.block}, transaction {status.id}"
    emit(document, text, as_json=json)


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
