"""The validator's shell, with links that are lists: order of storing and sending, late bodies,
restart, what is refused."""

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from tdmld.chain.blocks import Block, Certificate, Kind, Vote, block_hash, sign_vote
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import MAX_CERTIFICATES
from tdmld.chain.genesis import Genesis
from tdmld.chain.mempool import Mempool
from tdmld.chain.pacing import Times
from tdmld.chain.transactions import Transaction
from tdmld.node.admission import Admission
from tdmld.node.bodies import MAX_TRIES
from tdmld.node.chainwire import BlockRequest, Hello, Proposal, Transactions
from tdmld.node.finality import Finality
from tdmld.node.store import ChainStore
from tdmld.node.validator import ABSTAIN_VIEWS, LOOK_AGAIN, SILENT_SECONDS, Validator
from tests.node.chainkit import (
    CHAIN,
    GENESIS,
    KEYS,
    ROTATION,
    certificate,
    next_block,
    transfer,
    vote,
)

CLOCK_MS = GENESIS.time_ms + 5000
ME = 0
NEVER = Times(0.01, 3600, 3600, 3600)
"""No timer fires: only messages move the validator."""


class FakeLinks:
    """Everybody is linked; what is sent is kept, and checked to be on disk already."""

    def __init__(self, store: ChainStore) -> None:
        self.indices = set(range(1, len(KEYS)))
        self.sent: list[object] = []
        self._store = store
        self._news = trio.Event()

    def broadcast(self, message: object) -> None:
        if isinstance(message, Vote) and message.view > self._store.head.view:
            assert message in self._store.votes(), "sent before it was stored"
        self.sent.append(message)
        self._news.set()
        self._news = trio.Event()

    def get(self, _: int) -> None:
        return None

    async def votes(self, count: int) -> list[Vote]:
        """Wait until so many votes were sent."""
        while len(found := [m for m in self.sent if isinstance(m, Vote)]) < count:
            await self._news.wait()
        return found


@dataclass
class FakeLink:
    """Where a message comes from."""

    index: int = 1


class Bench:
    """One validator, run by hand."""

    def __init__(self, store: ChainStore, times: Times) -> None:
        self.store = store
        self.clock_ms = CLOCK_MS
        self.finality = Finality(store)
        self.admission = Admission(
            self.finality, Mempool(store.genesis), self._spread, lambda: None
        )
        self.hints: list[int | None] = []
        committee = store.committee(store.epoch)
        assert committee is not None
        self.validator = Validator(
            KEYS[ME],
            committee,
            self.finality,
            self.admission,
            times,
            now_ms=lambda: self.clock_ms,
            hint_sync=self.hints.append,
        )
        self.links = FakeLinks(store)
        self.validator.links = self.links  # type: ignore[assignment]
        self.posted: list[object] = []
        post = self.validator._post

        def spy(item: Vote | Block) -> None:
            self.posted.append(item)
            post(item)

        self.validator._post = spy  # type: ignore[method-assign]

    async def _spread(self, _: Iterable[bytes]) -> None: ...

    async def hear(self, *messages: object) -> None:
        for message in messages:
            await self.validator.receive(FakeLink(), message)  # type: ignore[arg-type]

    async def greeted(self, *certificates: Certificate, by: Iterable[int] = (1, 2)) -> None:
        """Links begin with a Hello (N6)."""
        for index in by:
            hello = Hello(self.store.height, certificates)
            await self.validator.receive(FakeLink(index), hello)  # type: ignore[arg-type]

    async def executed(self, height: int) -> None:
        feed = self.finality.heads()
        while self.store.height < height:
            await feed.receive()


@asynccontextmanager
async def bench(
    path: Path, genesis: Genesis = GENESIS, *, times: Times = NEVER, greet: bool = True
) -> AsyncIterator[Bench]:
    # A clock that jumps would jump to the limit while a thread writes votes.
    seconds = 10 if times is NEVER else math.inf
    with trio.fail_after(seconds), ChainStore(path / "chain", genesis) as store:
        made = Bench(store, times)
        made.validator.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.finality.run)
            nursery.start_soon(made.validator.run)
            nursery.start_soon(made.admission.run_queue)
            if greet:
                await made.greeted()
            yield made
            nursery.cancel_scope.cancel()


