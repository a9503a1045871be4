"""Who tells the followers that a block is final, and when."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.testing

from tdmld.chain.blocks import Kind, block_hash
from tdmld.chain.codec import decode
from tdmld.node.announcer import LATE, Announcer
from tdmld.node.chainwire import GOSSIP_BLOCK_BYTES, Announcement
from tdmld.node.store import AppliedBlock, ChainStore
from tests.node.chainkit import GENESIS, certificate, next_block, transfer


class Told:
    def __init__(self) -> None:
        self.raws: list[bytes] = []
        self.heard: set[bytes] = set()
        self.announcer = Announcer(self._publish, self.heard.__contains__)

    async def _publish(self, raw: bytes) -> None:
        self.raws.append(raw)


@asynccontextmanager
async def telling() -> AsyncIterator[Told]:
    told = Told()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told.announcer.run)
        yield told
        nursery.cancel_scope.cancel()


def applied(path: Path) -> AppliedBlock:
    with ChainStore(path / "chain", GENESIS) as store:
        block = next_block(store, [transfer(0, 0)])
        return store.apply(block, certificate(Kind.FINALIZE, block))


async def test_the_proposer_tells_at_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    final = applied(tmp_path)
    async with telling() as told:
        told.announcer.proposed(final)
        await trio.testing.wait_all_tasks_blocked()
        (raw,) = told.raws
        notice = decode(Announcement, raw, GOSSIP_BLOCK_BYTES)
        assert block_hash(notice.header) == final.hash
        assert notice.transactions == final.block.transactions
        await trio.sleep(10 * LATE)
        assert len(told.raws) == 1


async def test_the_next_leader_tells_when_it_hears_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    final = applied(tmp_path)
    async with telling() as told:
        told.announcer.leads_next(final)
        await trio.sleep(LATE / 2)
        assert told.raws == []
        await trio.sleep(LATE)
        assert len(told.raws) == 1


async def test_the_next_leader_is_silent_when_it_heard(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    final = applied(tmp_path)
    async with telling() as told:
        told.announcer.leads_next(final)
        await trio.sleep(LATE / 2)
        told.heard.add(final.hash)
        await trio.sleep(LATE)
        assert told.raws == []


async def test_waiting_for_one_block_does_not_hold_up_another(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    final = applied(tmp_path)
    async with telling() as told:
        told.announcer.leads_next(final)
        told.announcer.proposed(final)
        await trio.testing.wait_all_tasks_blocked()
        assert len(told.raws) == 1


async def test_a_block_without_a_finalization_of_its_own_is_not_announced(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with ChainStore(tmp_path / "chain", GENESIS) as store:
        final = store.apply(next_block(store), None)
    async with telling() as told:
        told.announcer.proposed(final)
        told.announcer.leads_next(final)
        await trio.sleep(2 * LATE)
        assert told.raws == []
