"""Absent leaders lose their turns, never their votes.

    a block of epoch e - 1   views that were passed over count against their leaders (`count`)
    its last block           who missed a third of its turns is jailed (`judge`), and has no turns
                             in the set of e + 1, which is fixed then (`appoint`)
    Return                   the node is at work again, and leads from the next set on (`return_`)

Time is all that an absent leader costs, and its votes may be needed: so nothing burns, and the
quorum stays what it is. Two bounds keep turns from being taken by accident: when those who missed
theirs weigh a third of an epoch's set nobody is jailed, for that was the network; and seats that do
not lead weigh less than a third of a set, so that wherever a quorum is, somebody leads.

A view that was passed over may have been its leader's fault or its links'. Nobody can make it one
alone: passing over takes a quorum's votes.
"""

from msgspec.structs import replace

from tdmld.chain.accounts import (
    Absences,
    Seat,
    ValidatorSet,
)
from tdmld.chain.blocks import turn, view_epoch
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.events import Jailed, Returned
from tdmld.chain.execution import Execution, require
from tdmld.chain.leader import Rotation
from tdmld.chain.limits import ABSENCES, JAIL_MISSES
from tdmld.chain.records import (
    Node,
)
from tdmld.chain.state import State
from tdmld.chain.transactions import Return


def count(run: Execution) -> None:
    """JAIL-1: before anything else of a block."""
    view, parent = run.context.view, run.context.parent_view
    epoch = view_epoch(view)
    passed = range((turn(parent) if view_epoch(parent) == epoch else 0) + 1, turn(view))
    if not passed:
        return
    chosen = _set(run.state, epoch)
    known = run.state.absences(epoch)
    missed = [0] * len(chosen.seats) if known is None else list(known.missed)
    rotation = _rotation(chosen)
    for number in passed[-ABSENCES:]:
        missed[rotation.leader(number)] += 1
    run.state.put_absences(epoch, Absences(tuple(missed)))


def judge(run: Execution, epoch: int) -> None:
    """JAIL-2, after the last block of `epoch`: jail who was absent in it, unless too many were."""
    absences = run.state.absences(epoch)
    if absences is None:
        return
    run.state.put_absences(epoch, None)
    chosen, views = _set(run.state, epoch), turn(run.context.view)
    rotation = _rotation(chosen)
    absent = [
        (seat, missed)
        for seat, missed, turns in zip(chosen.seats, absences.missed, rotation.turns, strict=True)
        if missed >= JAIL_MISSES and 3 * missed * rotation.period >= views * turns
    ]
    if not _is_minor([seat for seat, _ in absent], chosen.seats):
        return
    for seat, missed in absent:
        record = _node(run.state, seat.node)
        if not record.jailed:
            run.state.put_node(seat.node, replace(record, jailed=run.height))
            run.emit(Jailed(seat.node, seat.owner, epoch, missed))


def appoint(state: State, seats: tuple[Seat, ...]) -> tuple[Seat, ...]:
    """JAIL-3: the seats of a new set with who leads; all do when too much weight would not."""
    jailed = [seat for seat in seats if _node(state, seat.node).jailed]
    if not _is_minor(jailed, seats):
        jailed = []
    idle = {seat.node for seat in jailed}
    return tuple(replace(seat, leads=seat.node not in idle) for seat in seats)


def return_(run: Execution, signer: bytes, wanted: Return) -> None:
    """JAIL-4: a jailed node is at work again."""
    record = run.state.node(signer)
    if record is None:
        require(False, "the signer is no registered node")
        return
    require(record.jailed != 0, "this node is not jailed")
    require(
        record.jailed == wanted.jailed,
        f"jailed: {wanted.jailed}; the node was jailed at height {record.jailed}",
    )
    require(not record.convicted, "this node voted twice and is barred: register another one")
    run.state.put_node(signer, replace(record, jailed=0))
    run.emit(Returned(signer))


def _is_minor(some: list[Seat], seats: tuple[Seat, ...]) -> bool:
    """Whether some seats of a set weigh less than a third of it."""
    return 3 * sum(seat.weight for seat in some) < sum(seat.weight for seat in seats)


def _rotation(chosen: ValidatorSet) -> Rotation:
    return Rotation([s.weight for s in chosen.seats], [s.leads for s in chosen.seats])


def _set(state: State, epoch: int) -> ValidatorSet:
    found = state.validator_set(epoch)
    if found is None:
        raise InvariantViolation(f"a block of epoch {epoch}, which has no validators")
    return found


def _node(state: State, node: bytes) -> Node:
    found = state.node(node)
    if found is None:
        raise InvariantViolation(f"the node {node.hex()} validates and is not registered")
    return found
