"""The real feed against the real server, which is stopped and started again with a new token."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import trio
from textual.pilot import Pilot

from tdmld.rpc.access import TOKEN_FILE, URL_FILE
from tests.rpc.conftest import serving_in_a_thread
from tests.rpc.fake import JOB, FakeBackend, node_status
from tui.app import Dashboard
from tui.rpcfeed import RpcFeed


@contextmanager
def node_in(directory: Path, backend: FakeBackend, token: str) -> Iterator[None]:
    """A node whose files lie in `directory`, until the block ends."""
    (directory / "run").mkdir(exist_ok=True)
    with serving_in_a_thread(backend) as running:
        (directory / TOKEN_FILE).write_text(token)
        (directory / URL_FILE).write_text(running.server.url)
        yield


def test_the_dashboard_survives_the_restart_of_its_node(tmp_path: Path) -> None:
    async def reached(pilot: "Pilot[None]", live: bool, height: int | None = None) -> None:
        app = pilot.app
        assert isinstance(app, Dashboard)
        async with asyncio.timeout(10):
            while not (
                app.link
                and app.link.live is live
                and (height is None or (app.snapshot and app.snapshot.status.height == height))
            ):
                await pilot.pause(0.02)

    async def main() -> None:
        app = Dashboard(RpcFeed(tmp_path, tmp_path), backoff=0.05)
        async with app.run_test(size=(120, 36)) as pilot:
            await reached(pilot, live=False)
            with ExitStack() as node:
                node.enter_context(node_in(tmp_path, FakeBackend(tick=trio.Event()), "admin"))
                await reached(pilot, live=True, height=4211)
                assert app.selected == JOB
                await asyncio.to_thread(node.close)
            await reached(pilot, live=False)
            restarted = FakeBackend(status=node_status(height=5000), tick=trio.Event())
            with ExitStack() as node:
                # Another port and another token, as after every restart.
                node.enter_context(node_in(tmp_path, restarted, "reader"))
                await reached(pilot, live=True, height=5000)
                app.exit()
                await asyncio.to_thread(node.close)

    asyncio.run(main())


def test_snapshots_follow_the_node(tmp_path: Path) -> None:
    backend = FakeBackend(tick=trio.Event())
    heights = itertools.count(1)

    async def counting() -> object:
        return msgspec.structs.replace(node_status(), height=next(heights))

    backend.node_status = counting  # type: ignore[method-assign, assignment]

    async def main() -> list[tuple[int, str | None]]:
        feed = RpcFeed(tmp_path, tmp_path)
        found = []
        snapshots = feed.snapshots(lambda: JOB if found else None)
        async for snapshot in snapshots:
            job = snapshot.job.summary.id if snapshot.job else None
            found.append((snapshot.status.height, job))
            if len(found) == 3:
                break
        await snapshots.aclose()
        return found

    with node_in(tmp_path, backend, "admin"):
        assert asyncio.run(main()) == [(1, None), (2, JOB), (3, JOB)]


def test_events_of_a_job_end_with_it(tmp_path: Path) -> None:
    async def main() -> list[int | None]:
        return [event.segment async for event in RpcFeed(tmp_path, tmp_path).events(JOB)]

    with node_in(tmp_path, FakeBackend(), "admin"):
        assert asyncio.run(main()) == [0, 1, 2]
