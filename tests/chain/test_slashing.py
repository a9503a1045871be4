"""Evidence: what convicts, what does not, what it costs, once, and until when."""

from msgspec.structs import replace

from tdmld.chain.blocks import EPOCH_VIEWS, Header, Kind, Vote, block_hash, sign_block, sign_vote
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import KeyPair
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.events import Slashed
from tdmld.chain.mempool import Mempool
from tdmld.chain.slashing import from_votes
from tdmld.chain.transactions import (
    Evidence,
    Nominate,
    ProposalEvidence,
    Unbond,
    VoteEvidence,
    Withdraw,
    decode_transaction,
)
from tests.chain.world import World, make_genesis, mark, node_key, owner_key

EPOCH = 10
BLOCKS = 25
ONE, TWO = mark("one"), mark("two")
STRANGER = KeyPair(bytes(31) + b"\x07")


def world() -> World:
    return World(make_genesis(7, 4, epoch_blocks=EPOCH, unbonding=[BLOCKS, 1]))


def vote(world: World, kind: Kind, block: bytes, view: int = 3, by: int = 1) -> Vote:
    return sign_vote(node_key(by), world.chain_id, kind, view, block, by)


def twice(world: World, view: int = 3, by: int = 1) -> VoteEvidence:
    votes = [vote(world, Kind.NOTARIZE, block, view, by) for block in (ONE, TWO)]
    return from_votes(node_key(by).public, *votes)


def stake(world: World, index: int = 1) -> int:
    return world.state.account(owner_key(index).public).vote_stake


def refused(world: World, evidence: Evidence) -> str:
    def state() -> dict[bytes, bytes]:
        """All but what the end of an epoch puts."""
        return {k: v for k, v in world.store.items() if k[:1] not in (b"e", b"v")}

    before = state()
    reason = world.refused(STRANGER, evidence)
    assert state() == before, "evidence that fails does nothing"
    return reason


def test_two_votes_of_a_kind_burn_a_twentieth_and_bar_the_node() -> None:
    made = world()
    made.do(STRANGER, twice(made))
    assert stake(made) == 1001 - 51
    assert made.state.supply.burned == 51
    (event,) = [event for event in made.events if isinstance(event, Slashed)]
    assert (event.node, event.owner, event.epoch, event.burned) == (
        node_key(1).public,
        owner_key(1).public,
        0,
        51,
    )
    made.wait(EPOCH - made.height)
    chosen = made.state.validator_set(2)
    assert chosen is not None
    assert node_key(1).public not in {seat.node for seat in chosen.seats}
    assert "barred" in made.refused(owner_key(1), Nominate(node_key(1).public))


def test_nullify_and_finalize_in_one_view_convict() -> None:
    made = world()
    votes = vote(made, Kind.FINALIZE, ONE), vote(made, Kind.NULLIFY, ZERO_HASH)
    made.do(STRANGER, from_votes(node_key(1).public, *votes))
    assert stake(made) == 1001 - 51


def header(made: World, time_ms: int, by: int = 1) -> Header:
    names = dict.fromkeys(Header.__struct_fields__, 0)
    hashes = ("parent", "tx_root", "history_root", "state_root", "validators", "next_validators")
    fields = {**names, **dict.fromkeys(hashes, ZERO_HASH), "proof": b"", "view": 3}
    return Header(**{**fields, "time_ms": time_ms, "proposer": node_key(by).public})  # type: ignore[arg-type]


def proposals(made: World, *times: int) -> ProposalEvidence:
    blocks = [sign_block(node_key(1), made.chain_id, header(made, time), ()) for time in times]
    one, two = blocks
    return ProposalEvidence(one.header, one.signature, two.header, two.signature)


def test_two_blocks_of_one_view_convict() -> None:
    made = world()
    made.do(STRANGER, proposals(made, 1, 2))
    assert stake(made) == 1001 - 51


