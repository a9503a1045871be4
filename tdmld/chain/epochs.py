"""Who validates: stake bound and unbound, nodes nominated, and the set of each epoch.

    epoch e - 1   Bond, Unbond, Nominate, Revoke, convictions
    its last block fixes the set of e + 1
    epoch e       the set of e votes; its headers name the sets of e and e + 1
    epoch e + 1   the set of e + 1 votes

So everybody knows a set a whole epoch before it votes, and nobody waits for execution but at the
edge of an epoch. From one set to the next less than a third of the old set's weight moves
(`elect`), so that nobody who can talk the stakes over in one epoch takes the chain with it.

**Unbonding.** Stake that is unbound in epoch e votes until the end of e + 1, for that set is fixed;
its two windows, blocks and seconds, count from the begin of e + 2. Where the bound on change keeps
a weight in a set although its stake was unbound, the entries wait with it (`_hold`). Evidence of
epoch x is good for the same two windows from the begin of x + 1. So no stake that voted in x can
be withdrawn while evidence of x is good.
"""

from collections.abc import Iterable

from msgspec.structs import replace

from tdmld.chain import jail
from tdmld.chain.accounts import (
    EpochStart,
    Seat,
    Unbonding,
    Unbondings,
    ValidatorSet,
)
from tdmld.chain.blocks import Committee, ends_epoch, epoch_of
from tdmld.chain.codec import encode
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.execution import BlockContext, Execution, require
from tdmld.chain.genesis import Genesis
from tdmld.chain.limits import UNBONDINGS
from tdmld.chain.state import State
from tdmld.chain.transactions import Nominate, Revoke, Unbond


def set_id(chosen: ValidatorSet) -> bytes:
    """What headers name a set by."""
    return sha256(encode(chosen))


def committee(chain_id: bytes, chosen: ValidatorSet) -> Committee:
    """The set as consensus wants it."""
    return Committee(
        chain_id,
        tuple(seat.node for seat in chosen.seats),
        tuple(seat.weight for seat in chosen.seats),
        chosen.epoch,
        tuple(seat.leads for seat in chosen.seats),
    )


def genesis_set(genesis: Genesis, epoch: int) -> ValidatorSet:
    """The validators of epoch 0 or 1."""
    seats = [Seat(v.node, v.owner, v.stake) for v in genesis.validators]
    return ValidatorSet(epoch, tuple(sorted(seats, key=lambda seat: seat.node)))


def found(state: State, genesis: Genesis) -> None:
    """What genesis says of validators: the sets of the first two epochs."""
    for validator in genesis.validators:
        state.put_nominee(validator.owner, validator.node)
    for epoch in (0, 1):
        state.put_validator_set(genesis_set(genesis, epoch))
    state.put_epoch_start(0, EpochStart(0, genesis.time_ms))


def close(run: Execution) -> None:
    """After the last block of an epoch: note when the next begins, jail who was absent in the one
    that is over, fix the set of the one after the next."""
    blocks = run.parameters.epoch_blocks
    if not ends_epoch(run.height, blocks):
        return
    begins = epoch_of(run.height + 1, blocks)
    run.state.put_epoch_start(begins, EpochStart(run.height, run.context.time_ms))
    now = run.state.validator_set(begins)
    if now is None:
        raise InvariantViolation(f"epoch {begins} begins and has no validators")
    jail.judge(run, begins - 1)
    seats = elect(now.seats, _wanted(run), run.parameters.validators_max)
    chosen = ValidatorSet(begins + 1, jail.appoint(run.state, seats))
    run.state.put_validator_set(chosen)
    _hold(run, now, chosen)


def elect(old: Iterable[Seat], wanted: Iterable[Seat], most: int) -> tuple[Seat, ...]:
    """The next set: from `old` towards `wanted`, moving less than a third of the old weight.

    Who loses weight comes first, by node key; then who gains, the heaviest first. What does not fit
    is done as far as it does, and goes on an epoch later. A set never becomes empty so; one whose
    weights sum to less than four never changes.
    """
    before = {seat.node: seat for seat in old}
    target = {seat.node: seat for seat in wanted}
    left = (sum(seat.weight for seat in before.values()) - 1) // 3
    seats = dict(before)
    for node in sorted(before):
        aim = target[node].weight if node in target else 0
        step = min(max(0, before[node].weight - aim), left)
        left -= step
        weight = before[node].weight - step
        if weight:
            seats[node] = replace(before[node], weight=weight)
        else:
            del seats[node]
    for seat in sorted(target.values(), key=lambda seat: (-seat.weight, seat.node)):
        known = seats.get(seat.node)
        if known is None and len(seats) >= most:
            continue
        weight = 0 if known is None else known.weight
        step = min(max(0, seat.weight - weight), left)
        left -= step
        if step:
            seats[seat.node] = replace(seat, weight=weight + step)
    return tuple(seats[node] for node in sorted(seats))


def _wanted(run: Execution) -> list[Seat]:
    """The set that the stakes ask for."""
    seats = []
    for owner, node in run.state.nominees():
        record, stake = run.state.node(node), run.state.account(owner).vote_stake
        if (
            record is not None
            and record.owner == owner
            and not record.revoked
            and not record.convicted
            and stake >= run.parameters.vote_stake_min
        ):
            seats.append(Seat(node, owner, stake))
    seats.sort(key=lambda seat: (-seat.weight, seat.node))
    return seats[: run.parameters.validators_max]


