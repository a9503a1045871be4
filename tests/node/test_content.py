"""Content between carriers: who gets what, and what is refused."""

import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node import contentserver, layout
from tdmld.node import contentwire as wire
from tdmld.node.contentserver import JobContent
from tdmld.node.contentstore import ContentStore
from tdmld.node.control import FramesFile, Item, ResultFile, Slot, StateFile
from tdmld.node.errors import ContentMismatch, ContentRefused, ContentUnavailable
from tdmld.node.layout import Layout
from tdmld.node.seal import ContentKeys
from tdmld.train.digest import digest
from tests.node.contentkit import JOB, Node, random_text
from tests.node.fake_stream import FakeStream, stream_pair

SLOT = Slot(JOB, 0, 1)
TEXT = random_text(2)
LIAR = KeyPair(b"3" * 32).address


@pytest.fixture
def holder(tmp_path: Path, nursery: trio.Nursery) -> Node:
    return Node(tmp_path, 2, nursery)


@pytest.fixture
def asker(tmp_path: Path, nursery: trio.Nursery, holder: Node) -> Node:
    node = Node(tmp_path, 1, nursery)
    holder.serve(node)
    return node


def store_at(path: Path, quota: int) -> ContentStore:
    return ContentStore(Layout(path), quota, ContentKeys(Layout(path), KeyPair(b"1" * 32)))


