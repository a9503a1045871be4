"""What a chain database holds beside the chain's own records, and what applying a block returns."""

from dataclasses import dataclass

from tdmld.chain.blocks import Block, Certificate, Header
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import Hash, Record
from tdmld.chain.events import Event
from tdmld.chain.ledger import Receipt
from tdmld.node.chainerrors import CheckpointMismatch

PROTOCOLS = frozenset({1})
"""Protocol versions that this program implements."""


class Head(Record, frozen=True):
    """The highest applied block."""

    height: int
    view: int
    hash: Hash
    mix: Hash
    state_root: Hash
    header: Header


class Passed(Record, frozen=True):
    """What executing a height left: the state root and the beacon mix."""

    state_root: Hash
    mix: Hash


class EpochEnd(Record, frozen=True):
    """The last header of an epoch and its finalization; kept when the block is pruned."""

    header: Header
    certificate: Certificate


class StoredReceipt(Record, frozen=True):
    """What became of a transaction, and in which block."""

    height: int
    ok: bool
    reason: str


class Outcome(Record, frozen=True):
    """What became of one transaction where it stands; `reason` is empty when `ok`."""

    ok: bool
    reason: str


@dataclass(frozen=True, slots=True)
class AppliedBlock:
    """What applying a final block did. `certificate` finalizes this very block, if there is one;
    `touched` are the owners whose accounts it changed."""

    height: int
    hash: bytes
    block: Block
    certificate: Certificate | None
    receipts: tuple[Receipt, ...]
    events: tuple[Event, ...]
    touched: frozenset[bytes] = frozenset()


def check_checkpoint(checkpoint: Checkpoint | None, height: int, found: bytes) -> None:
    """Raise CheckpointMismatch when `found`, final at `height`, is not the operator's block."""
    if checkpoint is not None and height == checkpoint.height and found != checkpoint.hash:
        raise CheckpointMismatch(
            f"the network's final block {height} is {found.hex()}, and the checkpoint in "
            f"tdmld.toml says {checkpoint.hash.hex()}: either the checkpoint is wrong, or these "
            "peers follow a false chain. Compare it with a source that you trust before going on"
        )
