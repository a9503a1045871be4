"""What a slot needs: memory and disk, at its peak, and what its links carry.

Estimates that err upwards; they stand in the offer, and matching counts with them.
"""

from math import prod

from tdmld.train.contribution import CHUNK, ROWS, low_bits
from tdmld.train.family import Part
from tdmld.train.spec import Spec, stage_parameters

WORKER_BASE_BYTES = 400 * 1024 * 1024
"""Resident memory of a worker before it holds a model: interpreter, torch, transformers."""

_ENTRY = Part(0, 0, entry=True, head=False)
_DIGEST_BYTES = 160
"""A digest in a Python dict or list, with its key."""
_FRAME_RECORD_BYTES = 76
"""Beside the payload, in a frame log."""
_STATE_BYTES = 12
"""Of a trained value: itself and two moments."""
_OUTER_BYTES = 8
"""Of a trained value in a diloco state, beside: outer momentum and residual."""
_OUTER_WORK_BYTES = 16
"""Of a trained value in a diloco job, in memory only: the weights before the segment, and the delta
twice for a moment."""
_ENCODE_BYTES = 48
"""Of a value among those that are compressed at a time."""
_KEPT_BYTES = 12
"""Of a value that a contribution which was read keeps: its place and itself."""
_DECODE_BYTES, _DECODE_BIT_BYTES = 40, 16
"""Of a kept value while its contribution is read, and of each low bit of its place."""


def kept_segments(spec: Spec) -> int:
    """Segments of which a slot keeps what it has: up to D + 2R from the newest boundary whose copy
    was proven, beyond which it stalls, and one that a neighbour is ahead."""
    return spec.pipeline.unsettled + 2 * spec.pipeline.state_every + 1


def stage_memory(spec: Spec, stage: int) -> int:
    """Bytes of memory that a worker of this stage and its carrier need at their peak.

    Weights, gradients and two moments (fp32), what autograd keeps of the micro-batches that 1F1B
    has open, what lanes exchange, the text and a step's windows of it, frames in shared memory and
    those that the carrier keeps at hand, digests of what is not settled, and the process itself. An
    estimate that errs upwards.
    """
    kept, once = activation_memory(spec, stage)
    return (
        WORKER_BASE_BYTES
        + 17 * stage_parameters(spec, stage)
        + _tied_bytes(spec, stage)
        + _lane_bytes(spec, stage)
        + open_batches(spec, stage) * kept
        + once
        + _frame_memory(spec, stage)
        + _text_memory(spec, stage)
        + _segment_frames(spec, stage) * _DIGEST_BYTES * (kept_segments(spec) + 1)
    )


def open_batches(spec: Spec, stage: int) -> int:
    """Micro-batches that have gone forward through a stage and not yet back, at most."""
    return min(spec.ahead - stage, max(map(spec.micro_batches, range(spec.lanes))))


def activation_memory(spec: Spec, stage: int) -> tuple[int, int]:
    """(bytes that autograd keeps of each open micro-batch, bytes that are needed once)"""
    part = spec.part(stage)

    def kept_by(some: Part) -> int:
        return spec.model.activation_bytes(
            spec.config, some, spec.train.micro_batch_size, spec.data.sequence
        )

    # The rounded copies of the weights that a pass made belong to what is kept of it.
    rounded = 2 * stage_parameters(spec, stage) if spec.train.precision == "bf16" else 0
    if not spec.train.recompute or part.first == part.last:
        return kept_by(part) + rounded, 0
    ends = kept_by(Part(part.first, part.first, part.entry, part.head))
    samples, sequence = spec.train.micro_batch_size, spec.data.sequence
    borders = 4 * samples * sequence * (sequence + 4)  # the mask, token and position numbers
    for layer in range(part.first, part.last):
        borders += 4 * samples * prod(spec.model.boundary(spec.config, layer, sequence))
    return borders + ends, kept_by(Part(part.first, part.first + 1, False, False)) + rounded


