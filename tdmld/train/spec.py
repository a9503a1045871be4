"""The spec: a training program as data. Its bytes are its identity.

A spec is canonical JSON: ASCII, keys sorted, no blanks, no floats, at most 64 KiB; `spec_id` is the
SHA-256 of the bytes. Decoding is strict (unknown and missing keys are errors, the bytes must be
the canonical ones) and complete: what `decode_spec` returns can be built and run. The job file
that people write is `jobfile.py`. Fields: design annex A1.
"""

import hashlib
import json
import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import msgspec

from tdmld.train import limits
from tdmld.train.digest import data_root
from tdmld.train.errors import SpecError
from tdmld.train.families import FAMILIES, family_of
from tdmld.train.family import Family, Part, Weight, by_name
from tdmld.train.wireformat import Wire, plain_bytes

_DECIMAL = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?(e-?[0-9]{1,2})?")
DecimalText = Annotated[str, msgspec.Meta(max_length=limits.DECIMAL_CHARACTERS)]
HexDigest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base: frozen, every key known."""


class Optimizer(_Part, frozen=True):
    """AdamW with decoupled weight decay on every parameter; decimals as strings."""

    name: Literal["adamw"]
    lr: DecimalText
    betas: tuple[DecimalText, DecimalText]
    eps: DecimalText
    weight_decay: DecimalText


class Schedule(_Part, frozen=True):
    """Linear warm-up over `warmup` steps, then lr until `decay_from`, then linear to floor x lr."""

    kind: Literal["linear"]
    warmup: Annotated[int, msgspec.Meta(ge=0, le=limits.STEPS)]
    decay_from: Annotated[int, msgspec.Meta(ge=0, le=limits.STEPS)]
    floor: DecimalText


class NoClip(_Part, frozen=True, tag_field="kind", tag="none"):
    """Gradients are used as they are."""


class StageClip(_Part, frozen=True, tag_field="kind", tag="stage"):
    """Gradients are scaled down to `norm` by the norm of the stage's own gradients."""

    norm: DecimalText


class SeedInit(_Part, frozen=True, tag_field="kind", tag="seed"):
    """Weights are drawn from (seed, parameter name)."""


class GivenInit(_Part, frozen=True, tag_field="kind", tag="given"):
    """Weights are given: for each stage the root of the shared state that it begins with.

    The root is the content id of the stage's safetensors file (`statefile`), and what the chain
    compares at boundary 0.
    """

    roots: Annotated[tuple[HexDigest, ...], msgspec.Meta(min_length=1, max_length=limits.STAGES)]


class Lanes(_Part, frozen=True):
    """Replicas of the whole pipeline."""

    count: Annotated[int, msgspec.Meta(ge=1, le=1)]
    mode: Literal["sync"]


class Pipeline(_Part, frozen=True):
    """The cut and the segment: K = segment_steps, D = unsettled, R = state_every."""

    cuts: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=limits.LAYERS)], ...],
        msgspec.Meta(min_length=2, max_length=limits.STAGES + 1),
    ]
    lanes: Lanes
    segment_steps: Annotated[int, msgspec.Meta(ge=1, le=limits.SEGMENT_STEPS)]
    unsettled: Annotated[int, msgspec.Meta(ge=1, le=limits.UNSETTLED)]
    state_every: Annotated[int, msgspec.Meta(ge=1, le=limits.UNSETTLED)]


class Data(_Part, frozen=True):
    """The data as shards (id, size) with their Merkle root; `tokens` counts all bytes.

    Text: a token is a byte. Images: records of a label byte and `sequence` bytes of pixels.
    """

    tokenizer: Literal["bytes", "images"]
    sequence: Annotated[int, msgspec.Meta(ge=1, le=limits.SEQUENCE)]
    heldout: DecimalText
    tokens: Annotated[int, msgspec.Meta(ge=1, le=limits.TEXT_BYTES)]
    shards: Annotated[
        tuple[tuple[HexDigest, Annotated[int, msgspec.Meta(ge=1, le=limits.SHARD_BYTES)]], ...],
        msgspec.Meta(min_length=1),
    ]
    root: HexDigest


class Train(_Part, frozen=True):
    """Steps, micro-batches and arithmetic.

    `wire` is one format, or one for each link (the links in the order of the stages above them)
    where they differ.
    """

    steps: Annotated[int, msgspec.Meta(ge=1, le=limits.STEPS)]
    micro_batches: Annotated[int, msgspec.Meta(ge=1, le=limits.MICRO_BATCHES)]
    micro_batch_size: Annotated[int, msgspec.Meta(ge=1, le=limits.MICRO_BATCH_SIZE)]
    precision: Literal["fp32"]
    wire: Wire | Annotated[tuple[Wire, ...], msgspec.Meta(max_length=limits.STAGES)]
    optimizer: Optimizer
    schedule: Schedule


