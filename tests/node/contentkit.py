"""Carriers' content sides joined by streams in memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import trio

from tdmld.chain.crypto import KeyPair
from tdmld.node import contentwire as wire
from tdmld.node.content import ContentClient
from tdmld.node.contentserver import (
    PEER_BURST_BYTES,
    PEER_BYTES_PER_SECOND,
    ContentServer,
    JobContent,
)
from tdmld.node.contentstore import ContentStore
from tdmld.node.control import Item
from tdmld.node.layout import Layout
from tdmld.node.seal import ContentKeys
from tests.node.fake_stream import FakeHost, FakeStream

JOB = b"j" * 32
SPEC_ID = b"s" * 32


class Node:
    """One session with a store, a server and a client."""

    def __init__(
        self,
        root: Path,
        number: int,
        nursery: trio.Nursery,
        *,
        rate: float = PEER_BYTES_PER_SECOND,
        burst: float = PEER_BURST_BYTES,
    ) -> None:
        key = KeyPair(bytes([number]) * 32)
        self.session = key.address
        self.layout = Layout(root / f"node{number}")
        self.layout.content.mkdir(parents=True)
        self.keys = ContentKeys(self.layout, key)
        self.store = ContentStore(self.layout, 1 << 30, self.keys)
        self.jobs: dict[bytes, JobContent] = {}
        self.growing: set[Item] = set()
        self.server = ContentServer(
            self.store,
            self.keys,
            self.jobs,
            self.growing.__contains__,
            rate=rate,
            burst=burst,
        )
        self.host = FakeHost(self.session)
        self.host.nursery = nursery
        self.client = self.new_client()

    def new_client(self) -> ContentClient:
        """As after a restart of the carrier."""
        return ContentClient(self.host, "content", self.layout, self.store, self.keys)  # type: ignore[arg-type]

    def serve(self, *askers: "Node", sealed: bytes | None = None) -> None:
        """Answer these nodes, as members of the job."""
        self.jobs[JOB] = JobContent(frozenset(asker.session for asker in askers), sealed)
        for asker in askers:
            asker.host.routes[self.session] = self.server.handle  # type: ignore[assignment]

    def put(self, place: str, data: bytes) -> Path:
        """A file of the job, by its place below the job's directory."""
        path = self.layout.job(JOB) / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    @property
    def target(self) -> Path:
        """Where `fetch` puts what it brought."""
        return self.layout.data_dir / "got"

    async def fetch(
        self, item: Item, holders: Sequence["Node | str"], limit: int = 1 << 30
    ) -> bytes:
        named = [holder if isinstance(holder, str) else holder.session for holder in holders]
        self.had = await self.client.fetch_file(item, limit, named, self.target)
        return self.target.read_bytes()

    def parts(self) -> list[Path]:
        return sorted(self.layout.data_dir.rglob("*.part"))


class Tap:
    """Stands before a holder's server: counts chunks, spoils, delays or breaks them."""

    def __init__(self, asker: Node, holder: Node) -> None:
        self.holder = holder
        self.wanted: list[int] = []
        self.chunks = 0
        self.break_at: int | None = None
        """Of all chunks sent: this one breaks the stream, once."""
        self.spoil = False
        self.gate: trio.Event | None = None
        """Chunks wait for it."""
        asker.host.routes[holder.session] = self.handle

    async def handle(self, stream: FakeStream) -> None:
        await self.holder.server.handle(_Tapped(stream, self))  # type: ignore[arg-type]


class _Tapped:
    def __init__(self, stream: FakeStream, tap: Tap) -> None:
        self._stream, self._tap = stream, tap
        self.peer_id = stream.peer_id

    async def receive(self, limit: int) -> bytes:
        raw = await self._stream.receive(limit)
        request = wire.decode_request(raw)
        if isinstance(request, wire.Want):
            self._tap.wanted.append(request.chunk)
        return raw

    async def send(self, *parts: bytes) -> None:
        if parts[0] == wire.BYTES:
            if self._tap.gate is not None:
                await self._tap.gate.wait()
            if self._tap.chunks == self._tap.break_at:
                self._tap.break_at = None
                await self._stream.reset()
            self._tap.chunks += 1
            if self._tap.spoil:
                parts = (parts[0], bytes([parts[1][0] ^ 1]) + parts[1][1:])
        await self._stream.send(*parts)


def random_text(chunks: int, rest: int = 12345) -> bytes:
    return os.urandom(wire.CHUNK_BYTES * chunks + rest)
