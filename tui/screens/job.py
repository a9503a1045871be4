"""The submitter's screen: does it learn, who runs it, was it checked, what does it cost?"""

from collections.abc import Iterable

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer, Static

from tdmld.rpc.types import JobEvent
from tui.feed import Link, Snapshot
from tui.widgets.audits import AuditsTable
from tui.widgets.chart import LossChart
from tui.widgets.events import EventsLog
from tui.widgets.jobhead import JobHead
from tui.widgets.pipeline import PipelineCard
from tui.widgets.statusline import StatusLine


class JobScreen(Screen[None]):
    """Head, loss curve, pipeline, audits, events."""

    def compose(self) -> ComposeResult:
        """Top to bottom."""
        yield StatusLine()
        yield Static("No job yet. When there is one, choose it on Home (1) with Enter.", id="empty")
        with Vertical(id="job"):
            yield JobHead()
            with Horizontal(id="middle"):
                yield LossChart()
                with Vertical(id="side"):
                    yield PipelineCard()
                    yield AuditsTable()
            yield EventsLog()
        yield Footer()

    def show(self, link: Link | None, snapshot: Snapshot | None) -> None:
        """Hand the parts on; with an offline node the last known values stay."""
        self.query_one(StatusLine).show(link, snapshot.status if snapshot else None)
        job = snapshot.job if snapshot else None
        self.query_one("#job").display = job is not None
        self.query_one("#empty").display = job is None
        if job is None:
            return
        self.query_one(JobHead).show(job)
        self.query_one(LossChart).show(job)
        self.query_one(PipelineCard).show(job)
        self.query_one(AuditsTable).show(job)

    def add_events(self, events: Iterable[JobEvent]) -> None:
        """Append to the log."""
        for event in events:
            self.query_one(EventsLog).show(event)

    def forget_events(self) -> None:
        """Another job was chosen."""
        self.query_one(EventsLog).clear()