def _hold(run: Execution, now: ValidatorSet, chosen: ValidatorSet) -> None:
    """Where an owner votes in `chosen` with more than it has bound, its entries that would begin to
    unbind then begin an epoch later."""
    weights: dict[bytes, int] = {}
    for seat in chosen.seats:
        weights[seat.owner] = weights.get(seat.owner, 0) + seat.weight
    for owner in sorted({seat.owner for seat in now.seats}):
        stake = run.state.account(owner).vote_stake
        if weights.get(owner, 0) <= stake:
            continue
        entries = run.state.unbondings(owner).entries
        held = [
            replace(entry, epoch=chosen.epoch + 1)
            if entry.bucket == "vote" and entry.epoch == chosen.epoch
            else entry
            for entry in entries
        ]
        if held != list(entries):
            run.state.put_unbondings(owner, Unbondings(tuple(_merged(held))))


# ---- transactions ------------------------------------------------------------------------------


def unbond(run: Execution, signer: bytes, wanted: Unbond) -> None:
    """Take stake out of a bucket."""
    require(wanted.amount > 0, "amount: must be greater than 0")
    require(wanted.bucket in ("vote", "work"), f"bucket {wanted.bucket!r}: must be vote or work")
    account = run.state.account(signer)
    bound = account.vote_stake if wanted.bucket == "vote" else account.work_stake
    require(
        bound >= wanted.amount,
        f"the {wanted.bucket} stake of {bound} is {wanted.amount - bound} short",
    )
    epoch = epoch_of(run.height, run.parameters.epoch_blocks) + 2
    entry = Unbonding(wanted.bucket, wanted.amount, epoch)
    entries = _merged([*run.state.unbondings(signer).entries, entry])
    require(
        len(entries) <= UNBONDINGS,
        f"{UNBONDINGS} amounts unbind already: withdraw what is over, or wait for the next epoch",
    )
    if wanted.bucket == "vote":
        account = replace(account, vote_stake=bound - wanted.amount)
    else:
        account = replace(account, work_stake=bound - wanted.amount)
    run.state.put_account(signer, account)
    run.state.put_unbondings(signer, Unbondings(tuple(entries)))


def withdraw(run: Execution, signer: bytes) -> None:
    """Give back what both windows have passed for."""
    entries = run.state.unbondings(signer).entries
    require(bool(entries), "nothing of the signer unbinds")
    kept = [entry for entry in entries if not unbound(run.state, run.context, run.genesis, entry)]
    due = sum(entry.amount for entry in entries) - sum(entry.amount for entry in kept)
    blocks, seconds = run.parameters.unbonding
    require(
        due > 0,
        f"the unbonding period is not over: {blocks} blocks and {seconds} seconds from the begin"
        f" of epoch {min(entry.epoch for entry in entries)}",
    )
    run.state.put_unbondings(signer, Unbondings(tuple(kept)))
    account = run.state.account(signer)
    run.state.put_account(signer, replace(account, balance=account.balance + due))


def unbound(state: State, context: BlockContext, genesis: Genesis, entry: Unbonding) -> bool:
    """Whether an entry may be withdrawn."""
    return over(state, context, genesis, entry.epoch)


def over(state: State, context: BlockContext, genesis: Genesis, epoch: int) -> bool:
    """Whether both unbonding windows have passed since `epoch` began."""
    start = state.epoch_start(epoch)
    blocks, seconds = genesis.parameters.unbonding
    return (
        start is not None
        and context.height > start.height + blocks
        and context.time_ms > start.time_ms + seconds * 1000
    )


def nominate(run: Execution, signer: bytes, wanted: Nominate) -> None:
    """Name the node that votes."""
    record = run.state.node(wanted.node)
    require(
        record is not None and record.owner == signer,
        "node: not registered to the signer: send Register first",
    )
    assert record is not None
    require(not record.revoked, "node: this key was revoked: register another one")
    require(not record.convicted, "node: this key voted twice and is barred: register another one")
    stake, least = run.state.account(signer).vote_stake, run.parameters.vote_stake_min
    require(stake >= least, f"a vote stake of {stake}; at least {least} is needed: send Bond first")
    run.state.put_nominee(signer, wanted.node)


def revoke(run: Execution, signer: bytes, wanted: Revoke) -> None:
    """End a node key."""
    record = run.state.node(wanted.node)
    require(record is not None and record.owner == signer, "node: not registered to the signer")
    assert record is not None
    require(not record.revoked, f"node: revoked at height {record.revoked} already")
    run.state.put_node(wanted.node, replace(record, revoked=run.height))
    if run.state.ask(wanted.node) is not None:
        run.state.put_ask(wanted.node, None)
    if run.state.nominee(signer) == wanted.node:
        run.state.put_nominee(signer, None)


def _merged(entries: Iterable[Unbonding]) -> list[Unbonding]:
    """By bucket and epoch, one of each."""
    sums: dict[tuple[str, int], int] = {}
    for entry in entries:
        key = (entry.bucket, entry.epoch)
        sums[key] = sums.get(key, 0) + entry.amount
    return [Unbonding(bucket, sums[bucket, epoch], epoch) for bucket, epoch in sorted(sums)]