def test_what_an_honest_validator_signs_convicts_nobody() -> None:
    made = world()
    votes = [
        vote(made, Kind.NOTARIZE, ONE),
        vote(made, Kind.FINALIZE, ONE),
        vote(made, Kind.NOTARIZE, TWO, view=4),
        vote(made, Kind.NULLIFY, ZERO_HASH, view=4),
    ]
    for first in votes:
        for second in votes:
            if first.view == second.view:
                assert "contradict" in refused(made, from_votes(node_key(1).public, first, second))
    swapped = replace(from_votes(node_key(1).public, votes[0], votes[2]), view=3)
    assert "signature" in refused(made, swapped)  # of two views
    assert "two blocks" in refused(made, proposals(made, 1, 1))


def test_forgeries_convict_nobody() -> None:
    made = world()
    good = twice(made)
    assert "signature" in refused(made, replace(good, view=4))
    assert "signature" in refused(made, replace(good, node=node_key(2).public))
    assert "did not validate" in refused(made, twice(made, by=6))
    assert "did not validate" in refused(made, twice(made, view=9 * EPOCH_VIEWS))
    bad = replace(good.first, kind=Kind.NULLIFY)
    other = replace(good.second, kind=Kind.NULLIFY)
    assert "names no block" in refused(made, replace(good, first=bad, second=other))
    blocks = proposals(made, 1, 2)
    assert "leader's" in refused(made, replace(blocks, second=header(made, 3)))
    other_leader = replace(blocks, second=header(made, 3, by=2))
    assert "two blocks" in refused(made, other_leader)
    assert block_hash(blocks.first) != block_hash(blocks.second)
    assert stake(made) == 1001


def test_all_of_an_epoch_is_one_offence_another_epoch_is_another() -> None:
    made = world()
    made.do(STRANGER, twice(made))
    for again in (twice(made), twice(made, view=4), proposals(made, 1, 2)):
        assert "already" in refused(made, again)
    made.do(STRANGER, twice(made, view=EPOCH_VIEWS + 1))
    assert stake(made) == 950 - 48
    first = made.state.offence(owner_key(1).public, node_key(1).public, 0)
    assert first is not None
    assert first.burned == 51


def test_stake_that_unbinds_is_reached_stake_that_never_voted_then_is_too() -> None:
    made = world()
    made.do(owner_key(1), Unbond("vote", 1001))
    made.do(STRANGER, twice(made))
    assert stake(made) == 0
    assert made.state.unbondings(owner_key(1).public).total == 1001 - 51
    assert made.state.supply.burned == 51 + 10


def test_work_stake_is_not_touched() -> None:
    made = world()
    before = made.state.account(owner_key(1).public).work_stake
    made.do(owner_key(1), Unbond("work", 100))
    made.do(STRANGER, twice(made))
    assert made.state.account(owner_key(1).public).work_stake == before - 100
    assert made.state.unbondings(owner_key(1).public).total == 100


def test_evidence_is_good_exactly_as_long_as_the_stake_is_there() -> None:
    """Stake unbound in epoch 0 votes until the end of 1: in the block in which it can first be
    withdrawn, evidence of epoch 1 is too late, and one block earlier it is not."""
    last = 2 * EPOCH + BLOCKS
    for wait, good in ((last - 1, True), (last, False)):
        made = world()
        made.do(owner_key(1), Unbond("vote", 1001))
        made.wait(wait - made.height)
        evidence = made.sign(STRANGER, twice(made, view=EPOCH_VIEWS + 1))
        withdrawal = made.sign(owner_key(1), Withdraw())
        receipts = made.block(withdrawal, evidence).receipts
        assert [receipt.ok for receipt in receipts] == [not good, good]


def test_a_pool_takes_one_accusation_of_a_node_and_only_a_true_one() -> None:
    made = world()
    pool = Mempool(made.genesis)

    def admit(evidence: Evidence) -> None:
        raw = made.sign(STRANGER, evidence)
        pool.admit(decode_transaction(raw, made.chain_id), made.state, made.height)

    def refusal(evidence: Evidence) -> str:
        try:
            admit(evidence)
        except InvalidTransaction as error:
            return str(error)
        raise AssertionError("admitted")

    assert "signature" in refusal(replace(twice(made), view=4))
    admit(twice(made))
    assert "wait" in refusal(twice(made, view=5))
    admit(twice(made, by=2))
    assert len(pool) == 2
    made.do(STRANGER, twice(made))
    pool.refresh(made.state, made.height)
    assert len(pool) == 1
