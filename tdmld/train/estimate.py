"""What a job will take: the time of a step, found by playing its schedule, and balanced cuts.

The seconds of the model's parts are measured (`timing`) or follow from a speed. A step is played
operation by operation (`schedule.operations`): an operation begins when its slot is free and its
frame is there; a frame leaves when its sender's line is free, and takes its size by the line's
speed and the latency. What the real carriers do beside that (signing, retries, other jobs) and what
the chain costs is not in it. Torch is not needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import msgspec

from tdmld.train.budget import link_step_bytes, stage_memory, state_bytes
from tdmld.train.errors import SpecError
from tdmld.train.family import Part
from tdmld.train.schedule import operations, traffic
from tdmld.train.spec import Spec, stage_parameters


class PartSeconds(NamedTuple):
    """Seconds of one micro-batch through a part of the model."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Seconds:
    """What a machine takes for the parts of a model."""

    entry: PartSeconds
    layers: tuple[PartSeconds, ...]
    head: PartSeconds
    optimizer: float
    """Seconds a step and trained value."""
    hash: float
    """Seconds a byte."""


class Line(NamedTuple):
    """A node's line to the others."""

    bytes_per_second: float
    """Outwards; all links of a slot share it."""
    latency: float
    """Seconds, one way."""


@dataclass(frozen=True)
class Step:
    """One step of a lane as it was played."""

    seconds: float
    busy: tuple[float, ...]
    """Of each stage: seconds in which it computed."""
    exchange: float
    """Of it: seconds in which lanes exchanged gradients."""

    @property
    def bubble(self) -> float:
        """The share of the step in which a stage, on average, did not compute."""
        return 1 - sum(self.busy) / len(self.busy) / self.seconds


def seconds_of_speed(spec: Spec, flops: float, hash_bytes: float = 1e9) -> Seconds:
    """The seconds of a machine that does so many operations (multiply or add) a second.

    A token passes each weight of a product of matrices with two operations forward and four back,
    and with 4 x sequence x hidden ones (forward) its attention. Of an image each place does.
    """

    def part(some: Part) -> PartSeconds:
        tokens = spec.train.micro_batch_size * spec.data.sequence
        if spec.model.images:
            _, *sides = spec.model.boundary(spec.config, some.last, spec.data.sequence)
            places = _product(sides) * (4 if some.entry else 1)  # a stem pools what it computed
            tokens = spec.train.micro_batch_size * (1 if some.head else places)
        shapes = [weight.shape for weight in spec.model.weights(spec.config, some)]
        count = sum(_product(shape) for shape in shapes if len(shape) > 1)
        if some.entry:
            count = 0 if not spec.model.images else count
        elif some.head and spec.model.tied(spec.config):
            count += _product(_embedding(spec))
        work = 2.0 * tokens * count
        if not (some.entry or some.head or spec.model.images):
            width = spec.model.boundary(spec.config, some.first, spec.data.sequence)[-1]
            work += 4.0 * tokens * spec.data.sequence * width
        return PartSeconds(work / flops, 2 * work / flops)

    last = spec.whole.last
    return Seconds(
        part(Part(0, 0, True, False)),
        tuple(part(Part(layer, layer + 1, False, False)) for layer in range(last)),
        part(Part(last, last, False, True)),
        20 / flops,
        1 / hash_bytes,
    )


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _embedding(spec: Spec) -> tuple[int, ...]:
    shapes = [w.shape for w in spec.model.weights(spec.config, Part(0, 0, True, False))]
    return max(shapes, key=_product)


def stage_seconds(spec: Spec, stage: int, seconds: Seconds) -> dict[str, float]:
    """Seconds of the operations F, B and H (`schedule`) of a stage."""
    first, last = spec.layers(stage)
    again = 1 if spec.train.recompute else 0
    layers = seconds.layers[first:last]
    forward = sum(one.forward for one in layers)
    backward = sum(one.backward + again * one.forward for one in layers)
    head = 0.0
    if spec.has_input(stage):
        forward += seconds.entry.forward
        backward += seconds.entry.backward
    if spec.has_loss(stage):
        if spec.is_ring:
            head = seconds.head.both
        else:
            forward += seconds.head.forward
            backward += seconds.head.backward
    return {"F": forward, "B": backward, "H": head}


