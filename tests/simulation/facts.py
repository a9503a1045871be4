"""What a simulated block contains: short stand-ins for signatures, bodies and state."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tdmld.chain.blocks import quorum
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import sha256
from tdmld.chain.leader import Rotation

GENESIS = ZERO_HASH
"""The id of height 0, and the root of its state."""


@dataclass(frozen=True)
class Electorate:
    """Who votes on a height."""

    stakes: tuple[int, ...]
    rotation: Rotation = field(init=False)
    quorum: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rotation", Rotation(self.stakes))
        object.__setattr__(self, "quorum", quorum(self.stakes))


def signature(voter: int) -> bytes:
    """Everybody's only signature. Nobody but its owner makes it: attackers keep to that."""
    return b"signed by" + voter.to_bytes(55, "big")


def public(voter: int) -> bytes:
    return voter.to_bytes(32, "big")


def body_root(transactions: Sequence[bytes]) -> bytes:
    return sha256(*transactions) if transactions else ZERO_HASH


def next_root(root: bytes, block: bytes, transactions: Sequence[bytes]) -> bytes:
    """The state after a block: an empty one changes nothing."""
    return sha256(root, block) if transactions else root
