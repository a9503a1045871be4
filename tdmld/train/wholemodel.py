"""The unsplit model of the reference: its values, its cuts, and who owns what of it.

Shared with the engine are the model's initial draw and the rounding of its wires; never the cut.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from tdmld.train.digest import Leaf, digest
from tdmld.train.draw import draw_weight
from tdmld.train.errors import FileError, SegmentFault
from tdmld.train.evaluate import load_model
from tdmld.train.model import arithmetic, mean_cross_entropy, pixel_values
from tdmld.train.spec import Spec
from tdmld.train.specfields import GivenInit
from tdmld.train.wire import round_to_wire, tensor_bytes

DTYPES = {torch.float32: "F32", torch.int64: "I64"}
"""As safetensors spells them."""


class _Wire(torch.autograd.Function):
    """What crossing a cut does to a boundary tensor and to its gradient."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, wire: str) -> torch.Tensor:
        context.wire = wire
        return round_to_wire(tensor, wire)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return round_to_wire(gradients[0], context.wire), None


Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Group:
    """The parameters that one stage of the job owns, by name, and its running statistics."""

    names: tuple[str, ...]
    weights: tuple[nn.Parameter, ...]
    statistics: tuple[tuple[str, torch.Tensor], ...]
    momenta: Tensors
    """Of the outer step, in `diloco`."""

    @property
    def model(self) -> list[tuple[str, torch.Tensor]]:
        """What the stage owns of the model."""
        return [*zip(self.names, self.weights, strict=True), *self.statistics]

    @property
    def shared(self) -> list[tuple[str, torch.Tensor]]:
        """The shared part of the stage's state."""
        return [
            *self.model,
            *((f"outer.{n}", m) for n, m in zip(self.names, self.momenta, strict=False)),
        ]

    @property
    def floats(self) -> list[torch.Tensor]:
        """The running statistics without the counters."""
        return [value for _, value in self.statistics if value.dtype == torch.float32]


@dataclass(frozen=True)
class Private:
    """What one lane keeps of a stage for itself."""

    first: Tensors
    second: Tensors
    residual: Tensors
    """In `diloco`: the pieces of `flat`."""
    flat: torch.Tensor

    def leaves(self, names: Sequence[str], step: int) -> list[Leaf]:
        """The leaves of the lane part of the state after `step` steps."""
        return [
            *leaves_of("lane", "exp_avg.", zip(names, self.first, strict=True)),
            *leaves_of("lane", "exp_avg_sq.", zip(names, self.second, strict=True)),
            *leaves_of("lane", "residual.", zip(names, self.residual, strict=False)),
            Leaf("step", "lane", "I64", (), digest(step.to_bytes(8, "little"))),
        ]


def take_moments(
    given: Path, groups: Sequence[Group], private: Sequence[Sequence[Private]]
) -> None:
    """What a job goes on with beside the weights, read from a boundary's directory (`recut`)."""
    place = given / "moments"
    count = json.loads((place / "boundary.json").read_text())["lanes"]
    outer = place / "outer.safetensors"
    momenta = load_file(outer) if outer.exists() else {}
    for lane, owned in enumerate(private):
        values = load_file(place / f"{lane % count}.safetensors")
        for group, own in zip(groups, owned, strict=True):
            kinds = {"exp_avg": own.first, "exp_avg_sq": own.second}
            if lane < count:
                kinds["residual"] = own.residual
            for kind, tensors in kinds.items():
                for name, tensor in zip(group.names, tensors, strict=False):
                    if kind != "residual" or f"residual.{name}" in values:
                        tensor.copy_(values[f"{kind}.{name}"])
            for name, tensor in zip(group.names, group.momenta, strict=False):
                if momenta:
                    tensor.copy_(momenta[f"outer.{name}"])


def new_private(group: Group, spec: Spec) -> Private:
    """Zero moments and residual."""
    first, second = (tuple(torch.zeros(w.shape) for w in group.weights) for _ in range(2))
    sizes = [weight.numel() for weight in group.weights]
    flat = torch.zeros(sum(sizes) if spec.is_diloco else 0)
    pieces = torch.split(flat, sizes) if spec.is_diloco else ()
    residual = tuple(p.view(w.shape) for p, w in zip(pieces, group.weights, strict=False))
    return Private(first, second, residual, flat)


def _layers(model: nn.Module, spec: Spec) -> list[nn.Module]:
    """The layers that can be cut apart, in order."""
    if spec.model.images:
        stages = cast(Any, model).resnet.encoder.stages
        return [block for stage in stages for block in stage.layers]
    base = cast(Any, model).base_model
    return list(base.h if hasattr(base, "h") else base.layers)


def mark_cuts(model: nn.Module, spec: Spec) -> None:
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


def fill(model: nn.Module, spec: Spec, given: Path | None) -> None:
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


def untie(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Give a tied head a parameter of its own over the embedding's memory; (embedding, head).

    The program sums their gradients apart over the micro-batches and adds them once.
    """
    entry, head = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
    assert head.weight is entry.weight
    head.weight = nn.Parameter(entry.weight.data)
    return entry.weight, head.weight


def make_groups(
    model: nn.Module, spec: Spec, tied: tuple[nn.Parameter, nn.Parameter] | None
) -> list[Group]:
    """What each stage owns of the model; a tied head is not listed beside its embedding."""
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
        own = tuple((name, statistics[name]) for name in other)
        momenta = tuple(torch.zeros(w.shape) for w in weights) if spec.is_diloco else ()
        groups.append(Group(names, weights, own, momenta))
    return groups


def forward_loss(model: nn.Module, spec: Spec, rows: list[bytes], step: int) -> torch.Tensor:
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


def leaves_of(part: str, prefix: str, named: Iterable[tuple[str, torch.Tensor]]) -> list[Leaf]:
    """The leaves of named tensors in a part of a state."""
    return [
        Leaf(
            prefix + name,
            part,
            DTYPES[tensor.dtype],
            tuple(tensor.shape),
            digest(tensor_bytes(tensor)),
        )
        for name, tensor in named
    ]
