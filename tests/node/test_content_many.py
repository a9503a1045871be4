"""Several holders at once: shared work, thieves of work, liars, breaks, restarts, allowances."""

from pathlib import Path

import pytest
import trio
import trio.testing

from tdmld.node import contentserver, download
from tdmld.node import contentwire as wire
from tdmld.node.contentserver import Allowance
from tdmld.node.control import ResultFile
from tdmld.node.download import part_path
from tdmld.node.errors import ContentUnavailable
from tests.node.contentkit import JOB, Node, Tap, random_text

ITEM = ResultFile(JOB, "model")
CHUNKS = 12
TEXT = random_text(CHUNKS - 1)
PATIENCE_SECONDS = 20


class World:
    """An asker and three holders of the same file, each behind a tap."""

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.asker = Node(root, 1, nursery)
        self.holders = [Node(root, number, nursery) for number in (2, 3, 4)]
        self.taps = []
        for holder in self.holders:
            holder.serve(self.asker)
            holder.put("result/model", TEXT)
            self.taps.append(Tap(self.asker, holder))

    async def fetch(self) -> bytes:
        with trio.fail_after(PATIENCE_SECONDS):
            return await self.asker.fetch(ITEM, self.holders)

    @property
    def wanted(self) -> list[int]:
        return sorted(chunk for tap in self.taps for chunk in tap.wanted)


@pytest.fixture
def world(tmp_path: Path, nursery: trio.Nursery) -> World:
    return World(tmp_path, nursery)


async def test_holders_share_the_chunks_and_none_is_asked_for_twice(world: World) -> None:
    assert await world.fetch() == TEXT
    assert world.wanted == list(range(CHUNKS))
    assert all(tap.wanted for tap in world.taps)
    assert set(world.asker.had) == {holder.session for holder in world.holders}


async def test_a_holder_that_stalls_loses_its_chunks_to_the_others(world: World) -> None:
    world.taps[0].gate = trio.Event()
    assert await world.fetch() == TEXT
    assert len(world.wanted) == CHUNKS + len(world.taps[0].wanted)
    assert 0 < len(world.taps[0].wanted) <= download.AHEAD


