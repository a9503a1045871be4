"""All jobs of the chain; Enter opens one."""

from dataclasses import dataclass

from rich.text import Text
from textual.message import Message
from textual.widgets import DataTable

from tdmld.rpc.types import JobSummary
from tui.text import nats, percent, state_style, units
from tui.widgets.rows import Rows


class JobsTable(Rows):
    """One row a job, newest first."""

    TITLE = "Jobs"
    CHOICE = True
    HEAD = ("job", "name", "state", "done", "segments", "loss", "spent", "escrow", "offered")
    RIGHT = frozenset({"done", "segments", "loss", "spent", "escrow", "offered"})

    @dataclass
    class Chosen(Message):
        """The user wants to see this job."""

        job: str

    def show(self, jobs: tuple[JobSummary, ...]) -> None:
        """Replace the rows."""
        self.replace({job.id: _row(job) for job in jobs})

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Enter or a click."""
        event.stop()
        if event.row_key.value is not None:
            self.post_message(self.Chosen(event.row_key.value))


def _row(job: JobSummary) -> tuple[str | Text, ...]:
    total = job.rounds * job.stages * job.lanes
    return (
        job.id[:8],
        job.name or "—",
        Text(job.state, style=state_style(job.state)),
        percent(job.segments_settled, total),
        f"{job.segments_settled:,}/{total:,}",
        nats(job.loss),
        units(job.spent),
        units(job.escrow),
        f"{job.offered:,}",
    )
