"""The dashboard with a feed that the tests command. Plain functions: Textual needs asyncio."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from tdmld.rpc.client import Unauthorized, Unreachable
from tests.rpc.fake import JOB, node_status
from tests.tui.fakefeed import FakeFeed, snapshot
from tui.app import Dashboard
from tui.feed import Snapshot
from tui.screens.home import HomeScreen
from tui.screens.job import JobScreen
from tui.widgets.audits import AuditsTable
from tui.widgets.events import EventsLog
from tui.widgets.jobs import JobsTable
from tui.widgets.notice import Notice
from tui.widgets.pipeline import PipelineCard
from tui.widgets.statusline import StatusLine
from tui.widgets.tasks import TasksTable

Body = Callable[[Dashboard, "Pilot[None]"], Awaitable[None]]


def drive(feed: FakeFeed, body: Body, *, backoff: float = 0.01, width: int = 120) -> None:
    async def main() -> None:
        app = Dashboard(feed, backoff=backoff)
        async with app.run_test(size=(width, 36)) as pilot:
            await body(app, pilot)

    asyncio.run(main())


async def until(pilot: "Pilot[None]", condition: Callable[[], bool]) -> None:
    """Wait for the app to get there; fails after five seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await pilot.pause()
    await pilot.pause()


def line(app: Dashboard, widget: type[Static]) -> str:
    return str(app.screen.query_one(widget).render())


def cells(table: DataTable[Any], row: int = 0) -> list[str]:
    return [str(cell) for cell in table.get_row_at(row)]


def screen_text(app: Dashboard) -> str:
    """What stands on the screen, as plain text."""
    width = app.size.width
    strips = app.screen._compositor.render_strips()
    return "\n".join(strip.text[:width] for strip in strips)


def test_home_shows_a_snapshot() -> None:
    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.snapshot is not None)
        assert isinstance(app.screen, HomeScreen)
        status = line(app, StatusLine)
        assert "● live" in status
        assert "height 4,211" in status
        assert "peers 6" in status
        assert "Earning: 1 task at work" in line(app, Notice)
        tasks = app.screen.query_one(TasksTable)
        assert cells(tasks)[:7] == ["a91f0000", "worker", "0.0", "0-1", "11/20", "114/200", "912"]
        jobs = app.screen.query_one(JobsTable)
        assert jobs.row_count == 2
        text = screen_text(app)
        for shown in ("283,392", "62,976", "1,000,283,392", "0.982", "validator 25.0%"):
            assert shown in text

    drive(FakeFeed(snapshot()), body)


def test_home_says_why_a_node_does_not_earn() -> None:
    idle = msgspec.structs.replace(
        node_status(), tasks=(), why_not_earning="no job asks for this class; change [ask] or wait"
    )

    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.snapshot is not None)
        assert "Why am I not earning?  no job asks" in line(app, Notice)
        assert "change [ask] or wait" in line(app, Notice), "the node's words are no markup"

    drive(FakeFeed(snapshot(idle)), body)


def test_the_job_screen_shows_curve_pipeline_audits_and_money() -> None:
    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.snapshot is not None)
        await pilot.press("2")
        await until(pilot, lambda: isinstance(app.screen, JobScreen))
        text = screen_text(app)
        assert "714,000 of 2,410,000" in text
        assert "17 of 40 segments" in text
        assert "Loss (nats a token)" in text
        assert "now 2.612" in text
        assert any("\u2800" < letter <= "\u28ff" for letter in text), "no braille curve"
        assert app.screen.query_one(AuditsTable).border_subtitle == "2 of 3 passed"
        assert cells(app.screen.query_one(AuditsTable))[1:4] == ["9", "12D3KooW…Hn7e", "committed"]
        assert app.screen.query_one(PipelineCard).size.height >= 3
        assert "waiting for frames" in text
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen))

    drive(FakeFeed(snapshot()), body)


def test_enter_opens_the_chosen_job_and_its_events() -> None:
    feed = FakeFeed(snapshot())

    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.selected == JOB)
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(app.screen, JobScreen))
        assert app.selected == "b2" * 32
        await until(pilot, lambda: feed.event_jobs == [JOB, "b2" * 32])
        await until(pilot, lambda: len(app.screen.query_one(EventsLog).lines) == 3)
        feed.queue.put_nowait(snapshot())
        await until(pilot, lambda: feed.asked[-1] == "b2" * 32)
        await pilot.press("n")
        await until(pilot, lambda: app.selected == JOB)

    drive(feed, body)


def test_without_jobs_the_job_screen_says_what_to_do() -> None:
    full = snapshot()
    empty = Snapshot(full.status, full.earnings, (), None)

    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.snapshot is not None)
        await pilot.press("2")
        await until(pilot, lambda: isinstance(app.screen, JobScreen))
        assert "No job yet" in screen_text(app)
        await pilot.press("n")

    drive(FakeFeed(empty), body)


def test_a_node_that_goes_and_comes_back_is_followed_again() -> None:
    feed = FakeFeed(
        Unreachable("no node answers; tdmld run"), Unauthorized("new token"), snapshot()
    )

    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: feed.connections == 3 and app.snapshot is not None)
        assert "● live" in line(app, StatusLine)
        feed.queue.put_nowait(Unreachable("the connection broke"))
        await until(pilot, lambda: feed.connections == 4)
        status, notice = line(app, StatusLine), line(app, Notice)
        assert "offline" in status
        assert "height 4,211" in status, "the last known values stay"
        assert "the connection broke" in notice
        feed.queue.put_nowait(snapshot())
        await until(pilot, lambda: bool(app.link and app.link.live))
        assert "● live" in line(app, StatusLine)

    drive(feed, body)


def test_r_does_not_wait_for_the_back_off() -> None:
    feed = FakeFeed(Unreachable("nobody"))

    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: bool(app.link and app.link.retry_in > 1000))
        assert "retry in" in line(app, StatusLine)
        feed.queue.put_nowait(snapshot())
        await pilot.press("r")
        await until(pilot, lambda: bool(app.link and app.link.live))

    drive(feed, body, backoff=5000)


def test_the_cursor_stays_when_numbers_change() -> None:
    feed = FakeFeed(snapshot())

    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.snapshot is not None)
        await pilot.press("down")
        table = app.screen.query_one(JobsTable)
        assert table.cursor_row == 1
        later = snapshot(msgspec.structs.replace(node_status(), height=4300))
        feed.queue.put_nowait(later)
        await until(pilot, lambda: app.snapshot is later)
        assert table.cursor_row == 1
        assert "height 4,300" in line(app, StatusLine)

    drive(feed, body)


def test_a_narrow_terminal_does_not_break_it() -> None:
    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.snapshot is not None)
        await pilot.press("2")
        await until(pilot, lambda: isinstance(app.screen, JobScreen))
        assert "714,000" in screen_text(app)

    drive(FakeFeed(snapshot()), body, width=80)


def test_q_quits() -> None:
    async def body(app: Dashboard, pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: app.snapshot is not None)
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)

    drive(FakeFeed(snapshot()), body)
