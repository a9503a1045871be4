"""`tdmld status`: one screen that says who this node is, whether it is live, and what it earns."""

import msgspec

from tdmld.cli.common import AsJson, DataDir, emit, table
from tdmld.cli.node import connect
from tdmld.cli.text import frame, short, units
from tdmld.rpc.types import NodeStatus


async def status(*, data_dir: DataDir = None, json: AsJson = False) -> None:
    """What the node is doing: sync, peers, tasks, earnings, and why it may not be earning."""
    async with connect(data_dir) as client:
        found = await client.call("node_status", {}, NodeStatus)
    emit(msgspec.to_builtins(found), render(found), as_json=json)


def render(status: NodeStatus) -> list[str]:
    """The lines for people."""
    roles = [_validates(status)] if int(status.weight) or int(status.next_weight) else []
    roles += sorted({task.role for task in status.tasks})
    lines = frame(
        "Status",
        [
            ("state", "catching up" if status.syncing else "live"),
            ("version", status.version),
            ("node", status.node),
            ("roles", ", ".join(roles) or "none"),
            ("chain", f"{status.chain} ({status.chain_id[:8]})"),
            ("height", f"{status.height:,} (view {status.view:,})"),
            ("peers", str(status.peers)),
        ],
    )
    lines += frame(
        "Wallet",
        [
            ("owner", status.owner),
            ("balance", f"{units(status.balance):>20}"),
            ("earned", f"{units(status.earned):>20}"),
            ("pending", f"{units(status.pending):>20}"),
            ("work stake", f"{units(status.work_stake):>20}"),
            ("vote stake", f"{units(status.vote_stake):>20}"),
            ("reputation", f"{status.reputation / 1e6:>20.3f}"),
        ],
    )
    lines += frame("Market", _market(status))
    if status.tasks:
        head = ("job", "role", "slot", "layers", "segment", "step", "settled", "earned", "state")
        lines += table(
            head,
            [
                (
                    task.job[:8],
                    task.role,
                    f"{task.lane}.{task.stage}",
                    f"{task.layers[0]}-{task.layers[1] - 1}",
                    f"{task.segment}/{task.segments}",
                    f"{task.step}/{task.steps}",
                    task.settled,
                    units(task.earned),
                    task.state,
                )
                for task in status.tasks
            ],
        )
    if status.why_not_earning:
        lines.append(f"not earning: {status.why_not_earning}")
    return lines


def _validates(status: NodeStatus) -> str:
    if not int(status.weight):
        return f"validator from epoch {status.epoch + 1:,} on"
    share = 100 * int(status.weight) / int(status.total_weight)
    leaves = "" if int(status.next_weight) else ", for the last time"
    return f"validator in epoch {status.epoch:,} with {share:.1f} % of the votes{leaves}"


def _market(status: NodeStatus) -> list[tuple[str, str]]:
    ask = status.ask
    if ask is None:
        return [("ask", "none: this node does not offer work")]
    return [
        ("price", f"{units(ask.price)} per 10^6 parameters x 10^3 tokens"),
        ("class", ask.device_class),
        ("memory", f"{ask.memory / 2**30:.1f} GiB"),
        ("capacity", f"{ask.audit_capacity} audits, {ask.standby_slots} standby slots"),
        ("valid", f"until height {ask.until:,}"),
        ("carrier", short(status.session)),
    ]
