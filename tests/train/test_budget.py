"""What a slot needs, against what it takes."""

from typing import Any

import msgspec
import pytest

from tdmld.train.budget import (
    activation_memory,
    stage_disk,
    stage_memory,
    standby_disk,
    state_bytes,
)
from tdmld.train.families import FAMILIES
from tdmld.train.spec import Spec, stage_parameters
from tests.train.support import FAMILY_CONFIGS, family_spec, make_spec
from tests.train.test_spec import DILOCO, OUTER

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


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "qwen3_moe"])
def test_recomputing_keeps_as_little_as_is_estimated(family: str) -> None:
    kept = wide_spec(family)
    changed = msgspec.structs.replace(kept.train, recompute=True)
    spec = msgspec.structs.replace(kept, train=changed)
    for stage in range(3):
        found, once = activation_memory(spec, stage)
        real = kept_bytes(spec, stage)
        assert real <= found <= 3 * real
        assert once <= activation_memory(kept, stage)[0]
    assert kept_bytes(spec, 1) < kept_bytes(kept, 1) / 4


def test_rounded_weights_are_counted() -> None:
    exact = wide_spec("llama")
    spec = msgspec.structs.replace(
        exact, train=msgspec.structs.replace(exact.train, precision="bf16")
    )
    for stage in range(3):
        assert kept_bytes(spec, stage) <= activation_memory(spec, stage)[0]


def test_a_tokens_width_is_memory_and_disk() -> None:
    spec = wide_spec("llama")
    wide = msgspec.structs.replace(
        spec, data=msgspec.structs.replace(spec.data, tokenizer="tokens", width=4)
    )
    assert stage_memory(wide, 0) > stage_memory(spec, 0)


@pytest.mark.parametrize("lanes", [{"count": 1, "mode": "sync"}, DILOCO])
def test_disk_lasts_for_all_that_is_kept_until_a_copy_is_proven(lanes: dict[str, Any]) -> None:
    """The newest proven copy may lie 2R behind what is settled, and that D behind what is done."""
    ahead, every = 6, 2
    spec = make_spec(pipeline__lanes=lanes, pipeline__unsettled=ahead, pipeline__state_every=every)
    segments = ahead + 2 * every
    frames = spec.link_frames(0, 0, "down") * 2 * spec.link_frame_bytes(0, "down")
    told = spec.lanes * spec.contribution_bytes(0)
    assert stage_disk(spec, 0) >= (segments + 1) * (frames + told + state_bytes(spec, 0))
    copies = segments // every + 1
    slots = spec.lanes * sum(state_bytes(spec, stage) for stage in range(2))
    brought = spec.lanes * sum(spec.contribution_bytes(stage) for stage in range(2))
    assert standby_disk(spec) >= copies * (slots + brought)


@pytest.mark.parametrize(("density", "bits"), [(128, 2), (1024, 8), (4096, 2), (4096, 8)])
def test_an_outer_step_takes_no_more_than_is_estimated(density: int, bits: int) -> None:
    import tracemalloc

    import numpy as np

    from tdmld.train.compress import Place, decode_contribution, encode_contribution
    from tdmld.train.outer import combine

    config = make_spec().config | {"vocab_size": 1 << 14}
    outer = OUTER | {"density": density, "bits": bits}
    apart = make_spec(config=config, pipeline__lanes=DILOCO | {"count": 8, "outer": outer})
    values = stage_parameters(apart, 0)
    room = stage_memory(apart, 0) - stage_memory(make_spec(config=config), 0) - 8 * values
    delta = np.random.default_rng(1).standard_normal(values).astype(np.float32)
    tracemalloc.start()
    try:
        raw = encode_contribution(apart, Place(0, 0, 0), delta, np.zeros(0, np.float32))
        made = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        found = [decode_contribution(apart, Place(0, 0, 0), raw) for _ in range(8)]
        combine(found, [1] * 8, values)
        met = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    before = 12 * values  # the weights before the segment, and the delta, twice for a moment
    assert max(before + made, met) <= room
