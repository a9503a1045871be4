"""Cutting a Hugging Face model between its layers.

The family's own module is built on the meta device, its list of layers replaced by the slot's
slice, and what other slots own by a pass-through; its own forward makes masks and positions, so
nothing is re-implemented. Only the slot's weights ever have memory. Parameters keep the names
that they have in the whole model.
"""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
from transformers.configuration_utils import PreTrainedConfig

from tdmld.train.device import CPU
from tdmld.train.errors import SpecError
from tdmld.train.family import Part, number
from tdmld.train.numerics import ATTENTION, EXPERTS
from tdmld.train.spec import Spec

_LAYER_LISTS = ("layers", "h")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_POSITIONS = "wpe"
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_DTYPES = {"F32": torch.float32, "I64": torch.int64}


class _Pass(nn.Module):
    """Stands where another slot owns the part."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value


class _NoPositions(nn.Module):
    """Stands for a table of positions: adding -0.0 changes no value's bits."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.full((1,), -0.0, device=positions.device)


def hugging_face_config(spec: Spec) -> PreTrainedConfig:
    """The transformers config of the whole model."""
    values = spec.model.hugging_face(spec.config)
    kind = values.pop("model_type")
    return AutoConfig.for_model(kind, **values)


def whole_model(spec: Spec) -> nn.Module:
    """The whole model, its parameters on the current default device.

    A decoder is in evaluation mode (no dropout), a classifier in training mode (its batch norms
    look at the batch).
    """
    config = hugging_face_config(spec)
    if spec.model.images:
        pictures = AutoModelForImageClassification.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        return cast(nn.Module, pictures).train()
    more = {"experts_implementation": EXPERTS} if hasattr(config, "num_experts") else {}
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=ATTENTION, dtype=torch.float32, **more
    )
    return cast(nn.Module, model).eval()


def arithmetic(precision: str, device: torch.device) -> torch.autocast:
    """The rounding of a forward pass; backward passes follow it.

    bf16: products of matrices take bfloat16 operands. No rounded copy of a weight is kept for a
    second use: whether there is one must not depend on how the model is cut.
    """
    mixed = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)


def _recompute(layer: nn.Module) -> None:
    """Keep the layer's inputs alone, and run it again for its backward pass."""
    forward = layer.forward

    def again(*inputs: Any, **options: Any) -> Any:
        return checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options
        )

    layer.forward = again


class StageModule(nn.Module):
    """What a slot holds of the model.

    What it computes is rounded as the spec's precision says; what it takes and gives is float32.
    `forward` takes token ids (batch, sequence) or pixels (batch, channels, side, side) in the first
    slot and boundary tensors in the others; it gives logits in the last slot of a line and boundary
    tensors otherwise, float32. `head` makes logits of boundary tensors in the first slot of a ring.
    `weights` maps whole-model names, sorted, to parameters without values, `statistics` likewise
    what no optimizer changes; `tied` is the pair of parameters that share one weight, if any:
    their gradients are summed apart over the micro-batches and added once, whatever order of
    micro-batches a schedule has. That is part of the program.
    """

    def __init__(self, spec: Spec, stage: int, device: torch.device = CPU) -> None:
        super().__init__()
        self.precision = spec.train.precision
        part = spec.part(stage)
        rings = spec.is_ring and part.head
        ends = Part(spec.whole.last, spec.whole.last, False, True)
        own = Part(part.first, part.last, part.entry, part.head and not rings)
        self.body = _cut(spec, own, device)
        self.end = _cut(spec, ends, device) if rings else None
        self.weights: dict[str, nn.Parameter] = {}
        self.statistics: dict[str, torch.Tensor] = {}
        found = [*self.body.own(), *(self.end.own() if self.end is not None else ())]
        by_name = {name: (owner, leaf) for name, owner, leaf in found}
        shapes = {
            name: tuple(getattr(owner, leaf).shape) for name, (owner, leaf) in by_name.items()
        }
        expected = spec.shared(stage)
        if shapes != {weight.name: weight.shape for weight in expected}:
            raise SpecError(
                "family",
                f"the parameters of {spec.family} differ from transformers' own",
                "use the pinned version of transformers",
            )
        for weight in expected:
            owner, leaf = by_name[weight.name]
            value = torch.zeros(weight.shape, dtype=_DTYPES[weight.dtype], device=device)
            if leaf in owner._buffers:
                owner._buffers[leaf] = self.statistics[weight.name] = value
            else:
                parameter = nn.Parameter(value)
                setattr(owner, leaf, parameter)
                self.weights[weight.name] = parameter
        self.tied = self._tie(spec, part)

    def _tie(self, spec: Spec, part: Part) -> tuple[nn.Parameter, nn.Parameter] | None:
        if not (part.head and spec.model.tied(spec.config)):
            return None
        entry = cast(Any, self.body).model.get_input_embeddings()
        head = cast(Any, self.end if self.end is not None else self.body).model
        head.get_output_embeddings().weight = second = nn.Parameter(entry.weight.data)
        return entry.weight, second

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """See the class."""
        with arithmetic(self.precision, value.device):
            return cast(torch.Tensor, self.body(value)).to(torch.float32)

    def head(self, value: torch.Tensor) -> torch.Tensor:
        """See the class."""
        assert self.end is not None
        with arithmetic(self.precision, value.device):
            return cast(torch.Tensor, self.end(value)).to(torch.float32)


