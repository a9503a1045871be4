"""Peers that hold streams, downloads, disk or memory of ours, or bring something very slowly."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from tdmld.node import content, contentserver, contentstore, download, layout
from tdmld.node import contentwire as wire
from tdmld.node.contentserver import JobContent
from tdmld.node.control import ResultFile
from tdmld.node.errors import ContentUnavailable
from tdmld.train.digest import digest
from tests.node.contentkit import JOB, SPEC_ID, Node, Tap, random_text
from tests.node.fake_stream import FakeStream, stream_pair

ITEM = ResultFile(JOB, "model")
TEXT = random_text(2)
OTHER_JOB = b"o" * 32
PATIENCE_SECONDS = 20


@pytest.fixture
def asker(tmp_path: Path, nursery: trio.Nursery) -> Node:
    return Node(tmp_path, 1, nursery)


def holder(asker: Node, number: int, data: bytes = TEXT) -> Node:
    """One more node that has the model."""
    assert asker.host.nursery is not None
    node = Node(asker.layout.data_dir.parent, number, asker.host.nursery)
    node.serve(asker)
    node.put("result/model", data)
    return node


def announce(size: int, digests: bytes) -> wire.Located:
    return wire.Located(wire.content_of(size, digests), size, 0, b"", digests)


async def test_strangers_take_no_streams_from_members(
    asker: Node, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contentserver, "STREAMS", 2)
    node = holder(asker, 2)
    for number in range(3):
        mine, theirs = stream_pair(f"stranger {number}", node.session)
        nursery.start_soon(node.server.handle, theirs)
        await trio.testing.wait_all_tasks_blocked()
        assert b"not a member" in await mine.receive(10_000)
    assert await asker.fetch(ITEM, [node]) == TEXT


async def test_partial_files_of_a_liar_are_few(
    asker: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(download.KEPT_PARTS + 3):
        first = os.urandom(wire.CHUNK_BYTES)
        located = announce(2 * wire.CHUNK_BYTES, digest(first) + bytes(32))

        async def lie(
            stream: FakeStream, located: wire.Located = located, first: bytes = first
        ) -> None:
            await stream.receive(10_000)
            await stream.send(wire.encode_reply(located))
            await stream.receive(10_000)
            await stream.send(wire.BYTES, first)
            await stream.reset()

        monkeypatch.setattr(content, "RETRY_SECONDS", ())
        asker.host.routes["liar"] = lie  # type: ignore[assignment]
        with pytest.raises(ContentUnavailable):
            await asker.fetch(ITEM, ["liar"])
        assert len(asker.parts()) == min(number + 1, download.KEPT_PARTS)


async def test_made_up_keys_leave_nothing_but_few_partial_files(
    asker: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "RETRY_SECONDS", ())
    for number in range(2 * download.KEPT_PARTS):
        first = os.urandom(wire.CHUNK_BYTES)
        digests = digest(first) + bytes(32)
        whole = wire.content_of(wire.CHUNK_BYTES + 32, digests)
        located = wire.Located(whole, wire.CHUNK_BYTES + 32, number, os.urandom(16), digests)

        async def lie(
            stream: FakeStream, located: wire.Located = located, first: bytes = first
        ) -> None:
            await stream.receive(10_000)
            await stream.send(wire.encode_reply(located))
            await stream.receive(10_000)
            await stream.send(wire.BYTES, first)
            await stream.reset()

        asker.host.routes["liar"] = lie  # type: ignore[assignment]
        with pytest.raises(ContentUnavailable):
            await asker.client.fetch_data(JOB, SPEC_ID, [(bytes(32), 1 << 20)], ["liar"])
    left = list(asker.layout.sealed(SPEC_ID).iterdir())
    assert sorted(left) == asker.parts()
    assert len(left) == download.KEPT_PARTS


async def test_a_list_of_chunks_in_tiny_pieces_is_not_taken(asker: Node) -> None:
    count = wire.LIST_CHUNKS + 1
    located = announce(count << 20, bytes(32) * count)
    located = wire.Located(located.content, located.size, 0, b"", bytes(32) * wire.LIST_CHUNKS)

    async def drip(stream: FakeStream) -> None:
        await stream.receive(10_000)
        await stream.send(wire.encode_reply(located))
        for _ in range(32):
            await stream.receive(10_000)
            await stream.send(wire.BYTES, b"\0")

    asker.host.routes["drip"] = drip  # type: ignore[assignment]
    with pytest.raises(ContentUnavailable, match="list of chunks is too short"):
        await asker.fetch(ITEM, ["drip"], 1 << 40)


async def test_a_slow_holder_of_something_else_does_not_keep_us_from_the_others(
    asker: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = os.urandom(len(TEXT))
    monkeypatch.setattr(content, "PATIENCE_SECONDS", 0.5 - wire.chunk_count(len(TEXT)))
    slow, good = [holder(asker, 2, wrong), holder(asker, 3, wrong)], holder(asker, 4)
    taps = [Tap(asker, node) for node in slow]
    for tap in taps:
        tap.gate = trio.Event()
    with trio.fail_after(PATIENCE_SECONDS):
        assert await asker.fetch(ITEM, [*slow, good]) == TEXT
    assert asker.had == (good.session,)
    assert all(tap.wanted for tap in taps)
    # Where nobody else has it, there is nothing to gain by leaving.
    with trio.move_on_after(1) as scope:
        await asker.fetch(ITEM, slow)
    assert scope.cancelled_caught


async def test_downloads_of_one_job_do_not_wait_for_those_of_another(
    asker: Node, nursery: trio.Nursery
) -> None:
    slow, good = holder(asker, 2), holder(asker, 3)
    tap = Tap(asker, slow)
    tap.gate = trio.Event()
    good.jobs[OTHER_JOB] = JobContent(frozenset({asker.session}))
    other = good.layout.result(OTHER_JOB)
    other.mkdir(parents=True)
    (other / "model").write_bytes(b"of the other job")
    targets = [asker.layout.data_dir / str(number) for number in range(9)]
    for target in targets[1:]:
        nursery.start_soon(asker.client.fetch_file, ITEM, 1 << 30, [slow.session], target)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert len(asker.host.opened) == content.DOWNLOADS_AT_ONCE
    assert content.DOWNLOADS_AT_ONCE < content.ALL_DOWNLOADS <= contentserver.DOWNLOADS_PER_PEER
    with trio.fail_after(PATIENCE_SECONDS):
        item = ResultFile(OTHER_JOB, "model")
        await asker.client.fetch_file(item, 100, [good.session], targets[0])
    assert targets[0].read_bytes() == b"of the other job"
    nursery.cancel_scope.cancel()


async def test_downloads_at_once_leave_the_disk_its_reserve(
    asker: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when it began; others have used it meanwhile."""
    node = holder(asker, 2)
    tap = Tap(asker, node)

    def filling(path: Path) -> object:
        left = layout.DISK_RESERVE_BYTES + (100 if tap.chunks else 1 << 30)
        return SimpleNamespace(f_bavail=left, f_frsize=1)

    monkeypatch.setattr(layout.os, "statvfs", filling)
    with pytest.raises(OSError, match="full"):
        await asker.fetch(ITEM, [node])
    assert asker.parts() == []


async def test_a_file_that_is_identified_twice_at_once_is_counted_once(
    asker: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contentstore, "KNOWN_LISTS_BYTES", 100)
    key, found = ("path", 1, 1), contentstore.ChunkList(bytes(32), 1, bytes(32))
    for _ in range(3):  # as two threads that hash the same file do at the end
        asker.store._remember(key, found)
    assert asker.store._lists == {key: found}
    asker.store._remember(("other", 1, 1), found)
    assert list(asker.store._lists) == [("other", 1, 1)]


async def test_a_text_that_is_here_needs_no_room(asker: Node, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    shards = asker.store.import_text(text)
    asker.store._quota = len(TEXT)
    assert asker.store.import_text(text) == shards
