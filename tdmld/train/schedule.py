"""The order of work inside a step, and the numbers that change from step to step.

Every scalar is computed in exact or 60-digit decimal arithmetic and rounded once to a double, so
that no machine's math library has a say in it.
"""

from decimal import Context, Decimal
from fractions import Fraction
from typing import Literal, NamedTuple

from tdmld.train.spec import Spec

Operation = tuple[Literal["F", "B"], int]
"""Forward or backward of one micro-batch."""


def one_f_one_b(stages: int, stage: int, micro_batches: int) -> tuple[Operation, ...]:
    """The 1F1B order of a stage: warm-up forwards, pairs, remaining backwards."""
    warm = min(stages - stage - 1, micro_batches)
    order: list[Operation] = [("F", number) for number in range(warm)]
    for number in range(micro_batches - warm):
        order += [("F", warm + number), ("B", number)]
    return (*order, *(("B", number) for number in range(micro_batches - warm, micro_batches)))


class StepFrame(NamedTuple):
    """A frame of a step: its link, whether this slot sends or receives it, its number."""

    link: str
    direction: Literal["sent", "received"]
    seq: int


def step_frames(spec: Spec, stage: int, step: int) -> tuple[StepFrame, ...]:
    """The frames of a step in the order in which the runner meets them: that of the step leaf."""
    found: list[StepFrame] = []
    for operation, number in one_f_one_b(spec.stages, stage, spec.train.micro_batches):
        seq = step * spec.train.micro_batches + number
        into, out = ("up", "down") if operation == "F" else ("down", "up")
        links = spec.links(stage)
        if into in links:
            found.append(StepFrame(into, "received", seq))
        if out in links:
            found.append(StepFrame(out, "sent", seq))
    return tuple(found)


_PRECISE = Context(prec=60)


class StepScalars(NamedTuple):
    """AdamW's numbers in one step, as doubles."""

    beta1: float
    beta2: float
    one_minus_beta1: float
    one_minus_beta2: float
    decay: float
    """1 - lr x weight decay: weights are multiplied by it."""
    step_size: float
    """lr / (1 - beta1^t)."""
    root_correction: float
    """sqrt(1 - beta2^t)."""
    eps: float


def learning_rate(spec: Spec, step: int) -> Fraction:
    """The exact learning rate of step 0, 1, ...

    Warm-up reaches lr in step `warmup`; decay goes linearly from lr at `decay_from` to floor x lr
    at the last step and stays there.
    """
    schedule = spec.train.schedule
    rate, floor = Fraction(spec.train.optimizer.lr), Fraction(schedule.floor)
    if step < schedule.warmup:
        return rate * Fraction(step + 1, schedule.warmup)
    span = spec.train.steps - schedule.decay_from
    if step < schedule.decay_from or span == 0:
        return rate
    gone = min(Fraction(step + 1 - schedule.decay_from, span), Fraction(1))
    return rate * (1 - (1 - floor) * gone)


def step_scalars(spec: Spec, step: int) -> StepScalars:
    """The optimizer's numbers of step 0, 1, ... (t = step + 1)."""
    optimizer = spec.train.optimizer
    rate = learning_rate(spec, step)
    exact_rate = _PRECISE.divide(Decimal(rate.numerator), Decimal(rate.denominator))
    beta1, beta2 = (Decimal(beta) for beta in optimizer.betas)
    left1 = _PRECISE.subtract(Decimal(1), _PRECISE.power(beta1, step + 1))
    left2 = _PRECISE.subtract(Decimal(1), _PRECISE.power(beta2, step + 1))
    return StepScalars(
        beta1=float(beta1),
        beta2=float(beta2),
        one_minus_beta1=float(1 - beta1),
        one_minus_beta2=float(1 - beta2),
        decay=float(1 - rate * Fraction(optimizer.weight_decay)),
        step_size=float(_PRECISE.divide(exact_rate, left1)),
        root_correction=float(_PRECISE.sqrt(left2)),
        eps=float(optimizer.eps),
    )