Owned = tuple[str, nn.Module, str]
"""A weight's or buffer's name in the whole model, the module that has it, its name there."""


class _Decoder(nn.Module):
    """Layers of a decoder, with the ends that belong to the part."""

    def __init__(self, spec: Spec, part: Part, device: torch.device) -> None:
        super().__init__()
        self.part = part
        with torch.device("meta"):
            model = cast(Any, whole_model(spec))
        config = copy.deepcopy(model.config)
        base = model.base_model
        self.list_name = _attribute(base, _LAYER_LISTS)
        layers = list(getattr(base, self.list_name))[part.first : part.last]
        setattr(base, self.list_name, nn.ModuleList(layers))
        if spec.train.recompute:
            for layer in layers:
                _recompute(layer)
        for owner in (model.config, base.config):
            if getattr(owner, "layer_types", None):
                owner.layer_types = list(config.layer_types[part.first : part.last])
        if not part.entry:
            setattr(base, _attribute(base, _EMBEDDINGS), _Pass())
            if hasattr(base, _POSITIONS):
                setattr(base, _POSITIONS, _NoPositions())
        if not part.head:
            setattr(base, _attribute(base, _NORMS), _Pass())
            model.lm_head = _Pass()
        _fill_buffers(model, config, device)
        self.model = model

    def own(self) -> Iterator[Owned]:
        """The parameters of the part; a tied head's is the embedding's."""
        prefix = f"{self.model.base_model_prefix}.{self.list_name}."
        tied = self.model.config.tie_word_embeddings
        for name, _ in self.model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if tied and name == "lm_head.weight":
                continue
            whole = name
            if name.startswith(prefix):
                index, _, rest = name[len(prefix) :].partition(".")
                whole = f"{prefix}{int(index) + self.part.first}.{rest}"
            yield whole, self.model.get_submodule(owner), leaf

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        key = "input_ids" if self.part.entry else "inputs_embeds"
        inputs = {key: value, "use_cache": False}
        if self.part.head:
            return cast(torch.Tensor, self.model(**inputs).logits)
        return cast(torch.Tensor, self.model.base_model(**inputs).last_hidden_state)


