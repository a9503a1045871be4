"""What a worker process is told to do, as JSON in its arguments, and with which status it ends."""

from typing import Annotated, Literal

import msgspec

from tdmld.node.errors import FailureCause

PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TASK_BYTES = 32 * 1024
MAX_INCLUDED = 16
"""Lanes of a job."""

EXIT_FAILED = 1
EXIT_TASK = 2
EXITS = {
    FailureCause.DIED: EXIT_FAILED,
    FailureCause.REFUSED: 10,
    FailureCause.OUT_OF_MEMORY: 11,
    FailureCause.DISK_FULL: 12,
    FailureCause.DEVICE: 13,
}
"""With which status a worker ends that could not go on."""
CAUSES = {status: cause for cause, status in EXITS.items()}


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do.

    directory  the slot's, standby's or audit's directory: state, list, contribution and, for a
               replay, frames
    boundary   whose state to begin with; a replay runs the segment of this number
    draw       make the state at boundary 0 in the place of loading it
    given      files that it is made of, when weights are given: the shared part, and the lane part
               when the job goes on with moments
    included   replay in lanes mode `diloco`: lanes of the round before that enter the segment
    memory     bytes of private memory that the worker may have; 0: no limit
    """

    mode: Literal["live", "genesis", "replay"]
    spec: PathText
    directory: PathText
    lane: Number
    stage: Number
    boundary: Number = 0
    draw: bool = False
    given: Annotated[tuple[PathText, ...], msgspec.Meta(max_length=2)] = ()
    included: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_INCLUDED)] = ()
    niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = 0
    memory: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0


def encode_task(task: Task) -> str:
    """The text of a task."""
    return msgspec.json.encode(task).decode()


def decode_task(text: str) -> Task:
    """The task in `text`; msgspec.MsgspecError when it is none."""
    if len(text) > TASK_BYTES:
        raise msgspec.ValidationError(f"a task of {len(text)} characters")
    return msgspec.json.decode(text, type=Task)
