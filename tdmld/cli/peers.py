"""`tdmld peers list|connect|bans|ban|unban`"""

import re
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from tdmld.cli.common import AsJson, DataDir, emit, table
from tdmld.cli.exits import Exit
from tdmld.cli.node import connect as connect_node
from tdmld.cli.text import short, size
from tdmld.errors import UserError
from tdmld.rpc.nettypes import BanInfo, Connected
from tdmld.rpc.types import PeerInfo

app = App(name="peers", help="Whom the node is connected to.", help_format="plaintext")

_SPAN = re.compile(r"([0-9]{1,7})(s|min|m|h|d)")
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_LONGEST_SECONDS = 10 * 365 * 86400

Subject = Annotated[
    str, Parameter(help="A node's id (12D3Koo...), an IP address or a network (192.0.2.0/24).")
]


@app.command(name="list")
async def list_peers(*, data_dir: DataDir = None, json: AsJson = False) -> None:
    """List the nodes that this one knows, connected ones first."""
    async with connect_node(data_dir) as client:
        peers = await client.call("net_peers", {}, tuple[PeerInfo, ...])
        bans = await client.call("net_bans", {}, tuple[BanInfo, ...])
    lines = table(
        ("node", "state", "role", "path", "way", "ms", "in", "out", "score", "address"),
        [
            (
                peer.node,
                "banned" if peer.banned else "connected" if peer.connected else "away",
                "validator" if peer.validator else "-",
                peer.path or "-",
                {"inbound": "in", "outbound": "out", None: "-"}[peer.direction],
                "-" if peer.round_trip_ms is None else f"{peer.round_trip_ms:.1f}",
                size(peer.bytes_in),
                size(peer.bytes_out),
                f"{peer.score:.0f}",
                peer.remote or (peer.addresses[0] if peer.addresses else "-"),
            )
            for peer in peers
        ],
    )
    if bans:
        lines = [*(lines if peers else []), f"{len(bans)} banned: tdmld peers bans"]
    text = lines if peers or bans else ["no peers"]
    emit(msgspec.to_builtins(peers), text, as_json=json)


@app.command
async def connect(address: str, /, *, data_dir: DataDir = None, json: AsJson = False) -> None:
    """Connect to a node now, and again whenever it is away.

    Parameters
    ----------
    address: /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo...
    """
    async with connect_node(data_dir) as client:
        made = await client.call("net_connect", {"address": address}, Connected)
    text = f"connected with {made.node} at {made.address}, {made.path}, {made.transport}"
    emit(msgspec.to_builtins(made), text, as_json=json)


@app.command
async def bans(*, data_dir: DataDir = None, json: AsJson = False) -> None:
    """List who may not connect, until when, and why."""
    async with connect_node(data_dir) as client:
        found = await client.call("net_bans", {}, tuple[BanInfo, ...])
    lines = table(
        ("banned", "until", "by", "times", "reason"),
        [
            (ban.subject, ban.until or "lifted", ban.author, ban.times, ban.reason or "-")
            for ban in found
        ],
    )
    emit(msgspec.to_builtins(found), lines if found else "nobody is banned", as_json=json)


@app.command
async def ban(
    subject: Subject,
    /,
    *,
    for_: Annotated[
        str | None,
        Parameter(name="--for", help="How long: 90s, 30min, 2h, 7d (default: until unbanned)."),
    ] = None,
    reason: Annotated[str, Parameter(help="Shown in the list of bans.")] = "",
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Disconnect a node or a network, and let it in no more."""
    seconds = 0 if for_ is None else _seconds(for_)
    async with connect_node(data_dir) as client:
        done = await client.call(
            "net_ban", {"subject": subject, "seconds": seconds, "reason": reason}, BanInfo
        )
    until = f"until {done.until}" if done.until else "until it is unbanned"
    emit(msgspec.to_builtins(done), f"{short(done.subject)} is banned {until}", as_json=json)


@app.command
async def unban(subject: Subject, /, *, data_dir: DataDir = None, json: AsJson = False) -> None:
    """Let a node or a network in again."""
    async with connect_node(data_dir) as client:
        done = await client.call("net_unban", {"subject": subject}, BanInfo)
    text = f"{short(done.subject)} may connect again"
    if done.author == "configuration":
        text += "; the setting `deny` bans it anew at the next start"
    emit(msgspec.to_builtins(done), text, as_json=json)


def _seconds(text: str) -> int:
    match = _SPAN.fullmatch(text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise UserError(
            f"{text!r} is no time",
            next="write it like 90s, 30min, 2h or 7d",
            exit_code=Exit.USAGE,
        )
    return seconds
