"""The dashboard follows a real node through kill -9 and a restart."""

import asyncio
from pathlib import Path

import pytest

from tdmld import devnet
from tui.app import Dashboard
from tui.rpcfeed import RpcFeed

pytestmark = pytest.mark.e2e


def test_the_dashboard_survives_a_killed_and_restarted_daemon(tmp_path: Path) -> None:
    network = devnet.make_network(tmp_path / "network", nodes=1, validators=1, asks=[])

    async def reached(app: Dashboard, live: bool) -> None:
        async with asyncio.timeout(30):
            while not (app.link and app.link.live is live):  # noqa: ASYNC110 (polls a process)
                await asyncio.sleep(0.05)

    async def main() -> None:
        directory = network.data_dir(0)
        app = Dashboard(RpcFeed(directory, directory), backoff=0.2)
        async with app.run_test(size=(120, 36)):
            await asyncio.to_thread(network.start, 0)
            await reached(app, live=True)
            assert app.snapshot is not None
            assert app.snapshot.status.node == network.nodes[0].node
            await asyncio.to_thread(network.kill, 0)
            await reached(app, live=False)
            await asyncio.to_thread(network.start, 0)
            await reached(app, live=True)
            app.exit()

    with network:
        asyncio.run(main())
