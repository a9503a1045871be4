"""What a member compares before it takes a place."""

import pytest
from msgspec.structs import replace

from tdmld.chain.records import Job
from tdmld.chain.transactions import LaneMode, Stage
from tdmld.node.offers import OfferMismatch, check_offer, lane_mode, offered_stages
from tdmld.train.spec import Spec, spec_bytes, spec_id
from tests.chain.world import World
from tests.train.support import family_spec


def job_of(spec: Spec) -> Job:
    """A job as its spec says, offered by hand."""
    raw = spec_bytes(spec)
    world = World()
    job = world.job(world.submit(audit_rate=0))
    return replace(
        job,
        spec_id=spec_id(raw),
        spec_bytes=len(raw),
        stages=offered_stages(spec),
        lanes=spec.lanes,
        ring=spec.is_ring,
        lane_mode=lane_mode(spec),
        lane_weights=spec.lane_weights,
        rounds=spec.rounds,
        segment_steps=spec.pipeline.segment_steps,
        unsettled=spec.pipeline.unsettled,
        state_every=spec.pipeline.state_every,
        tokens=spec.tokens_per_segment,
        class_wanted=spec.class_,
        privacy=spec.privacy,
    )


@pytest.mark.parametrize(("family", "stages"), [("llama", 3), ("gpt2", 2), ("resnet", 2)])
def test_an_offer_that_says_what_its_spec_says_is_taken(family: str, stages: int) -> None:
    spec = family_spec(family, stages)
    check_offer(job_of(spec), spec_bytes(spec), spec)


def test_an_offer_that_says_something_else_is_refused_by_the_field() -> None:
    spec = family_spec("llama", 3)
    job = job_of(spec)
    for field, value in {
        "stages": (*job.stages[:-1], Stage(1, 1)),
        "lanes": 2,
        "ring": True,
        "lane_mode": LaneMode.SYNC,
        "lane_weights": (2,),
        "rounds": job.rounds + 1,
        "tokens": job.tokens - 1,
        "privacy": "split",
        "spec_id": bytes(32),
    }.items():
        with pytest.raises(OfferMismatch, match=field):
            check_offer(replace(job, **{field: value}), spec_bytes(spec), spec)
