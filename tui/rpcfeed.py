"""The feed of a real node."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path

from tdmld.rpc.client import Client, NotFound, find_access
from tdmld.rpc.types import Earnings, Head, JobDetail, JobEvent, JobSummary, NodeStatus
from tui.feed import Selected, Snapshot

SNAPSHOTS_A_SECOND = 4
"""Blocks may come faster; several become one snapshot."""
PATIENCE_SECONDS = 1.0
"""Steps and slot states change between blocks, and a chain at rest makes none."""


class RpcFeed:
    """Follows the node of a data directory; reads its token and address anew for each connection,
    because both change when the node restarts."""

    def __init__(self, data_dir: Path | None, fallback: Path) -> None:
        self._data_dir = data_dir
        self._fallback = fallback

    async def snapshots(self, selected: Selected) -> AsyncGenerator[Snapshot]:
        """A snapshot after each block, and at least every PATIENCE_SECONDS."""
        async with (
            Client(find_access(self._data_dir, self._fallback)) as client,
            client.subscribe("chain_subscribeHeads", {}, Head) as heads,
        ):
            changed = asyncio.Event()

            async def follow_heads() -> None:
                async for _ in heads:
                    changed.set()

            follower = asyncio.create_task(follow_heads())
            try:
                while not follower.done():
                    changed.clear()
                    yield await _snapshot(client, selected())
                    await asyncio.sleep(1 / SNAPSHOTS_A_SECOND)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), PATIENCE_SECONDS)
                follower.result()
            finally:
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)

    async def events(self, job: str) -> AsyncGenerator[JobEvent]:
        """Events of one job."""
        async with (
            Client(find_access(self._data_dir, self._fallback)) as client,
            client.subscribe("job_subscribe", {"id": job}, JobEvent) as events,
        ):
            async for event in events:
                yield event


async def _snapshot(client: Client, selected: str | None) -> Snapshot:
    status, earnings, jobs, job = await asyncio.gather(
        client.call("node_status", {}, NodeStatus),
        client.call("node_earnings", {}, Earnings),
        client.call("job_list", {}, tuple[JobSummary, ...]),
        _job(client, selected),
    )
    return Snapshot(status, earnings, jobs, job)


async def _job(client: Client, selected: str | None) -> JobDetail | None:
    if selected is None:
        return None
    try:
        return await client.call("job_status", {"id": selected}, JobDetail)
    except NotFound:
        return None
