"""A feed that says what a test tells it to."""

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from tdmld.rpc.types import Earnings, EarningsBucket, JobEvent, NodeStatus, time_text
from tests.rpc.fake import GENESIS_MS, job_detail, job_event, node_status
from tui.feed import Selected, Snapshot


def earnings() -> Earnings:
    return Earnings(
        height=4211,
        total="283392",
        pending="62976",
        buckets=tuple(
            EarningsBucket(
                start=time_text(GENESIS_MS + 60_000 * n), amount=str(31488 * (n * 7 % 5))
            )
            for n in range(30)
        ),
    )


def snapshot(status: NodeStatus | None = None, state: str = "active") -> Snapshot:
    detail = job_detail(state)
    other = msgspec.structs.replace(
        detail.summary, id="b2" * 32, name="older", state="closed", segments_settled=40
    )
    return Snapshot(
        status=status or node_status(),
        earnings=earnings(),
        jobs=(detail.summary, other),
        job=detail,
    )


class FakeFeed:
    """Items put into `queue` are yielded; an exception among them is raised."""

    def __init__(self, *items: Snapshot | Exception) -> None:
        self.queue: asyncio.Queue[Snapshot | Exception] = asyncio.Queue()
        for item in items:
            self.queue.put_nowait(item)
        self.connections = 0
        self.asked: list[str | None] = []
        self.event_jobs: list[str] = []

    async def snapshots(self, selected: Selected) -> AsyncGenerator[Snapshot]:
        self.connections += 1
        while True:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            self.asked.append(selected())
            yield item

    async def events(self, job: str) -> AsyncGenerator[JobEvent]:
        self.event_jobs.append(job)
        for number in range(3):
            yield job_event(number)
        await asyncio.Event().wait()
