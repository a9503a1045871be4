"""The reference: the same spec in one process on the unsplit model, with a loop of its own.

It shares data, wire rounding, optimizer and initial draw with the engine; never the cut, the runner
or the channel. Its roots and its exported model are what an honest job must equal, bit for bit, on
one class of machine.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from tdmld.files import write_file
from tdmld.train import optimizer
from tdmld.train.data import Tokens, window_index
from tdmld.train.digest import Leaf, digest, state_root
from tdmld.train.draw import draw_weight
from tdmld.train.errors import FileError, SegmentFault
from tdmld.train.evaluate import load_model
from tdmld.train.export import Result, write_result
from tdmld.train.model import arithmetic, mean_cross_entropy, pixel_values, whole_model
from tdmld.train.schedule import step_scalars
from tdmld.train.segment import OnStep, StepReport
from tdmld.train.spec import Spec, spec_bytes, spec_id
from tdmld.train.specfields import GivenInit, StageClip
from tdmld.train.statefile import TensorData
from tdmld.train.wire import round_to_wire, tensor_bytes

_NAMES = {torch.float32: "F32", torch.int64: "I64"}
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
    """The parameters that one stage of the job owns, by name, and its running statistics."""

    names: tuple[str, ...]
    weights: tuple[nn.Parameter, ...]
    first: tuple[torch.Tensor, ...]
    second: tuple[torch.Tensor, ...]
    statistics: tuple[tuple[str, torch.Tensor], ...]

    @property
    def shared(self) -> list[tuple[str, torch.Tensor]]:
        """The shared part of the stage's state."""
        return [*zip(self.names, self.weights, strict=True), *self.statistics]


def run_reference(
    spec: Spec,
    data: Tokens,
    out: Path,
    on_step: OnStep | None = None,
    given: Path | None = None,
) -> Reference:
    """Run the whole job and write `roots.json` and the model directory under `out`.

    `given` is the Hugging Face directory that a job goes on from, read by transformers itself.
    SegmentFault when a loss or a gradient is not finite, as in the engine. OSError when `out`
    cannot be written. FileError when `given` is missing or holds no such model.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model = whole_model(spec)
    _fill(model, spec, given)
    tied = _untie(model) if spec.model.tied(spec.config) else None
    _mark_cuts(model, spec)
    groups = _groups(model, spec, tied)
    boundaries, losses = [_roots(groups, 0)], []
    for step in range(spec.train.steps):
        before = time.perf_counter()
        loss, norm = _step(model, groups, tied, spec, data, step)
        losses.append(loss)
        if on_step is not None:
            on_step(StepReport(step, loss, time.perf_counter() - before, 0.0, 0.0, norm))
        if (step + 1) % spec.pipeline.segment_steps == 0:
            boundaries.append(_roots(groups, step + 1))
    seconds = time.perf_counter() - began
    tensors = [
        TensorData(name, _NAMES[value.dtype], tuple(value.shape), tensor_bytes(value))
        for group in groups
        for name, value in group.shared
    ]
    result = write_result(spec, tensors, out / MODEL_DIRECTORY)
    found = Reference(tuple(boundaries), tuple(losses), seconds, result)
    _write_roots(spec, found, out / ROOTS_FILE)
    return found


def _layers(model: nn.Module, spec: Spec) -> list[nn.Module]:
    """The layers that can be cut apart, in order."""
    if spec.model.images:
        stages = cast(Any, model).resnet.encoder.stages
        return [block for stage in stages for block in stage.layers]
    base = cast(Any, model).base_model
    return list(base.h if hasattr(base, "h") else base.layers)


def _mark_cuts(model: nn.Module, spec: Spec) -> None:
    """Round what passes the borders of the cut, both ways."""
    layers = _layers(model, spec)
    for stage in range(spec.link_count):
        wire = spec.wire(stage, "down")

        def leaving(_: nn.Module, __: Any, output: Any, wire: str = wire) -> Any:
            if isinstance(output, tuple):
                return (_Wire.apply(output[0], wire), *output[1:])  # type: ignore[no-untyped-call]
            return _Wire.apply(output, wire)  # type: ignore[no-untyped-call]

        def entering(_: nn.Module, inputs: Any, wire: str = wire) -> Any:
            return (_Wire.apply(inputs[0], wire), *inputs[1:])  # type: ignore[no-untyped-call]

        border = spec.pipeline.cuts[stage + 1]
        if border:
            layers[border - 1].register_forward_hook(leaving)
        else:
            layers[0].register_forward_pre_hook(entering)


def _stage_of(name: str, spec: Spec, layers: dict[str, int]) -> int:
    """The stage that owns a tensor, from its name alone."""
    layer = next((at for prefix, at in layers.items() if name.startswith(prefix)), None)
    if layer is not None:
        return sum(layer >= cut for cut in spec.pipeline.cuts[1:-1])
    starts = any(word in name for word in ("embed_tokens", "embed_in", "wte", "wpe", "embedder"))
    return 0 if starts or spec.is_ring else spec.stages - 1


def _fill(model: nn.Module, spec: Spec, given: Path | None) -> None:
    """The values to begin with: drawn, or those of a Hugging Face directory."""
    if isinstance(spec.init, GivenInit):
        if given is None:
            raise FileError("the job goes on from given weights; name their directory")
        values = cast(nn.Module, load_model(given)).state_dict()
        model.load_state_dict(values)
        return
    family, whole = spec.model, spec.whole
    drawn = (*family.weights(spec.config, whole), *family.buffers(spec.config, whole))
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for weight in drawn:
            values[weight.name].copy_(torch.from_numpy(draw_weight(spec, weight)))


def _untie(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Give a tied head a parameter of its own over the embedding's memory; (embedding, head).

    The program sums their gradients apart over the micro-batches and adds them once.
    """
    entry, head = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
    assert head.weight is entry.weight
    head.weight = nn.Parameter(entry.weight.data)
    return entry.weight, head.weight


