"""`tdmld devnet up|down|status`"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import App, Parameter

from tdmld.cli.common import AsJson, emit, table
from tdmld.cli.exits import Exit
from tdmld.config import default_data_dir
from tdmld.devnet import NETWORK_FILE, Devnet, make_network
from tdmld.errors import UserError

app = App(name="devnet", help="A network of real nodes on this machine.", help_format="plaintext")

Directory = Annotated[
    Path | None,
    Parameter(name="--directory", help="Where the network lies (default: beside the data dir)."),
]


@app.command
def up(
    *,
    directory: Directory = None,
    nodes: int | None = None,
    validators: int | None = None,
    timeout: float = 60.0,
    json: AsJson = False,
) -> None:
    """Start the network, making it first where there is none; returns when all nodes are ready.

    Parameters
    ----------
    nodes: How many nodes a new network has (default 7).
    validators: How many of them validate (default 4, at most all).
    timeout: Seconds to wait for the nodes.
    """
    place = _place(directory)
    if (place / NETWORK_FILE).exists():
        network = Devnet.open(place)
        _check_size(network, nodes, validators)
    else:
        count = 7 if nodes is None else nodes
        network = make_network(
            place, nodes=count, validators=min(4, count) if validators is None else validators
        )
        _say(f"made {count} nodes in {place}")
    started = network.start_all()
    _say(f"started {len(started)} of {len(network.nodes)} nodes; waiting until they are ready")
    try:
        network.wait_ready(timeout_seconds=timeout)
    except BaseException:  # also an interrupt: nothing is left running that nobody knows of
        for index in started:
            network.stop(index)
        raise
    _print(network, json)


@app.command
def down(*, directory: Directory = None, grace: float = 15.0, json: AsJson = False) -> None:
    """Stop all nodes: SIGTERM, and SIGKILL to those that have not ended after the grace.

    Parameters
    ----------
    grace: Seconds between the two.
    """
    endings = Devnet.open(_place(directory)).down(grace)
    emit(endings, [f"{name}  {ending}" for name, ending in endings.items()], as_json=json)


@app.command
def status(*, directory: Directory = None, json: AsJson = False) -> int:
    """What each node does. Exit code 1 unless all of them are ready."""
    network = Devnet.open(_place(directory))
    ready = _print(network, json)
    return Exit.OK if ready else Exit.FAILED


def _place(directory: Path | None) -> Path:
    return (directory or default_data_dir().with_name("tdmld-devnet")).absolute()


def _check_size(network: Devnet, nodes: int | None, validators: int | None) -> None:
    have = len(network.nodes), sum(node.validator for node in network.nodes)
    if nodes not in (None, have[0]) or validators not in (None, have[1]):
        raise UserError(
            f"the network in {network.directory} has {have[0]} nodes, {have[1]} of them validators",
            next="leave the numbers out, or give another --directory",
            exit_code=Exit.USAGE,
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(network: Devnet, as_json: bool) -> bool:
    """Print the table of the nodes; whether all are ready."""
    rows = [_row(network, index) for index in range(len(network.nodes))]
    trio.run(_add_heights, network, rows)
    lines = table(
        ["node", "pid", "state", "height", "peers", "role", "rpc"],
        [
            [
                row["name"],
                row["pid"] or "-",
                row["state"],
                row["height"] if row["height"] is not None else "-",
                row["peers"] if row["peers"] is not None else "-",
                row["role"],
                row["rpc"],
            ]
            for row in rows
        ],
    )
    document = {"directory": str(network.directory), "nodes": rows}
    emit(document, [*lines, "", f"in {network.directory}"], as_json=as_json)
    return all(row["state"] == "ready" for row in rows)


def _row(network: Devnet, index: int) -> dict[str, object]:
    node, process = network.nodes[index], network.process(index)
    state = "down"
    if process is not None:
        state = "ready" if network.ready(index) else "starting"
    return {
        "name": node.name,
        "data_dir": str(network.data_dir(index)),
        "owner": node.owner,
        "node": node.node,
        "pid": process.pid if process else None,
        "state": state,
        "role": "validator" if node.validator else "node",
        "asks": node.asks,
        "rpc": node.rpc_url,
        "height": None,
        "peers": None,
    }


async def _add_heights(network: Devnet, rows: list[dict[str, object]]) -> None:
    """Ask the nodes that run. One that does not answer keeps its blanks: the table says enough."""
    from tdmld.rpc.client import Client, RpcError, find_access

    async def ask(index: int, row: dict[str, object]) -> None:
        data_dir = network.data_dir(index)
        try:
            async with Client(find_access(data_dir, data_dir)) as client:
                answer: Mapping[str, object] = await client.call("node_status", {}, dict)
        except RpcError:
            return
        row["height"], row["peers"] = answer.get("height"), answer.get("peers")

    async with trio.open_nursery() as nursery:
        for index, row in enumerate(rows):
            if row["pid"] is not None:
                nursery.start_soon(ask, index, row)
