"""A real server on loopback around a fake backend."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    logging.getLogger("tdmld.rpc").setLevel(logging.CRITICAL)
    async with serving(FakeBackend()) as it:
        yield it
    logging.getLogger("tdmld.rpc").setLevel(logging.NOTSET)
