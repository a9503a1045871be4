"""What job this is, how far it is and what it has cost."""

from rich.table import Table
from rich.text import Text

from tdmld.rpc.types import JobDetail
from tui.text import GOOD, bar, percent, short, state_style, units
from tui.widgets.card import Card

BAR_CELLS = 24


class JobHead(Card):
    """Two bars: segments settled, and spent of budget."""

    TITLE = "Job"

    def show(self, job: JobDetail) -> None:
        """Replace the lines."""
        brief = job.summary
        total = brief.rounds * brief.stages * brief.lanes
        state = Text(brief.state, style=f"bold {state_style(brief.state)}")
        if brief.reason:
            state.append(f"  {brief.reason}")
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True, ratio=1)
        grid.add_row(
            "state", state, "", f"by {short(brief.submitter)}, {len(job.payments)} owners paid"
        )
        grid.add_row(
            "settled",
            bar(brief.segments_settled, total, BAR_CELLS, GOOD),
            percent(brief.segments_settled, total),
            f"{brief.segments_settled:,} of {total:,} segments",
        )
        grid.add_row(
            "spent",
            bar(int(brief.spent), int(job.budget), BAR_CELLS, "blue"),
            percent(int(brief.spent), int(job.budget)),
            f"{units(brief.spent)} of {units(job.budget)}",
        )
        self.border_title = f"Job {brief.id[:12]}  {brief.name}".rstrip()
        self.border_subtitle = _end(job)
        self.update(grid)


def _end(job: JobDetail) -> str:
    if job.result is not None:
        return f"model ready: tdmld job fetch {job.summary.id[:12]}"
    left = job.deadline - job.summary.height
    return f"deadline in {left:,} blocks" if left > 0 else ""
