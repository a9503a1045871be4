"""The reference: the same spec in one process on the unsplit model, with a loop of its own.

It shares data, wire rounding, optimizer and initial draw with the engine; never the cut, the runner
or the channel. Its roots and its exported model are what an honest job must equal, bit for bit, on
one class of machine.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tdmld.files import write_file
from tdmld.train import optimizer
from tdmld.train.data import Tokens, window_index
from tdmld.train.digest import Leaf, digest, state_root
from tdmld.train.draw import draw_weight
from tdmld.train.errors import SegmentFault
from tdmld.train.export import Result, write_result
from tdmld.train.model import hugging_face_config, token_loss, whole_model
from tdmld.train.schedule import step_scalars
from tdmld.train.segment import OnStep, StepReport
from tdmld.train.spec import Spec, StageClip, spec_bytes, spec_id
from tdmld.train.statefile import TensorData
from tdmld.train.wire import round_to_wire, tensor_bytes

ROOTS_FILE = "roots.json"
MODEL_DIRECTORY = "model"
BoundaryRoots = dict[str, tuple[bytes, bytes]]
"""Slot "lane.stage" -> (shared root, lane root) at one boundary."""


@dataclass(frozen=True)
class Reference:
    """What the reference found: roots of boundaries 0 to rounds, one loss a step, the model."""

    boundaries: tuple[BoundaryRoots, ...]
    losses: tuple[float, ...]
    seconds: float
    result: Result


class _Wire(torch.autograd.Function):
    """What crossing a cut does to a boundary tensor and to its gradient."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, wire: str) -> torch.Tensor:
        context.wire = wire
        return round_to_wire(tensor, wire)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return round_to_wire(gradients[0], context.wire), None


@dataclass(frozen=True)
class _Group:
    """The parameters that one stage of the job owns, by name."""

    names: tuple[str, ...]
    weights: tuple[nn.Parameter, ...]
    first: tuple[torch.Tensor, ...]
    second: tuple[torch.Tensor, ...]


def run_reference(spec: Spec, data: Tokens, out: Path, on_step: OnStep | None = None) -> Reference:
    """Run the whole job and write `roots.json` and the model directory under `out`.

    SegmentFault when a loss or a gradient is not finite, as in the engine. OSError when `out`
    cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model = whole_model(hugging_face_config(spec))
    _mark_cuts(model, spec)
    groups = _groups(model, spec)
    boundaries, losses = [_roots(groups, 0)], []
    for step in range(spec.train.steps):
        before = time.perf_counter()
        loss, norm = _step(model, groups, spec, data, step)
        losses.append(loss)
        if on_step is not None:
            on_step(StepReport(step, loss, time.perf_counter() - before, 0.0, 0.0, norm))
        if (step + 1) % spec.pipeline.segment_steps == 0:
            boundaries.append(_roots(groups, step + 1))
    seconds = time.perf_counter() - began
    named = zip(
        (name for group in groups for name in group.names),
        (weight for group in groups for weight in group.weights),
        strict=True,
    )
    tensors = [
        TensorData(name, "F32", tuple(weight.shape), tensor_bytes(weight)) for name, weight in named
    ]
    result = write_result(spec, tensors, out / MODEL_DIRECTORY)
    found = Reference(tuple(boundaries), tuple(losses), seconds, result)
    _write_roots(spec, found, out / ROOTS_FILE)
    return found


def _mark_cuts(model: nn.Module, spec: Spec) -> None:
    """Round what passes the inner layer borders, both ways."""
    layers = cast(Any, model).model.layers

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_Wire.apply(output[0], spec.train.wire), *output[1:])  # type: ignore[no-untyped-call]
        return _Wire.apply(output, spec.train.wire)  # type: ignore[no-untyped-call]

    for cut in spec.pipeline.cuts[1:-1]:
        layers[cut - 1].register_forward_hook(hook)


def _stage_of(name: str, spec: Spec) -> int:
    """The stage that owns a parameter, from its name alone."""
    words = name.split(".")
    if "layers" in words:
        layer = int(words[words.index("layers") + 1])
        return sum(layer >= cut for cut in spec.pipeline.cuts[1:-1])
    return 0 if "embed_tokens" in words else spec.stages - 1


def _groups(model: nn.Module, spec: Spec) -> list[_Group]:
    parameters = dict(model.named_parameters())
    drawn = {weight.name: weight for weight in spec.model.weights(spec.config, 0, _depth(spec))}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(draw_weight(spec, drawn[name])))
    groups = []
    for stage in range(spec.stages):
        names = tuple(sorted(name for name in parameters if _stage_of(name, spec) == stage))
        weights = tuple(parameters[name] for name in names)
        first, second = (tuple(torch.zeros(weight.shape) for weight in weights) for _ in range(2))
        groups.append(_Group(names, weights, first, second))
    return groups


def _depth(spec: Spec) -> int:
    return spec.pipeline.cuts[-1]


def _step(
    model: nn.Module, groups: Sequence[_Group], spec: Spec, data: Tokens, step: int
) -> tuple[float, float]:
    """One optimizer step; (loss, largest gradient norm of a stage)."""
    total: torch.Tensor | None = None
    length = spec.data.sequence
    for micro_batch in range(spec.train.micro_batches):
        starts = [
            window_index(spec, 0, step, micro_batch, sequence)
            for sequence in range(spec.train.micro_batch_size)
        ]
        rows = [list(data.window(start, length + 1)) for start in starts]
        tokens = torch.tensor(rows, dtype=torch.long)
        logits = model(input_ids=tokens[:, :-1].contiguous(), use_cache=False).logits
        loss = token_loss(logits, tokens[:, 1:].contiguous())
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    mean = float(total / spec.train.micro_batches)
    largest = 0.0
    for group in groups:
        gradients = [weight.grad for weight in group.weights if weight.grad is not None]
        optimizer.average_gradients(gradients, spec.train.micro_batches)
        norm = optimizer.gradient_norm(gradients)
        if not math.isfinite(norm) or not math.isfinite(mean):
            raise SegmentFault("nonfinite", step, f"loss {mean}, gradient norm {norm}")
        if isinstance(spec.clip, StageClip):
            optimizer.clip_gradients(gradients, norm, float(spec.clip.norm))
        with torch.no_grad():
            optimizer.adamw_step(
                group.weights, gradients, group.first, group.second, step_scalars(spec, step)
            )
        largest = max(largest, norm)
    for group in groups:
        for weight in group.weights:
            weight.grad = None
    return mean, largest


def _roots(groups: Sequence[_Group], step: int) -> BoundaryRoots:
    """The roots of every slot's state after `step` steps."""
    found: BoundaryRoots = {}
    for stage, group in enumerate(groups):
        shared = _leaves("shared", "", group.names, group.weights)
        lane = [
            *_leaves("lane", "exp_avg.", group.names, group.first),
            *_leaves("lane", "exp_avg_sq.", group.names, group.second),
            Leaf("step", "lane", "I64", (), digest(step.to_bytes(8, "little"))),
        ]
        found[f"0.{stage}"] = (state_root(shared), state_root(lane))
    return found


def _leaves(
    part: str, prefix: str, names: Sequence[str], tensors: Sequence[torch.Tensor]
) -> list[Leaf]:
    return [
        Leaf(prefix + name, part, "F32", tuple(tensor.shape), digest(tensor_bytes(tensor)))
        for name, tensor in zip(names, tensors, strict=True)
    ]


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
