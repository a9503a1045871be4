"""What a slot needs: memory and disk, at its peak.

Estimates that err upwards; they stand in the offer, and matching counts with them.
"""

from tdmld.train.family import Part
from tdmld.train.spec import Spec, stage_parameters

WORKER_BASE_BYTES = 400 * 1024 * 1024
"""Resident memory of a worker before it holds a model: interpreter, torch, transformers."""


def stage_memory(spec: Spec, stage: int) -> int:
    """Bytes of memory that a worker of this stage and its carrier need at their peak.

    Weights, gradients and two moments (fp32), the activations of the micro-batches that 1F1B keeps
    open, the text and a step's windows of it, frames in shared memory and those that the carrier
    keeps at hand, digests of what is not settled, and the process itself. An estimate that errs
    upwards.
    """
    train, links = spec.train, len(spec.links(0, stage))
    open_batches = min(spec.ahead - stage, max(map(spec.micro_batches, range(spec.lanes))))
    activations = spec.model.activation_bytes(
        spec.config, spec.part(stage), train.micro_batch_size, spec.data.sequence
    )
    frames = 3 * links * (2 * spec.stages + 2) * spec.frame_bytes
    windows = train.micro_batches * max(spec.lane_weights) * train.micro_batch_size
    sides = spec.has_input(stage) + spec.has_loss(stage)
    # A byte and an int64 for each token, one more int64 for each of inputs and labels.
    text = windows * (100 + (spec.data.sequence + 1) * (9 + 8 * sides)) if sides else 0
    text += spec.data.tokens if spec.reads_text(stage) else 0
    digests = _segment_frames(spec, stage) * _DIGEST_BYTES * (spec.pipeline.unsettled + 2)
    return (
        WORKER_BASE_BYTES
        + 17 * stage_parameters(spec, stage)
        + _tied_bytes(spec, stage)
        + open_batches * activations
        + frames
        + text
        + digests
    )


def _tied_bytes(spec: Spec, stage: int) -> int:
    """The second gradient of a weight that embedding and head share."""
    if not (spec.has_loss(stage) and spec.model.tied(spec.config)):
        return 0
    return 4 * max(weight.count for weight in spec.model.weights(spec.config, _ENTRY))


_ENTRY = Part(0, 0, entry=True, head=False)
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
    return max(
        sum(2 * spec.link_frames(lane, stage, link) for link in spec.links(lane, stage))
        for lane in range(spec.lanes)
    )


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
