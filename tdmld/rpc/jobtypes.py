"""Of a job, over JSON-RPC: where its time goes, and who worked in it before."""

from typing import Literal

from tdmld.rpc.wire import AddressText, HeightNumber, Wire

TimeKind = Literal["compute", "waiting", "wire", "verifying", "saving", "chain"]


class SlotTimes(Wire, frozen=True):
    """Mean seconds a step of a slot over its recent steps, by where they went."""

    compute: float
    waiting: float
    """For frames of neighbours and siblings."""
    wire: float
    """Spelling and reading frames."""
    verifying: float
    """Hashing frames and gradients."""
    saving: float
    """Writing the state at the end of segments."""
    chain: float
    """For leave to go on: a settlement, or a round."""


class Bottleneck(Wire, frozen=True):
    """What a job waits for: the slowest slot, and what it spends most of its time with."""

    lane: int
    stage: int
    kind: TimeKind
    share: float
    """Of that slot's time, 0 to 1."""
    text: str
    """For people."""


class FormerWorker(Wire, frozen=True):
    """Somebody who had a slot, or was asked to take it, and has it no more."""

    lane: int
    stage: int
    node: AddressText
    owner: AddressText
    cause: str
    """A word of the chain: absent, undelivered, separated, stall, left, mismatch, unopened,
    unproven; unanswered and declined of those who were only asked."""
    convicted: bool
    """Whether an audit found its work wrong, or could not open its seal."""
    epoch: int
    incarnation: int
    settled: int
    """Segments of the slot that were settled then."""
    height: HeightNumber
