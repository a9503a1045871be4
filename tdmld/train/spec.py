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
from typing import Annotated, Literal

import msgspec

from tdmld.train import limits
from tdmld.train.digest import data_root
from tdmld.train.errors import SpecError
from tdmld.train.families import FAMILIES, Family, Weight

SharedOrLane = Literal["shared", "lane"]


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


class SeedInit(_Part, frozen=True):
    """Weights are drawn from (seed, parameter name)."""

    kind: Literal["seed"]


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
    """The text as shards (id, size) with their Merkle root; `tokens` counts all of them."""

    tokenizer: Literal["bytes"]
    sequence: Annotated[int, msgspec.Meta(ge=1, le=limits.SEQUENCE)]
    heldout: DecimalText
    tokens: Annotated[int, msgspec.Meta(ge=1, le=limits.TEXT_BYTES)]
    shards: Annotated[
        tuple[tuple[HexDigest, Annotated[int, msgspec.Meta(ge=1, le=limits.SHARD_BYTES)]], ...],
        msgspec.Meta(min_length=1),
    ]
    root: HexDigest


class Train(_Part, frozen=True):
    """Steps, micro-batches and arithmetic."""

    steps: Annotated[int, msgspec.Meta(ge=1, le=limits.STEPS)]
    micro_batches: Annotated[int, msgspec.Meta(ge=1, le=limits.MICRO_BATCHES)]
    micro_batch_size: Annotated[int, msgspec.Meta(ge=1, le=limits.MICRO_BATCH_SIZE)]
    precision: Literal["fp32"]
    wire: Literal["fp32", "bf16"]
    optimizer: Optimizer
    schedule: Schedule


class StateTensor(msgspec.Struct, frozen=True):
    """One tensor of a slot's state; `dtype` as safetensors spells it."""

    part: SharedOrLane
    name: str
    dtype: str
    shape: tuple[int, ...]


class Spec(_Part, frozen=True):
    """A job's program. Make it with `decode_spec` or `jobfile.load_job_file`: both check it."""

    version: Literal[1]
    family: Annotated[str, msgspec.Meta(max_length=32)]
    config: dict[str, bool | int | str | None]
    seed: Annotated[int, msgspec.Meta(ge=0, le=limits.SEED)]
    init: SeedInit
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
    def heldout_tokens(self) -> int:
        """Tokens at the end of the text that training never sees."""
        return int(Fraction(self.data.heldout) * self.data.tokens)

    @property
    def has_heldout(self) -> bool:
        """Whether at least one window of text is held out."""
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
    def frame_bytes(self) -> int:
        """Size of every boundary tensor on the wire."""
        values = self.train.micro_batch_size * self.data.sequence * self.model.width(self.config)
        return values * {"fp32": 4, "bf16": 2}[self.train.wire]

    @property
    def shards(self) -> tuple[tuple[bytes, int], ...]:
        """(shard id, size) in the order of the text."""
        return tuple((bytes.fromhex(name), size) for name, size in self.data.shards)

    def layers(self, stage: int) -> tuple[int, int]:
        """The layers [first, last) of a stage."""
        return self.pipeline.cuts[stage], self.pipeline.cuts[stage + 1]

    def is_first(self, stage: int) -> bool:
        """Whether the stage reads tokens."""
        return stage == 0

    def is_last(self, stage: int) -> bool:
        """Whether the stage computes the loss."""
        return stage == self.stages - 1

    def reads_text(self, stage: int) -> bool:
        """Whether the stage reads inputs or labels: one between others never sees the text."""
        return self.is_first(stage) or self.is_last(stage)

    def links(self, stage: int) -> tuple[str, ...]:
        """The links of a stage, "up" before "down"."""
        up = () if self.is_first(stage) else ("up",)
        return up if self.is_last(stage) else (*up, "down")

    def slot_index(self, lane: int, stage: int) -> int:
        """The number of a slot in the job."""
        return lane * self.stages + stage

    def weights(self, stage: int) -> tuple[Weight, ...]:
        """The stage's parameters under their names in the whole model, sorted."""
        return self.model.weights(self.config, *self.layers(stage))


def frame_bytes(spec: Spec) -> int:
    """Size of every boundary tensor on the wire, in bytes."""
    return spec.frame_bytes


def stage_parameters(spec: Spec, stage: int) -> int:
    """Number of trained values of a stage."""
    return sum(weight.count for weight in spec.weights(stage))


WORKER_BASE_BYTES = 400 * 1024 * 1024
"""Resident memory of a worker before it holds a model: interpreter, torch, transformers."""


