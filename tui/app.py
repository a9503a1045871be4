"""The dashboard: two screens over one feed, which comes back by itself when the node does."""

import asyncio
from collections import deque
from contextlib import aclosing, suppress

from textual.app import App
from textual.binding import Binding

from tdmld.rpc.client import RpcError, Unauthorized
from tdmld.rpc.types import JobEvent
from tui.feed import Feed, Link, Snapshot
from tui.screens.home import HomeScreen
from tui.screens.job import JobScreen
from tui.widgets.jobs import JobsTable

BACKOFF_SECONDS = 0.5
BACKOFF_MAX_SECONDS = 10.0
EVENTS_KEPT = 500


class Dashboard(App[None]):
    """`link` says whether what is shown is live; `snapshot` is the last that came."""

    TITLE = "tdmld"
    CSS_PATH = "tdmld.tcss"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS = [
        Binding("1", "go('home')", "Home"),
        Binding("2", "go('job')", "Job"),
        Binding("escape", "go('home')", "Back", show=False),
        Binding("n", "next_job", "Next job"),
        Binding("r", "retry", "Reconnect now"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, feed: Feed, *, backoff: float = BACKOFF_SECONDS) -> None:
        super().__init__()
        self.feed = feed
        self.backoff = backoff
        self.link: Link | None = None
        self.snapshot: Snapshot | None = None
        self.selected: str | None = None
        self._events: deque[JobEvent] = deque(maxlen=EVENTS_KEPT)
        self._retry = asyncio.Event()
        self._home = HomeScreen()
        self._job = JobScreen()

    async def on_mount(self) -> None:
        """Show Home and begin to follow the node."""
        self.theme = "tokyo-night"
        self.install_screen(self._job, "job")
        self.install_screen(self._home, "home")
        await self.push_screen("home")
        self.run_worker(self._follow(), group="feed", exclusive=True)

    async def _follow(self) -> None:
        """Snapshots until the app ends; after a failure wait, twice as long each time."""
        delay = self.backoff
        while True:
            try:
                async with aclosing(self.feed.snapshots(lambda: self.selected)) as snapshots:
                    async for snapshot in snapshots:
                        delay = self.backoff
                        self._take(snapshot)
                problem = "the node ended the connection"
            except RpcError as error:
                problem = str(error)
                if isinstance(error, Unauthorized):
                    problem = f"wrong token: {problem}"
            await self._wait(problem, delay)
            delay = min(delay * 2, BACKOFF_MAX_SECONDS)

    async def _wait(self, problem: str, delay: float) -> None:
        self._retry.clear()
        loop = asyncio.get_running_loop()
        end = loop.time() + delay
        while (left := end - loop.time()) > 0 and not self._retry.is_set():
            self._show_link(Link(False, problem, left))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._retry.wait(), min(left, 1.0))
        self._show_link(Link(False, problem))

    async def _follow_events(self, job: str) -> None:
        """The log of the selected job; a broken connection is the other worker's news."""
        while True:
            with suppress(RpcError):
                async with aclosing(self.feed.events(job)) as events:
                    async for event in events:
                        self._events.append(event)
                        if self._job.is_mounted:
                            self._job.add_events([event])
                return
            await asyncio.sleep(max(self.backoff, 1.0))

    def _take(self, snapshot: Snapshot) -> None:
        self.link, self.snapshot = Link(True), snapshot
        if self.selected is None and snapshot.jobs:
            self._select(snapshot.jobs[0].id)
        self._refresh_screen()

    def _show_link(self, link: Link) -> None:
        self.link = link
        self._refresh_screen()

    def _refresh_screen(self) -> None:
        # A worker may still deliver while the app is being taken down.
        screen = self.screen if self.is_running and self.screen_stack else None
        if isinstance(screen, HomeScreen | JobScreen) and screen.is_mounted:
            screen.show(self.link, self.snapshot)

    def _select(self, job: str) -> None:
        if job == self.selected:
            return
        self.selected = job
        self._events.clear()
        if self._job.is_mounted:
            self._job.forget_events()
        self.run_worker(self._follow_events(job), group="events", exclusive=True)

    async def action_go(self, name: str) -> None:
        """Switch to a screen."""
        first = name == "job" and not self._job.is_mounted
        await self.switch_screen(name)
        if first:
            self._job.add_events(self._events)
        self._refresh_screen()

    async def action_next_job(self) -> None:
        """Look at the next job of the list."""
        ids = [job.id for job in self.snapshot.jobs] if self.snapshot else []
        if ids:
            place = ids.index(self.selected) if self.selected in ids else -1
            self._select(ids[(place + 1) % len(ids)])
            await self.action_go("job")

    def action_retry(self) -> None:
        """Do not wait for the back-off."""
        self._retry.set()

    async def on_jobs_table_chosen(self, message: JobsTable.Chosen) -> None:
        """Enter on a job opens it."""
        self._select(message.job)
        await self.action_go("job")