def _lane_bytes(spec: Spec, stage: int) -> int:
    """What is in memory for the other lanes: all gradients once more, or an outer step's values."""
    parameters = stage_parameters(spec, stage)
    if spec.is_diloco:
        density = spec.outer.density
        kept = parameters * density // CHUNK + min(density, parameters)
        read = (_DECODE_BYTES + _DECODE_BIT_BYTES * low_bits(CHUNK, density)) * kept
        made = _ENCODE_BYTES * min(parameters, ROWS * CHUNK)
        work = max(made, _KEPT_BYTES * spec.lanes * kept) + read
        told = 2 * spec.lanes * spec.contribution_bytes(stage)
        return (_OUTER_BYTES + _OUTER_WORK_BYTES) * parameters + work + told
    return 8 * parameters if spec.has_lane_links else 0


def _frame_memory(spec: Spec, stage: int) -> int:
    """Frames in shared memory, both directions, and as many again that the carrier has at hand."""
    return sum(
        3 * spec.link_places(stage, link) * spec.link_frame_bytes(stage, link)
        for link in spec.links(0, stage)
    )


def _text_memory(spec: Spec, stage: int) -> int:
    """The text, and a step's windows: as they lie there, twice, and as int64, and once more for
    each of inputs and labels."""
    if not spec.reads_text(stage):
        return 0
    windows = max(map(spec.micro_batches, range(spec.lanes))) * spec.train.micro_batch_size
    sides = spec.has_input(stage) + spec.has_loss(stage)
    token = 2 * spec.data.width + 8 + 8 * sides
    return windows * (100 + (spec.data.sequence + 1) * token) + spec.data.tokens


def _tied_bytes(spec: Spec, stage: int) -> int:
    """The second gradient of a weight that embedding and head share."""
    if not (spec.has_loss(stage) and spec.model.tied(spec.config)):
        return 0
    return 4 * max(weight.count for weight in spec.model.weights(spec.config, _ENTRY))


def _segment_frames(spec: Spec, stage: int) -> int:
    """Frames that a stage sends and receives in a segment."""
    return max(
        sum(2 * spec.link_frames(lane, stage, link) for link in spec.links(lane, stage))
        for lane in range(spec.lanes)
    )


def link_step_bytes(spec: Spec, lane: int, stage: int, link: str) -> int:
    """Bytes that cross a link in one direction in a step, at most (deflated frames are smaller)."""
    frames = spec.link_frames(lane, stage, link) // spec.pipeline.segment_steps
    return frames * spec.link_frame_bytes(stage, link)


def state_bytes(spec: Spec, stage: int) -> int:
    """Bytes of a slot's state on disk, without headers."""
    return (_STATE_BYTES + _OUTER_BYTES * spec.is_diloco) * stage_parameters(spec, stage)


def stage_disk(spec: Spec, stage: int) -> int:
    """Bytes of disk that a worker of this stage needs at its peak: the frames, contributions and
    states of the segments that somebody may need (`kept_segments`), the text."""
    kept = kept_segments(spec)
    frames = max(
        sum(
            2
            * spec.link_frames(lane, stage, link)
            * (spec.link_frame_bytes(stage, link) + _FRAME_RECORD_BYTES)
            for link in spec.links(lane, stage)
        )
        for lane in range(spec.lanes)
    )
    told = spec.lanes * spec.contribution_bytes(stage)
    states = (kept + 1) * state_bytes(spec, stage)
    return kept * (frames + told) + states + spec.data.tokens


def standby_disk(spec: Spec) -> int:
    """Bytes of disk that a standby of the whole job needs at its peak: copies of every slot's
    state from the newest proven one on (one more while it arrives), each with what its lane
    contributed last, the result, the text."""
    states = spec.lanes * sum(
        state_bytes(spec, stage) + spec.contribution_bytes(stage) for stage in range(spec.stages)
    )
    copies = kept_segments(spec) // spec.pipeline.state_every + 2
    parameters = sum(stage_parameters(spec, stage) for stage in range(spec.stages))
    return copies * states + 4 * parameters + spec.data.tokens