def stage_memory(spec: Spec, stage: int) -> int:
    """Bytes of memory that a worker of this stage and its carrier need at their peak.

    Weights, gradients and two moments (fp32), the activations of the micro-batches that 1F1B keeps
    open, the text and a step's windows of it, frames in shared memory and those that the carrier
    keeps at hand, digests of what is not settled, and the process itself. An estimate that errs
    upwards.
    """
    train, links = spec.train, len(spec.links(stage))
    tokens = spec.train.micro_batch_size * spec.data.sequence
    open_batches = min(spec.stages - stage, spec.train.micro_batches)
    activations = spec.model.activation_bytes(spec.config, *spec.layers(stage), tokens)
    frames = 3 * links * (2 * spec.stages + 2) * spec.frame_bytes
    windows = train.micro_batches * train.micro_batch_size
    sides = spec.is_first(stage) + spec.is_last(stage)
    # A byte and an int64 for each token, one more int64 for each of inputs and labels.
    text = windows * (100 + (spec.data.sequence + 1) * (9 + 8 * sides)) if sides else 0
    text += spec.data.tokens if spec.reads_text(stage) else 0
    digests = _segment_frames(spec, stage) * _DIGEST_BYTES * (spec.pipeline.unsettled + 2)
    return (
        WORKER_BASE_BYTES
        + 17 * stage_parameters(spec, stage)
        + open_batches * activations
        + frames
        + text
        + digests
    )


_DIGEST_BYTES = 160
"""A digest in a Python dict or list, with its key."""
_FRAME_RECORD_BYTES = 76
"""Beside the payload, in a frame log."""
_STATE_BYTES = 12
"""Of a trained value: itself and two moments."""
KEPT_STATES = 2
"""States that are kept besides those that something unsettled needs."""


def _segment_frames(spec: Spec, stage: int) -> int:
    """Frames that a stage sends and receives in a segment."""
    batches = spec.pipeline.segment_steps * spec.train.micro_batches
    return 2 * len(spec.links(stage)) * batches


def stage_disk(spec: Spec, stage: int) -> int:
    """Bytes of disk that a worker of this stage needs at its peak: the frames and states of the
    segments that are not settled (D, and the one that runs), the text."""
    unsettled = spec.pipeline.unsettled
    frames = _segment_frames(spec, stage) * (spec.frame_bytes + _FRAME_RECORD_BYTES)
    states = (unsettled + KEPT_STATES) * _STATE_BYTES * stage_parameters(spec, stage)
    return (unsettled + 1) * frames + states + spec.data.tokens


def standby_disk(spec: Spec) -> int:
    """Bytes of disk that a standby of the whole job needs at its peak: copies of every stage's
    state (one more while it arrives), the result, the text."""
    parameters = sum(stage_parameters(spec, stage) for stage in range(spec.stages))
    return ((KEPT_STATES + 1) * _STATE_BYTES + 4) * parameters + spec.data.tokens


def state_tensors(spec: Spec, stage: int) -> tuple[StateTensor, ...]:
    """Every tensor of a slot's state, shared part first, each part sorted by name."""
    weights = spec.weights(stage)
    shared = [StateTensor("shared", weight.name, "F32", weight.shape) for weight in weights]
    lane = [
        StateTensor("lane", f"{moment}.{weight.name}", "F32", weight.shape)
        for moment in ("exp_avg", "exp_avg_sq")
        for weight in weights
    ]
    lane.append(StateTensor("lane", "step", "I64", ()))
    return tuple(shared + sorted(lane, key=lambda tensor: tensor.name))


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
    family = FAMILIES.get(spec.family)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise SpecError("family", f"unknown model family {spec.family!r}", f"use one of {known}")
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
    if any(below >= above for below, above in pairwise(cuts)):
        raise SpecError("pipeline.cuts", f"{list(cuts)} does not increase", "list rising borders")
    if cuts[0] != 0 or cuts[-1] != layers:
        raise SpecError(
            "pipeline.cuts",
            f"{list(cuts)} does not cover the model's {layers} layers",
            f"start with 0 and end with {layers}",
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
    if family.vocabulary(spec.config) != 256:
        raise SpecError(
            "config.vocab_size",
            f"{family.vocabulary(spec.config)} does not fit the tokenizer bytes",
            "use 256",
        )
    if data.sequence > family.positions(spec.config):
        raise SpecError(
            "data.sequence",
            f"{data.sequence} exceeds max_position_embeddings {family.positions(spec.config)}",
            "shorten the sequence or raise max_position_embeddings in the config",
        )
    sizes = [size for _, size in data.shards]
    if any(size != limits.SHARD_BYTES for size in sizes[:-1]) or sum(sizes) != data.tokens:
        raise SpecError(
            "data.shards",
            "sizes do not add up to the tokens",
            "cut the text into shards of 1 MiB, only the last one shorter",
        )
    if data_root(spec.shards).hex() != data.root:
        raise SpecError("data.root", "is not the root of the shards", "compute it from the shards")
    if spec.train_tokens <= data.sequence:
        raise SpecError(
            "data.sequence",
            f"the text has only {spec.train_tokens} training tokens",
            "use a longer text or a shorter sequence",
        )
