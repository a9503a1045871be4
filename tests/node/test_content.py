"""Content between carriers: who gets what, and what is refused."""

import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node import content
from tdmld.node.content import ContentClient, ContentServer, ContentStore
from tdmld.node.control import Blob, FramesFile, Item, ResultFile, Slot, StateFile
from tdmld.node.errors import ContentMismatch, ContentRefused, ContentUnavailable
from tdmld.node.layout import Layout
from tdmld.train.digest import digest
from tests.node.fake_stream import FakeHost, FakeStream, stream_pair

JOB = b"j" * 32
SLOT = Slot(JOB, 0, 1)
ASKER, HOLDER = (KeyPair(bytes([n]) * 32).address for n in (1, 2))
TEXT = os.urandom(content.CHUNK_BYTES * 2 + 12345)


class World:
    """A holder with content and an asker without, joined by streams in memory."""

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.root = root
        self.members = {JOB: frozenset({ASKER})}
        self.growing: set[Item] = set()
        self.layout = Layout(root / "holder")
        self.mine = Layout(root / "asker")
        for layout in (self.layout, self.mine):
            layout.content.mkdir(parents=True)
        self.store = ContentStore(self.layout, 1 << 30)
        self.server = ContentServer(self.store, self.members, self.growing.__contains__)
        self.asker_store = ContentStore(self.mine, 1 << 30)
        host = FakeHost(ASKER)
        host.nursery = nursery
        host.routes[HOLDER] = self.server.handle  # type: ignore[assignment]
        self.host = host
        self.client = ContentClient(host, "content", self.asker_store)  # type: ignore[arg-type]

    def put(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def fetch(self, item: Item, limit: int = 1 << 30, *, blob: bool = False) -> bytes:
        target = self.mine.data_dir / "got"
        await self.client.fetch(item, limit, [HOLDER], target, blob=blob)
        return target.read_bytes()

    def leftovers(self) -> list[str]:
        return [path.name for path in self.mine.data_dir.glob("*.part")]


@pytest.fixture
def world(tmp_path: Path, nursery: trio.Nursery) -> World:
    return World(tmp_path, nursery)


async def test_a_text_is_imported_as_shards_that_join_to_it(world: World) -> None:
    path = world.root / "text"
    path.write_bytes(TEXT)
    shards = world.store.import_text(path)
    assert [size for _, size in shards] == [1 << 20, 1 << 20, 12345]
    parts = [await world.fetch(Blob(JOB, name), size, blob=True) for name, size in shards]
    assert b"".join(parts) == TEXT


@pytest.mark.parametrize(
    ("item", "place"),
    [
        (StateFile(SLOT, 3, "shared"), "slot-0.1/state/3/shared.safetensors"),
        (StateFile(SLOT, 3, "lane"), "standby-0.1/state/3/lane.safetensors"),
        (FramesFile(SLOT, 2, "up"), "slot-0.1/ring/2.up.sent"),
        (ResultFile(JOB, "config.json"), "result/config.json"),
    ],
)
async def test_a_member_gets_states_frames_and_results(
    world: World, item: Item, place: str
) -> None:
    world.put(world.layout.job(JOB) / place, TEXT)
    assert await world.fetch(item) == TEXT
    assert world.leftovers() == []


async def test_a_stranger_gets_nothing(world: World) -> None:
    world.put(world.layout.result(JOB) / "config.json", b"secret")
    world.members[JOB] = frozenset()
    with pytest.raises(ContentUnavailable, match="not a member"):
        await world.fetch(ResultFile(JOB, "config.json"))
    with pytest.raises(ContentUnavailable, match="not a member"):
        await world.client.list_result(JOB, [HOLDER])


async def test_a_log_that_still_grows_is_not_given(world: World) -> None:
    item = FramesFile(SLOT, 0, "up")
    world.put(world.layout.slot(JOB, 0, 1) / "ring" / "0.up.sent", b"half")
    world.growing.add(item)
    with pytest.raises(ContentUnavailable, match="not finished"):
        await world.fetch(item)


async def test_more_than_the_limit_is_not_taken(world: World) -> None:
    world.put(world.layout.result(JOB) / "config.json", b"x" * 100)
    with pytest.raises(ContentUnavailable, match="at most 99"):
        await world.fetch(ResultFile(JOB, "config.json"), 99)


async def test_a_damaged_shard_is_not_taken(world: World) -> None:
    name = digest(b"right")
    world.put(world.layout.blob(name), b"wrong")
    with pytest.raises(ContentUnavailable, match="another content"):
        await world.fetch(Blob(JOB, name), 5, blob=True)


async def test_the_next_holder_is_tried(world: World) -> None:
    world.put(world.layout.result(JOB) / "config.json", b"x")
    liar = KeyPair(b"3" * 32).address

    async def lie(stream: FakeStream) -> None:
        await stream.receive(10_000)
        await stream.send(msgspec.msgpack.encode(content.Located(digest(b"a"), 1)))
        await stream.receive(10_000)
        await stream.send(b"b")

    world.host.routes[liar] = lie
    target = world.root / "out" / "config.json"
    item = ResultFile(JOB, "config.json")
    assert await world.client.fetch(item, 10, [liar, HOLDER], target) == HOLDER
    with pytest.raises(ContentUnavailable, match="announced hash"):
        await world.client.fetch(item, 10, [liar], world.root / "out" / "other")
    assert [path.name for path in (world.root / "out").iterdir()] == ["config.json"]


async def test_without_holders_the_error_says_so(world: World) -> None:
    with pytest.raises(ContentUnavailable, match="no holder"):
        await world.client.fetch(Blob(JOB, bytes(32)), 1, [], world.root / "x")


@pytest.mark.parametrize("size", [0, content.CHUNK_BYTES + 1])
async def test_a_chunk_of_a_wrong_size_is_refused(world: World, size: int) -> None:
    liar = KeyPair(b"3" * 32).address

    async def lie(stream: FakeStream) -> None:
        await stream.receive(10_000)
        await stream.send(msgspec.msgpack.encode(content.Located(bytes(32), 1 << 22)))
        await stream.receive(10_000)
        await stream.send(bytes(size))

    world.host.routes[liar] = lie
    with pytest.raises(ContentUnavailable):
        await world.client.fetch(Blob(JOB, bytes(32)), 1 << 22, [liar], world.root / "x")


@pytest.mark.parametrize("raw", [b"", b"\xff" * 30, b"\x80", msgspec.msgpack.encode([1, 2])])
async def test_a_malformed_request_is_answered_and_ends_the_stream(
    world: World, nursery: trio.Nursery, raw: bytes
) -> None:
    mine, theirs = stream_pair(ASKER, HOLDER)
    await mine.send(raw)
    await world.server.handle(theirs)  # type: ignore[arg-type]
    reply = msgspec.msgpack.decode(await mine.receive(10_000))
    assert "malformed" in reply["reason"]


@pytest.mark.parametrize("name", ["..", ".x", "a/b", "", "x" * 70])
def test_a_file_name_with_a_way_in_it_is_no_file_of_a_result(name: str, tmp_path: Path) -> None:
    store = ContentStore(Layout(tmp_path), 1)
    with pytest.raises(ContentUnavailable):
        store.path(ResultFile(JOB, name))


async def test_bytes_can_only_be_wanted_of_what_was_located(world: World) -> None:
    mine, theirs = stream_pair(ASKER, HOLDER)
    world.host.nursery.start_soon(world.server.handle, theirs)  # type: ignore[union-attr, arg-type]
    await mine.send(msgspec.msgpack.encode(content.Want(0, 5)))
    reply = msgspec.msgpack.decode(await mine.receive(10_000))
    assert "located" in reply["reason"]
    await mine.close()


async def test_a_peer_may_not_hold_many_streams(world: World) -> None:
    ends = [stream_pair(ASKER, HOLDER) for _ in range(content.STREAMS_PER_PEER + 1)]
    for _, theirs in ends:
        world.host.nursery.start_soon(world.server.handle, theirs)  # type: ignore[union-attr, arg-type]
        await trio.testing.wait_all_tasks_blocked()
    refused = ends[-1][0]
    assert b"too many" in await refused.receive(10_000)
    for mine, _ in ends:
        await mine.close()


def test_the_quota_is_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.content.mkdir()
    text = tmp_path / "text"
    text.write_bytes(b"x" * 1000)
    with pytest.raises(ContentRefused, match="do not fit"):
        ContentStore(layout, 999).import_text(text)
    assert len(ContentStore(layout, 1000).import_text(text)) == 1


@pytest.mark.parametrize("kind", ["empty", "directory"])
def test_only_a_regular_file_with_bytes_is_a_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "text"
    path.mkdir() if kind == "directory" else path.touch()
    with pytest.raises((ContentRefused, OSError)):
        ContentStore(Layout(tmp_path), 1000).import_text(path)


def test_a_full_disk_refuses_new_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(content.os, "statvfs", lambda path: full)
    with pytest.raises(ContentRefused, match="full"):
        ContentStore(Layout(tmp_path), 1000).make_room(5, blob=False)


async def test_a_copy_of_ones_own_is_checked_for_size(world: World) -> None:
    world.put(world.mine.result(JOB) / "config.json", b"x" * 10)
    with pytest.raises(ContentMismatch):
        world.client._copy(ResultFile(JOB, "config.json"), 9, world.root / "y")


def test_room_that_others_made_is_seen(tmp_path: Path) -> None:
    store = ContentStore(Layout(tmp_path), 1000)
    old = tmp_path / "content" / "ab" / ("ab" * 32)
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(900))
    with pytest.raises(ContentRefused, match="holds 900 of 1000"):
        store.make_room(200, blob=True)
    old.unlink()
    store.make_room(600, blob=True)
    store.make_room(600, blob=True)  # what was announced and never came takes no room


def test_a_pipe_is_no_text_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ContentRefused, match="not a regular file"):
        ContentStore(Layout(tmp_path), 1000).import_text(tmp_path / "pipe")
