"""Whether an offer says what its spec says, and whether its work fits here.

The chain knows of a job only the numbers in its Offer. A member compares them with the spec before
it accepts: a submitter who promised little work and specified much is declined.
"""

from tdmld.chain.crypto import sha256
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import Job
from tdmld.chain.transactions import LaneMode, Stage
from tdmld.train.budget import stage_disk, stage_memory, standby_disk
from tdmld.train.spec import Spec, stage_parameters


class OfferRefused(Exception):
    """This node will not take a place in the job; the text says why."""


class OfferMismatch(OfferRefused):
    """The offer and its spec disagree; the text names the field."""


class NoRoom(OfferRefused):
    """The disk is too small for what the place needs."""


def offered_stages(spec: Spec) -> tuple[Stage, ...]:
    """The stages of an Offer for `spec`."""
    return tuple(
        Stage(stage_parameters(spec, stage), stage_memory(spec, stage))
        for stage in range(spec.stages)
    )


def lane_mode(spec: Spec) -> LaneMode:
    """What an Offer for `spec` says of its lanes."""
    if spec.lanes == 1:
        return LaneMode.SINGLE
    return LaneMode.DILOCO if spec.is_diloco else LaneMode.SYNC


def check_offer(job: Job, raw: bytes, spec: Spec) -> None:
    """Raise OfferMismatch unless the numbers of `job` are those of its spec (`raw` its bytes)."""
    pairs = {
        "spec_id": (job.spec_id, sha256(raw)),
        "spec_bytes": (job.spec_bytes, len(raw)),
        "stages": (job.stages, offered_stages(spec)),
        "lanes": (job.lanes, spec.lanes),
        "ring": (job.ring, spec.is_ring),
        "lane_mode": (job.lane_mode, lane_mode(spec)),
        "lane_weights": (job.lane_weights, spec.lane_weights),
        "rounds": (job.rounds, spec.rounds),
        "segment_steps": (job.segment_steps, spec.pipeline.segment_steps),
        "unsettled": (job.unsettled, spec.pipeline.unsettled),
        "state_every": (job.state_every, spec.pipeline.state_every),
        "tokens": (job.tokens, spec.tokens_per_segment),
        "class": (job.class_wanted, spec.class_),
        "privacy": (job.privacy, spec.privacy),
    }
    for name, (offered, specified) in pairs.items():
        if offered != specified:
            raise OfferMismatch(f"the offer says {name} = {offered!r}, its spec {specified!r}")


def check_room(spec: Spec, slot: int, free: int) -> None:
    """Raise NoRoom when a place (slot index or STANDBY_SLOT) needs more than `free` bytes of disk.

    A disk that fills up in the middle would end the job as this node's fault.
    """
    needed = standby_disk(spec) if slot == STANDBY_SLOT else stage_disk(spec, slot % spec.stages)
    if needed > free:
        raise NoRoom(
            f"it needs {needed >> 20} MiB of disk, {max(free, 0) >> 20} MiB may be used; free some"
        )