def play(
    spec: Spec,
    seconds: Seconds,
    lines: Sequence[Line],
    speeds: Sequence[float],
    lane: int = 0,
) -> Step:
    """One step of a lane. `lines` and `speeds` (1: as fast as measured) have one entry a stage."""
    orders = [operations(spec, lane, stage) for stage in range(spec.stages)]
    takes = [
        {kind: value / speed for kind, value in stage_seconds(spec, stage, seconds).items()}
        for stage, speed in enumerate(speeds)
    ]
    free, line_free = [0.0] * spec.stages, [0.0] * spec.stages
    busy, at = [0.0] * spec.stages, [0] * spec.stages
    arrived: dict[tuple[int, str, int], float] = {}  # by receiving stage, its link, the number

    def ready(stage: int) -> float | None:
        if at[stage] == len(orders[stage]):
            return None
        kind, number = orders[stage][at[stage]]
        into, _ = traffic(spec, stage, kind)
        there = 0.0 if into is None else arrived.get((stage, into, number))
        return None if there is None else max(free[stage], there)

    while True:
        found = ((ready(stage), stage) for stage in range(spec.stages))
        starts = [(start, stage) for start, stage in found if start is not None]
        if not starts:
            break
        start, stage = min(starts)
        kind, number = orders[stage][at[stage]]
        end = start + takes[stage][kind]
        busy[stage] += takes[stage][kind]
        free[stage] = end
        at[stage] += 1
        _, out = traffic(spec, stage, kind)
        if out is not None:
            size = spec.link_frame_bytes(stage, out)
            leaves = max(end, line_free[stage])
            line_free[stage] = leaves + size / lines[stage].bytes_per_second
            _, other, link = spec.other_end(lane, stage, out)
            arrived[other, link, number] = line_free[stage] + lines[stage].latency
    assert all(done == len(order) for done, order in zip(at, orders, strict=True))
    ends, exchanges = [], []
    for stage in range(spec.stages):
        parameters = stage_parameters(spec, stage)
        after = (parameters * (seconds.optimizer + 4 * seconds.hash)) / speeds[stage]
        told = sum(
            link_step_bytes(spec, lane, stage, link)
            for link in spec.links(lane, stage)
            if link.startswith("lane")
        )
        exchange = told / lines[stage].bytes_per_second + (lines[stage].latency if told else 0.0)
        busy[stage] += after
        ends.append(free[stage] + after + exchange)
        exchanges.append(exchange)
    return Step(max(ends), tuple(busy), max(exchanges))


def segment_overhead(spec: Spec, seconds: Seconds) -> float:
    """Seconds between two segments: the greatest state is hashed at both ends."""
    return max(state_bytes(spec, stage) for stage in range(spec.stages)) * seconds.hash


class Cut(NamedTuple):
    """Cuts, and the seconds of a micro-batch through the slowest stage of them."""

    cuts: tuple[int, ...]
    slowest: float


def balanced(
    spec: Spec,
    seconds: Seconds,
    speeds: Sequence[float],
    memory: Sequence[int | None],
) -> Cut:
    """The cuts into `len(speeds)` stages with the least time in the slowest stage.

    `memory` is what a slot of each stage may use, None where that is not known. SpecError when no
    cuts fit, or there are fewer layers than stages.
    """
    stages, count = len(speeds), spec.whole.last
    ring = stages > 1 and (spec.model.tied(spec.config) or spec.privacy == "split")
    sums = [0.0, *accumulate(_cost(spec, one) for one in seconds.layers)]
    head_stage = 0 if ring else stages - 1

    def cost(stage: int, first: int, last: int) -> float:
        ends = seconds.entry.both if stage == 0 else 0.0
        ends += seconds.head.both if stage == head_stage else 0.0
        return (sums[last] - sums[first] + ends) / speeds[stage]

    # best[last]: the least slowest stage when the stages so far hold the layers below `last`.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        empty, low = ring and stage == 0, 0
        for last in range(count + 1):
            # What does not fit up to here fits no further on either.
            while low < last and not _fits(spec, stage, low, last, memory):
                low += 1
            chosen: tuple[float, tuple[int, ...]] | None = None
            for first in range(last if empty else last - 1, low - 1, -1):
                own = cost(stage, first, last)
                if chosen is not None and own >= chosen[0]:
                    break  # and more so with more layers
                if first in best and (chosen is None or best[first][0] < chosen[0]):
                    chosen = max(best[first][0], own), (*best[first][1], last)
            if chosen is not None:
                found[last] = chosen
        best = found
    if count not in best:
        raise SpecError(
            "pipeline.cuts",
            f"no cut of {count} layers into {stages} stages fits the memory given",
            "use more stages, more memory, smaller micro-batches, or train.recompute",
        )
    slowest, cuts = best[count]
    return Cut(cuts, slowest)


def _cost(spec: Spec, one: PartSeconds) -> float:
    return one.both + (one.forward if spec.train.recompute else 0.0)


def _fits(spec: Spec, stage: int, first: int, last: int, memory: Sequence[int | None]) -> bool:
    """Whether layers [first, last) fit a stage."""
    most = memory[stage]
    if most is None:
        return True
    cuts = _around(stage, first, last, len(memory), spec.whole.last)
    return stage_memory(with_cuts(spec, cuts), stage) <= most


def _around(stage: int, first: int, last: int, stages: int, count: int) -> tuple[int, ...]:
    """Cuts in which `stage` has the layers [first, last); what the others have does not matter."""
    below = [first * n // stage for n in range(stage)] if stage else []
    above = [last + (count - last) * n // (stages - stage - 1) for n in range(1, stages - stage)]
    return (*below, first, last, *above)


def with_cuts(spec: Spec, cuts: tuple[int, ...]) -> Spec:
    """The spec with other cuts, and one wire format; not checked."""
    wire = spec.train.wire if isinstance(spec.train.wire, str) else spec.train.wire[0]
    return msgspec.structs.replace(
        spec,
        pipeline=msgspec.structs.replace(spec.pipeline, cuts=cuts),
        train=msgspec.structs.replace(spec.train, wire=wire),
    )
