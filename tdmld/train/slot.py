"""A slot at work: a stage's weights, its optimizer state, and where it stands."""

from pathlib import Path

import numpy as np
import torch

from tdmld.train.data import Tokens
from tdmld.train.digest import Leaf, digest, state_root
from tdmld.train.draw import draw_weight
from tdmld.train.errors import FileError
from tdmld.train.model import StageModule
from tdmld.train.spec import Spec, state_tensors
from tdmld.train.statefile import (
    PARTS,
    StateFile,
    TensorData,
    part_file,
    write_safetensors,
)
from tdmld.train.wire import tensor_bytes

Roots = tuple[bytes, bytes]
"""(shared root, lane root)"""


class Slot:
    """What a segment works on. Make it with `create`, then `init_from_seed` or `load`.

    The shared part of the state is the weights; the lane part the two AdamW moments and the number
    of steps done. All sequences stand in the order of parameter names.
    """

    def __init__(self, spec: Spec, stage: int, lane: int, data: Tokens | None) -> None:
        self.spec, self.stage, self.lane, self.data = spec, stage, lane, data
        self.module = StageModule(spec, stage)
        self.names = list(self.module.weights)
        self.weights = list(self.module.weights.values())
        self.first_moments = [torch.zeros_like(w, requires_grad=False) for w in self.weights]
        self.second_moments = [torch.zeros_like(w, requires_grad=False) for w in self.weights]
        self.step = 0
        self._leaves: dict[str, tuple[Leaf, ...]] | None = None

    @classmethod
    def create(cls, spec: Spec, stage: int, lane: int, data: Tokens | None) -> "Slot":
        """A slot with memory but no values. `data` is needed by the first and the last stage."""
        if data is None and (spec.is_first(stage) or spec.is_last(stage)):
            raise ValueError("the first and the last stage need the data")
        return cls(spec, stage, lane, data)

    def init_from_seed(self) -> None:
        """Boundary 0: drawn weights, zero moments, no step done."""
        with torch.no_grad():
            for weight, tensor in zip(self.spec.weights(self.stage), self.weights, strict=True):
                tensor.copy_(torch.from_numpy(draw_weight(self.spec, weight)))
            for moment in (*self.first_moments, *self.second_moments):
                moment.zero_()
        self.step = 0
        self.touch()

    def touch(self) -> None:
        """The state has changed: known roots no longer hold."""
        self._leaves = None

    def _tensors(self, part: str) -> list[TensorData]:
        if part == "shared":
            named: list[tuple[str, torch.Tensor]] = [*zip(self.names, self.weights, strict=True)]
        else:
            moments = (("exp_avg", self.first_moments), ("exp_avg_sq", self.second_moments))
            named = [
                (f"{kind}.{name}", tensor)
                for kind, tensors in moments
                for name, tensor in zip(self.names, tensors, strict=True)
            ]
        found = [
            TensorData(name, "F32", tuple(tensor.shape), tensor_bytes(tensor))
            for name, tensor in named
        ]
        if part == "lane":
            found.append(TensorData("step", "I64", (), self.step.to_bytes(8, "little")))
        return found

    def leaves(self) -> dict[str, tuple[Leaf, ...]]:
        """The leaves of both parts; hashed once for each state."""
        if self._leaves is None:
            self._leaves = {
                part: tuple(
                    Leaf(name, part, dtype, shape, digest(data))
                    for name, dtype, shape, data in self._tensors(part)
                )
                for part in PARTS
            }
        return self._leaves

    def roots(self) -> Roots:
        """(shared root, lane root) of the state as it is now."""
        leaves = self.leaves()
        return state_root(leaves["shared"]), state_root(leaves["lane"])

    def save(self, directory: Path) -> Roots:
        """Write shared.safetensors and lane.safetensors durably; OSError when that fails."""
        directory.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            write_safetensors(directory / part_file(part), self._tensors(part))
        return self.roots()

    def load(self, directory: Path) -> Roots:
        """Take the state from a snapshot; FileError when it is not one of this slot.

        Returns the roots of what was read; the caller compares them with the ones it expects.
        """
        expected = state_tensors(self.spec, self.stage)
        for part in PARTS:
            with StateFile(directory / part_file(part)) as file:
                found = list(file)
                wanted = [(t.name, t.dtype, t.shape) for t in expected if t.part == part]
                if [tensor[:3] for tensor in found] != wanted:
                    raise FileError(f"{file.path} is no state of stage {self.stage} of this job")
                self._take(part, found)
        self.touch()
        return self.roots()

    def _take(self, part: str, found: list[TensorData]) -> None:
        targets = dict(zip(self.names, self.weights, strict=True)) if part == "shared" else {}
        lane: dict[str, torch.Tensor] = {}
        for name, first, second in zip(
            self.names, self.first_moments, self.second_moments, strict=True
        ):
            lane |= {f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
        with torch.no_grad():
            for name, _, shape, data in found:
                if name == "step" and part == "lane":
                    self.step = int.from_bytes(data, "little", signed=True)
                    if not 0 <= self.step <= self.spec.train.steps:
                        raise FileError(f"a state after {self.step} steps is none of this job")
                    continue
                target = targets[name] if part == "shared" else lane[name]
                values = np.frombuffer(data, dtype="<f4").reshape(shape).copy()
                target.copy_(torch.from_numpy(values))
