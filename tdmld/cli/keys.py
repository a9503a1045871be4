"""`tdmld keys list|prove|register|revoke`: which node keys act for the owner."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from tdmld import files, keys
from tdmld.chain.crypto import public_key
from tdmld.chain.transactions import Register, Revoke, sign_registration
from tdmld.cli.common import AsJson, DataDir, PasswordFile, emit, resolve_data_dir, table
from tdmld.cli.exits import Exit
from tdmld.cli.node import (
    check_address,
    check_funds,
    choose_address,
    connect,
    load_account,
    load_keys,
    load_rules,
    open_owner_key,
    owner,
    send,
)
from tdmld.cli.text import short
from tdmld.errors import UserError
from tdmld.rpc.staketypes import NodeKeyInfo
from tdmld.rpc.types import AddressText, HeightNumber, HexId, Wire

app = App(name="keys", help="The owner's node keys.", help_format="plaintext")

AHEAD_BLOCKS = 20
"""A registration is for a height to come: from then on the node may be given work."""
PROOF_BLOCKS = 1000
"""How long a proof that travels to the owner's machine is good for."""
PROOF_BYTES = 4096

NodeKeyFile = Annotated[
    Path | None,
    Parameter(name="--node-key", help="Its file (default: keys/node.key of this directory)."),
]


class Consent(Wire, frozen=True, forbid_unknown_fields=True):
    """A node key's signature that it works for an owner: what `prove` writes."""

    chain_id: HexId
    node: AddressText
    owner: AddressText
    from_height: HeightNumber
    proof: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}$")]

    @property
    def payload(self) -> Register:
        return Register(public_key(self.node), self.from_height, bytes.fromhex(self.proof))


@app.command(name="list")
async def list_keys(
    address: str | None = None, /, *, data_dir: DataDir = None, json: AsJson = False
) -> None:
    """List the node keys of an owner: by default the owner's of this directory.

    Parameters
    ----------
    address: Another owner (12D3Koo...).
    """
    if address is not None:
        check_address(address)
    async with connect(data_dir) as client:
        chosen = await choose_address(client, address, data_dir)
        found = await load_keys(client, chosen)
    lines = table(
        ("node", "state", "votes", "asks for work"),
        [(key.node, _state(key), _votes(key), "yes" if key.asks else "no") for key in found],
    )
    document = {"owner": chosen, "keys": msgspec.to_builtins(found)}
    emit(document, lines if found else f"{chosen} has no node: tdmld keys register", as_json=json)


@app.command
async def prove(
    owner: str,
    /,
    *,
    out: Path | None = None,
    node_key: NodeKeyFile = None,
    data_dir: DataDir = None,
) -> None:
    """Sign that this node works for OWNER, whose key lies on another machine.

    Take the file there: tdmld keys register --proof FILE. It holds no secret.

    Parameters
    ----------
    owner: The owner's address (12D3Koo...).
    out: File to write (default: print it).
    """
    check_address(owner)
    async with connect(data_dir) as client:
        rules = await load_rules(client)
    file = node_key or resolve_data_dir(data_dir) / keys.NODE_KEY
    consent = _consent(file, rules.chain_id, owner, rules.height + PROOF_BLOCKS)
    text = msgspec.json.format(msgspec.json.encode(consent), indent=2) + b"\n"
    if out is None:
        emit("", text.decode().rstrip(), as_json=False)
        return
    files.write_file(out, text)
    emit("", f"{out}: good until block {consent.from_height - 1:,}", as_json=False)


@app.command
async def register(
    *,
    node_key: NodeKeyFile = None,
    proof: Annotated[
        Path | None, Parameter(help="What `tdmld keys prove` wrote, for a key that lies elsewhere.")
    ] = None,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    json: AsJson = False,
) -> None:
    """Bind a node key to the owner of this directory, for good, and wait until that is final."""
    if proof is not None and node_key is not None:
        raise UserError(
            "--proof and --node-key are two ways to say which key",
            next="give one of them",
            exit_code=Exit.USAGE,
        )
    async with connect(data_dir) as client:
        rules = await load_rules(client)
        account = await load_account(client, owner(data_dir))
        if proof is not None:
            consent = _read(proof, rules.chain_id, account.address, rules.height)
        else:
            file = node_key or resolve_data_dir(data_dir) / keys.NODE_KEY
            height = rules.height + AHEAD_BLOCKS
            consent = _consent(file, rules.chain_id, account.address, height)
        if any(key.node == consent.node for key in await load_keys(client, account.address)):
            raise UserError(
                f"{consent.node} is registered to {short(account.address)} already",
                next="tdmld keys list",
                exit_code=Exit.REFUSED,
            )
        check_funds(account, rules, 0, "to register a key")
        key = await open_owner_key(data_dir, password_file)
        status = await send(client, key, consent.payload, rules, account)
    lines = [
        f"registered {consent.node}; final in block {status.block}, transaction {status.id}",
        f"it may be given work from block {consent.from_height:,} on; "
        "to validate with it: tdmld stake nominate NODE",
    ]
    document = msgspec.to_builtins(status)
    emit(document | {"node": consent.node, "owner": account.address}, lines, as_json=json)