class _Classifier(nn.Module):
    """Blocks of a residual network, with the ends that belong to the part."""

    def __init__(self, spec: Spec, part: Part) -> None:
        super().__init__()
        with torch.device("meta"):
            model = cast(Any, whole_model(spec))
        blocks = [
            (f"resnet.encoder.stages.{stage}.layers.{place}", block)
            for stage, stage_module in enumerate(model.resnet.encoder.stages)
            for place, block in enumerate(stage_module.layers)
        ]
        named = blocks[part.first : part.last]
        if part.entry:
            named.insert(0, ("resnet.embedder", model.resnet.embedder))
        if part.head:
            named.append(("resnet.pooler", model.resnet.pooler))
            named.append(("classifier", model.classifier))
        self.names = [name for name, _ in named]
        self.pieces = nn.ModuleList(piece for _, piece in named)

    def own(self) -> Iterator[Owned]:
        """The parameters and running statistics of the part."""
        for prefix, piece in zip(self.names, self.pieces, strict=True):
            for name, _ in (*piece.named_parameters(), *piece.named_buffers()):
                owner, _, leaf = name.rpartition(".")
                yield f"{prefix}.{name}", piece.get_submodule(owner), leaf

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for piece in self.pieces:
            value = piece(value)
        return value


def _cut(spec: Spec, part: Part, device: torch.device = CPU) -> _Decoder | _Classifier:
    return _Classifier(spec, part) if spec.model.images else _Decoder(spec, part, device)


def loose_part(spec: Spec, part: Part) -> nn.Module:
    """A part by itself with weights of no meaning, for measuring; a tied head has its own copy."""
    found = _cut(spec, part)
    for _, owner, leaf in list(found.own()):
        if leaf in owner._buffers:
            empty = cast(torch.Tensor, owner._buffers[leaf])
            owner._buffers[leaf] = torch.ones(empty.shape, dtype=empty.dtype)
        else:
            shape = cast(torch.Tensor, getattr(owner, leaf)).shape
            setattr(owner, leaf, nn.Parameter(torch.randn(shape) * 0.02))
    head = None if spec.model.images else cast(Any, found).model.get_output_embeddings()
    if part.head and head is not None and head.weight.is_meta:
        head.weight = nn.Parameter(torch.randn(head.weight.shape) * 0.02)
    return found


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a label: of (..., classes) logits and (...) labels."""
    flat = logits.reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, labels.reshape(-1))


_WIDTHS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def vocabulary(spec: Spec) -> int:
    """Number of tokens that the model knows; for families that read text."""
    return number(spec.config, "vocab_size")


def token_rows(raw: bytes | bytearray, spec: Spec) -> torch.Tensor:
    """Windows as they lie in the data, one behind another, as int64 (windows, sequence + 1)."""
    numbers = torch.frombuffer(bytearray(raw), dtype=_WIDTHS[spec.data.width])
    return numbers.view(-1, spec.data.sequence + 1).to(torch.int64)


def pixel_values(raw: torch.Tensor, channels: int) -> torch.Tensor:
    """Pictures (batch, channels, side, side) of uint8 pixels (batch, bytes): byte / 128 - 1,
    which is exact."""
    side = round((raw.shape[1] / channels) ** 0.5)
    return raw.to(torch.float32).div_(128).sub_(1).view(-1, channels, side, side)


def _attribute(base: nn.Module, names: tuple[str, ...]) -> str:
    found = next((name for name in names if hasattr(base, name)), None)
    if found is None:
        raise SpecError("family", f"none of {names} in the model", "the family cannot be cut yet")
    return found


def _fill_buffers(model: nn.Module, config: PreTrainedConfig, device: torch.device) -> None:
    """Compute what meta left empty: rotary tables, from the whole model's config, and the scale of
    an embedding. The CPU computes them, wherever they go."""
    for name, module in list(model.named_modules()):
        empty = [key for key, value in module.named_buffers(recurse=False) if value.is_meta]
        if not empty:
            continue
        if empty == ["embed_scale"]:
            scale = torch.tensor(cast(Any, module).scalar_embed_scale)
            module.register_buffer("embed_scale", scale.to(device), persistent=False)
            continue
        if "Rotary" not in type(module).__name__:
            raise SpecError("family", f"buffer of {name} is unknown", "the family cannot be cut")
        fresh = cast(Any, type(module))(config=config)
        for key, value in fresh.named_buffers(recurse=False):
            module.register_buffer(key, value.to(device), persistent=False)
        for key, value in vars(fresh).items():
            if isinstance(value, torch.Tensor):
                setattr(module, key, value.to(device))
