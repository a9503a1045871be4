"""The volunteer's screen: what do I earn, what do I run, why not more?"""

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import Footer

from tui.feed import Link, Snapshot
from tui.widgets.chain import ChainCard
from tui.widgets.earnings import EarningsCard
from tui.widgets.jobs import JobsTable
from tui.widgets.notice import Notice
from tui.widgets.standing import StandingCard
from tui.widgets.statusline import StatusLine
from tui.widgets.tasks import TasksTable


class HomeScreen(Screen[None]):
    """Cards, the notice, own tasks, all jobs."""

    AUTO_FOCUS = "JobsTable"

    def compose(self) -> ComposeResult:
        """Top to bottom."""
        yield StatusLine()
        with Horizontal(id="cards"):
            yield EarningsCard()
            yield StandingCard()
            yield ChainCard()
        yield Notice()
        yield TasksTable()
        yield JobsTable()
        yield Footer()

    def show(self, link: Link | None, snapshot: Snapshot | None) -> None:
        """Hand the parts on; with an offline node the last known values stay."""
        status = snapshot.status if snapshot else None
        self.query_one(StatusLine).show(link, status)
        self.query_one(Notice).show(link, status)
        if snapshot is None:
            return
        self.query_one(EarningsCard).show(snapshot.status, snapshot.earnings)
        self.query_one(StandingCard).show(snapshot.status)
        self.query_one(ChainCard).show(snapshot.status)
        self.query_one(TasksTable).show(snapshot.status)
        self.query_one(JobsTable).show(snapshot.jobs)
