"""The rules of a spec that types cannot say, one after the other."""

from itertools import pairwise
from typing import TYPE_CHECKING

from tdmld.train import limits
from tdmld.train.digest import data_root
from tdmld.train.errors import SpecError
from tdmld.train.families import family_of
from tdmld.train.family import Family
from tdmld.train.specfields import LANE_WIRE, GivenInit, StageClip, decimal

if TYPE_CHECKING:
    from tdmld.train.spec import Spec

_LIST_FRAME_BYTES = 34
_LIST_STEP_BYTES = 110
_LIST_HEAD_BYTES = 4096
"""Of a segment's digest list: what each frame and step takes in it, and the rest at most."""


def check_spec(spec: "Spec") -> None:
    """Every rule that types cannot say. Raises SpecError at the first one that is broken."""
    family = family_of(spec.family)
    family.check(spec.config)
    _check_lanes(spec)
    _check_pipeline(spec, family)
    _check_train(spec)
    _check_data(spec, family)
    _check_list(spec)  # before anything goes over the parts of gradients: it bounds their number
    if spec.frame_bytes > limits.FRAME_BYTES:
        raise SpecError(
            "train.micro_batch_size",
            f"a boundary tensor has {spec.frame_bytes} bytes, at most {limits.FRAME_BYTES}",
            "use a smaller micro_batch_size or a shorter sequence",
        )


def _check_lanes(spec: "Spec") -> None:
    lanes = spec.pipeline.lanes
    name = "pipeline.lanes"
    if lanes.weights and (len(lanes.weights) != lanes.count or set(lanes.weights) == {1}):
        raise SpecError(
            f"{name}.weights",
            f"{len(lanes.weights)} weights for {lanes.count} lanes, or all of them 1",
            "give one a lane, or leave them out where all are 1",
        )
    if lanes.count == 1 and (spec.is_diloco or lanes.weights):
        raise SpecError(
            f"{name}.mode", "one lane has nobody to meet", 'use mode = "sync" without weights'
        )
    if lanes.wire != LANE_WIRE and not spec.has_lane_links:
        raise SpecError(
            f"{name}.wire", "no gradients cross between lanes", "leave it out in this job"
        )
    if (lanes.outer is None) == spec.is_diloco:
        raise SpecError(
            f"{name}.outer",
            "missing" if spec.is_diloco else f"{lanes.mode} has no outer step",
            "diloco needs it, and nothing else has it",
        )
    if spec.slots > limits.SLOTS:
        raise SpecError(
            f"{name}.count",
            f"{spec.lanes} lanes of {spec.stages} stages are {spec.slots} slots",
            f"use at most {limits.SLOTS}",
        )
    if spec.privacy == "split" and (spec.lanes > 1 or spec.stages < 2):
        raise SpecError(
            "privacy",
            f"split with {spec.lanes} lanes and {spec.stages} stages",
            "use one lane of 2 or more stages: the first one is your own node's",
        )
    if lanes.outer is not None:
        decimal(f"{name}.outer.lr", lanes.outer.lr, "1e-3", "10")
        decimal(f"{name}.outer.momentum", lanes.outer.momentum, "0", "0.999")
        decimal(f"{name}.outer.feedback", lanes.outer.feedback, "0", "1")


def _check_pipeline(spec: "Spec", family: Family) -> None:
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
    if isinstance(spec.init, GivenInit):
        _check_given(spec, spec.init)
    if left := (spec.train.steps - spec.first_step) % spec.pipeline.segment_steps:
        raise SpecError(
            "pipeline.segment_steps",
            f"{spec.pipeline.segment_steps} does not divide "
            f"{spec.train.steps - spec.first_step} steps ({left} are left)",
            "choose a divisor of train.steps (less the steps done before)",
        )
    most = spec.train.micro_batches * max(spec.lane_weights)
    if (batches := spec.pipeline.segment_steps * most) > limits.SEGMENT_MICRO_BATCHES:
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


def _check_list(spec: "Spec") -> None:
    steps = spec.pipeline.segment_steps
    batches = spec.train.micro_batches * max(spec.lane_weights)
    siblings = spec.lanes - 1 if spec.has_lane_links else 0

    def step_frames(stage: int) -> int:
        boundaries = len(spec.links(0, stage)) - siblings
        parts = spec.part_count(stage) if siblings else 0
        return 2 * (boundaries * batches + siblings * parts)

    frames = steps * max(map(step_frames, range(spec.stages)))
    size = frames * _LIST_FRAME_BYTES + steps * _LIST_STEP_BYTES + _LIST_HEAD_BYTES
    if size > limits.LIST_BYTES:
        raise SpecError(
            "pipeline.segment_steps",
            f"the list of a segment has {size} bytes, at most {limits.LIST_BYTES}: {frames} frames",
            "lower segment_steps, use fewer lanes or more stages, or a shorter lanes.wire",
        )


def _check_given(spec: "Spec", init: GivenInit) -> None:
    if len(init.roots) != spec.stages:
        raise SpecError(
            "init.roots",
            f"{len(init.roots)} roots for {spec.stages} stages",
            "give one root a stage",
        )
    if len(init.lane_roots) != (spec.slots if init.step else 0):
        raise SpecError(
            "init.lane_roots",
            f"{len(init.lane_roots)} roots for {spec.slots} slots after {init.step} steps",
            "give one a slot when steps were done before, and none otherwise",
        )
    if init.step >= spec.train.steps:
        raise SpecError(
            "init.step",
            f"{init.step} of {spec.train.steps} steps are done",
            "raise train.steps, which counts them too",
        )


def _check_train(spec: "Spec") -> None:
    optimizer, schedule = spec.train.optimizer, spec.train.schedule
    batches = spec.train.micro_batches * max(spec.lane_weights)
    tokens = batches * spec.train.micro_batch_size * spec.data.sequence
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
    if spec.train.recompute and spec.model.images:
        raise SpecError(
            "train.recompute",
            "batch norms would count each batch twice",
            "leave it out for this family",
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


def _check_data(spec: "Spec", family: Family) -> None:
    data = spec.data
    decimal("data.heldout", data.heldout, "0", "0.5")
    family.check_data(spec.config, data.tokenizer, data.sequence)
    if (data.width == 1) != (data.tokenizer != "tokens"):
        raise SpecError(
            "data.width",
            f"{data.tokenizer} of {data.width} bytes",
            "tokens have 2 or 4 bytes, everything else 1",
        )
    if data.tokens % spec.record:
        raise SpecError(
            "data.tokens",
            f"{data.tokens} bytes are no whole number of records of {spec.record}",
            "a record is one token, or a label byte and the pixels of one image",
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
    if spec.train_tokens < spec.window_bytes:
        raise SpecError(
            "data.sequence",
            f"the text has only {spec.train_tokens // data.width} training tokens",
            "use a longer text or a shorter sequence",
        )
