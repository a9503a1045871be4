"""A real server on loopback around a fake backend."""

import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import httpx
import pytest
import trio

from tdmld.rpc.access import Access, Scope
from tdmld.rpc.server import Server
from tests.rpc.fake import FakeBackend

TOKENS = {"reader": Scope.READ, "writer": Scope.WRITE, "admin": Scope.ADMIN}


@dataclass
class Running:
    """A served backend."""

    server: Server
    backend: FakeBackend
    stop: trio.Event
    done: trio.Event

    def access(self, token: str = "admin") -> Access:
        return Access(self.server.url, token)

    def http(self, token: str = "admin") -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.server.url, headers={"authorization": f"Bearer {token}"}, timeout=10
        )


@asynccontextmanager
async def serving(backend: FakeBackend, **options: object) -> AsyncIterator[Running]:
    server = Server("127.0.0.1:0", TOKENS, **options)  # type: ignore[arg-type]
    running = Running(server, backend, trio.Event(), trio.Event())

    async def serve() -> None:
        await server.serve(backend, running.stop)
        running.done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield running
        running.stop.set()
        with trio.fail_after(10):
            await running.done.wait()


@contextmanager
def serving_in_a_thread(backend: FakeBackend) -> Iterator[Running]:
    """For clients that run under asyncio, or outside any loop."""
    ready: list[Running] = []
    started = threading.Event()
    stop: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        async with serving(backend) as running:
            ready.append(running)
            stop.append(trio.lowlevel.current_trio_token())
            started.set()
            await running.stop.wait()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert started.wait(10)
    try:
        yield ready[0]
    finally:
        trio.from_thread.run_sync(ready[0].stop.set, trio_token=stop[0])
        thread.join(10)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    logging.getLogger("tdmld.rpc").setLevel(logging.CRITICAL)
    async with serving(FakeBackend()) as it:
        yield it
    logging.getLogger("tdmld.rpc").setLevel(logging.NOTSET)
