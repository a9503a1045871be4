"""The outer step of `diloco`: contributions of several lanes become one step of all of them.

    limits      of n deltas with the norms |d|: n >= 3: the median norm (the lower one of two);
                n = 2: twice the smaller norm; n = 1: none
    mean        sum over the lanes, ascending, of d x (min(1, limit / |d|) x weight / weights), in
                float32
    momentum    m <- momentum x m + mean
    weights     w <- w - lr x (mean + momentum x m), or without Nesterov w - lr x m
    buffers     sum over the lanes, ascending, of b x (weight / weights), in float32

With three lanes and more, no minority of them moves the weights further than the middle one does.
With two, one of them can at most double the step, or hold it up; that is a clipped mean and no
robust rule. Factors are doubles. The reference uses these functions, too.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tdmld.train.compress import Contribution, Floats
from tdmld.train.specfields import Outer


def clip_factors(norms: Sequence[float]) -> tuple[float, ...]:
    """By what the deltas with these norms are multiplied, each at most 1."""
    ordered = sorted(norms)
    if len(ordered) < 2:
        return (1.0,) * len(ordered)
    limit = ordered[(len(ordered) - 1) // 2] if len(ordered) > 2 else 2 * ordered[0]
    return tuple(1.0 if norm <= limit else limit / norm for norm in norms)


def combine(
    contributions: Sequence[Contribution], weights: Sequence[int], values: int
) -> tuple[Floats, Floats]:
    """(mean delta of `values` values, mean buffers) of the contributions, in the order given."""
    mean = np.zeros(values, dtype=np.float32)
    buffers = np.zeros_like(contributions[0].buffers)
    factors = clip_factors([one.norm for one in contributions])
    for one, factor, weight in zip(contributions, factors, weights, strict=True):
        share = weight / sum(weights)
        mean[one.places] += one.values * np.float32(factor * share)
        buffers += one.buffers * np.float32(share)
    return mean, buffers


def outer_step(
    weights: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor], mean: Floats, outer: Outer
) -> None:
    """Move the weights and their momenta in place; `mean` stands flat in the same order."""
    rate, momentum = float(outer.lr), float(outer.momentum)
    deltas = torch.split(torch.from_numpy(mean), [weight.numel() for weight in weights])
    with torch.no_grad():
        for weight, moment, flat in zip(weights, momenta, deltas, strict=True):
            delta = flat.view(weight.shape)
            moment.mul_(momentum).add_(delta)
            step = delta.add(moment, alpha=momentum) if outer.nesterov else moment
            weight.add_(step, alpha=-rate)


def robustness(lanes: int) -> str:
    """What the rule promises with so many lanes, for people."""
    if lanes >= 3:
        return f"deltas are clipped to the median norm of the {lanes} lanes"
    return "two lanes: a clipped mean; the robust rule needs three lanes"
