"""`run_segment`: the one implementation of K optimizer steps of a slot.

Live, in an audit and in a recovery it is this code; only the channel differs. It follows from the
spec, the slot's state and the frames received, and from nothing else: no clock (times go only into
reports for people), no local setting, no host generator.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tdmld.train import optimizer
from tdmld.train.channel import Channel
from tdmld.train.data import step_indices
from tdmld.train.device import to_device
from tdmld.train.digest import ZERO_DIGEST, digest, indices_root, link_root, merkle_root
from tdmld.train.errors import SegmentFault
from tdmld.train.lanes import DilocoSegment, exchange
from tdmld.train.model import mean_cross_entropy, pixel_values, token_rows, vocabulary
from tdmld.train.schedule import operations, step_scalars, traffic
from tdmld.train.segment import (
    LinkRoots,
    OnStep,
    SegmentRecord,
    StepDigests,
    StepReport,
    loss_bits,
)
from tdmld.train.slot import Slot
from tdmld.train.specfields import StageClip
from tdmld.train.wire import decode, encode, tensor_bytes
from tdmld.train.wireformat import WireError

Frames = dict[tuple[str, str], list[tuple[int, bytes]]]
"""(link, sent or received) -> (number, digest) of its frames."""


def run_segment(
    slot: Slot,
    segment: int,
    channel: Channel,
    on_step: OnStep | None = None,
    *,
    included: Sequence[int] = (),
    contributions: Path | None = None,
) -> SegmentRecord:
    """Run the K steps of `segment` and return its record; the slot stands at the end state.

    In a `diloco` job `included` names the lanes of the round before that enter the outer step
    (ascending; none in segment 0), and `contributions` is the directory that holds their
    contributions as `<round>.<lane>` and gets this slot's own (`contribution_name`).

    The slot must stand at the segment's first step (ValueError). `on_step` is called after each
    step, in the same thread. SegmentFault when the program refuses an input or meets a value that
    is not finite, FileError when a contribution is missing or malformed; the slot's state is
    undefined then. What the channel raises passes through.
    """
    first, last = slot.spec.boundary_step(segment), slot.spec.boundary_step(segment + 1)
    if slot.step != first or not 0 <= segment < slot.spec.rounds:
        raise ValueError(f"segment {segment} starts at step {first}, not {slot.step}")
    start, links = slot.roots(), slot.spec.links(slot.lane, slot.stage)
    diloco = DilocoSegment(slot, segment, included, contributions) if slot.spec.is_diloco else None
    if diloco is not None:
        diloco.begin()
    frames: Frames = {(link, way): [] for link in links for way in ("sent", "received")}
    steps = run_steps(slot, last - first, channel, on_step, frames)
    contribution = b"" if diloco is None else diloco.end()
    end = slot.roots()
    return SegmentRecord(
        segment=segment,
        start_shared=start[0],
        start_lane=start[1],
        end_shared=end[0],
        end_lane=end[1],
        link_roots=tuple(
            LinkRoots(link, link_root(frames[link, "sent"]), link_root(frames[link, "received"]))
            for link in links
        ),
        has_loss=slot.spec.has_loss(slot.stage),
        steps=tuple(steps),
        contribution=contribution,
        included=tuple(included),
    )


def run_steps(
    slot: Slot, count: int, channel: Channel, on_step: OnStep | None, frames: Frames
) -> list[StepDigests]:
    """Run the next `count` steps of a slot, without a segment's ends; `frames` gets the (number,
    digest) of what crosses each direction of its links. Raises as `run_segment`."""
    steps = []
    for _ in range(count):
        began = time.perf_counter()
        work = _Step(slot, channel, frames)
        steps.append(work.run())
        if on_step is not None:
            on_step(work.report(time.perf_counter() - began))
    return steps


def collect_gradients(slot: Slot) -> list[torch.Tensor]:
    """The gradients that the backward passes of a step have summed, in order of names.

    Zeros where nothing passed (an expert that no token chose); for a tied weight the sum of what
    it received as embedding and of what it received as head, each over all micro-batches.
    """
    if slot.module.tied is not None:
        entry, head = slot.module.tied
        assert entry.grad is not None
        assert head.grad is not None
        entry.grad.add_(head.grad)
        head.grad = None
    found = [weight.grad for weight in slot.weights]
    return [
        torch.zeros_like(weight, requires_grad=False) if gradient is None else gradient
        for weight, gradient in zip(slot.weights, found, strict=True)
    ]


def mean_loss(losses: Sequence[torch.Tensor]) -> float:
    """Mean of the micro-batches' losses, added in their order in float32."""
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return float(total / len(losses))


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite. A sum is not when one of them is not, and costs a fortieth of
    looking at each; that of large finite ones may overflow, so the sum alone accuses nobody."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _gradient(entering: torch.Tensor) -> torch.Tensor:
    assert entering.grad is not None
    return entering.grad


