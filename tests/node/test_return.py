"""The validator's shell while its node is jailed (N9), and the door for what it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tdmld.chain.blocks import Block, Kind, Vote, sign_vote
from tdmld.chain.genesis import chain_id
from tdmld.chain.records import Node
from tdmld.chain.slashing import from_votes
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Payload,
    Return,
    Revoke,
    Transaction,
    decode_transaction,
    sign_transaction,
)
from tdmld.node import claims, validator, views
from tdmld.node.admission import has_backing
from tdmld.node.chainwire import Proposal
from tdmld.node.finality import Finality
from tdmld.node.store import ChainStore
from tests.node.chainkit import KEYS, OWNERS, certificate, make_genesis, next_block, vote
from tests.node.test_validator import ME, Bench, bench

EPOCH = 12
GENESIS = make_genesis(epoch_blocks=EPOCH)
CHAIN = chain_id(GENESIS)


def grow(path: Path, epochs: int, last: tuple[bytes, ...] = ()) -> None:
    """`epochs` epochs in which the validator ME voted once and never leads; `last` is the body of
    the last block."""
    with ChainStore(path / "chain", GENESIS) as store:
        while store.height < epochs * EPOCH:
            body = last if store.height == epochs * EPOCH - 1 else ()
            block = next_block(store, body)
            if block.header.proposer == KEYS[ME].public:
                block = next_block(store, body, block.header.view + 1)
            if store.height == 0:
                store.bind(KEYS[ME].public)
                mine = vote(Kind.NOTARIZE, block, ME, 0, CHAIN)
                store.record(KEYS[ME].public, [mine], [], [block])
            store.apply(block, certificate(Kind.FINALIZE, block, (1, 2, 3), 0, CHAIN))


def node(store: ChainStore) -> Node:
    found = State(store.get).node(KEYS[ME].public)
    assert found is not None
    return found


async def live(made: Bench) -> None:
    """One block that everybody votes for and executes; ME does not lead it."""
    await agreed(made, await notarized(made))


async def notarized(made: Bench) -> Block:
    """The next block. ME votes for it; the others have not yet."""
    block = next_block(made.store)
    assert block.header.proposer != KEYS[ME].public, "it is not jailed in this epoch"
    before = [v for v in made.links.sent if isinstance(v, Vote)]
    await made.hear(Proposal(block, ()))
    await made.links.votes(len(before) + 1)
    await trio.testing.wait_all_tasks_blocked(0.02)
    return block


async def agreed(made: Bench, block: Block) -> None:
    """The others vote for it, too, and it is executed."""
    for kind in (Kind.NOTARIZE, Kind.FINALIZE):
        await made.hear(*(vote(kind, block, voter, 0, CHAIN) for voter in (1, 2)))
    await made.executed(block.header.height)
    await trio.testing.wait_all_tasks_blocked(0.02)


def listen(made: Bench, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Payload]]:
    """What is submitted, at which height; it gets lost."""
    heard: list[tuple[int, Payload]] = []

    async def lost(raw: bytes) -> bytes:
        heard.append((made.store.height, decode_transaction(raw, CHAIN).payload))
        return raw

    monkeypatch.setattr(made.admission, "submit", lost)
    return heard


def said(made: Bench) -> list[Transaction]:
    return [one for one in made.admission.select(()) if isinstance(one.payload, Return)]


async def test_n9_a_jailed_validator_returns_when_it_is_at_work(tmp_path: Path) -> None:
    grow(tmp_path, 2)
    async with bench(tmp_path, GENESIS) as made:
        jailed = node(made.store).jailed
        assert jailed == EPOCH
        block = await notarized(made)
        assert said(made) == [], "not before it finalizes a block with the others"
        await agreed(made, block)
        (found,) = said(made)
        assert found.payload == Return(EPOCH)
        assert found.signer == KEYS[ME].public
        await live(made)
        assert said(made) == [found]


async def test_n9_who_is_not_jailed_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, GENESIS) as made:
        heard = listen(made, monkeypatch)
        await live(made)
        assert heard == []


@pytest.mark.parametrize("barred", ["revoked", "convicted"])
async def test_n9_a_key_that_may_not_return_does_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, barred: str
) -> None:
    key = KEYS[ME]
    twice = [sign_vote(key, CHAIN, Kind.NOTARIZE, 1, bytes([n]) * 32, ME) for n in (1, 2)]
    accusation = sign_transaction(KEYS[1], CHAIN, from_votes(key.public, *twice))
    revocation = sign_transaction(OWNERS[ME], CHAIN, Revoke(key.public), fee=10)
    grow(tmp_path, 2, (revocation if barred == "revoked" else accusation,))
    async with bench(tmp_path, GENESIS) as made:
        record = node(made.store)
        assert record.jailed
        assert getattr(record, barred) == 2 * EPOCH
        heard = listen(made, monkeypatch)
        await live(made)
        assert heard == []


async def test_n9_it_is_said_again_after_a_while_and_only_while_jailed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RETURN_AGAIN", 3)
    grow(tmp_path, 2)
    async with bench(tmp_path, GENESIS) as made:
        heard = listen(made, monkeypatch)
        for _ in range(8):
            await live(made)
    assert heard == [(height, Return(EPOCH)) for height in (24, 27, 30)]


async def test_n9_nothing_is_said_while_execution_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(tmp_path, 2)
    async with bench(tmp_path, GENESIS) as made:
        monkeypatch.setattr(Finality, "backlog", validator.MAX_BACKLOG + 1)
        await live(made)
        assert said(made) == []


def test_validators_are_shown_with_who_leads_and_who_is_jailed(tmp_path: Path) -> None:
    grow(tmp_path, 1)
    with ChainStore(tmp_path / "chain", GENESIS) as store:
        for epoch in (1, 2):
            shown = {info.node: info for info in views.validators(State(store.get), epoch)}
            assert [info.weight for info in shown.values()] == ["10"] * 4
            mine = shown.pop(KEYS[ME].address)
            assert (mine.owner, mine.leads) == (OWNERS[ME].address, epoch == 1)
            assert mine.jailed == EPOCH
            assert all(info.leads and not info.jailed for info in shown.values())
        assert views.validators(State(store.get), 3) == ()


# ---- the door --------------------------------------------------------------------------------


@pytest.fixture(name="store")
def jailed_store(tmp_path: Path) -> Iterator[ChainStore]:
    grow(tmp_path, 1)
    with ChainStore(tmp_path / "chain", GENESIS) as store:
        yield store


def test_a_return_needs_a_registered_and_jailed_node_behind_it(store: ChainStore) -> None:
    state, parameters = State(store.get), GENESIS.parameters
    stranger = OWNERS[0]
    for key, backed in ((KEYS[ME], True), (KEYS[1], False), (stranger, False)):
        raw = sign_transaction(key, CHAIN, Return(EPOCH))
        assert has_backing(decode_transaction(raw, CHAIN), state, parameters) is backed