@app.command
async def revoke(
    node: str,
    /,
    *,
    yes: Annotated[bool, Parameter(negative="", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    password_file: PasswordFile = None,
    json: AsJson = False,
) -> None:
    """End a node key for good, and wait until that is final. Its owner's money is not touched.

    The key's ask is gone, and it is elected no more; in epochs whose validators are fixed it still
    votes. A key is never registered again.

    Parameters
    ----------
    node: The node key (12D3Koo..., see tdmld keys list).
    """
    check_address(node)
    async with connect(data_dir) as client:
        rules = await load_rules(client)
        account = await load_account(client, owner(data_dir))
        found = {key.node: key for key in await load_keys(client, account.address)}
        if node not in found or found[node].revoked:
            raise UserError(
                f"{node} is not registered to {short(account.address)}"
                if node not in found
                else f"{node} was revoked at height {found[node].revoked:,} already",
                next="tdmld keys list",
                exit_code=Exit.REFUSED,
            )
        check_funds(account, rules, 0, "to revoke a key")
        if not yes:
            _confirm(found[node])
        key = await open_owner_key(data_dir, password_file)
        status = await send(client, key, Revoke(check_address(node)), rules, account)
    lines = [f"revoked {node}; final in block {status.block}, transaction {status.id}"]
    if found[node].epochs:
        last = max(found[node].epochs)
        lines.append(f"it votes until epoch {last:,} is over: keep its machine running until then")
    emit(msgspec.to_builtins(status) | {"node": node}, lines, as_json=json)


def _confirm(key: NodeKeyInfo) -> None:
    """Ask a person; UserError when there is none, or it does not want to."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(
            "revoking a key is for good, and there is no terminal to ask on",
            next=f"tdmld keys revoke {key.node} --yes",
            exit_code=Exit.USAGE,
        )
    print(f"{key.node} may never act again.", file=sys.stderr)
    if key.nominated:
        print("It is the node that votes for your stake.", file=sys.stderr)
    print("Revoke it? Type yes: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UserError("nothing was done")


def _consent(file: Path, chain_id: str, owner: str, from_height: int) -> Consent:
    node = keys.load_node_key(file)
    signed = sign_registration(node, bytes.fromhex(chain_id), check_address(owner), from_height)
    return Consent(
        chain_id=chain_id,
        node=node.address,
        owner=owner,
        from_height=from_height,
        proof=signed.hex(),
    )


def _read(path: Path, chain_id: str, owner: str, height: int) -> Consent:
    """A proof file, for this chain and owner; UserError says what is wrong with it."""
    again = f"on the node's machine: tdmld keys prove {owner} --out FILE"
    try:
        found = msgspec.json.decode(files.read_file(path, PROOF_BYTES), type=Consent)
    except (msgspec.MsgspecError, UnicodeDecodeError, files.FileTooLarge) as error:
        raise UserError(
            f"{path} is not what `tdmld keys prove` writes",
            why=str(error),
            next=again,
            exit_code=Exit.USAGE,
        ) from error
    why = ""
    if found.chain_id != chain_id:
        why = f"it is for the chain {found.chain_id[:8]}, the node here is of {chain_id[:8]}"
    elif found.owner != owner:
        why = f"it is for the owner {found.owner}"
    elif found.from_height <= height:
        why = f"it was good until block {found.from_height - 1:,}; the head is {height:,}"
    if why:
        raise UserError(f"{path} does not serve here", why=why, next=again, exit_code=Exit.REFUSED)
    return found


def _state(key: NodeKeyInfo) -> str:
    if key.convicted:
        return f"voted twice, barred at {key.convicted:,}"
    if key.revoked:
        return f"revoked at {key.revoked:,}"
    if key.jailed:
        return f"jailed at {key.jailed:,}"
    return "nominated" if key.nominated else "in force"


def _votes(key: NodeKeyInfo) -> str:
    return ", ".join(f"epoch {epoch:,}" for epoch in key.epochs) or "no"
