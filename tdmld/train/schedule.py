"""The order of work inside a step, and the numbers that change from step to step.

Every scalar is computed in exact or 60-digit decimal arithmetic and rounded once to a double, so
that no machine's math library has a say in it.
"""

from decimal import Context, Decimal
from fractions import Fraction
from typing import Literal, NamedTuple

from tdmld.train.spec import Spec

Kind = Literal["F", "B", "H"]
Direction = Literal["sent", "received"]
Operation = tuple[Kind, int]
"""Forward or backward of a micro-batch, or forward and backward of the head that closes a ring."""


def one_f_one_b(stages: int, stage: int, micro_batches: int) -> tuple[Operation, ...]:
    """The 1F1B order of a stage: warm-up forwards, pairs, remaining backwards."""
    warm = min(stages - stage - 1, micro_batches)
    order: list[Operation] = [("F", number) for number in range(warm)]
    for number in range(micro_batches - warm):
        order += [("F", warm + number), ("B", number)]
    return (*order, *(("B", number) for number in range(micro_batches - warm, micro_batches)))


def ring_start(stages: int, micro_batches: int) -> tuple[Operation, ...]:
    """The order of the slot at both ends of a ring: the first and the last of `stages` + 1 parts.

    Its forwards run ahead as those of the first part of a pipeline that long; its heads run so far
    ahead of its backwards as a gradient needs to come round when a backward costs two forwards.
    It never waits in a circle: B(n) needs F(n + stages - 1) sent, and heads up to H(n) alone.
    """
    warm, lead = min(stages, micro_batches), min(2 * stages // 3, micro_batches)
    order: list[Operation] = [("F", number) for number in range(warm)]
    order += [("H", number) for number in range(lead)]
    for number in range(micro_batches):
        if warm + number < micro_batches:
            order.append(("F", warm + number))
        if lead + number < micro_batches:
            order.append(("H", lead + number))
        order.append(("B", number))
    return tuple(order)


def operations(spec: Spec, lane: int, stage: int) -> tuple[Operation, ...]:
    """The order of work of a slot in each step."""
    batches = spec.micro_batches(lane)
    if spec.is_ring:
        return (
            ring_start(spec.stages, batches)
            if stage == 0
            else one_f_one_b(spec.stages + 1, stage, batches)
        )
    return one_f_one_b(spec.stages, stage, batches)


def traffic(spec: Spec, stage: int, kind: Kind) -> tuple[str | None, str | None]:
    """(link that an operation receives from, link that it sends to)"""
    if kind == "H":
        return "up", "up"
    into = None if spec.has_input(stage) else "up"
    out = "down" if "down" in spec.links(0, stage) else None
    return (into, out) if kind == "F" else (out, into)


class StepFrame(NamedTuple):
    """A frame of a step: its link, whether this slot sends or receives it, its number."""

    link: str
    direction: Direction
    seq: int


def step_frames(spec: Spec, lane: int, stage: int, step: int) -> tuple[StepFrame, ...]:
    """The frames of a step in the order in which the runner meets them: that of the step leaf."""
    found: list[StepFrame] = []
    for kind, number in operations(spec, lane, stage):
        seq = (step - spec.first_step) * spec.micro_batches(lane) + number
        into, out = traffic(spec, stage, kind)
        if into is not None:
            found.append(StepFrame(into, "received", seq))
        if out is not None:
            found.append(StepFrame(out, "sent", seq))
    parts = spec.part_count(stage)
    siblings = [link for link in spec.links(lane, stage) if link not in ("up", "down")]
    ways: tuple[Direction, Direction] = ("sent", "received")
    for direction in ways:
        for part in range(parts):
            seq = (step - spec.first_step) * parts + part
            found += [StepFrame(link, direction, seq) for link in siblings]
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
