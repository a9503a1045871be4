"""The optimizer, written out: the order of operations is part of the program.

Used by the segment runner and by the reference. Parameters are processed by name; every scalar is
a double computed in `schedule.py`. Nothing here reads a clock, a generator or a setting.
"""

import math
from collections.abc import Sequence

import torch

from tdmld.train.schedule import StepScalars


def average_gradients(gradients: Sequence[torch.Tensor], micro_batches: int) -> None:
    """Divide the accumulated gradients by the number of micro-batches, once, in place."""
    for gradient in gradients:
        gradient.div_(micro_batches)


def gradient_norm(gradients: Sequence[torch.Tensor]) -> float:
    """Euclidean norm over all gradients: float32 a tensor, doubles between tensors."""
    total = 0.0
    for gradient in gradients:
        norm = float(torch.linalg.vector_norm(gradient))
        total += norm * norm
    return math.sqrt(total)


def clip_gradients(gradients: Sequence[torch.Tensor], norm: float, limit: float) -> None:
    """Scale the gradients down in place so that their norm, given, becomes `limit`."""
    if norm > limit:
        scale = limit / norm
        for gradient in gradients:
            gradient.mul_(scale)


def adamw_step(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    scalars: StepScalars,
) -> None:
    """One AdamW step in place: decoupled decay, moments, bias correction, update."""
    for weight, gradient, average, square in zip(weights, gradients, first, second, strict=True):
        weight.mul_(scalars.decay)
        average.mul_(scalars.beta1).add_(gradient, alpha=scalars.one_minus_beta1)
        square.mul_(scalars.beta2).addcmul_(gradient, gradient, value=scalars.one_minus_beta2)
        divisor = square.sqrt().div_(scalars.root_correction).add_(scalars.eps)
        weight.addcdiv_(average, divisor, value=-scalars.step_size)
