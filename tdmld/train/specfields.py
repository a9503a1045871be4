"""The parts of a spec: typed, frozen, every key known. What types cannot say: `speccheck`."""

import re
from decimal import Decimal
from typing import Annotated, Literal

import msgspec

from tdmld.train import limits
from tdmld.train.errors import SpecError
from tdmld.train.wireformat import Wire

LaneWire = Literal["fp32", "bf16", "int8"]
LANE_WIRE: LaneWire = "bf16"
"""What gradients between lanes are, unless a spec says otherwise."""
_DECIMAL = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?(e-?[0-9]{1,2})?")
DecimalText = Annotated[str, msgspec.Meta(max_length=limits.DECIMAL_CHARACTERS)]
HexDigest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base: frozen, every key known."""


class Optimizer(Fields, frozen=True):
    """AdamW with decoupled weight decay on every parameter; decimals as strings."""

    name: Literal["adamw"]
    lr: DecimalText
    betas: tuple[DecimalText, DecimalText]
    eps: DecimalText
    weight_decay: DecimalText


class Schedule(Fields, frozen=True):
    """Linear warm-up over `warmup` steps, then lr until `decay_from`, then linear to floor x lr."""

    kind: Literal["linear"]
    warmup: Annotated[int, msgspec.Meta(ge=0, le=limits.STEPS)]
    decay_from: Annotated[int, msgspec.Meta(ge=0, le=limits.STEPS)]
    floor: DecimalText


class NoClip(Fields, frozen=True, tag_field="kind", tag="none"):
    """Gradients are used as they are."""


class StageClip(Fields, frozen=True, tag_field="kind", tag="stage"):
    """Gradients are scaled down to `norm` by the norm of the stage's own gradients."""

    norm: DecimalText


class SeedInit(Fields, frozen=True, tag_field="kind", tag="seed"):
    """Weights are drawn from (seed, parameter name)."""


class GivenInit(Fields, frozen=True, omit_defaults=True, tag_field="kind", tag="given"):
    """Weights are given: for each stage the root of the shared state that it begins with.

    The root is the content id of the stage's safetensors file (`statefile`), and what the chain
    compares at boundary 0. A job that goes on where another one stood (`recut`) also says how many
    steps were done, and for each slot the root of the lane part that it begins with (moments and
    that number). Steps are counted from the first job's first: rates and windows follow them.
    """

    roots: Annotated[tuple[HexDigest, ...], msgspec.Meta(min_length=1, max_length=limits.STAGES)]
    lane_roots: Annotated[tuple[HexDigest, ...], msgspec.Meta(max_length=limits.SLOTS)] = ()
    """One a slot, in the order of their numbers; none: moments of zero."""
    step: Annotated[int, msgspec.Meta(ge=0, le=limits.STEPS)] = 0
    """Steps done before this job; 0 exactly when there are no `lane_roots`."""


class Outer(Fields, frozen=True):
    """The outer step of `diloco`, and what a contribution keeps of a lane's delta.

    `density` values of each 4096 are sent, `bits` bits each; `feedback` is the share of what was
    not sent that is added to the next delta.
    """

    lr: DecimalText
    momentum: DecimalText
    nesterov: bool
    density: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    bits: Literal[2, 8]
    feedback: DecimalText


class Lanes(Fields, frozen=True, omit_defaults=True):
    """Replicas of the whole pipeline.

    `weights`: lane l works on weights[l] x micro_batches in a step; none: 1 each. `wire`: the
    format of gradients between lanes (`sync`). `outer`: what `diloco` needs, and nothing else has.
    """

    count: Annotated[int, msgspec.Meta(ge=1, le=limits.LANES)]
    mode: Literal["sync", "diloco"]
    weights: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=1, le=limits.LANE_WEIGHT)], ...],
        msgspec.Meta(max_length=limits.LANES),
    ] = ()
    wire: LaneWire = LANE_WIRE
    outer: Outer | None = None


class Pipeline(Fields, frozen=True):
    """The cut and the segment: K = segment_steps, D = unsettled, R = state_every."""

    cuts: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=limits.LAYERS)], ...],
        msgspec.Meta(min_length=2, max_length=limits.STAGES + 1),
    ]
    lanes: Lanes
    segment_steps: Annotated[int, msgspec.Meta(ge=1, le=limits.SEGMENT_STEPS)]
    unsettled: Annotated[int, msgspec.Meta(ge=1, le=limits.UNSETTLED)]
    state_every: Annotated[int, msgspec.Meta(ge=1, le=limits.UNSETTLED)]


class Data(Fields, frozen=True, omit_defaults=True):
    """The data as shards (id, size) with their Merkle root; `tokens` counts all bytes.

    Text: a token is a byte. Tokens: unsigned little-endian numbers of `width` bytes (`tdmld data
    prepare` makes them). Images: records of a label byte and `sequence` bytes of pixels.
    """

    tokenizer: Literal["bytes", "images", "tokens"]
    sequence: Annotated[int, msgspec.Meta(ge=1, le=limits.SEQUENCE)]
    heldout: DecimalText
    tokens: Annotated[int, msgspec.Meta(ge=1, le=limits.TEXT_BYTES)]
    shards: Annotated[
        tuple[tuple[HexDigest, Annotated[int, msgspec.Meta(ge=1, le=limits.SHARD_BYTES)]], ...],
        msgspec.Meta(min_length=1),
    ]
    root: HexDigest
    width: Literal[1, 2, 4] = 1
    """Bytes a token."""


class Train(Fields, frozen=True, omit_defaults=True):
    """Steps, micro-batches and arithmetic.

    `precision`: fp32, or bf16 for products of matrices (autocast) over weights, optimizer and
    boundary tensors in fp32. `recompute`: activations inside a layer are made again for its
    backward instead of kept; the bits are the same.

    `wire` is one format, or one for each link (the links in the order of the stages above them)
    where they differ.
    """

    steps: Annotated[int, msgspec.Meta(ge=1, le=limits.STEPS)]
    micro_batches: Annotated[int, msgspec.Meta(ge=1, le=limits.MICRO_BATCHES)]
    micro_batch_size: Annotated[int, msgspec.Meta(ge=1, le=limits.MICRO_BATCH_SIZE)]
    precision: Literal["fp32", "bf16"]
    wire: Wire | Annotated[tuple[Wire, ...], msgspec.Meta(max_length=limits.STAGES)]
    optimizer: Optimizer
    schedule: Schedule
    recompute: bool = False


def decimal(field: str, text: str, low: str, high: str) -> Decimal:
    """The exact value of a decimal string, from `low` to `high`."""
    if not _DECIMAL.fullmatch(text):
        raise SpecError(
            field, f"{text!r} is not a decimal", 'write a string such as "0.1" or "2e-3"'
        )
    value = Decimal(text)
    if not Decimal(low) <= value <= Decimal(high):
        raise SpecError(field, f"{text} is out of range", f"use {low} to {high}")
    return value
