"""Cutting a Hugging Face model at its decoder layers.

The family's own module is built on the meta device, its list of layers replaced by the stage's
slice, and what other stages own by a pass-through; its own forward makes masks and positions, so
nothing is re-implemented. Only the stage's weights ever have memory. Parameters keep the names
that they have in the whole model.
"""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from tdmld.train.errors import SpecError
from tdmld.train.numerics import ATTENTION
from tdmld.train.spec import Spec

_LAYER_LISTS = ("layers", "h", "blocks")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


class _Pass(nn.Module):
    """Stands where another stage owns the part."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value


def hugging_face_config(spec: Spec) -> PreTrainedConfig:
    """The transformers config of the whole model."""
    values = spec.model.hugging_face(spec.config)
    kind = values.pop("model_type")
    return AutoConfig.for_model(kind, **values)


def whole_model(config: PreTrainedConfig) -> nn.Module:
    """The whole causal LM of a config, its parameters on the current default device."""
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=ATTENTION, dtype=torch.float32
    )
    model.eval()
    return cast(nn.Module, model)


class StageModule(nn.Module):
    """One stage of the model.

    `forward` takes token ids (batch, sequence) on the first stage and hidden states (batch,
    sequence, width) on the others, and gives logits on the last stage and hidden states on the
    others, float32. `weights` maps whole-model names, sorted, to parameters without values.
    """

    def __init__(self, spec: Spec, stage: int) -> None:
        super().__init__()
        self.is_first, self.is_last = spec.is_first(stage), spec.is_last(stage)
        first, last = spec.layers(stage)
        config = hugging_face_config(spec)
        with torch.device("meta"):
            model = cast(Any, whole_model(copy.deepcopy(config)))
        base = model.base_model
        list_name = _attribute(base, _LAYER_LISTS)
        layers = nn.ModuleList(list(getattr(base, list_name))[first:last])
        setattr(base, list_name, layers)
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    cast(Any, module).layer_idx = index
        for owner in (model.config, base.config):
            owner.num_hidden_layers = last - first
            if getattr(owner, "layer_types", None):
                owner.layer_types = list(config.layer_types[first:last])
        if not self.is_first:
            setattr(base, _attribute(base, _EMBEDDINGS), _Pass())
        if not self.is_last:
            setattr(base, _attribute(base, _NORMS), _Pass())
            model.lm_head = _Pass()
        _fill_buffers(model, config)
        prefix = f"{model.base_model_prefix}.{list_name}."
        self.model = model
        self.weights: dict[str, nn.Parameter] = {}
        named = {_whole_name(name, prefix, first): name for name, _ in model.named_parameters()}
        expected = spec.weights(stage)
        shapes = {whole: tuple(model.get_parameter(name).shape) for whole, name in named.items()}
        if shapes != {weight.name: weight.shape for weight in expected}:
            raise SpecError(
                "family",
                f"the parameters of {spec.family} differ from transformers' own",
                "use the pinned version of transformers",
            )
        for weight in expected:
            parameter = nn.Parameter(torch.zeros(weight.shape, dtype=torch.float32))
            owner_name, _, leaf = named[weight.name].rpartition(".")
            setattr(model.get_submodule(owner_name), leaf, parameter)
            self.weights[weight.name] = parameter

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """See the class."""
        inputs = {"input_ids" if self.is_first else "inputs_embeds": value, "use_cache": False}
        if self.is_last:
            return cast(torch.Tensor, self.model(**inputs).logits)
        return cast(torch.Tensor, self.model.base_model(**inputs).last_hidden_state)


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token of (batch, sequence, vocabulary) logits."""
    flat = logits.reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, labels.reshape(-1))


def _attribute(base: nn.Module, names: tuple[str, ...]) -> str:
    found = next((name for name in names if hasattr(base, name)), None)
    if found is None:
        raise SpecError("family", f"none of {names} in the model", "the family cannot be cut yet")
    return found


def _whole_name(name: str, prefix: str, first: int) -> str:
    if not name.startswith(prefix):
        return name
    index, _, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{int(index) + first}.{rest}"


def _fill_buffers(model: nn.Module, config: PreTrainedConfig) -> None:
    """Compute what meta left empty: rotary tables, from the whole model's config."""
    for name, module in list(model.named_modules()):
        empty = [key for key, value in module.named_buffers(recurse=False) if value.is_meta]
        if not empty:
            continue
        if "Rotary" not in type(module).__name__:
            raise SpecError("family", f"buffer of {name} is unknown", "the family cannot be cut")
        fresh = cast(Any, type(module))(config=config)
        for key, value in fresh.named_buffers(recurse=False):
            module.register_buffer(key, value, persistent=False)
        for key, value in vars(fresh).items():
            if isinstance(value, torch.Tensor):
                setattr(module, key, value)
