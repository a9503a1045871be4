"""The spec: a training program as data. Its bytes are its identity.

A spec is canonical JSON: ASCII, keys sorted, no blanks, no floats, at most 64 KiB; `spec_id` is the
SHA-256 of the bytes. Decoding is strict (unknown and missing keys are errors, the bytes must be
the canonical ones) and complete: what `decode_spec` returns can be built and run. The job file
that people write is `jobfile.py`. Fields: design annex A1.
"""

import hashlib
import json
import re
from fractions import Fraction
from functools import lru_cache
from math import prod
from typing import Annotated, Literal

import msgspec

from tdmld.train import limits
from tdmld.train.contribution import contribution_size
from tdmld.train.errors import SpecError
from tdmld.train.families import FAMILIES
from tdmld.train.family import Family, Part, Weight, by_name
from tdmld.train.speccheck import check_spec
from tdmld.train.specfields import (
    Data,
    Fields,
    GivenInit,
    NoClip,
    Outer,
    Pipeline,
    SeedInit,
    StageClip,
    Train,
)
from tdmld.train.wireformat import BLOCK, Wire, plain_bytes

_LANE_VALUES = {
    name: limits.LANE_FRAME_BYTES // plain_bytes(name, BLOCK) * BLOCK
    for name in ("fp32", "bf16", "int8")
}
"""Values in a full part of gradients between lanes, by format: whole blocks."""
_LANE_PLACES = 4
"""A sender never waits for a sibling, so a few places are enough."""


