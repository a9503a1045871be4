"""What lanes do together: `sync` after each step, `diloco` around the steps of a segment.

`sync`: every slot sends its gradients (of the mean over its own micro-batches) to the same stage of
all other lanes, flat in the order of names, in parts; then its float buffers in fp32. What it made
itself passes through the same encoding. The mean, weighted and added in the order of the lanes in
float32, is the same everywhere. Counters (I64 buffers) count the micro-batches of all lanes.

`diloco`: see `DilocoSegment`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from tdmld.files import write_file
from tdmld.train.compress import (
    Contribution,
    Place,
    decode_contribution,
    encode_contribution,
    read_contribution,
)
from tdmld.train.contribution import contribution_name
from tdmld.train.errors import SegmentFault
from tdmld.train.outer import combine, outer_step
from tdmld.train.slot import Slot
from tdmld.train.wire import encode, round_to_wire

SendPart = Callable[[Sequence[str], int, memoryview], None]
"""(links, number, payload): the same frame on several links."""
ReceivePart = Callable[[str, int, int, str], torch.Tensor]
"""(link, number, values, wire) -> the values, flat."""


def exchange(
    slot: Slot, gradients: Sequence[torch.Tensor], send: SendPart, receive: ReceivePart
) -> None:
    """Make the slot's gradients and buffers those of all lanes, in place, after a step."""
    spec, stage = slot.spec, slot.stage
    floats = [tensor for tensor in slot.statistics if tensor.dtype == torch.float32]
    told = [*gradients, *floats]
    flat = torch.cat([tensor.reshape(-1) for tensor in told])
    if not bool(torch.isfinite(flat).all()):
        raise SegmentFault("nonfinite", slot.step, "a gradient or a buffer is not finite")
    gradient_parts = len(spec.gradient_parts(stage))
    borders = (0, *accumulate(spec.lane_parts(stage)))
    parts = [
        (flat[first:last], spec.pipeline.lanes.wire if number < gradient_parts else "fp32")
        for number, (first, last) in enumerate(pairwise(borders))
    ]
    siblings = [f"lane{lane}" for lane in range(spec.lanes) if lane != slot.lane]
    first_seq = (slot.step - spec.first_step) * len(parts)
    for number, (part, wire) in enumerate(parts):
        send(siblings, first_seq + number, encode(part, wire))
    for number, (part, wire) in enumerate(parts):
        mean = _mean(
            (
                round_to_wire(part, wire)
                if lane == slot.lane
                else receive(f"lane{lane}", first_seq + number, part.numel(), wire)
                for lane in range(spec.lanes)
            ),
            spec.lane_weights,
        )
        part.copy_(mean)
    pieces = torch.split(flat, [tensor.numel() for tensor in told])
    for tensor, piece in zip(told, pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))
    others = sum(spec.lane_weights) - spec.lane_weights[slot.lane]
    for tensor in slot.statistics:
        if tensor.dtype == torch.int64:
            tensor.add_(others * spec.train.micro_batches)


def _mean(values: Iterator[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """The weighted mean, added in the order given."""
    total: torch.Tensor | None = None
    for value, weight in zip(values, weights, strict=True):
        term = value * weight
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.div_(sum(weights))


class DilocoSegment:
    """A segment's two ends in `diloco`: `begin`, then the steps, then `end`.

    A slot's state has the weights, buffers and outer momentum that all lanes share, as they are
    before the outer step that the contributions of the last round will make. `begin` makes that
    step; a lane that was left out of the round takes its contribution back into its residual. The
    steps move weights and buffers of this lane alone. `end` turns what they moved, and the
    residual, into the lane's contribution, and restores what is shared.

        fed = (weights before - weights after) + feedback x residual
        residual = fed - what the contribution says
    """

    def __init__(
        self, slot: Slot, number: int, included: Sequence[int], directory: Path | None
    ) -> None:
        """ValueError when `included` cannot be that of segment `number`."""
        spec = slot.spec
        lanes = list(included)
        if lanes != sorted(set(lanes)) or not set(lanes) <= set(range(spec.lanes)):
            raise ValueError(f"{lanes} are not lanes of the job, ascending")
        if bool(lanes) != (number > 0):
            raise ValueError(f"{len(lanes)} lanes enter the outer step of segment {number}")
        if directory is None:
            raise ValueError("a diloco segment needs a directory of contributions")
        self.slot, self.number, self.included = slot, number, lanes
        self._directory = directory

    def begin(self) -> None:
        """The outer step; FileError when a contribution is missing or malformed."""
        slot = self.slot
        if self.included:
            self._meet()
        if self.number < slot.spec.training_rounds:
            self._shared = [tensor.detach().clone() for tensor in slot.moving]
        slot.touch()

    def _meet(self) -> None:
        slot, spec = self.slot, self.slot.spec
        last = self.number - 1
        if slot.lane not in self.included:
            own = self._read(last, slot.lane)
            slot.residual.numpy()[own.places] += own.values
        weights = [spec.lane_weights[lane] for lane in self.included]
        count = slot.residual.numel()
        found = [self._read(last, lane) for lane in self.included]
        mean, buffers = combine(found, weights, count)
        outer_step(slot.weights, slot.outer_momenta, mean, spec.outer)
        floats = [tensor for tensor in slot.statistics if tensor.dtype == torch.float32]
        pieces = torch.split(torch.from_numpy(buffers), [tensor.numel() for tensor in floats])
        for tensor, piece in zip(floats, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))
        steps = spec.boundary_step(self.number) - spec.boundary_step(last)
        for tensor in slot.statistics:
            if tensor.dtype == torch.int64:
                tensor.add_(steps * spec.train.micro_batches * sum(weights))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in slot.moving):
            raise SegmentFault("nonfinite", slot.step, "the outer step left values not finite")

    def _read(self, number: int, lane: int) -> Contribution:
        place = Place(lane, self.slot.stage, number)
        return read_contribution(
            self.slot.spec, place, self._directory / contribution_name(number, lane)
        )

    def end(self) -> bytes:
        """Write the lane's contribution, durably; its id, nothing after a segment without steps."""
        slot, spec = self.slot, self.slot.spec
        if self.number >= spec.training_rounds:
            return b""
        count = len(slot.weights)
        with torch.no_grad():
            fed = torch.cat(
                [
                    (before - after).reshape(-1)
                    for before, after in zip(self._shared[:count], slot.weights, strict=True)
                ]
            )
            fed.add_(slot.residual, alpha=float(spec.outer.feedback))
            floats = [tensor for tensor in slot.statistics if tensor.dtype == torch.float32]
            buffers = torch.cat([torch.zeros(0), *(tensor.reshape(-1) for tensor in floats)])
            if not bool(torch.isfinite(fed).all()) or not bool(torch.isfinite(buffers).all()):
                raise SegmentFault("nonfinite", slot.step, "the lane's delta is not finite")
            place = Place(slot.lane, slot.stage, self.number)
            raw = encode_contribution(spec, place, fed.numpy(), buffers.numpy())
            own = decode_contribution(spec, place, raw)
            slot.residual.copy_(fed)
            slot.residual.numpy()[own.places] -= own.values
            for tensor, shared in zip(slot.moving, self._shared, strict=True):
                tensor.copy_(shared)
        slot.touch()
        path = self._directory / contribution_name(self.number, slot.lane)
        self._directory.mkdir(parents=True, exist_ok=True)
        write_file(path, raw)
        return own.identity