async def test_a_text_is_imported_as_shards_that_join_to_it(
    asker: Node, holder: Node, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    shards = holder.store.import_text(path)
    assert [size for _, size in shards] == [1 << 20, 1 << 20, 12345]
    await asker.client.fetch_data(JOB, None, shards, [holder.session])
    assert b"".join(asker.store.read(None, name) for name, _ in shards) == TEXT
    fd = asker.store.text_memory(None, shards)
    assert os.pread(fd, len(TEXT) + 1, 0) == TEXT
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


@pytest.mark.parametrize(
    ("item", "place"),
    [
        (StateFile(SLOT, 3, "shared"), "slot-0.1/state/3/shared.safetensors"),
        (StateFile(SLOT, 3, "lane"), "standby-0.1/state/3/lane.safetensors"),
        (FramesFile(SLOT, 2, "up"), "slot-0.1/ring/2.up.sent"),
        (ResultFile(JOB, "config.json"), "result/config.json"),
    ],
)
@pytest.mark.parametrize("data", [TEXT, TEXT[: 1 << 20], b"x", b""], ids=len)
async def test_a_member_gets_states_frames_and_results(
    asker: Node, holder: Node, item: Item, place: str, data: bytes
) -> None:
    holder.put(place, data)
    assert await asker.fetch(item, [holder]) == data
    assert asker.had == (holder.session,)
    assert asker.parts() == []


async def test_a_stranger_gets_nothing(asker: Node, holder: Node) -> None:
    holder.put("result/config.json", b"secret")
    holder.jobs[JOB] = JobContent(frozenset())
    with pytest.raises(ContentUnavailable, match="not a member"):
        await asker.fetch(ResultFile(JOB, "config.json"), [holder])
    with pytest.raises(ContentUnavailable, match="not a member"):
        await asker.client.list_result(JOB, [holder.session])


async def test_who_ceases_to_be_a_member_gets_no_further_chunk(asker: Node, holder: Node) -> None:
    holder.put("result/model", TEXT)
    stream, _ = await asker.client._open(holder.session, ResultFile(JOB, "model"))
    holder.jobs[JOB] = JobContent(frozenset())
    await stream.send(wire.encode_request(wire.Want(0)))
    with pytest.raises(ContentUnavailable, match="not a member"):
        wire.decode_bytes(await stream.receive(wire.CHUNK_MESSAGE_BYTES))
    await stream.close()


async def test_a_log_that_still_grows_is_not_given(asker: Node, holder: Node) -> None:
    item = FramesFile(SLOT, 0, "up")
    holder.put("slot-0.1/ring/0.up.sent", b"half")
    holder.growing.add(item)
    with pytest.raises(ContentUnavailable, match="not finished"):
        await asker.fetch(item, [holder])


async def test_more_than_the_limit_is_not_taken(asker: Node, holder: Node) -> None:
    holder.put("result/config.json", b"x" * 100)
    with pytest.raises(ContentUnavailable, match="at most 99"):
        await asker.fetch(ResultFile(JOB, "config.json"), [holder], 99)


async def test_a_damaged_shard_is_not_taken(asker: Node, holder: Node) -> None:
    name = digest(b"right")
    path = holder.layout.blob(name)
    path.parent.mkdir()
    path.write_bytes(b"wrong")
    with pytest.raises(ContentUnavailable, match="another content"):
        await asker.client.fetch_data(JOB, None, [(name, 5)], [holder.session])
    assert asker.parts() == []


async def test_without_holders_the_error_says_so(asker: Node) -> None:
    with pytest.raises(ContentUnavailable, match="no holder"):
        await asker.fetch(ResultFile(JOB, "x"), [])


def lie(located: wire.Located, *answers: bytes) -> object:
    """A holder that announces something and then answers what it likes."""

    async def handle(stream: FakeStream) -> None:
        await stream.receive(10_000)
        await stream.send(wire.encode_reply(located))
        for answer in answers:
            await stream.receive(10_000)
            await stream.send(answer)

    return handle


def located(size: int, digests: bytes) -> wire.Located:
    return wire.Located(wire.content_of(size, digests), size, 0, b"", digests)


@pytest.mark.parametrize(
    ("announced", "answers", "named"),
    [
        (located(5, digest(b"right")), [b"\x00wrong"], "announced hash"),
        (located(5, digest(b"right")), [b"\x00"], "0 bytes"),
        (located(5, digest(b"right")), [b"\x00righter"], "7 bytes"),
        (located(5, digest(b"right")), [b"right"], "bytes where an answer was due"),
        (located(5, digest(b"right")), [], "closed"),
        (wire.Located(bytes(32), 5, 0, b"", digest(b"right")), [], "list of chunks"),
        (located(5, b""), [], "list of chunks"),
        (located((wire.LIST_CHUNKS + 1) << 20, b""), [b"\x00"], "too short"),
        (located((wire.LIST_CHUNKS + 1) << 20, bytes(1 << 16)), [b"\x00" + bytes(32)], "hash"),
    ],
)
async def test_a_holder_that_lies_is_named_and_leaves_nothing(
    asker: Node, announced: wire.Located, answers: list[bytes], named: str
) -> None:
    asker.host.routes[LIAR] = lie(announced, *answers)  # type: ignore[assignment]
    with pytest.raises(ContentUnavailable, match=f"{LIAR}: .*{named}"):
        await asker.fetch(ResultFile(JOB, "x"), [LIAR], 1 << 40)
    assert not asker.target.exists()


@pytest.mark.parametrize("raw", [b"", b"\xff" * 30, b"\x80", msgspec.msgpack.encode([1, 2])])
async def test_a_malformed_request_is_answered_and_ends_the_stream(
    asker: Node, holder: Node, raw: bytes
) -> None:
    mine, theirs = stream_pair(asker.session, holder.session)
    await mine.send(raw)
    await holder.server.handle(theirs)  # type: ignore[arg-type]
    with pytest.raises(ContentUnavailable, match="malformed"):
        wire.decode_reply(await mine.receive(10_000))


@pytest.mark.parametrize("name", ["..", ".x", "a/b", "", "x" * 70])
def test_a_file_name_with_a_way_in_it_is_no_file_of_a_result(name: str, tmp_path: Path) -> None:
    with pytest.raises(ContentUnavailable):
        store_at(tmp_path, 1).path(ResultFile(JOB, name))


async def test_chunks_can_only_be_wanted_of_what_was_located(
    asker: Node, holder: Node, nursery: trio.Nursery
) -> None:
    mine, theirs = stream_pair(asker.session, holder.session)
    nursery.start_soon(holder.server.handle, theirs)  # type: ignore[arg-type]
    await mine.send(wire.encode_request(wire.Want(0)))
    with pytest.raises(ContentUnavailable, match="located"):
        wire.decode_bytes(await mine.receive(10_000))
    await mine.close()


async def test_a_peer_may_not_hold_many_streams(
    asker: Node, holder: Node, nursery: trio.Nursery
) -> None:
    count = contentserver.STREAMS_PER_PEER + 1
    ends = [stream_pair(asker.session, holder.session) for _ in range(count)]
    for _, theirs in ends:
        nursery.start_soon(holder.server.handle, theirs)  # type: ignore[arg-type]
        await trio.testing.wait_all_tasks_blocked()
    refused = ends[-1][0]
    assert b"too many" in await refused.receive(10_000)
    for mine, _ in ends:
        await mine.close()


def test_the_quota_is_kept(tmp_path: Path) -> None:
    Layout(tmp_path).content.mkdir()
    text = tmp_path / "text"
    text.write_bytes(b"x" * 1000)
    with pytest.raises(ContentRefused, match="do not fit"):
        store_at(tmp_path, 999).import_text(text)
    assert len(store_at(tmp_path, 1000).import_text(text)) == 1


@pytest.mark.parametrize("kind", ["empty", "directory"])
def test_only_a_regular_file_with_bytes_is_a_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "text"
    path.mkdir() if kind == "directory" else path.touch()
    with pytest.raises((ContentRefused, OSError)):
        store_at(tmp_path, 1000).import_text(path)


def test_a_full_disk_refuses_new_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(layout.os, "statvfs", lambda path: full)
    with pytest.raises(ContentRefused, match="full"):
        store_at(tmp_path, 1000).make_room(5, blob=False)


async def test_a_disk_that_fails_is_the_error_itself(
    asker: Node, holder: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.put("result/x", b"x")

    def fail(*arguments: object) -> int:
        raise OSError(5, "broken disk")

    monkeypatch.setattr("tdmld.node.download.os.pwrite", fail)
    with pytest.raises(OSError, match="broken disk"):
        await asker.fetch(ResultFile(JOB, "x"), [holder])


async def test_a_copy_of_ones_own_is_checked_for_size(asker: Node) -> None:
    asker.put("result/config.json", b"x" * 10)
    with pytest.raises(ContentUnavailable, match="at most 9"):
        await asker.fetch(ResultFile(JOB, "config.json"), [asker], 9)
    assert await asker.fetch(ResultFile(JOB, "config.json"), [asker]) == b"x" * 10


def test_a_shard_that_is_not_what_its_name_says_is_not_handed_out(tmp_path: Path) -> None:
    store, name = store_at(tmp_path, 1000), digest(b"right")
    with pytest.raises(ContentUnavailable, match="data shard 0: not here; fetch_data"):
        store.text_memory(None, [(name, 5)])
    Layout(tmp_path).blob(name).parent.mkdir(parents=True)
    Layout(tmp_path).blob(name).write_bytes(b"wrong")
    assert store.has(None, name, 5)
    with pytest.raises(ContentMismatch, match="shard 0"):
        store.text_memory(None, [(name, 5)])
    assert not store.has(None, name, 5), "or nobody would fetch it again"


def test_room_that_others_made_is_seen(tmp_path: Path) -> None:
    store = store_at(tmp_path, 1000)
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
        store_at(tmp_path, 1000).import_text(tmp_path / "pipe")