@dataclass
class _Step:
    """One optimizer step."""

    slot: Slot
    channel: Channel
    frames: Frames
    digests: list[bytes] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    loss: float | None = None
    norm: float = 0.0
    waiting: float = 0.0
    verifying: float = 0.0

    def run(self) -> StepDigests:
        slot, spec = self.slot, self.slot.spec
        step = slot.step
        inputs, labels, data = self._data(step)
        open_batches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for kind, number in operations(spec, slot.lane, slot.stage):
            seq = (step - spec.first_step) * spec.micro_batches(slot.lane) + number
            into, out = traffic(spec, slot.stage, kind)
            received = None if into is None else self._receive(into, seq)
            if kind == "F":
                entering = inputs[number] if received is None else received.requires_grad_(True)
                leaving = slot.module(entering)
                if out is None:
                    leaving = self._loss(leaving, labels[number])
                else:
                    self._send(out, seq, leaving)
                open_batches[number] = (entering, leaving)
            elif kind == "B":
                entering, leaving = open_batches.pop(number)
                torch.autograd.backward(leaving, received)
                if out is not None:
                    self._send(out, seq, _gradient(entering))
            else:
                assert received is not None
                assert out is not None
                entering = received.requires_grad_(True)
                leaving = self._loss(slot.module.head(entering), labels[number])
                torch.autograd.backward(leaving)
                self._send(out, seq, _gradient(entering))
            del entering, leaving, received
        root = self._update(step)
        bits = loss_bits(self.loss) if self.loss is not None else 0
        return StepDigests(step, tuple(self.digests), data, root, bits)

    def _data(self, step: int) -> tuple[list[torch.Tensor], list[torch.Tensor], bytes]:
        """Inputs and labels of each micro-batch, where this stage has them, and their root."""
        spec, tokens = self.slot.spec, self.slot.data
        first, last = spec.has_input(self.slot.stage), spec.has_loss(self.slot.stage)
        if not (first or last) or tokens is None:
            return [], [], ZERO_DIGEST
        indices = step_indices(spec, self.slot.lane, step)
        length, size = spec.data.sequence + 1, spec.train.micro_batch_size
        raw = b"".join(tokens.window(index, spec.window_bytes) for index in indices)
        windows = token_rows(raw, spec).view(-1, size, length)
        if spec.model.images:
            channels = int(str(spec.config["num_channels"]))
            inputs = [pixel_values(window[:, 1:], channels) for window in windows] if first else []
            labels = [window[:, 0].contiguous() for window in windows] if last else []
        else:
            if (most := int(windows.max())) >= (known := vocabulary(spec)):
                raise SegmentFault("token", step, f"the data have a token {most} of {known}")
            inputs = [window[:, :-1].contiguous() for window in windows] if first else []
            labels = [window[:, 1:].contiguous() for window in windows] if last else []
        device = self.slot.device
        inputs = [to_device(one, device) for one in inputs]
        labels = [to_device(one, device) for one in labels]
        return inputs, labels, indices_root(indices)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if (most := int(labels.max())) >= logits.shape[-1]:
            raise SegmentFault("label", self.slot.step, f"the data have a label {most}")
        loss = mean_cross_entropy(logits, labels)
        self.losses.append(loss.detach())
        return loss

    def _update(self, step: int) -> bytes:
        """Average, root, clip, optimize; returns the gradient root."""
        slot, spec = self.slot, self.slot.spec
        gradients = collect_gradients(slot)
        optimizer.average_gradients(gradients, spec.micro_batches(slot.lane))
        if spec.has_lane_links:
            with torch.no_grad():
                exchange(slot, gradients, self._send_parts, self._receive_part)
        began = time.perf_counter()
        root = merkle_root(tensor_bytes(gradient) for gradient in gradients)
        self.verifying += time.perf_counter() - began
        self.norm = optimizer.gradient_norm(gradients)
        if self.losses:
            self.loss = mean_loss(self.losses)
        for name, value in (("gradient norm", self.norm), ("loss", self.loss or 0.0)):
            if not math.isfinite(value):
                raise SegmentFault("nonfinite", step, f"the {name} is {value}")
        if isinstance(spec.clip, StageClip):
            optimizer.clip_gradients(gradients, self.norm, float(spec.clip.norm))
        with torch.no_grad():
            optimizer.adamw_step(
                slot.weights,
                gradients,
                slot.first_moments,
                slot.second_moments,
                step_scalars(spec, step),
            )
        for weight in slot.weights:
            weight.grad = None
        slot.step += 1
        slot.touch()
        return root

    def _receive(self, link: str, seq: int) -> torch.Tensor:
        spec, stage = self.slot.spec, self.slot.stage
        return self._take(link, seq, spec.boundary(stage, link), spec.wire(stage, link))

    def _receive_part(self, link: str, seq: int, values: int, wire: str) -> torch.Tensor:
        return self._take(link, seq, (values,), wire)

    def _take(self, link: str, seq: int, shape: tuple[int, ...], wire: str) -> torch.Tensor:
        step = self.slot.step
        began = time.perf_counter()
        payload = self.channel.receive(link, seq)
        arrived = time.perf_counter()
        self.waiting += arrived - began
        self._note(link, "received", seq, digest(payload))
        self.verifying += time.perf_counter() - arrived
        try:
            tensor = decode(payload, shape, wire, self.slot.device)
        except WireError as error:
            raise SegmentFault("size", step, f"frame {seq} of {link}: {error}") from error
        finally:
            del payload
        self.channel.release(link, seq)
        if not _all_finite(tensor):
            raise SegmentFault("nonfinite", step, f"frame {seq} of {link} has values not finite")
        return tensor

    def _send(self, link: str, seq: int, tensor: torch.Tensor) -> None:
        self._send_parts((link,), seq, encode(tensor, self.slot.spec.wire(self.slot.stage, link)))

    def _send_parts(self, links: Sequence[str], seq: int, payload: memoryview) -> None:
        for link in links:
            self.channel.send(link, seq, payload)
        # Hashed afterwards: somebody may be waiting for it.
        began = time.perf_counter()
        value = digest(payload)
        for link in links:
            self._note(link, "sent", seq, value)
        self.verifying += time.perf_counter() - began

    def _note(self, link: str, direction: str, seq: int, value: bytes) -> None:
        self.digests.append(value)
        self.frames[link, direction].append((seq, value))

    def report(self, seconds: float) -> StepReport:
        """The step for people."""
        return StepReport(
            step=self.slot.step - 1,
            loss=self.loss,
            seconds=seconds,
            waiting=self.waiting,
            verifying=self.verifying,
            gradient_norm=self.norm,
        )
