"""The validator's shell at the edge of an epoch (N7), and its accusations (N8)."""

from pathlib import Path

import trio
import trio.testing

from tdmld.chain.blocks import EPOCH_VIEWS, Block, Kind, Vote, block_hash
from tdmld.chain.transactions import ProposalEvidence, VoteEvidence
from tdmld.node.chainwire import Proposal
from tdmld.node.sync import SyncServer, check_blocks
from tests.node.chainkit import GENESIS, KEYS, make_genesis, next_block, vote
from tests.node.test_validator import Bench, bench, foreign_block

SHORT = make_genesis(epoch_blocks=2)


async def agree(made: Bench, kind: Kind, block: Block, view: int = 0) -> None:
    chain = made.store.chain_id
    await made.hear(*(vote(kind, block, voter, view, chain) for voter in (1, 2)))


async def last_of_the_epoch(made: Bench) -> Block:
    """Block 1 is final, block 2 ends the epoch and is notarized, but nobody else finalizes it."""
    first = next_block(made.store)
    await made.hear(Proposal(first, ()))
    await made.links.votes(1)
    await agree(made, Kind.NOTARIZE, first)
    await made.links.votes(2)
    await agree(made, Kind.FINALIZE, first)
    await made.executed(1)
    last = next_block(made.store)
    await made.hear(Proposal(last, ()))
    await made.links.votes(3)
    await agree(made, Kind.NOTARIZE, last)
    await made.links.votes(5)
    return last


def cast(made: Bench, block: Block) -> list[tuple[Kind, int]]:
    key = block_hash(block.header)
    return [(v.kind, v.view) for v in made.links.sent if isinstance(v, Vote) if v.hash == key]


async def test_the_last_block_of_an_epoch_is_voted_on_again_until_it_is_final(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, SHORT) as made:
        last = await last_of_the_epoch(made)
        assert cast(made, last) == [(Kind.NOTARIZE, 2), (Kind.FINALIZE, 2), (Kind.NOTARIZE, 3)]
        await agree(made, Kind.NOTARIZE, last, 3)
        await made.links.votes(7)
        assert cast(made, last)[3:] == [(Kind.FINALIZE, 3), (Kind.NOTARIZE, 4)]
        await agree(made, Kind.FINALIZE, last, 3)
        await made.executed(2)
        proof = made.store.certificate(2)
        assert proof is not None
        assert (proof.view, last.header.view) == (3, 2)
        answer = SyncServer(made.store, made._spread, lambda _: None).blocks(2, 9)
        committee = made.store.committee(0)
        assert committee is not None
        assert check_blocks(committee, 2, 1, last.header.parent, answer) == ([last], proof)


async def test_the_next_epoch_begins_with_views_of_its_own(tmp_path: Path) -> None:
    async with bench(tmp_path, SHORT) as made:
        last = await last_of_the_epoch(made)
        await agree(made, Kind.FINALIZE, last)
        await made.executed(2)
        child = next_block(made.store)
        assert child.header.view == EPOCH_VIEWS + 1
        before = list(made.posted)
        await made.hear(Proposal(child, ()))
        assert made.posted == before  # this validator's epoch is over
    async with bench(tmp_path, SHORT) as made:
        assert made.validator.epoch == 1
        assert made.validator.view == EPOCH_VIEWS + 1
        child = next_block(made.store)
        await made.hear(Proposal(child, ()))
        votes = await made.links.votes(1)
        assert [(v.kind, v.view) for v in votes] == [(Kind.NOTARIZE, EPOCH_VIEWS + 1)]


async def test_a_restart_between_two_votes_on_the_last_block_contradicts_nothing(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, SHORT) as made:
        last = await last_of_the_epoch(made)
        said = set(cast(made, last))
    async with bench(tmp_path, SHORT) as made:
        await agree(made, Kind.NOTARIZE, last)
        await agree(made, Kind.NOTARIZE, last, 3)
        await made.links.votes(2)
        assert cast(made, last) == [(Kind.FINALIZE, 3), (Kind.NOTARIZE, 4)]
        assert not said.intersection(cast(made, last))


async def test_a_block_that_names_other_validators_gets_no_vote(tmp_path: Path) -> None:
    async with bench(tmp_path, SHORT) as made:
        for name in ("validators", "next_validators"):
            await made.hear(Proposal(next_block(made.store, **{name: bytes(32)}), ()))
        assert made.posted == []


async def test_who_votes_twice_is_accused_once(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        blocks = [foreign_block(made.store, time_ms=GENESIS.time_ms + i) for i in (1, 2, 3)]
        await made.hear(*(vote(Kind.NOTARIZE, block, 1) for block in blocks))
        await trio.testing.wait_all_tasks_blocked(0.05)
        (transaction,) = made.admission.select(())
        assert isinstance(transaction.payload, VoteEvidence)
        assert transaction.payload.node == KEYS[1].public


async def test_a_leader_that_proposes_twice_is_accused(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        for i in (1, 2):
            block = foreign_block(made.store, time_ms=GENESIS.time_ms + i)
            await made.hear(Proposal(block, ()))
        await trio.testing.wait_all_tasks_blocked(0.05)
        (transaction,) = made.admission.select(())
        assert isinstance(transaction.payload, ProposalEvidence)
