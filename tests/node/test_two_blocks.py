"""N8: a leader that shows one block to some and another one to others is found out."""

from dataclasses import dataclass, field
from pathlib import Path

import trio.testing

from tdmld.chain.blocks import Kind, block_hash
from tdmld.chain.transactions import ProposalEvidence
from tdmld.node.chainwire import BlockRequest, Proposal
from tests.node.chainkit import GENESIS, vote
from tests.node.test_validator import Bench, bench, foreign_block


@dataclass
class Voter:
    """The other end of a link, and what it was told."""

    index: int
    told: list[object] = field(default_factory=list)

    def tell(self, message: object) -> None:
        self.told.append(message)


async def say(made: Bench, voter: Voter, message: object) -> None:
    await made.validator.receive(voter, message)  # type: ignore[arg-type]


async def test_who_votes_for_a_block_that_we_were_not_shown_is_asked_for_it(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as made:
        ours, theirs = (
            foreign_block(made.store, time_ms=GENESIS.time_ms + number) for number in (1, 2)
        )
        voter = Voter(2)
        await made.hear(Proposal(ours, ()))
        await say(made, voter, vote(Kind.NOTARIZE, theirs, voter.index))
        assert voter.told == [BlockRequest(block_hash(theirs.header))]
        await say(made, voter, Proposal(theirs, ()))
        await trio.testing.wait_all_tasks_blocked(0.05)
        (accusation,) = made.admission.select(())
        assert isinstance(accusation.payload, ProposalEvidence)
        other = Voter(3)
        await say(made, other, vote(Kind.NOTARIZE, theirs, other.index))
        assert other.told == []  # it is known by now


async def test_who_votes_for_the_same_block_is_asked_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        block, voter = foreign_block(made.store), Voter(2)
        await made.hear(Proposal(block, ()))
        await say(made, voter, vote(Kind.NOTARIZE, block, voter.index))
        assert voter.told == []
