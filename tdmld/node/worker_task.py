"""What a worker process is told to do, as JSON in its arguments."""

from typing import Annotated, Literal

import msgspec

PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
TASK_BYTES = 16 * 1024


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do.

    directory  the slot's, standby's or audit's directory: state/, list/ and replayed frames
    segment    the one to replay
    """

    mode: Literal["live", "genesis", "replay"]
    spec: PathText
    directory: PathText
    lane: Annotated[int, msgspec.Meta(ge=0)]
    stage: Annotated[int, msgspec.Meta(ge=0)]
    segment: Annotated[int, msgspec.Meta(ge=0)] = 0
    niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = 0
