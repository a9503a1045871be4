"""`tdmld chain head|block|validators|export`: the chain as the node has it."""

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from tdmld.cli.common import AsJson, DataDir, emit, resolve_data_dir, table
from tdmld.cli.exits import Exit
from tdmld.cli.node import connect
from tdmld.cli.text import frame, short, units
from tdmld.errors import UserError
from tdmld.rpc.staketypes import ValidatorSetInfo
from tdmld.rpc.types import BlockInfo, Head, TransactionLine

app = App(name="chain", help="The chain as this node has it.", help_format="plaintext")


@app.command
async def head(*, data_dir: DataDir = None, json: AsJson = False) -> None:
    """Show the newest final block."""
    async with connect(data_dir) as client:
        found = await client.call("chain_head", {}, Head)
    emit(
        msgspec.to_builtins(found),
        [
            f"height {found.height:,} (view {found.view:,})",
            f"  hash      {found.hash}",
            f"  time      {found.time}",
            f"  proposer  {found.proposer}",
            f"  carries   {found.transactions} transactions",
        ],
        as_json=json,
    )


@app.command
async def block(
    height: Annotated[int, Parameter(help="From 1; genesis has no block.")],
    /,
    *,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Show a final block and what became of its transactions."""
    if not 0 <= height < 2**53:
        raise UserError(
            f"there is no height {height}", next="tdmld chain head", exit_code=Exit.USAGE
        )
    async with connect(data_dir) as client:
        found = await client.call("chain_block", {"height": height}, BlockInfo)
    emit(msgspec.to_builtins(found), _block(found), as_json=json)


@app.command
async def validators(
    *,
    epoch: Annotated[
        int | None, Parameter(help="A past epoch, or the next: its validators are fixed already.")
    ] = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """List who validates in this epoch, with the weight of its votes; more than two thirds decide.

    A validator that missed its turns to lead is jailed: it votes, and has no turns until its node
    is at work again.
    """
    async with connect(data_dir) as client:
        params = {} if epoch is None else {"epoch": epoch}
        found = await client.call("chain_validators", params, ValidatorSetInfo)
    lines = table(
        ("node", "owner", "weight", "share", "leads", "jailed"),
        [
            (
                one.node,
                short(one.owner),
                units(one.weight),
                f"{100 * int(one.weight) / int(found.total):.1f} %",
                "yes" if one.leads else "no",
                f"at height {one.jailed:,}" if one.jailed else "",
            )
            for one in found.validators
        ],
    )
    lines += [
        "",
        f"epoch {found.epoch:,}, blocks {found.first:,} to {found.last:,}: "
        f"{units(found.quorum)} of {units(found.total)} decide; as of height {found.height:,}",
    ]
    emit(msgspec.to_builtins(found), lines, as_json=json)


@app.command
def export(
    *,
    out: Annotated[Path, Parameter(help="File to write; an older one is replaced.")],
    data_dir: DataDir = None,
    json: AsJson = False,
) -> int:
    """Write the whole chain of a stopped node as JSON lines, for auditors.

    Genesis, every block with what became of its transactions, every record of the state, sums.
    docs/spec/chain.md says what every field is and how to check it. Exit code 1 when the money in
    the records is not the supply of genesis.
    """
    from tdmld.chain.errors import ChainError
    from tdmld.node.chainerrors import ChainSideError, StoreLocked
    from tdmld.node.export import FORMAT, export_ledger

    directory = resolve_data_dir(data_dir)
    try:
        found = export_ledger(directory, out)
    except StoreLocked as error:
        raise UserError(
            f"the node of {directory} is running",
            why="only a stopped node's chain can be exported: its database has one user at a time",
            next="stop it (Ctrl-C where it runs, or tdmld rpc admin_stop), then the same again",
        ) from error
    except (ChainSideError, ChainError) as error:
        raise UserError(f"the chain of {directory} cannot be exported", why=str(error)) from error
    document = {
        "bytes": found.size,
        "chain_id": found.chain_id.hex(),
        "entries": found.entries,
        "format": FORMAT,
        "height": found.height,
        "out": str(out),
        "sha256": found.sha256.hex(),
        "state_root": found.state_root.hex(),
        "supply": {place: str(amount) for place, amount in found.counted.items()},
        "supply_conserved": found.conserved,
        "transactions": found.transactions,
    }
    lines = [
        f"wrote {out}: {found.size:,} bytes, {found.height:,} blocks, "
        f"{found.transactions:,} transactions, {found.entries:,} records",
        f"  state root  {found.state_root.hex()}",
        f"  sha256      {found.sha256.hex()}",
        *(f"  {place:<11} {units(amount):>26}" for place, amount in found.counted.items()),
        "  the sum of balances, stakes, escrows and burns is the supply of genesis"
        if found.conserved
        else f"  THE SUMS DO NOT AGREE: the chain recorded {found.recorded}",
    ]
    emit(document, lines, as_json=json)
    return Exit.OK if found.conserved else Exit.FAILED


def _block(found: BlockInfo) -> list[str]:
    lines = frame(
        f"Block {found.height:,}",
        [
            ("hash", found.hash),
            ("parent", found.parent),
            ("view", f"{found.view:,}"),
            ("time", found.time),
            ("proposer", found.proposer),
            ("state", f"{found.state_root} after height {found.state_height:,}"),
            ("size", f"{found.size:,} bytes"),
        ],
        width=78,
    )
    if found.transactions:
        lines += table(
            ("transaction", "kind", "signer", "outcome"),
            [(tx.id[:16], tx.kind, short(tx.signer), _outcome(tx)) for tx in found.transactions],
        )
    return lines


def _outcome(tx: TransactionLine) -> str:
    return "ok" if tx.ok else f"failed: {tx.reason}"
