"""Seconds that a model's parts take on this machine, from a short run.

Each kind of layer (parts with weights of the same shapes are one kind), the embedding or stem and
the head run a micro-batch forward and back, as a worker does it: same cut, precision and threads.
The first pass warms up; of the others the fastest counts, since other programs can only slow them
down. Only one part is in memory at a time.
"""

import time
from collections.abc import Callable

import msgspec
import torch
from torch import nn

from tdmld.train import optimizer
from tdmld.train.digest import digest
from tdmld.train.estimate import PartSeconds, Seconds
from tdmld.train.family import Part
from tdmld.train.model import arithmetic, loose_part, mean_cross_entropy, vocabulary
from tdmld.train.schedule import step_scalars
from tdmld.train.spec import Spec
from tdmld.train.wire import tensor_bytes

_PASSES = 5
_VALUES = 1 << 20
"""Values that the optimizer and the hash are timed on."""


def measure(spec: Spec, on_part: Callable[[str], None] | None = None) -> Seconds:
    """The seconds of all parts of the spec's model, of the optimizer and of hashing.

    `on_part` hears what is measured next.
    """
    say = on_part or (lambda _: None)
    # A second forward pass is counted where a stage's time is added up (`estimate.stage_seconds`).
    spec = msgspec.structs.replace(spec, train=msgspec.structs.replace(spec.train, recompute=False))
    last = spec.whole.last
    say("embedding")
    entry = _part(spec, Part(0, 0, True, False))
    kinds: dict[object, PartSeconds] = {}
    layers = []
    for layer in range(last):
        part = Part(layer, layer + 1, False, False)
        kind = (_kind(spec, part), spec.model.boundary(spec.config, layer, spec.data.sequence))
        if kind not in kinds:
            say(f"layer {layer}")
            kinds[kind] = _part(spec, part)
        layers.append(kinds[kind])
    say("head")
    head = _part(spec, Part(last, last, False, True))
    say("optimizer")
    return Seconds(entry, tuple(layers), head, _optimizer(spec), _hash())


def _kind(spec: Spec, part: Part) -> tuple[tuple[int, ...], ...]:
    return tuple(weight.shape for weight in spec.model.weights(spec.config, part))


def _part(spec: Spec, part: Part) -> PartSeconds:
    module = loose_part(spec, part)
    size, length = spec.train.micro_batch_size, spec.data.sequence
    precision = spec.train.precision
    value: torch.Tensor
    if not part.entry:
        shape = spec.model.boundary(spec.config, part.first, length)
        value = torch.randn(size, *shape)
    elif spec.model.images:
        channels = int(str(spec.config["num_channels"]))
        side = round((length / channels) ** 0.5)
        value = torch.randn(size, channels, side, side)
    else:
        value = torch.randint(0, vocabulary(spec), (size, length))
    forward, backward = [], []
    for _ in range(1 + _PASSES):
        entering = value.clone().requires_grad_(value.is_floating_point() and not part.entry)
        began = time.perf_counter()
        with arithmetic(precision, value.device):
            leaving = module(entering).to(torch.float32)
        if part.head:
            leaving = mean_cross_entropy(leaving, torch.zeros(leaving.shape[:-1], dtype=torch.long))
        middle = time.perf_counter()
        torch.autograd.backward(leaving, None if part.head else torch.ones_like(leaving))
        backward.append(time.perf_counter() - middle)
        forward.append(middle - began)
        for parameter in module.parameters():
            parameter.grad = None
    return PartSeconds(min(forward[1:]), min(backward[1:]))


def _optimizer(spec: Spec) -> float:
    """Seconds of a step for each trained value."""
    weight, gradient, first, second = (torch.rand(_VALUES) for _ in range(4))
    scalars = step_scalars(spec, spec.first_step)
    weights = [nn.Parameter(weight, requires_grad=False)]
    seconds = []
    for _ in range(1 + _PASSES):
        began = time.perf_counter()
        optimizer.average_gradients([gradient], spec.train.micro_batches)
        optimizer.gradient_norm([gradient])
        optimizer.adamw_step(weights, [gradient], [first], [second], scalars)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:]) / _VALUES


def _hash() -> float:
    """Seconds of a digest for each byte."""
    raw = tensor_bytes(torch.rand(_VALUES))
    seconds = []
    for _ in range(1 + _PASSES):
        began = time.perf_counter()
        digest(raw)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:]) / len(raw)