class Spec(Fields, frozen=True):
    """A job's program. Make it with `decode_spec` or `jobfile.load_job_file`: both check it."""

    version: Literal[1]
    family: Annotated[str, msgspec.Meta(max_length=32)]
    config: dict[str, bool | int | str | None]
    seed: Annotated[int, msgspec.Meta(ge=0, le=limits.SEED)]
    init: SeedInit | GivenInit
    privacy: Literal["open", "sealed", "split"]
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
    def is_diloco(self) -> bool:
        """Whether lanes go apart for a segment and meet in an outer step."""
        return self.pipeline.lanes.mode == "diloco"

    @property
    def outer(self) -> Outer:
        """The outer step of a `diloco` job; ValueError in another one."""
        if self.pipeline.lanes.outer is None:
            raise ValueError("only a diloco job has an outer step")
        return self.pipeline.lanes.outer

    @property
    def lane_weights(self) -> tuple[int, ...]:
        """How many times `micro_batches` each lane works on in a step."""
        return self.pipeline.lanes.weights or (1,) * self.lanes

    @property
    def training_rounds(self) -> int:
        """Segments of each slot that have steps, and so frames on the links: the first ones."""
        return (self.train.steps - self.first_step) // self.pipeline.segment_steps

    @property
    def rounds(self) -> int:
        """Segments of each slot. In `diloco` a last one without steps makes the last outer step."""
        return self.training_rounds + self.is_diloco

    def boundary_step(self, boundary: int) -> int:
        """Steps done at a boundary, by all that is to be trained."""
        steps = self.first_step + boundary * self.pipeline.segment_steps
        return min(steps, self.train.steps)

    def micro_batches(self, lane: int) -> int:
        """Micro-batches that a lane works on in a step."""
        return self.train.micro_batches * self.lane_weights[lane]

    @property
    def first_step(self) -> int:
        """The step that the job begins with: 0 unless it goes on where another one stood."""
        return self.init.step if isinstance(self.init, GivenInit) else 0

    @property
    def goes_on(self) -> bool:
        """Whether moments are given beside the weights."""
        return self.first_step > 0

    @property
    def is_ring(self) -> bool:
        """Whether the slots form a U: the first one holds embedding, head and loss, and the last
        one is joined to it. A head that is tied to the embedding needs that, and a job whose data
        only the first slot may see."""
        tied = self.model.tied(self.config)
        return self.stages > 1 and (tied or self.privacy == "split")

    @property
    def record(self) -> int:
        """Bytes that belong together: an image with its label, or one token."""
        return self.data.sequence + 1 if self.model.images else self.data.width

    @property
    def window_bytes(self) -> int:
        """Bytes that one sample reads: the inputs, and one label more."""
        return (self.data.sequence + 1) * self.data.width

    @property
    def heldout_tokens(self) -> int:
        """Bytes at the end of the data that training never sees, whole records."""
        return int(Fraction(self.data.heldout) * (self.data.tokens // self.record)) * self.record

    @property
    def has_heldout(self) -> bool:
        """Whether at least one window of the data is held out."""
        return self.heldout_tokens >= self.window_bytes

    @property
    def train_tokens(self) -> int:
        """Bytes that windows are drawn from."""
        return self.data.tokens - self.heldout_tokens

    @property
    def tokens_per_segment(self) -> int:
        """Tokens that a lane of weight 1 reads in one segment."""
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
        sizes = [self.link_frame_bytes(*down) for down in downs]
        if self.has_lane_links:
            sizes += [self.link_frame_bytes(stage, "lane0") for stage in range(self.stages)]
        return max(sizes, default=1)

    @property
    def ahead(self) -> int:
        """By so many a boundary frame's number may exceed what its receiver ever sent back."""
        return self.stages + self.is_ring

    @property
    def has_lane_links(self) -> bool:
        """Whether the same stages of all lanes are joined: they exchange gradients each step."""
        return self.lanes > 1 and not self.is_diloco

    def window(self, number: int) -> int:
        """Where the window that a drawn number names begins."""
        count = (self.train_tokens - self.window_bytes) // self.record + 1
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

    def links(self, lane: int, stage: int) -> tuple[str, ...]:
        """The links of a slot in the order of its commitment: up, down, siblings ascending."""
        up = () if stage == 0 and not self.is_ring else ("up",)
        down = () if stage == self.stages - 1 and not self.is_ring else ("down",)
        others = range(self.lanes) if self.has_lane_links else ()
        return (*up, *down, *(f"lane{other}" for other in others if other != lane))

    def logged_links(self, lane: int, stage: int, segment: int) -> tuple[str, ...]:
        """The links of a slot that frames cross in a segment: none in one without steps."""
        return self.links(lane, stage) if segment < self.training_rounds else ()

    def other_end(self, lane: int, stage: int, link: str) -> tuple[int, int, str]:
        """(lane, stage, link) of a link as its other end has it. KeyError for a link it lacks."""
        if link not in self.links(lane, stage):
            raise KeyError(link)
        if link == "up":
            return lane, (stage - 1) % self.stages, "down"
        if link == "down":
            return lane, (stage + 1) % self.stages, "up"
        return int(link.removeprefix("lane")), stage, f"lane{lane}"

    def lane_parts(self, stage: int) -> tuple[int, ...]:
        """Values in each part of what a stage tells its siblings in a step: the parts of its
        gradients, in `lanes.wire`, then those of its float buffers, in fp32."""
        return (*self.gradient_parts(stage), *self.buffer_parts(stage))

    def part_count(self, stage: int) -> int:
        """Number of `lane_parts`, without listing them."""
        gradients = -(-stage_parameters(self, stage) // _LANE_VALUES[self.pipeline.lanes.wire])
        return gradients + -(-self.float_buffers(stage) // _LANE_VALUES["fp32"])

    def gradient_parts(self, stage: int) -> tuple[int, ...]:
        """Values in each part of a stage's gradients, which stand one after another by name."""
        return _parts(stage_parameters(self, stage), _LANE_VALUES[self.pipeline.lanes.wire])

    def buffer_parts(self, stage: int) -> tuple[int, ...]:
        """Values in each part of a stage's float buffers, which stand one after another by name."""
        return _parts(self.float_buffers(stage), _LANE_VALUES["fp32"])

    def float_buffers(self, stage: int) -> int:
        """Number of values in the float buffers of a stage."""
        return sum(weight.count for weight in self.buffers(stage) if weight.dtype == "F32")

    def link_frames(self, lane: int, stage: int, link: str) -> int:
        """Frames that cross a link in a segment with steps, the same number in both directions."""
        step = self.micro_batches(lane) if _is_boundary(link) else self.part_count(stage)
        return step * self.pipeline.segment_steps

    def link_frame_bytes(self, stage: int, link: str) -> int:
        """The greatest size of a frame on a link."""
        if _is_boundary(link):
            return plain_bytes(self.wire(stage, link), prod(self.boundary(stage, link)))
        wire = self.pipeline.lanes.wire
        gradients = [plain_bytes(wire, values) for values in self.gradient_parts(stage)]
        buffers = [plain_bytes("fp32", values) for values in self.buffer_parts(stage)]
        return max((*gradients, *buffers), default=1)

    def link_ahead(self, stage: int, link: str) -> int:
        """By how much a frame's number may exceed the greatest that its receiver ever sent on this
        link: the parts of a pipeline that can be ahead of each other, or one step of parts."""
        return self.ahead if _is_boundary(link) else self.part_count(stage)

    def link_places(self, stage: int, link: str) -> int:
        """Places of shared memory for each direction of a link."""
        return 2 * self.stages + 2 if _is_boundary(link) else _LANE_PLACES

    def contribution_bytes(self, stage: int) -> int:
        """The greatest size of a stage's contribution to an outer step; 0 where there is none."""
        outer = self.pipeline.lanes.outer
        if outer is None:
            return 0
        values, buffers = stage_parameters(self, stage), self.float_buffers(stage)
        return contribution_size(values, buffers, outer.density, outer.bits)

    def _above(self, stage: int, link: str) -> int:
        """The number of a link: the stage for which it is the one down."""
        return stage if link == "down" else (stage - 1) % self.stages

    def wire(self, stage: int, link: str) -> Wire:
        """The format of the frames on a link, in both directions."""
        wire = self.train.wire
        return wire if isinstance(wire, str) else wire[self._above(stage, link)]

    def boundary(self, stage: int, link: str) -> tuple[int, ...]:
        """Shape of the boundary tensors on a link, the micro-batch first."""
        border = self.pipeline.cuts[self._above(stage, link) + 1]
        shape = self.model.boundary(self.config, border, self.data.sequence)
        return self.train.micro_batch_size, *shape

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


def _is_boundary(link: str) -> bool:
    """Whether boundary tensors cross the link, not gradients."""
    return link in ("up", "down")


def _parts(values: int, most: int) -> tuple[int, ...]:
    return tuple(min(most, values - at) for at in range(0, values, most))


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