def _groups(
    model: nn.Module, spec: Spec, tied: tuple[nn.Parameter, nn.Parameter] | None
) -> list[_Group]:
    parameters = {
        name: value
        for name, value in model.named_parameters()
        if tied is None or value is not tied[1]
    }
    kept = model.state_dict()
    statistics = {name: value for name, value in model.named_buffers() if name in kept}
    by_module = {module: name for name, module in model.named_modules()}
    layers = {f"{by_module[layer]}.": at for at, layer in enumerate(_layers(model, spec))}
    groups = []
    for stage in range(spec.stages):
        names, other = (
            tuple(sorted(name for name in every if _stage_of(name, spec, layers) == stage))
            for every in (parameters, statistics)
        )
        weights = tuple(parameters[name] for name in names)
        first, second = (tuple(torch.zeros(weight.shape) for weight in weights) for _ in range(2))
        own = tuple((name, statistics[name]) for name in other)
        groups.append(_Group(names, weights, first, second, own))
    return groups


def _forward(model: nn.Module, spec: Spec, rows: list[bytes], step: int) -> torch.Tensor:
    """The loss of one micro-batch."""
    if spec.model.images:
        raw = torch.tensor([list(row[1:]) for row in rows], dtype=torch.uint8)
        pixels = pixel_values(raw, int(str(spec.config["num_channels"])))
        labels = torch.tensor([row[0] for row in rows])
        with arithmetic(spec.train.precision, pixels.device):
            answers = model(pixel_values=pixels).logits
        return mean_cross_entropy(answers.to(torch.float32), labels)
    numbers = np.frombuffer(b"".join(rows), dtype=f"<u{spec.data.width}").astype(np.int64)
    tokens = torch.from_numpy(numbers).view(len(rows), -1)
    if (most := int(tokens.max())) >= int(str(spec.config["vocab_size"])):
        raise SegmentFault("token", step, f"the data have a token {most}")
    with arithmetic(spec.train.precision, tokens.device):
        logits = model(input_ids=tokens[:, :-1].contiguous(), use_cache=False).logits
    return mean_cross_entropy(logits.to(torch.float32), tokens[:, 1:].contiguous())


def _step(
    model: nn.Module,
    groups: Sequence[_Group],
    tied: tuple[nn.Parameter, nn.Parameter] | None,
    spec: Spec,
    data: Tokens,
    step: int,
) -> tuple[float, float]:
    """One optimizer step; (loss, largest gradient norm of a stage)."""
    total: torch.Tensor | None = None
    for micro_batch in range(spec.train.micro_batches):
        starts = [
            window_index(spec, 0, step, micro_batch, sequence)
            for sequence in range(spec.train.micro_batch_size)
        ]
        rows = [data.window(start, spec.window_bytes) for start in starts]
        loss = _forward(model, spec, rows, step)
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    mean = float(total / spec.train.micro_batches)
    if tied is not None:
        assert tied[0].grad is not None
        assert tied[1].grad is not None
        tied[0].grad.add_(tied[1].grad)
        tied[1].grad = None
    largest = 0.0
    for group in groups:
        gradients = [
            torch.zeros(weight.shape) if weight.grad is None else weight.grad
            for weight in group.weights
        ]
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
        lane = [
            *_leaves("lane", "exp_avg.", zip(group.names, group.first, strict=True)),
            *_leaves("lane", "exp_avg_sq.", zip(group.names, group.second, strict=True)),
            Leaf("step", "lane", "I64", (), digest(step.to_bytes(8, "little"))),
        ]
        found[f"0.{stage}"] = (state_root(_leaves("shared", "", group.shared)), state_root(lane))
    return found


def _leaves(part: str, prefix: str, named: Iterable[tuple[str, torch.Tensor]]) -> list[Leaf]:
    return [
        Leaf(
            prefix + name,
            part,
            _NAMES[tensor.dtype],
            tuple(tensor.shape),
            digest(tensor_bytes(tensor)),
        )
        for name, tensor in named
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
