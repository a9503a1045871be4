"""Stakes, seats and node keys as they travel over JSON-RPC; conventions as in `types`."""

from typing import Literal

from tdmld.rpc.types import AddressText, AmountText, HeightNumber, ValidatorInfo, Wire

Bucket = Literal["vote", "work"]


class UnbondingInfo(Wire, frozen=True):
    """Stake on its way back. Two windows must be over, one in blocks and one in seconds; both
    count from the begin of `epoch`, the first in which the stake votes no more."""

    bucket: Bucket
    amount: AmountText
    epoch: int
    from_height: HeightNumber
    """The first block in which it may be withdrawn."""
    after: str
    """The time that such a block must be later than; empty while `epoch` has not begun."""
    ready: bool
    """Whether nodes take in a withdrawal of it now: it will stand in the next block, which is later
    than the one at `height`."""


class SeatInfo(Wire, frozen=True):
    """A node's place among the validators of one epoch."""

    epoch: int
    node: AddressText
    weight: AmountText
    total: AmountText
    """Weight of all seats of that epoch."""
    leads: bool


class OffenceInfo(Wire, frozen=True):
    """A node's double voting in one epoch that was proven."""

    node: AddressText
    epoch: int
    height: HeightNumber
    """Of the block with the evidence."""
    burned: AmountText


class StakeInfo(Wire, frozen=True):
    """An owner's stake, and what it does."""

    address: AddressText
    height: HeightNumber
    time: str
    """Of the block at `height`: the chain's clock."""
    epoch: int
    """Of the block after `height`."""
    epoch_end: HeightNumber
    """The last block of `epoch`."""
    vote_stake: AmountText
    work_stake: AmountText
    nominee: str
    """The node that votes for the vote stake; empty while none is nominated."""
    unbonding: tuple[UnbondingInfo, ...]
    seats: tuple[SeatInfo, ...]
    """In this epoch and the next."""
    offences: tuple[OffenceInfo, ...]


class NodeKeyInfo(Wire, frozen=True):
    """A node key that is registered to an owner. Heights are 0 where the thing has not happened."""

    node: AddressText
    from_height: HeightNumber
    """From then on it may be given work."""
    nominated: bool
    epochs: tuple[int, ...]
    """This one or the next, where it has a seat: there it votes, revoked or not."""
    asks: bool
    """Whether it asks for work."""
    revoked: HeightNumber
    convicted: HeightNumber
    """It voted twice, and is not elected again."""
    jailed: HeightNumber
    """It missed its turns to lead, and has none until it is at work again."""


class AskRow(Wire, frozen=True):
    """A node's ask in force: what it would work for."""

    node: AddressText
    price: AmountText
    """Units per (10**6 parameters x 10**3 tokens)."""
    device_class: str
    memory: int
    """Bytes that a slot may use."""
    until: HeightNumber


class ValidatorSetInfo(Wire, frozen=True):
    """Who validates in one epoch."""

    height: HeightNumber
    """As of which this is; `jailed` is of now, the rest was fixed an epoch before `epoch`."""
    epoch: int
    first: HeightNumber
    """The epoch's first block."""
    last: HeightNumber
    quorum: AmountText
    """The weight that decides: more than two thirds."""
    total: AmountText
    validators: tuple[ValidatorInfo, ...]
