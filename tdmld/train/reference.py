"""The reference: the same spec in one process on the unsplit model, with a loop of its own.

It shares data, wire rounding, optimizer and initial draw with the engine; never the cut, the runner
or the channel. Its roots and its exported model are what an honest job must equal, bit for bit, on
one class of machine.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tdmld.files import write_file
from tdmld.train import optimizer
from tdmld.train.compress import (
    Contribution,
    Place,
    decode_contribution,
    encode_contribution,
)
from tdmld.train.data import Tokens, window_index
from tdmld.train.digest import state_root
from tdmld.train.errors import SegmentFault
from tdmld.train.export import Result, write_result
from tdmld.train.model import whole_model
from tdmld.train.outer import combine, outer_step
from tdmld.train.schedule import step_scalars
from tdmld.train.segment import OnStep, StepReport
from tdmld.train.spec import Spec, spec_bytes, spec_id
from tdmld.train.specfields import StageClip
from tdmld.train.statefile import TensorData
from tdmld.train.wholemodel import (
    DTYPES,
    Group,
    Private,
    fill,
    forward_loss,
    leaves_of,
    make_groups,
    mark_cuts,
    new_private,
    take_moments,
    untie,
)
from tdmld.train.wire import round_to_wire, tensor_bytes

ROOTS_FILE = "roots.json"
MODEL_DIRECTORY = "model"
BoundaryRoots = dict[str, tuple[bytes, bytes]]
"""Slot "lane.stage" -> (shared root, lane root) at one boundary."""


@dataclass(frozen=True)
class Reference:
    """What the reference found: roots of boundaries 0 to rounds, the losses, the model."""

    boundaries: tuple[BoundaryRoots, ...]
    lane_losses: tuple[tuple[float, ...], ...]
    """One a step, for each lane."""
    losses: tuple[float, ...]
    """One a step: the mean of the lanes, by their weights."""
    seconds: float
    result: Result


def run_reference(
    spec: Spec,
    data: Tokens,
    out: Path,
    on_step: OnStep | None = None,
    given: Path | None = None,
    included: Mapping[int, Sequence[int]] | None = None,
) -> Reference:
    """Run the whole job and write `roots.json` and the model directory under `out`.

    One process plays all lanes, one after the other. `given` is the Hugging Face directory that a
    job goes on from, read by transformers itself. `included` names the lanes of a `diloco` round
    that entered its outer step, where that were not all. SegmentFault when a loss or a gradient is
    not finite, as in the engine. OSError when `out` cannot be written. FileError when `given` is
    missing or holds no such model.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    play = _Play(spec, data, given, on_step)
    boundaries = [play.roots(spec.first_step)]
    for number in range(spec.training_rounds):
        if spec.is_diloco:
            lanes = (included or {}).get(number, range(spec.lanes))
            boundaries.append(play.apart(number))
            play.meet(number, tuple(lanes))
        else:
            for step in range(spec.boundary_step(number), spec.boundary_step(number + 1)):
                play.together(step)
            boundaries.append(play.roots(spec.boundary_step(number + 1)))
    if spec.is_diloco:
        boundaries.append(play.roots(spec.train.steps))
    seconds = time.perf_counter() - began
    tensors = [
        TensorData(name, DTYPES[value.dtype], tuple(value.shape), tensor_bytes(value))
        for group in play.groups
        for name, value in group.model
    ]
    result = write_result(spec, tensors, out / MODEL_DIRECTORY)
    told = tuple(tuple(losses) for losses in play.losses)
    means = tuple(_weighted(losses, spec) for losses in zip(*told, strict=True))
    found = Reference(tuple(boundaries), told, means, seconds, result)
    _write_roots(spec, found, out / ROOTS_FILE)
    return found


def _weighted(losses: Sequence[float], spec: Spec) -> float:
    if len(losses) == 1:
        return losses[0]
    pairs = zip(losses, spec.lane_weights, strict=True)
    return sum(loss * weight for loss, weight in pairs) / sum(spec.lane_weights)


