"""What a slot needs, against what it takes."""

from typing import Any

import pytest

from tdmld.train.families import FAMILIES
from tdmld.train.spec import Spec
from tests.train.support import FAMILY_CONFIGS, family_spec

WIDER = {
    "hidden_size": 128,
    "n_embd": 128,
    "num_attention_heads": 4,
    "n_head": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "intermediate_size": 352,
    "moe_intermediate_size": 64,
    "head_dim": 64,
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
}


def wide_spec(family: str) -> Spec:
    """Three stages of a model that is large enough for proportions to show."""
    small = FAMILY_CONFIGS[family]
    config = small | {key: value for key, value in WIDER.items() if key in small}
    more = {} if family == "resnet" else {"data__sequence": 64}
    canonical = FAMILIES[family].canonical(config)
    return family_spec(family, 3, config=canonical, train__micro_batch_size=4, **more)


def kept_bytes(spec: Spec, stage: int) -> int:
    """Bytes that autograd keeps of one micro-batch, measured."""
    import torch

    from tdmld.train.model import StageModule, mean_cross_entropy

    module = StageModule(spec, stage)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return mean_cross_entropy(logits, torch.zeros(logits.shape[:-1], dtype=torch.long))

    value: Any
    if not spec.has_input(stage):
        value = torch.randn(spec.boundary(stage, "up")).requires_grad_(True)
    elif spec.model.images:
        value = torch.randn(4, 1, 16, 16)
    else:
        value = torch.randint(0, 256, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = [module(value)]
        if spec.has_loss(stage) and spec.is_ring:
            found.append(loss(module.head(torch.randn(found[0].shape).requires_grad_(True))))
        elif spec.has_loss(stage):
            found.append(loss(found[0]))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_estimate_of_activations_errs_upwards_and_not_by_much(family: str) -> None:
    spec = wide_spec(family)
    for stage in range(3):
        found = spec.model.activation_bytes(
            spec.config, spec.part(stage), spec.train.micro_batch_size, spec.data.sequence
        )
        real = kept_bytes(spec, stage)
        assert real <= found <= 3 * real