def foreign_block(
    store: ChainStore, body: tuple[bytes, ...] = (), view: int = 1, **changes: object
) -> Block:
    assert ROTATION.leader(view) != ME
    return next_block(store, body, view, **changes)


async def test_a_good_block_is_notarized_and_finalized(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        block = foreign_block(made.store, (transfer(0, 0),))
        await made.hear(Proposal(block, ()))
        assert [v.kind for v in await made.links.votes(1)] == [Kind.NOTARIZE]
        assert made.store.bodies() == (block,)
        await made.hear(vote(Kind.NOTARIZE, block, 1), vote(Kind.NOTARIZE, block, 2))
        assert [v.kind for v in await made.links.votes(2)] == [Kind.NOTARIZE, Kind.FINALIZE]
        await made.hear(vote(Kind.FINALIZE, block, 1), vote(Kind.FINALIZE, block, 2))
        await made.executed(1)
        assert made.store.head.hash == block_hash(block.header)
        assert made.store.certificate(1) is not None


async def test_the_first_vote_of_a_view_is_demand_at_once(tmp_path: Path) -> None:
    """P3: a validator at rest does not sleep until its heartbeat when another says NULLIFY."""
    slow = Times(0.01, 1.0, 1.0, 600.0)
    async with bench(tmp_path, times=slow) as made:
        await trio.testing.wait_all_tasks_blocked()
        signed = sign_vote(KEYS[1], CHAIN, Kind.NULLIFY, 1, ZERO_HASH, 1)
        await made.hear(signed)
        with trio.fail_after(slow.heartbeat / 10):
            await made.links.votes(1)


async def test_a_body_that_comes_after_its_certificate_is_taken(tmp_path: Path) -> None:
    """The view has passed meanwhile; only the height counts (N3)."""
    async with bench(tmp_path) as made:
        block = foreign_block(made.store)
        await made.hear(certificate(Kind.NOTARIZE, block), certificate(Kind.FINALIZE, block))
        await trio.testing.wait_all_tasks_blocked()
        assert BlockRequest(block_hash(block.header)) in made.links.sent
        assert made.store.height == 0
        await made.hear(Proposal(block, ()))
        await made.executed(1)
        assert made.validator.view == 2


async def test_blocks_that_break_a_rule_get_no_vote(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        unsigned = transfer(0, 0)[:-1] + b"\x00"
        for block in (
            foreign_block(made.store, state_root=bytes(32)),
            foreign_block(made.store, proof=bytes(80)),
            foreign_block(made.store, time_ms=GENESIS.time_ms),
            foreign_block(made.store, (unsigned,)),
            foreign_block(made.store, protocol=2),
        ):
            await made.hear(Proposal(block, ()))
        assert made.posted == []


async def test_a_leader_that_makes_up_block_after_block_holds_its_view_up_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    quick = Times(1.0, 2.0, 2.0, 30.0)
    async with bench(tmp_path, times=quick) as made:
        first = GENESIS.time_ms + 1
        for number in range(20):
            await made.hear(Proposal(foreign_block(made.store, time_ms=first + number), ()))
            await trio.sleep(0.5)
        assert [v.kind for v in made.posted if isinstance(v, Vote)] == [
            Kind.NOTARIZE,
            Kind.NULLIFY,
        ]


async def test_a_leader_cannot_have_block_after_block_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full one costs a fifth of a second; the last transaction's signature is wrong."""
    async with bench(tmp_path) as made:
        checked: list[int] = []

        async def verified(transactions: Sequence[Transaction]) -> list[bool]:
            checked.append(len(transactions))
            return [False]

        monkeypatch.setattr(made.admission, "verified", verified)
        first = GENESIS.time_ms + 1
        blocks = [
            foreign_block(made.store, (transfer(0, 0),), time_ms=first + number)
            for number in range(3 * MAX_TRIES)
        ]
        forged = msgspec.structs.replace(blocks[0], signature=bytes(64))
        for block in (*[forged] * 9, *blocks):
            await made.hear(Proposal(block, ()))
        assert len(checked) == MAX_TRIES
        await made.hear(certificate(Kind.NOTARIZE, blocks[-1]), Proposal(blocks[-1], ()))
        assert len(checked) == MAX_TRIES + 1, "what a quorum has notarized is wanted"


async def test_blocks_of_views_that_are_over_take_no_memory(tmp_path: Path) -> None:
    """A faulty leader once led view 2 too; whatever it makes up for it can never be final."""
    async with bench(tmp_path) as made:
        final = foreign_block(made.store, view=3)
        made.validator.adopt([final], certificate(Kind.FINALIZE, final))
        await made.executed(1)
        for height in (2, 2**60):
            old = next_block(made.store, (), 2, height=height, parent_view=1)
            await made.hear(Proposal(old, ()))
        assert len(made.validator._bodies.tree) == 0


async def test_views_that_fail_for_long_leave_room_for_the_next_proposal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdmld.chain.pending.MAX_BLOCKS", 6)
    monkeypatch.setattr("tdmld.node.validator.MAX_BLOCKS", 6)
    async with bench(tmp_path) as made:
        voted = 0
        for view in range(1, 16):
            if ROTATION.leader(view) != ME:
                voted += 1
                await made.hear(Proposal(next_block(made.store, (), view), ()))
            await made.hear(ended(view))
        await made.links.votes(voted)
        assert len(made.validator._bodies.tree) <= 6


async def test_a_block_from_the_future_waits_for_its_time(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.hear(Proposal(foreign_block(made.store, time_ms=CLOCK_MS + 60_000), ()))
        assert made.posted == []
        assert made.validator._tick() <= trio.current_time() + LOOK_AGAIN
        made.clock_ms += 60_000
        made.validator._tick()
        assert [v.kind for v in await made.links.votes(1)] == [Kind.NOTARIZE]


async def test_forged_votes_and_certificates_count_for_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        block = foreign_block(made.store)
        stolen = vote(Kind.NOTARIZE, block, 1)
        forged = [
            Vote(v.kind, v.view, v.hash, i, v.signature) for i, v in ((2, stolen), (3, stolen))
        ]
        await made.hear(*forged, certificate(Kind.NOTARIZE, block, (1, 2)))
        assert made.validator.view == 1


async def test_a_vote_does_not_wait_behind_transactions(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        async with made.admission.turns.of("b"):  # somebody else's signatures are being checked
            await made.hear(
                Transactions((transfer(0, 0),)), Proposal(foreign_block(made.store), ())
            )
            assert [v.kind for v in await made.links.votes(1)] == [Kind.NOTARIZE]
            assert len(made.admission.pool) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert len(made.admission.pool) == 1


async def test_a_restart_says_the_same_again_and_signs_nothing_new(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        block = foreign_block(made.store)
        await made.hear(Proposal(block, ()))
        before = await made.links.votes(1)
    async with bench(tmp_path) as made:
        other = foreign_block(made.store, time_ms=GENESIS.time_ms + 9)
        await made.hear(Proposal(other, ()))
        assert made.posted == []
        hello, *rest = list(made.validator.greet())
        assert isinstance(hello, Hello)
        assert rest == before
        await made.hear(vote(Kind.NOTARIZE, block, 1), vote(Kind.NOTARIZE, block, 2))
        assert [v.kind for v in await made.links.votes(1)] == [Kind.FINALIZE]


async def test_a_restart_remembers_the_certificates_that_its_votes_rest_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        block = foreign_block(made.store)
        known = certificate(Kind.NOTARIZE, block)
        await made.hear(Proposal(block, ()), known)
        before = await made.links.votes(2)
    async with bench(tmp_path) as made:
        assert made.validator.view == 2
        hello, *rest = list(made.validator.greet())
        assert hello == Hello(0, (known,))
        assert rest == before
        assert made.posted == []


async def test_a_greeting_proves_the_height_that_it_claims(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        block = foreign_block(made.store)
        final = certificate(Kind.FINALIZE, block)
        made.validator.adopt([block], final)
        await made.executed(1)
    async with bench(tmp_path) as made:
        assert next(iter(made.validator.greet())) == Hello(1, (final,))


async def test_a_greeting_with_many_certificates_continues_in_messages(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        known = [ended(view) for view in range(1, MAX_CERTIFICATES + 3)]
        await made.hear(*known)
        assert list(made.validator.greet()) == [
            Hello(0, tuple(known[:MAX_CERTIFICATES])),
            *known[MAX_CERTIFICATES:],
        ]


def ended(view: int) -> Certificate:
    """The proof that a view was nullified."""
    rows = ((i, sign_vote(KEYS[i], CHAIN, Kind.NULLIFY, view, ZERO_HASH, i)) for i in (1, 2, 3))
    return Certificate(Kind.NULLIFY, view, ZERO_HASH, tuple((i, v.signature) for i, v in rows))


async def test_an_empty_directory_says_nothing_before_a_quorum_greeted_it(tmp_path: Path) -> None:
    """Until then this key may have voted from another directory, in any view (N6)."""
    async with bench(tmp_path, greet=False) as made:
        block = foreign_block(made.store)
        await made.hear(Proposal(block, ()))
        await made.greeted(by=[1])
        await made.hear(*(vote(Kind.NOTARIZE, block, i) for i in (1, 2, 3)))
        assert made.posted == []
        assert not made.validator._may_propose()


async def test_an_empty_directory_on_a_fresh_chain_votes_when_a_quorum_greeted_it(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, greet=False) as made:
        await made.hear(Proposal(foreign_block(made.store), ()))
        await made.greeted(by=[1, 2])
        assert [v.kind for v in await made.links.votes(1)] == [Kind.NOTARIZE]


async def test_a_time_out_that_fell_into_the_silence_is_made_up_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Greetings that come later than the first time-out must not cost the first view its end:
    found by the simulator, where all stood in view 1 for ever."""
    quick = Times(0.01, 1.0, 1.0, 3.0)
    async with bench(tmp_path, times=quick, greet=False) as made:
        await trio.sleep(quick.heartbeat + 2 * quick.timeout)
        assert made.posted == []
        await made.greeted(by=[1, 2])
        (late,) = await made.links.votes(1)
        assert (late.kind, late.view) == (Kind.NULLIFY, 1)


async def test_an_empty_directory_on_a_running_chain_does_not_vote_at_once(tmp_path: Path) -> None:
    """This key may have voted from another directory, up to ABSTAIN_VIEWS ahead (N6)."""
    async with bench(tmp_path, greet=False) as made:
        block = foreign_block(made.store)
        await made.greeted(certificate(Kind.NOTARIZE, block), ended(2), ended(3))
        assert made.posted == [], "no finalization of view 1: it may have been nullified here"
        for view in range(4, 4 + ABSTAIN_VIEWS + 1):
            made.validator._act(made.validator.core.time_out(view))
            assert made.posted == []
            await made.hear(ended(view))
        made.validator._act(made.validator.core.time_out(made.validator.view))
        assert [v.view for v in await made.links.votes(1)] == [4 + ABSTAIN_VIEWS + 1]


async def test_an_empty_directory_that_was_synced_does_not_vote_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path, greet=False) as made:
        block = foreign_block(made.store)
        made.validator.adopt([block], certificate(Kind.FINALIZE, block))
        await made.executed(1)
        assert ROTATION.leader(2) != ME
        await made.hear(Proposal(next_block(made.store, (), 2), ()))
        await made.greeted()
        assert made.validator.view == 2
        assert made.posted == []
    async with bench(tmp_path) as made:
        await made.hear(Proposal(next_block(made.store, (), 2), ()))
        assert made.posted == [], "a restart changes nothing"


async def test_a_chain_that_stands_still_without_it_has_it_vote_after_all(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A wiped validator of three must not stop the chain for ever."""
    quick = Times(0.01, 1.0, 1.0, 3.0)
    async with bench(tmp_path, times=quick, greet=False) as made:
        began = trio.current_time()
        await made.greeted(ended(1))
        (late,) = await made.links.votes(1)
        assert (late.kind, late.view) == (Kind.NULLIFY, 2)
        assert trio.current_time() >= began + SILENT_SECONDS
