"""Who runs which stage, how far, and who is slowest."""

from rich.table import Table
from rich.text import Text

from tdmld.rpc.types import JobDetail, SlotInfo
from tui.text import BUSY, GOOD, bar, state_style, units
from tui.widgets.card import Card


class PipelineCard(Card):
    """One line a slot, then the standbys."""

    TITLE = "Pipeline"

    def show(self, job: JobDetail) -> None:
        """Replace the lines."""
        if not job.slots:
            self.update(Text("no workers yet: matching follows a few blocks after the offer"))
            return
        grid = Table.grid(expand=True, padding=(0, 1))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        for _ in range(2):
            grid.add_column(justify="right", no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        slowest = _slowest(job.slots)
        for slot in job.slots:
            grid.add_row(
                Text(f"{slot.lane}.{slot.stage}", style="bold"),
                bar(slot.segment, job.summary.rounds, 10, BUSY if slot is slowest else GOOD),
                _tail(slot.worker),
                f"{slot.segment}/{job.summary.rounds}",
                units(slot.earned),
                Text(slot.state, style=state_style(slot.state)),
            )
        for standby in job.standbys:
            grid.add_row(
                Text("standby", style="dim"),
                bar(standby.proved, job.summary.rounds, 10, "blue"),
                _tail(standby.node),
                f"{standby.proved}/{job.summary.rounds}",
                units(standby.earned),
                Text("copy proved" if standby.proved else "waiting", style="dim"),
            )
        self.update(grid)


def _tail(address: str) -> str:
    """All addresses begin alike, and this box is narrow."""
    return f"…{address[-6:]}" if address else "—"


def _slowest(slots: tuple[SlotInfo, ...]) -> SlotInfo | None:
    """The slot that is behind, if one is."""
    least = min(slots, key=lambda slot: slot.segment)
    return least if least.segment < max(slot.segment for slot in slots) else None
