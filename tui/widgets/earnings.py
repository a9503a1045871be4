"""Income: settled, pending, spendable, and its recent course."""

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Label, Sparkline, Static

from tdmld.rpc.types import Earnings, NodeStatus
from tui.text import pairs, units


class EarningsCard(Vertical):
    """Numbers above, a bar for each of the last buckets below."""

    def compose(self) -> ComposeResult:
        """Numbers, sparkline, its unit."""
        yield Static(id="earnings-numbers")
        yield Sparkline([0.0], id="earnings-course")
        yield Label("", id="earnings-unit")

    def on_mount(self) -> None:
        """Put the title into the frame."""
        self.border_title = "Earnings"

    def show(self, status: NodeStatus, earnings: Earnings) -> None:
        """Replace the numbers."""
        self.query_one("#earnings-numbers", Static).update(
            pairs(
                ("earned", units(earnings.total)),
                ("pending", units(earnings.pending)),
                ("balance", units(status.balance)),
            )
        )
        course = [float(bucket.amount) for bucket in earnings.buckets]
        self.query_one("#earnings-course", Sparkline).data = course or [0.0]
        self.query_one("#earnings-unit", Label).update(_unit(earnings.bucket_seconds))


def _unit(seconds: int) -> str:
    names = {60: "minute", 3600: "hour", 86400: "day"}
    return f"income per {names.get(seconds, f'{seconds} s')}"
