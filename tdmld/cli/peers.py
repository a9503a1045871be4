"""`tdmld peers list`"""

import msgspec
from cyclopts import App

from tdmld.cli.common import AsJson, DataDir, emit, table
from tdmld.cli.node import connect
from tdmld.rpc.types import PeerInfo

app = App(name="peers", help="Whom the node is connected to.", help_format="plaintext")


@app.command(name="list")
async def list_peers(*, data_dir: DataDir = None, json: AsJson = False) -> None:
    """List the nodes that this one knows, connected ones first."""
    async with connect(data_dir) as client:
        peers = await client.call("net_peers", {}, tuple[PeerInfo, ...])
    lines = table(
        ("node", "state", "role", "height", "ms", "address"),
        [
            (
                peer.node,
                "connected" if peer.connected else "away",
                "validator" if peer.validator else "-",
                "-" if peer.height is None else f"{peer.height:,}",
                "-" if peer.round_trip_ms is None else f"{peer.round_trip_ms:.1f}",
                peer.addresses[0] if peer.addresses else "-",
            )
            for peer in peers
        ],
    )
    emit(msgspec.to_builtins(peers), lines if peers else "no peers", as_json=json)
