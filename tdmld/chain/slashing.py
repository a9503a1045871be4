"""Evidence: what a validator signed against itself burns its owner's stake.

It is self-contained: the chain checks two signatures of one node and needs no other witness. All
that a node does in one epoch is one offence, so somebody who started two machines with one key
does not lose everything within minutes, while one that is caught still has more to lose in every
epoch in which it votes. The owner pays, whatever key it used, from what it has bound and from what
unbinds and voted then. The node is never elected again; it leaves with the next set that is fixed.
"""

from msgspec.structs import replace

from tdmld.chain import epochs
from tdmld.chain.accounts import (
    Offence,
    Unbonding,
    Unbondings,
)
from tdmld.chain.blocks import (
    PROPOSAL_DOMAIN,
    VOTE_DOMAIN,
    Header,
    Kind,
    Vote,
    block_hash,
    view_epoch,
    vote_bytes,
)
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import verify
from tdmld.chain.events import Slashed
from tdmld.chain.execution import Execution, require
from tdmld.chain.limits import RATE_ONE
from tdmld.chain.transactions import Evidence, ProposalEvidence, Sworn, VoteEvidence


def from_votes(node: bytes, first: Vote, second: Vote) -> VoteEvidence:
    """Evidence of two votes of one view that the node signed."""
    one, two = (Sworn(vote.kind, vote.hash, vote.signature) for vote in (first, second))
    if (two.kind, two.hash) < (one.kind, one.hash):
        one, two = two, one
    return VoteEvidence(node, first.view, one, two)


def offender(evidence: Evidence) -> tuple[bytes, int]:
    """Whom it is about, and in which epoch: the offence."""
    if isinstance(evidence, VoteEvidence):
        return evidence.node, view_epoch(evidence.view)
    return evidence.first.proposer, view_epoch(evidence.first.view)


def convict(run: Execution, evidence: Evidence, chain_id: bytes) -> None:
    """Burn the offender's stake and bar its node. Cheap rules come before signatures."""
    node, epoch = offender(evidence)
    record, chosen = run.state.node(node), run.state.validator_set(epoch)
    seat = None if chosen is None else next((s for s in chosen.seats if s.node == node), None)
    if record is None or seat is None:
        require(False, f"the node did not validate in epoch {epoch}")
        return
    owner = seat.owner
    require(
        run.state.offence(owner, node, epoch) is None,
        "this offence is proven already: all of one node in one epoch is one",
    )
    require(
        not epochs.over(run.state, run.context, run.genesis, epoch + 1),
        "too late: the unbonding period since that epoch is over",
    )
    if isinstance(evidence, VoteEvidence):
        _check_votes(evidence, chain_id)
    else:
        _check_proposals(evidence, chain_id)
    burned = _burn(run, owner, epoch)
    run.state.put_offence(owner, epoch, Offence(node, run.height, burned))
    if not record.convicted:
        run.state.put_node(node, replace(record, convicted=run.height))
    run.emit(Slashed(node, owner, epoch, burned))


def _check_votes(evidence: VoteEvidence, chain_id: bytes) -> None:
    first, second = evidence.first, evidence.second
    kinds = {first.kind, second.kind}
    require(
        (len(kinds) == 1 and first.hash != second.hash) or kinds == {Kind.NULLIFY, Kind.FINALIZE},
        "these two votes do not contradict each other",
    )
    for vote in (first, second):
        require(
            (vote.kind is Kind.NULLIFY) == (vote.hash == ZERO_HASH),
            "a vote to nullify names no block, any other names one",
        )
        message = vote_bytes(vote.kind, evidence.view, vote.hash)
        require(
            verify(evidence.node, VOTE_DOMAIN, chain_id, message, vote.signature),
            "a signature is not the node's over this vote",
        )


def _check_proposals(evidence: ProposalEvidence, chain_id: bytes) -> None:
    first, second = evidence.first, evidence.second
    require(
        first != second and first.view == second.view and first.proposer == second.proposer,
        "these are not two blocks of one leader for one view",
    )
    rows: tuple[tuple[Header, bytes], ...] = (
        (first, evidence.first_signature),
        (second, evidence.second_signature),
    )
    for header, signature in rows:
        require(
            verify(header.proposer, PROPOSAL_DOMAIN, chain_id, block_hash(header), signature),
            "a signature is not the leader's over its block",
        )


def _burn(run: Execution, owner: bytes, epoch: int) -> int:
    """Take the share from what is bound, and from what unbinds and still voted in `epoch`."""
    account = run.state.account(owner)
    from_bound = _share(run, account.vote_stake)
    entries, burned = [], from_bound
    for entry in run.state.unbondings(owner).entries:
        cut = _share(run, entry.amount) if entry.bucket == "vote" and entry.epoch > epoch else 0
        burned += cut
        if entry.amount > cut:
            entries.append(Unbonding(entry.bucket, entry.amount - cut, entry.epoch))
    run.state.put_account(owner, replace(account, vote_stake=account.vote_stake - from_bound))
    run.state.put_unbondings(owner, Unbondings(tuple(entries)))
    run.state.burn(burned)
    return burned


def _share(run: Execution, amount: int) -> int:
    """The burned part, rounded up."""
    return -(-amount * run.parameters.slash_ppm // RATE_ONE)