class _Play:
    """The whole model, and what each lane keeps for itself."""

    def __init__(
        self, spec: Spec, data: Tokens, given: Path | None, on_step: OnStep | None
    ) -> None:
        self.spec, self.data, self.on_step = spec, data, on_step
        self.model = whole_model(spec)
        fill(self.model, spec, given)
        self.tied = untie(self.model) if spec.model.tied(spec.config) else None
        mark_cuts(self.model, spec)
        self.groups = make_groups(self.model, spec, self.tied)
        self.private = [[new_private(group, spec) for group in self.groups]]
        # Lanes that meet at every step have equal moments: one copy plays for all.
        for _ in range(spec.lanes - 1 if spec.is_diloco else 0):
            self.private.append([new_private(group, spec) for group in self.groups])
        if spec.goes_on:
            assert given is not None  # else `fill` had said so
            take_moments(given, self.groups, self.private)
        self.losses: list[list[float]] = [[] for _ in range(spec.lanes)]
        self._contributions: list[list[Contribution]] = []

    def roots(self, step: int) -> BoundaryRoots:
        """The roots of every slot's state after `step` steps."""
        found: BoundaryRoots = {}
        for lane in range(self.spec.lanes):
            private = self.private[lane if self.spec.is_diloco else 0]
            for stage, (group, own) in enumerate(zip(self.groups, private, strict=True)):
                shared = state_root(leaves_of("shared", "", group.shared))
                found[f"{lane}.{stage}"] = shared, state_root(own.leaves(group.names, step))
        return found

    def together(self, step: int) -> None:
        """One step of lanes that meet in it."""
        began = time.perf_counter()
        before = self._copy()
        told: list[list[list[torch.Tensor]]] = []
        buffers: list[list[list[torch.Tensor]]] = []
        for lane in range(self.spec.lanes):
            self._restore(before)
            told.append(self._gradients(lane, step))
            buffers.append([[one.clone() for one in group.floats] for group in self.groups])
        if self.spec.lanes > 1:
            for stage, group in enumerate(self.groups):
                self._meet_in_step(stage, group, told, buffers)
        norm = self._update(told[0], self.private[0], step)
        self._report(step, _weighted([own[-1] for own in self.losses], self.spec), norm, began)

    def _meet_in_step(
        self,
        stage: int,
        group: Group,
        told: list[list[list[torch.Tensor]]],
        buffers: list[list[list[torch.Tensor]]],
    ) -> None:
        """Put the mean of all lanes' gradients into those of lane 0, and that of the buffers into
        the model; its counters have seen the last lane's micro-batches."""
        spec, wire = self.spec, self.spec.pipeline.lanes.wire
        total = sum(spec.lane_weights)
        flats = [
            round_to_wire(torch.cat([one.reshape(-1) for one in lane[stage]]), wire)
            for lane in told
        ]
        mean = flats[0] * spec.lane_weights[0]
        for flat, weight in zip(flats[1:], spec.lane_weights[1:], strict=True):
            mean = mean + flat * weight
        mean = mean / total
        at = 0
        for gradient in told[0][stage]:
            gradient.copy_(mean[at : at + gradient.numel()].view(gradient.shape))
            at += gradient.numel()
        for number, value in enumerate(group.floats):
            mixed = buffers[0][stage][number] * spec.lane_weights[0]
            for lane in range(1, spec.lanes):
                mixed = mixed + buffers[lane][stage][number] * spec.lane_weights[lane]
            value.copy_(mixed / total)
        for _, value in group.statistics:
            if value.dtype == torch.int64:
                value.add_((total - spec.lane_weights[-1]) * spec.train.micro_batches)

    def apart(self, number: int) -> BoundaryRoots:
        """The steps of one segment in every lane by itself, and the roots at its end."""
        spec, before = self.spec, self._copy()
        self._contributions = []
        for lane, private in enumerate(self.private):
            self._restore(before)
            for step in range(spec.boundary_step(number), spec.boundary_step(number + 1)):
                began = time.perf_counter()
                norm = self._update(self._gradients(lane, step), private, step)
                self._report(step, self.losses[lane][-1], norm, began)
            self._contributions.append(
                [self._contribute(lane, stage, number, before) for stage in range(spec.stages)]
            )
        self._restore(before)
        return self.roots(spec.boundary_step(number + 1))

    def _contribute(
        self, lane: int, stage: int, number: int, before: Mapping[str, torch.Tensor]
    ) -> Contribution:
        group, private = self.groups[stage], self.private[lane][stage]
        pairs = zip(group.names, group.weights, strict=True)
        delta = torch.cat([(before[name] - weight.detach()).reshape(-1) for name, weight in pairs])
        fed = delta.add(private.flat, alpha=float(self.spec.outer.feedback))
        buffers = torch.cat([torch.zeros(0), *(value.reshape(-1) for value in group.floats)])
        place = Place(lane, stage, number)
        raw = encode_contribution(self.spec, place, fed.numpy(), buffers.numpy())
        found = decode_contribution(self.spec, place, raw)
        told = torch.zeros_like(fed)
        told[torch.from_numpy(found.places)] = torch.from_numpy(found.values)
        private.flat.copy_(fed - told)
        return found

    def meet(self, number: int, lanes: tuple[int, ...]) -> None:
        """The outer step with what `lanes` contributed to round `number`."""
        spec = self.spec
        steps = spec.boundary_step(number + 1) - spec.boundary_step(number)
        weights = [spec.lane_weights[lane] for lane in lanes]
        for stage, group in enumerate(self.groups):
            for lane in set(range(spec.lanes)) - set(lanes):
                own = self._contributions[lane][stage]
                kept = torch.zeros_like(self.private[lane][stage].flat)
                kept[torch.from_numpy(own.places)] = torch.from_numpy(own.values)
                self.private[lane][stage].flat.add_(kept)
            chosen = [self._contributions[lane][stage] for lane in lanes]
            mean, buffers = combine(chosen, weights, sum(w.numel() for w in group.weights))
            outer_step(group.weights, group.momenta, mean, spec.outer)
            at = 0
            for value in group.floats:
                values = torch.from_numpy(buffers[at : at + value.numel()])
                value.copy_(values.view(value.shape))
                at += value.numel()
            for _, value in group.statistics:
                if value.dtype == torch.int64:
                    value.add_(steps * spec.train.micro_batches * sum(weights))

    def _copy(self) -> dict[str, torch.Tensor]:
        """The model's values by name."""
        return {
            name: value.detach().clone() for group in self.groups for name, value in group.model
        }

    def _restore(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for group in self.groups:
                for name, value in group.model:
                    value.copy_(values[name])

    def _report(self, step: int, loss: float, norm: float, began: float) -> None:
        if self.on_step is not None:
            seconds = time.perf_counter() - began
            self.on_step(StepReport(step, loss, seconds, 0.0, 0.0, norm))

    def _gradients(self, lane: int, step: int) -> list[list[torch.Tensor]]:
        """The gradients of each stage over a lane's micro-batches of a step; notes its loss."""
        spec, data, batches = self.spec, self.data, self.spec.micro_batches(lane)
        total: torch.Tensor | None = None
        for micro_batch in range(batches):
            starts = [
                window_index(spec, lane, step, micro_batch, sequence)
                for sequence in range(spec.train.micro_batch_size)
            ]
            rows = [data.window(start, spec.window_bytes) for start in starts]
            loss = forward_loss(self.model, spec, rows, step)
            loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        mean = float(total / batches)
        if not math.isfinite(mean):
            raise SegmentFault("nonfinite", step, f"the loss is {mean}")
        self.losses[lane].append(mean)
        if self.tied is not None:
            entry, head = self.tied
            assert entry.grad is not None
            assert head.grad is not None
            entry.grad.add_(head.grad)
            head.grad = None
        found = []
        for group in self.groups:
            gradients = [
                torch.zeros(weight.shape) if weight.grad is None else weight.grad
                for weight in group.weights
            ]
            optimizer.average_gradients(gradients, batches)
            found.append(gradients)
            for weight in group.weights:
                weight.grad = None
        return found

    def _update(
        self, gradients: list[list[torch.Tensor]], private: Sequence[Private], step: int
    ) -> float:
        """Clip, optimize; the greatest gradient norm of a stage."""
        spec, largest = self.spec, 0.0
        for group, own, told in zip(self.groups, private, gradients, strict=True):
            norm = optimizer.gradient_norm(told)
            if not math.isfinite(norm):
                raise SegmentFault("nonfinite", step, f"the gradient norm is {norm}")
            if isinstance(spec.clip, StageClip):
                optimizer.clip_gradients(told, norm, float(spec.clip.norm))
            with torch.no_grad():
                optimizer.adamw_step(
                    group.weights, told, own.first, own.second, step_scalars(spec, step)
                )
            largest = max(largest, norm)
        return largest


def _write_roots(spec: Spec, found: Reference, path: Path) -> None:
    document = {
        "spec_id": spec_id(spec_bytes(spec)).hex(),
        "result_id": found.result.result_id.hex(),
        "losses": list(found.losses),
        "boundaries": [
            {slot: [root.hex() for root in roots] for slot, roots in boundary.items()}
            for boundary in found.boundaries
        ],
    }
    write_file(path, json.dumps(document, indent=1, sort_keys=True).encode("ascii"))
