"""The first line of every screen: is it live, who is this, where is the chain."""

from rich.text import Text
from textual.widgets import Static

from tdmld.rpc.types import NodeStatus
from tui.feed import Link
from tui.text import short


class StatusLine(Static):
    """● live  12D3KooW…k2Xq  tdmld-local-1  height 4,211  peers 6."""

    def show(self, link: Link | None, status: NodeStatus | None) -> None:
        """`link` None: the first connection is still being made."""
        text = Text(" tdmld ", style="bold")
        text.append(" ")
        text.append_text(_light(link, status))
        if status is not None:
            for part in (
                short(status.node),
                status.chain,
                f"height {status.height:,}",
                f"peers {status.peers}",
            ):
                text.append("   ")
                text.append(part, style="" if link and link.live else "dim")
        self.update(text)
        self.set_class(link is not None and not link.live, "-offline")


def _light(link: Link | None, status: NodeStatus | None) -> Text:
    if link is None:
        return Text("○ connecting", style="yellow")
    if not link.live:
        when = f"retry in {link.retry_in:.0f} s" if link.retry_in >= 1 else "trying again"
        return Text(f"○ offline ({when})", style="bold red")
    if status is not None and status.syncing:
        return Text("● catching up", style="yellow")
    return Text("● live", style="green")
