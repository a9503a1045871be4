"""What a simulated chain is made of: keys, signatures and proofs that cost next to nothing.

The product asks `crypto.verify` and `vrf`; `stand_ins` answers in their place. A stand-in names its
owner in clear and covers the message: nobody but its owner makes it, attackers keep to that, and
what is forged, altered or meant for another chain is refused as the real thing would be.
"""

import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import cache

import tdmld.chain.crypto
import tdmld.chain.slashing
import tdmld.chain.vrf
import tdmld.node.chainlinks
import tdmld.node.succession
from tdmld.chain.blocks import Header, first_header
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import address, sha256, signing_bytes
from tdmld.chain.genesis import Genesis, Parameters

CHAIN_ID = sha256(b"the simulated chain")
START_MS = 1_000_000
"""The time of height 0."""


class Key:
    """A validator's key, by its number."""

    def __init__(self, number: int) -> None:
        self.public = self.seed = number.to_bytes(32, "big")

    def sign(self, domain: str, chain_id: bytes, message: bytes) -> bytes:
        return self.public + sha256(signing_bytes(domain, chain_id, message))


def number_of(public: bytes) -> int:
    """Whose key it is."""
    return int.from_bytes(public, "big")


_address = cache(address)


def peer_of(number: int) -> str:
    """The address of a node."""
    return _address(Key(number).public)


def _verify(public: bytes, domain: str, chain_id: bytes, message: bytes, signature: bytes) -> bool:
    return signature == public + sha256(signing_bytes(domain, chain_id, message))


def _prove(seed: bytes, alpha: bytes) -> bytes:
    return seed + sha256(alpha)


def _output(public: bytes, alpha: bytes, proof: bytes) -> bytes | None:
    return sha256(proof) if proof == public + sha256(alpha) else None


STAND_INS = (
    (tdmld.chain.crypto, "verify", _verify),
    (tdmld.chain.slashing, "verify", _verify),
    (tdmld.chain.vrf, "prove", _prove),
    (tdmld.chain.vrf, "verify", _output),
    (tdmld.node.chainlinks, "address", _address),
    (tdmld.node.succession, "address", _address),
)
"""Where the product asks, what, and who answers."""
_depth = 0


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within it the product takes stand-ins, and logs nothing. Worlds live within it."""
    global _depth
    log = logging.getLogger("tdmld")
    level = log.level
    before = [(module, name, getattr(module, name)) for module, name, _ in STAND_INS]
    for module, name, other in STAND_INS:
        setattr(module, name, other)
    log.setLevel(logging.CRITICAL + 1)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        log.setLevel(level)
        for module, name, real in before:
            setattr(module, name, real)


def standing_in() -> bool:
    """Whether stand-ins are taken now."""
    return _depth > 0


@cache
def genesis(epoch_blocks: int) -> Genesis:
    """The parameters of a simulated chain; who validates is the plan's."""
    parameters = Parameters(epoch_blocks=epoch_blocks)
    return Genesis("simulated", START_MS, ((0, 1),), (), (), (), (), (), (), parameters)


FIRST: Header = first_header(CHAIN_ID, 1, START_MS, ZERO_HASH)
"""Height 0."""


def next_root(root: bytes, block: bytes, transactions: tuple[bytes, ...]) -> bytes:
    """The state after a block: an empty one changes nothing."""
    return sha256(root, block) if transactions else root


def now(coroutine: Coroutine[object, object, object]) -> None:
    """Run what the product awaits: here nothing of it ever waits."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("something waited, and a simulated node has no tasks")
