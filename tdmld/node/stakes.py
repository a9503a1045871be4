"""Stakes, seats and node keys as the RPC shows them: pure functions of the finalized state."""

from collections.abc import Iterable, Iterator

from tdmld.chain.accounts import (
    Offence,
    Seat,
    Unbonding,
)
from tdmld.chain.blocks import epoch_of
from tdmld.chain.codec import decode
from tdmld.chain.crypto import address
from tdmld.chain.epochs import unbound
from tdmld.chain.execution import BlockContext
from tdmld.chain.genesis import Genesis
from tdmld.chain.limits import RECORD_BYTES
from tdmld.chain.records import (
    Node,
)
from tdmld.chain.state import State
from tdmld.node import views
from tdmld.rpc.staketypes import (
    AskRow,
    NodeKeyInfo,
    OffenceInfo,
    SeatInfo,
    StakeInfo,
    UnbondingInfo,
    ValidatorSetInfo,
)
from tdmld.rpc.types import (
    time_text,
)

NODES = b"n"
"""Where the state keeps node records, by node key."""


def offences_of(owner: bytes) -> bytes:
    """Where the state keeps what was proven against an owner's nodes."""
    return b"x" + owner


def stake(
    state: State,
    genesis: Genesis,
    owner: bytes,
    height: int,
    time_ms: int,
    offences: Iterable[tuple[bytes, bytes]],
) -> StakeInfo:
    """An owner's stake after block `height` of `time_ms`. `offences`: items at `offences_of`."""
    account, blocks = state.account(owner), genesis.parameters.epoch_blocks
    epoch = epoch_of(height + 1, blocks)
    nominee = state.nominee(owner)
    context = BlockContext(height + 1, height + 1, height, time_ms, bytes(32), bytes(32))
    return StakeInfo(
        address=address(owner),
        height=height,
        time=time_text(time_ms),
        epoch=epoch,
        epoch_end=(epoch + 1) * blocks,
        vote_stake=str(account.vote_stake),
        work_stake=str(account.work_stake),
        nominee="" if nominee is None else address(nominee),
        unbonding=tuple(
            _unbonding(state, genesis, context, entry) for entry in state.unbondings(owner).entries
        ),
        seats=tuple(
            SeatInfo(
                epoch=number,
                node=address(seat.node),
                weight=str(seat.weight),
                total=str(total),
                leads=seat.leads,
            )
            for number, seat, total in _seats(state, epoch)
            if seat.owner == owner
        ),
        offences=tuple(_offence(key, raw) for key, raw in offences),
    )


def keys(
    state: State, genesis: Genesis, owner: bytes, height: int, nodes: Iterable[bytes]
) -> tuple[NodeKeyInfo, ...]:
    """The owner's among `nodes`, those in force first."""
    nominee = state.nominee(owner)
    seated = list(_seats(state, epoch_of(height + 1, genesis.parameters.epoch_blocks)))
    found = []
    for node in nodes:
        record, ask = state.node(node), state.ask(node)
        if record is None or record.owner != owner:
            continue
        found.append(
            NodeKeyInfo(
                node=address(node),
                from_height=record.from_height,
                nominated=node == nominee,
                epochs=tuple(number for number, seat, _ in seated if seat.node == node),
                asks=ask is not None and ask.until_height > height,
                revoked=record.revoked,
                convicted=record.convicted,
                jailed=record.jailed,
            )
        )
    return tuple(sorted(found, key=lambda key: (key.revoked, not key.nominated, key.node)))


def owned_by(owner: bytes, raw: bytes) -> bool:
    """Whether a stored node record is of a key of `owner`."""
    # Looking for the bytes first spares decoding the records of everybody else.
    return owner in raw and decode(Node, raw, RECORD_BYTES).owner == owner


def validator_set(
    state: State, genesis: Genesis, epoch: int, height: int
) -> ValidatorSetInfo | None:
    """The validators of an epoch; None where none are fixed."""
    rows, blocks = views.validators(state, epoch), genesis.parameters.epoch_blocks
    if not rows:
        return None
    total = sum(int(row.weight) for row in rows)
    return ValidatorSetInfo(
        height=height,
        epoch=epoch,
        first=epoch * blocks + 1,
        last=(epoch + 1) * blocks,
        quorum=str(total * 2 // 3 + 1),
        total=str(total),
        validators=rows,
    )


def weights(state: State, node: bytes, epoch: int) -> tuple[int, int, int]:
    """Of a node's votes in an epoch and in the next, and of all votes in the epoch."""
    mine, whole = {epoch: 0, epoch + 1: 0}, 0
    for number, seat, total in _seats(state, epoch):
        if seat.node == node:
            mine[number] = seat.weight
        if number == epoch:
            whole = total
    return mine[epoch], mine[epoch + 1], whole


def _seats(state: State, epoch: int) -> Iterator[tuple[int, Seat, int]]:
    """(epoch, seat, weight of all) for an epoch and the one after it."""
    for number in (epoch, epoch + 1):
        chosen = state.validator_set(number)
        if chosen is not None:
            total = sum(seat.weight for seat in chosen.seats)
            for seat in chosen.seats:
                yield number, seat, total


def _unbonding(
    state: State, genesis: Genesis, context: BlockContext, entry: Unbonding
) -> UnbondingInfo:
    """STAKE-2: an epoch begins after a known height, and at the time of that block."""
    blocks, seconds = genesis.parameters.unbonding
    start = state.epoch_start(entry.epoch)
    return UnbondingInfo(
        bucket="vote" if entry.bucket == "vote" else "work",
        amount=str(entry.amount),
        epoch=entry.epoch,
        from_height=entry.epoch * genesis.parameters.epoch_blocks + blocks + 1,
        after="" if start is None else time_text(start.time_ms + 1000 * seconds),
        ready=unbound(state, context, genesis, entry),
    )


def _offence(key: bytes, raw: bytes) -> OffenceInfo:
    record = decode(Offence, raw, RECORD_BYTES)
    return OffenceInfo(
        node=address(record.node),
        epoch=int.from_bytes(key[-8:], "big"),
        height=record.height,
        burned=str(record.burned),
    )


def asks(state: State, height: int) -> tuple[AskRow, ...]:
    """The asks in force, the cheapest first, then by the node's key."""
    found = sorted(
        ((ask.price, node, ask) for node, ask in state.asks() if ask.until_height >= height),
        key=lambda entry: entry[:2],
    )
    return tuple(
        AskRow(
            node=address(node),
            price=str(price),
            device_class=ask.class_id,
            memory=ask.memory,
            until=ask.until_height,
        )
        for price, node, ask in found
    )