async def test_a_holder_that_spoils_a_chunk_is_dropped_and_named(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.taps[1].spoil = True
    assert await world.fetch() == TEXT
    assert world.taps[1].chunks <= download.AHEAD
    assert f"content from {world.holders[1].session} is not taken" in caplog.text
    blamed = {stream.peer_id for stream in world.asker.host.opened if stream.blamed}
    assert blamed == {world.holders[1].session}
    for tap in world.taps:
        tap.spoil = True
    world.asker.target.unlink()
    with pytest.raises(ContentUnavailable, match="announced hash") as caught:
        await world.fetch()
    assert all(holder.session in str(caught.value) for holder in world.holders)


async def test_a_broken_stream_goes_on_at_the_chunk_where_it_broke(world: World) -> None:
    world.taps[0].break_at = 3
    with trio.fail_after(PATIENCE_SECONDS):
        assert await world.asker.fetch(ITEM, world.holders[:1]) == TEXT
    assert CHUNKS <= world.taps[0].chunks <= CHUNKS + download.AHEAD


async def test_a_download_goes_on_after_a_restart_and_believes_nothing_that_is_there(
    world: World,
) -> None:
    tap, holder = world.taps[0], world.holders[0]
    tap.break_at = 7
    del world.asker.host.routes[world.holders[1].session]
    holder_route = world.asker.host.routes[holder.session]

    async def once(stream: object) -> None:
        """One stream, then nobody is there any more."""
        world.asker.host.routes[holder.session] = refuse
        await holder_route(stream)  # type: ignore[misc, arg-type]

    async def refuse(stream: object) -> None:
        raise ConnectionError

    world.asker.host.routes[holder.session] = once  # type: ignore[assignment]
    with pytest.raises(ContentUnavailable):
        await world.asker.fetch(ITEM, [holder])
    (part,) = world.asker.parts()
    whole = part.read_bytes()
    had = [n for n in range(CHUNKS) if whole[n << 20 : n + 1 << 20] == TEXT[n << 20 : n + 1 << 20]]
    assert 7 - download.AHEAD <= len(had) <= 7
    # Somebody changed what is there: two chunks are not what they were.
    spoiled = bytearray(whole)
    for chunk in had[:2]:
        spoiled[chunk * wire.CHUNK_BYTES + 5] ^= 1
    part.write_bytes(spoiled + b"more than it should be" * 100_000)
    world.asker.client = world.asker.new_client()
    world.asker.host.routes[holder.session] = tap.handle  # type: ignore[assignment]
    tap.wanted.clear()
    assert await world.asker.fetch(ITEM, [holder]) == TEXT
    assert sorted(tap.wanted) == [n for n in range(CHUNKS) if n not in had[2:]]
    assert world.asker.parts() == []


async def test_a_partial_file_of_something_else_is_not_gone_on_with(world: World) -> None:
    stale = part_path(world.asker.target, bytes(32))
    stale.write_bytes(b"of another state")
    assert await world.fetch() == TEXT
    assert world.asker.parts() == []


async def test_those_who_disagree_are_groups_and_the_largest_goes_first(world: World) -> None:
    world.holders[0].put("result/model", b"other bytes")
    assert await world.fetch() == TEXT
    assert set(world.asker.had) == {holder.session for holder in world.holders[1:]}
    assert world.taps[0].wanted == []
    for tap in world.taps[1:]:
        tap.spoil = True
    assert await world.fetch() == b"other bytes"
    assert world.asker.had == (world.holders[0].session,)


async def test_a_cancelled_download_leaves_nothing(world: World, nursery: trio.Nursery) -> None:
    for tap in world.taps:
        tap.gate = trio.Event()
    with trio.move_on_after(PATIENCE_SECONDS) as scope:
        async with trio.open_nursery() as fetching:
            fetching.start_soon(world.fetch)
            while not world.asker.parts():
                await trio.testing.wait_all_tasks_blocked(0.01)
            fetching.cancel_scope.cancel()
    assert not scope.cancelled_caught
    assert world.asker.parts() == []
    assert not world.asker.target.exists()


async def test_two_who_want_the_same_thing_bring_it_one_after_the_other(world: World) -> None:
    text = world.asker.layout.data_dir / "text"
    text.write_bytes(TEXT)
    shards = world.holders[0].store.import_text(text)
    world.taps[0].wanted.clear()
    async with trio.open_nursery() as both:
        for _ in range(2):
            both.start_soon(
                world.asker.client.fetch_data, JOB, None, shards, [world.holders[0].session]
            )
    assert world.taps[0].wanted == [0] * len(shards)


async def test_a_long_list_of_chunks_comes_in_pieces(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "LIST_CHUNKS", 5)
    assert await world.fetch() == TEXT
    assert world.wanted == list(range(CHUNKS))


# what a holder grants -------------------------------------------------------------------------


def test_an_allowance_is_given_at_once_and_then_at_its_rate() -> None:
    allowance = Allowance(rate=10, burst=100)
    assert all(allowance.take("a", 10, now=1000.0) <= 1000.0 for _ in range(11))
    assert allowance.take("a", 10, now=1000.0) == pytest.approx(1001.0)
    assert allowance.take("a", 10, now=1000.0) == pytest.approx(1002.0)
    assert allowance.take("b", 10, now=1000.0) <= 1000.0
    assert allowance.take("a", 10, now=2000.0) <= 2000.0


async def test_a_peer_above_its_allowance_waits_and_small_requests_do_not(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    holder = Node(tmp_path, 2, nursery, rate=1.0, burst=2.0 * wire.CHUNK_BYTES)
    greedy, other = Node(tmp_path, 1, nursery), Node(tmp_path, 5, nursery)
    holder.serve(greedy, other)
    holder.put("result/model", TEXT)
    holder.put("result/config.json", b"{}")
    tap = Tap(greedy, holder)
    nursery.start_soon(greedy.fetch, ITEM, [holder])
    with trio.fail_after(PATIENCE_SECONDS):
        while tap.chunks < 2:
            await trio.testing.wait_all_tasks_blocked(0.01)
        # It has what it may take for a while; its own small questions are answered all the same.
        assert len(await greedy.client.list_result(JOB, [holder.session])) == 2
        assert await other.fetch(ResultFile(JOB, "config.json"), [holder]) == b"{}"
    assert tap.chunks <= 3
    nursery.cancel_scope.cancel()


async def test_downloads_leave_streams_for_small_requests(
    world: World, nursery: trio.Nursery
) -> None:
    asker, holder, tap = world.asker, world.holders[0], world.taps[0]
    tap.gate = trio.Event()
    streams = []
    for _ in range(contentserver.DOWNLOADS_PER_PEER):
        stream, _ = await asker.client._open(holder.session, ITEM)
        await stream.send(wire.encode_request(wire.Want(0)))
        streams.append(stream)
    await trio.testing.wait_all_tasks_blocked()
    one_more, _ = await asker.client._open(holder.session, ITEM)
    await one_more.send(wire.encode_request(wire.Want(0)))
    with pytest.raises(ContentUnavailable, match="too many downloads"):
        wire.decode_bytes(await one_more.receive(wire.CHUNK_MESSAGE_BYTES))
    assert await asker.client.list_result(JOB, [holder.session])
    for stream in [*streams, one_more]:
        await stream.reset()
    tap.gate.set()
