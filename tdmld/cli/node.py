"""How commands reach a node, sign for its owner and wait for the chain."""

from pathlib import Path

import trio

from tdmld.chain.crypto import KeyPair, public_key
from tdmld.chain.errors import DecodeError
from tdmld.chain.transactions import Payload, sign_transaction
from tdmld.cli.exits import Exit
from tdmld.cli.password import get_password
from tdmld.cli.text import short, units
from tdmld.config import default_data_dir
from tdmld.errors import UserError
from tdmld.keys import OWNER_KEYSTORE, KeyFileError, load_owner_key, owner_address
from tdmld.rpc.client import Client, find_access
from tdmld.rpc.errors import NotFound
from tdmld.rpc.staketypes import NodeKeyInfo, StakeInfo
from tdmld.rpc.types import (
    AccountInfo,
    ChainParameters,
    Head,
    NodeStatus,
    Submitted,
    TransactionStatus,
)

EXPIRY_BLOCKS = 200
"""A transaction that did not make it into a block by then never will: it is safe to sign anew."""
FINAL_SECONDS = 60.0
"""How long commands wait for a transaction; a block takes about a second."""


def connect(data_dir: Path | None) -> Client:
    """The client of the node that --data-dir, TDMLD_API_INFO or the default directory names."""
    return Client(find_access(data_dir, default_data_dir()))


def keystore(data_dir: Path | None) -> Path:
    """Where the owner's keystore lies."""
    return (data_dir or default_data_dir()).absolute() / OWNER_KEYSTORE


def owner(data_dir: Path | None) -> str:
    """The owner's address, without a password; KeyFileError when there is no keystore."""
    return owner_address(keystore(data_dir))


async def open_owner_key(data_dir: Path | None, password_file: Path | None) -> KeyPair:
    """Ask for the password and open the keystore (half a second of CPU, in a thread)."""
    path = keystore(data_dir)
    owner_address(path)  # a missing or damaged file is told before anybody types a password
    password = get_password(password_file)
    return await trio.to_thread.run_sync(load_owner_key, path, password)


async def send(
    client: Client, key: KeyPair, payload: Payload, rules: ChainParameters, account: AccountInfo
) -> TransactionStatus:
    """Sign `payload` with the account's next nonce, submit it, and wait until it is final.

    UserError: the transaction failed on the chain, or is not final after FINAL_SECONDS.
    """
    raw = sign_transaction(
        key,
        bytes.fromhex(rules.chain_id),
        payload,
        nonce=account.nonce,
        fee=fee_floor(rules),
        expiry=account.height + EXPIRY_BLOCKS,
    )
    submitted = await client.call("chain_submit", {"raw": raw.hex()}, Submitted)
    status = await _final(client, submitted.id)
    if status is None:
        raise UserError(
            f"transaction {submitted.id} is not final after {FINAL_SECONDS:.0f} seconds",
            why="the chain does not produce blocks, or the node is cut off",
            next=f"tdmld status; later: tdmld rpc chain_transaction {submitted.id}",
            exit_code=Exit.TIMED_OUT,
        )
    if status.state == "failed":
        raise UserError(
            f"the chain refused transaction {status.id}",
            why=status.reason,
            exit_code=Exit.REFUSED,
        )
    return status


def fee_floor(rules: ChainParameters) -> int:
    """The least fee of an owner's transaction."""
    fee = rules.parameters.get("fee_floor", 0)
    return fee if isinstance(fee, int) else 0


async def load_account(client: Client, address: str) -> AccountInfo:
    """An account as it stands now."""
    return await client.call("chain_account", {"address": address}, AccountInfo)


async def load_stake(client: Client, address: str) -> StakeInfo:
    """An owner's stake as it stands now."""
    return await client.call("chain_stake", {"address": address}, StakeInfo)


async def load_keys(client: Client, address: str) -> tuple[NodeKeyInfo, ...]:
    """The node keys registered to an owner."""
    return await client.call("chain_keys", {"address": address}, tuple[NodeKeyInfo, ...])


async def load_rules(client: Client) -> ChainParameters:
    """The genesis rules of the node's chain."""
    return await client.call("chain_parameters", {}, ChainParameters)


def check_funds(account: AccountInfo, rules: ChainParameters, amount: int, purpose: str) -> None:
    """UserError when the balance does not cover `amount` and the fee; `purpose`: "to send 5"."""
    cost = amount + fee_floor(rules)
    if cost > int(account.balance):
        raise UserError(
            f"{short(account.address)} has {units(account.balance)}, not enough {purpose}",
            why=f"with the fee of {fee_floor(rules)} it takes {units(cost)}",
            next="tdmld wallet balance",
            exit_code=Exit.REFUSED,
        )


def check_amount(amount: int, done: str) -> None:
    """UserError when no such amount can be `done`: "sent", "bonded"."""
    if not 0 < amount < 2**63:
        raise UserError(
            f"{amount} cannot be {done}",
            next="give a whole number above zero",
            exit_code=Exit.USAGE,
        )


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


async def choose_address(client: Client, given: str | None, data_dir: Path | None) -> str:
    """The address given, else that of the keystore here, else the owner of the node."""
    if given is not None:
        return given
    try:
        return owner(data_dir)
    except KeyFileError:
        return (await client.call("node_status", {}, NodeStatus)).owner


def has_keystore(data_dir: Path | None, address: str) -> bool:
    """Whether the keystore here is that of `address`."""
    try:
        return owner(data_dir) == address
    except KeyFileError:
        return False


async def _final(client: Client, id: str) -> TransactionStatus | None:
    with trio.move_on_after(FINAL_SECONDS):
        async with client.subscribe("chain_subscribeHeads", {}, Head) as heads:
            async for _ in heads:
                status = await _lookup(client, id)
                if status is not None and status.state != "pending":
                    return status
    return None


async def _lookup(client: Client, id: str) -> TransactionStatus | None:
    try:
        return await client.call("chain_transaction", {"id": id}, TransactionStatus)
    except NotFound:
        return None  # a mempool may drop what a block will still bring