class Spec(_Part, frozen=True):
    """A job's program. Make it with `decode_spec` or `jobfile.load_job_file`: both check it."""

    version: Literal[1]
    family: Annotated[str, msgspec.Meta(max_length=32)]
    config: dict[str, bool | int | str | None]
    seed: Annotated[int, msgspec.Meta(ge=0, le=limits.SEED)]
    init: SeedInit | GivenInit
    privacy: Literal["open", "sealed"]
    class_: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}$")] = msgspec.field(name="class")
    data: Data
    train: Train
    pipeline: Pipeline
    clip: NoClip | StageClip

    @property
    def model(self) -> Family:
        """The family's facts."""
        return FAMILIES[self.family]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.pipeline.cuts) - 1

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return self.pipeline.lanes.count

    @property
    def slots(self) -> int:
        """Lanes x stages."""
        return self.lanes * self.stages

    @property
    def rounds(self) -> int:
        """Segments of each slot."""
        return self.train.steps // self.pipeline.segment_steps

    @property
    def is_ring(self) -> bool:
        """Whether the slots form a U: the first one holds embedding, head and loss, and the last
        one is joined to it. A head that is tied to the embedding needs that."""
        return self.stages > 1 and self.model.tied(self.config)

    @property
    def record(self) -> int:
        """Bytes that belong together: an image with its label, or one token."""
        return self.data.sequence + 1 if self.model.images else 1

    @property
    def heldout_tokens(self) -> int:
        """Tokens at the end of the data that training never sees, whole records."""
        return int(Fraction(self.data.heldout) * (self.data.tokens // self.record)) * self.record

    @property
    def has_heldout(self) -> bool:
        """Whether at least one window of the data is held out."""
        return self.heldout_tokens > self.data.sequence

    @property
    def train_tokens(self) -> int:
        """Tokens that windows are drawn from."""
        return self.data.tokens - self.heldout_tokens

    @property
    def tokens_per_segment(self) -> int:
        """Tokens that a lane reads in one segment."""
        train = self.train
        per_step = train.micro_batches * train.micro_batch_size * self.data.sequence
        return per_step * self.pipeline.segment_steps

    @property
    def link_count(self) -> int:
        """Links of a lane: between neighbours, and in a ring from the last stage to the first."""
        return self.stages if self.is_ring else self.stages - 1

    @property
    def frame_bytes(self) -> int:
        """The greatest size of a frame on any link."""
        downs = ((stage, "down") for stage in range(self.link_count))
        return max((self.link_frame_bytes(*down) for down in downs), default=1)

    @property
    def ahead(self) -> int:
        """By so many a frame's number may exceed what its receiver ever sent the other way."""
        return self.stages + self.is_ring

    def window(self, number: int) -> int:
        """Where the window that a drawn number names begins."""
        count = (self.train_tokens - self.data.sequence - 1) // self.record + 1
        return number % count * self.record

    @property
    def shards(self) -> tuple[tuple[bytes, int], ...]:
        """(shard id, size) in the order of the text."""
        return tuple((bytes.fromhex(name), size) for name, size in self.data.shards)

    def layers(self, stage: int) -> tuple[int, int]:
        """The layers [first, last) of a stage."""
        return self.pipeline.cuts[stage], self.pipeline.cuts[stage + 1]

    def part(self, stage: int) -> Part:
        """What of the model a stage holds."""
        return Part(*self.layers(stage), self.has_input(stage), self.has_loss(stage))

    def has_input(self, stage: int) -> bool:
        """Whether the stage reads tokens or images."""
        return stage == 0

    def has_loss(self, stage: int) -> bool:
        """Whether the stage computes the loss."""
        return stage == (0 if self.is_ring else self.stages - 1)

    def reads_text(self, stage: int) -> bool:
        """Whether the stage reads inputs or labels: one between others never sees the data."""
        return self.has_input(stage) or self.has_loss(stage)

    def links(self, stage: int) -> tuple[str, ...]:
        """The links of a stage, "up" before "down"."""
        if self.is_ring:
            return ("up", "down")
        up = () if stage == 0 else ("up",)
        return up if stage == self.stages - 1 else (*up, "down")

    def neighbour(self, stage: int, link: str) -> int:
        """The stage at the other end of a link."""
        return (stage + (1 if link == "down" else -1)) % self.stages

    def _above(self, stage: int, link: str) -> int:
        """The number of a link: the stage for which it is the one down."""
        return stage if link == "down" else self.neighbour(stage, link)

    def wire(self, stage: int, link: str) -> Wire:
        """The format of the frames on a link, in both directions."""
        wire = self.train.wire
        return wire if isinstance(wire, str) else wire[self._above(stage, link)]

    def boundary(self, stage: int, link: str) -> tuple[int, ...]:
        """Shape of the boundary tensors on a link, the micro-batch first."""
        border = self.pipeline.cuts[self._above(stage, link) + 1]
        shape = self.model.boundary(self.config, border, self.data.sequence)
        return self.train.micro_batch_size, *shape

    def link_frame_bytes(self, stage: int, link: str) -> int:
        """The greatest size of a frame on a link."""
        return plain_bytes(self.wire(stage, link), prod(self.boundary(stage, link)))

    def slot_index(self, lane: int, stage: int) -> int:
        """The number of a slot in the job."""
        return lane * self.stages + stage

    def weights(self, stage: int) -> tuple[Weight, ...]:
        """The stage's parameters under their names in the whole model, sorted."""
        return self.model.weights(self.config, self.part(stage))

    def buffers(self, stage: int) -> tuple[Weight, ...]:
        """What training changes beside the stage's parameters, sorted by name."""
        return self.model.buffers(self.config, self.part(stage))

    def shared(self, stage: int) -> tuple[Weight, ...]:
        """The tensors of the shared part of a stage's state, sorted by name."""
        return by_name((*self.weights(stage), *self.buffers(stage)))

    @property
    def whole(self) -> Part:
        """The whole model."""
        return Part(0, self.pipeline.cuts[-1], True, True)


def stage_parameters(spec: Spec, stage: int) -> int:
    """Number of trained values of a stage."""
    return sum(weight.count for weight in spec.weights(stage))


def spec_bytes(spec: Spec) -> bytes:
    """The canonical JSON of a spec."""
    return json.dumps(
        msgspec.to_builtins(spec), sort_keys=True, separators=(",", ":"), ensure_ascii=True
    ).encode("ascii")


def spec_id(raw: bytes) -> bytes:
    """The identity of a spec: SHA-256 of its bytes."""
    return hashlib.sha256(raw).digest()


@lru_cache(maxsize=16)
def decode_spec(raw: bytes) -> Spec:
    """The spec of these bytes, checked in every respect; SpecError names the field and the remedy.

    The result is shared between callers: treat its `config` as read-only.
    """
    if len(raw) > limits.SPEC_BYTES:
        raise SpecError(
            "spec", f"{len(raw)} bytes", f"a spec has at most {limits.SPEC_BYTES} bytes"
        )
    try:
        spec = msgspec.json.decode(raw, type=Spec)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise typed_error(error) from error
    check_spec(spec)
    if spec_bytes(spec) != raw:
        raise SpecError(
            "spec", "not canonical JSON", "sort the keys, drop blanks, use ASCII; see the job file"
        )
    return spec


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?P<kind>missing required|contains unknown) field `(?P<name>[^`]*)`")


def typed_error(error: Exception) -> SpecError:
    """A decoder's complaint as a SpecError that names the field."""
    match = _AT.match(str(error))
    what, path = (match["what"], match["path"] or "$") if match else (str(error), "$")
    field = path.removeprefix("$").removeprefix(".") or "spec"
    named = _FIELD.search(what)
    if named:
        inner = named["name"] if field == "spec" else f"{field}.{named['name']}"
        if named["kind"].startswith("missing"):
            return SpecError(inner, "missing", "add it; nothing has a silent default")
        return SpecError(inner, "unknown key", "remove it or check its spelling")
    return SpecError(field, what[:200], "see docs for the values it may have")


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


def check_spec(spec: Spec) -> None:
    """Every rule that types cannot say. Raises SpecError at the first one that is broken."""
    family = family_of(spec.family)
    family.check(spec.config)
    _check_pipeline(spec, family)
    _check_train(spec)
    _check_data(spec, family)
    if spec.frame_bytes > limits.FRAME_BYTES:
        raise SpecError(
            "train.micro_batch_size",
            f"a boundary tensor has {spec.frame_bytes} bytes, at most {limits.FRAME_BYTES}",
            "use a smaller micro_batch_size or a shorter sequence",
        )


def _check_pipeline(spec: Spec, family: Family) -> None:
    cuts, layers = spec.pipeline.cuts, family.layers(spec.config)
    first = int(spec.is_ring and cuts[1] == 0)  # the slot of both ends may hold no layer
    if any(below >= above for below, above in pairwise(cuts[first:])):
        raise SpecError("pipeline.cuts", f"{list(cuts)} does not increase", "list rising borders")
    if cuts[0] != 0 or cuts[-1] != layers:
        raise SpecError(
            "pipeline.cuts",
            f"{list(cuts)} does not cover the model's {layers} layers",
            f"start with 0 and end with {layers}",
        )
    if isinstance(spec.init, GivenInit) and len(spec.init.roots) != spec.stages:
        raise SpecError(
            "init.roots",
            f"{len(spec.init.roots)} roots for {spec.stages} stages",
            "give one root a stage",
        )
    if spec.train.steps % spec.pipeline.segment_steps:
        raise SpecError(
            "pipeline.segment_steps",
            f"{spec.pipeline.segment_steps} does not divide {spec.train.steps} steps",
            "choose a divisor of train.steps",
        )
    if (batches := spec.pipeline.segment_steps * spec.train.micro_batches) > (
        limits.SEGMENT_MICRO_BATCHES
    ):
        raise SpecError(
            "pipeline.segment_steps",
            f"a segment has {batches} micro-batches, at most {limits.SEGMENT_MICRO_BATCHES}",
            "lower segment_steps or micro_batches",
        )
    if 2 * spec.pipeline.state_every > spec.pipeline.unsettled:
        raise SpecError(
            "pipeline.state_every",
            f"2 x {spec.pipeline.state_every} exceeds unsettled = {spec.pipeline.unsettled}",
            "lower state_every or raise unsettled (2R <= D)",
        )


def _check_train(spec: Spec) -> None:
    optimizer, schedule = spec.train.optimizer, spec.train.schedule
    tokens = spec.train.micro_batches * spec.train.micro_batch_size * spec.data.sequence
    if tokens > limits.STEP_TOKENS:
        raise SpecError(
            "train.micro_batches",
            f"a step has {tokens} tokens, at most {limits.STEP_TOKENS}",
            "use fewer or smaller micro-batches, or a shorter sequence",
        )
    if not isinstance(spec.train.wire, str) and (
        len(spec.train.wire) != spec.link_count or len(set(spec.train.wire)) < 2
    ):
        raise SpecError(
            "train.wire",
            f"{len(spec.train.wire)} formats for {spec.link_count} links, or all the same",
            "write one format, or one for each link where they differ",
        )
    decimal("train.optimizer.lr", optimizer.lr, "1e-9", "10")
    for number, beta in enumerate(optimizer.betas):
        decimal(f"train.optimizer.betas[{number}]", beta, "0", "0.99999")
    decimal("train.optimizer.eps", optimizer.eps, "1e-12", "1e-1")
    decimal("train.optimizer.weight_decay", optimizer.weight_decay, "0", "10")
    decimal("train.schedule.floor", schedule.floor, "0", "1")
    if isinstance(spec.clip, StageClip):
        decimal("clip.norm", spec.clip.norm, "1e-6", "1e6")
    if schedule.warmup > schedule.decay_from:
        raise SpecError(
            "train.schedule.warmup",
            f"{schedule.warmup} ends after decay_from",
            "use warmup <= decay_from",
        )
    if schedule.decay_from > spec.train.steps:
        raise SpecError(
            "train.schedule.decay_from",
            f"{schedule.decay_from} exceeds {spec.train.steps} steps",
            "use decay_from <= steps",
        )


def _check_data(spec: Spec, family: Family) -> None:
    data = spec.data
    decimal("data.heldout", data.heldout, "0", "0.5")
    family.check_data(spec.config, data.tokenizer, data.sequence)
    if data.tokens % spec.record:
        raise SpecError(
            "data.tokens",
            f"{data.tokens} bytes are no whole number of records of {spec.record}",
            "a record is a label byte and the pixels of one image",
        )
    sizes = [size for _, size in data.shards]
    if any(size != limits.SHARD_BYTES for size in sizes[:-1]) or sum(sizes) != data.tokens:
        raise SpecError(
            "data.shards",
            "sizes do not add up to the tokens",
            "cut the data into shards of 1 MiB, only the last one shorter",
        )
    if data_root(spec.shards).hex() != data.root:
        raise SpecError("data.root", "is not the root of the shards", "compute it from the shards")
    if spec.train_tokens <= data.sequence:
        raise SpecError(
            "data.sequence",
            f"the text has only {spec.train_tokens} training tokens",
            "use a longer text or a shorter sequence",
        )
