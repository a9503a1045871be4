"""A slot at work: a stage's weights, its optimizer state, and where it stands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tdmld.files import Aside, settle_all
from tdmld.train.data import Tokens
from tdmld.train.device import open_device
from tdmld.train.digest import Leaf, digest, state_root
from tdmld.train.draw import draw_weight
from tdmld.train.errors import FileError, NumericsError
from tdmld.train.model import StageModule
from tdmld.train.spec import Spec
from tdmld.train.specfields import GivenInit
from tdmld.train.statefile import (
    PARTS,
    StateFile,
    TensorData,
    begin_safetensors,
    part_file,
    state_tensors,
)
from tdmld.train.wire import tensor_bytes

_NAMES = {torch.float32: "F32", torch.int64: "I64"}
_LAYOUTS = {"F32": "<f4", "I64": "<i8"}
Roots = tuple[bytes, bytes]
"""(shared root, lane root)"""


class Slot:
    """What a segment works on. Make it with `create`, then `init_from_seed`, `init_from_file` or
    `load`.

    The shared part of the state is the weights and running statistics, and in `diloco` the momentum
    of the outer step; the lane part the two AdamW moments, the number of steps done, and in
    `diloco` the residual: what of this lane's deltas was not told the others. All sequences stand
    in the order of parameter names; `residual` and `outer_momentum` are flat, empty elsewhere.
    """

    def __init__(
        self, spec: Spec, stage: int, lane: int, data: Tokens | None, device: torch.device
    ) -> None:
        self.spec, self.stage, self.lane, self.data = spec, stage, lane, data
        self.device = device
        self.module = StageModule(spec, stage, device)
        self.names = list(self.module.weights)
        self.weights = list(self.module.weights.values())
        self.first_moments = [torch.zeros_like(w, requires_grad=False) for w in self.weights]
        self.second_moments = [torch.zeros_like(w, requires_grad=False) for w in self.weights]
        count = sum(w.numel() for w in self.weights) if spec.is_diloco else 0
        self.outer_momentum, self.residual = torch.zeros(count), torch.zeros(count)
        self.outer_momenta = self._views(self.outer_momentum)
        private = {
            "exp_avg": self.first_moments,
            "exp_avg_sq": self.second_moments,
            "residual": self._views(self.residual),
        }
        self._parts: dict[str, dict[str, torch.Tensor]] = {
            "shared": {
                **self.module.weights,
                **self.module.statistics,
                **self._named("outer", self.outer_momenta),
            },
            "lane": {
                name: tensor
                for kind, tensors in private.items()
                for name, tensor in self._named(kind, tensors).items()
            },
        }
        self.step = 0
        self._leaves: dict[str, tuple[Leaf, ...]] | None = None

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of a flat tensor that belong to the weights, none of an empty one."""
        if not flat.numel():
            return []
        pieces = torch.split(flat, [weight.numel() for weight in self.weights])
        return [piece.view(w.shape) for piece, w in zip(pieces, self.weights, strict=True)]

    def _named(self, kind: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{kind}.{name}": tensor for name, tensor in zip(self.names, tensors, strict=False)}

    @property
    def statistics(self) -> list[torch.Tensor]:
        """The buffers that training changes, in order of names."""
        return list(self.module.statistics.values())

    @property
    def moving(self) -> list[torch.Tensor]:
        """What the steps of a segment change and lanes share: weights, then buffers."""
        return [*self.weights, *self.module.statistics.values()]

    @classmethod
    def create(
        cls, spec: Spec, stage: int, lane: int, data: Tokens | None, device: str = "cpu"
    ) -> "Slot":
        """A slot with memory but no values. `data` is needed where inputs or labels are. `device`
        is "cpu" or "cuda:0"; NumericsError when it is not there, or cannot do the job's work."""
        if device != "cpu" and spec.is_diloco:
            raise NumericsError("outer steps of diloco are made by the CPU alone; use another node")
        if data is None and (spec.has_input(stage) or spec.has_loss(stage)):
            raise ValueError("a stage with inputs or labels needs the data")
        return cls(spec, stage, lane, data, open_device(device))

    def init_from_seed(self) -> None:
        """Boundary 0: drawn weights, zero moments, no step done. FileError when the spec gives
        the weights: they were not fetched."""
        if isinstance(self.spec.init, GivenInit):
            raise FileError("the job goes on from given weights; fetch the stage's first state")
        with torch.no_grad():
            for weight in self.spec.shared(self.stage):
                self._parts["shared"][weight.name].copy_(
                    torch.from_numpy(draw_weight(self.spec, weight))
                )
        self._begin()

    def init_from_file(self, path: Path, lane: Path | None = None) -> None:
        """Boundary 0 of a job that goes on from given weights: the shared part from `path`, zero
        moments, no step done. In a job that goes on where another one stood the shared part has the
        outer step's momentum, too, and `lane` is the lane part. FileError when a file is not the
        one that the spec names."""
        init, goes_on = self.spec.init, self.spec.goes_on
        if not isinstance(init, GivenInit) or (lane is not None) != goes_on:
            raise ValueError("the spec begins with other files, or draws the weights")
        self._begin()
        with StateFile(path) as file:
            if file.manifest("shared").root.hex() != init.roots[self.stage]:
                raise FileError(f"{path} does not hold the weights that the spec names; fetch it")
            expected = [(w.name, w.dtype, w.shape) for w in self.spec.shared(self.stage)]
            self._take(
                "shared", self._checked(file, self._expected("shared") if goes_on else expected)
            )
        if lane is None:
            return
        with StateFile(lane) as file:
            number = self.spec.slot_index(self.lane, self.stage)
            if file.manifest("lane").root.hex() != init.lane_roots[number]:
                raise FileError(f"{lane} does not hold the moments that the spec names; fetch it")
            self._take("lane", self._checked(file, self._expected("lane")))
        if self.step != init.step:
            raise FileError(f"{lane} stands after {self.step} steps, the spec after {init.step}")

    def _expected(self, part: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors of a part of the state."""
        tensors = state_tensors(self.spec, self.stage)
        return [(t.name, t.dtype, t.shape) for t in tensors if t.part == part]

    def _begin(self) -> None:
        for tensor in (*self._parts["lane"].values(), self.outer_momentum):
            tensor.zero_()
        self.step = 0
        self.touch()

    def _checked(
        self, file: StateFile, expected: Sequence[tuple[str, str, tuple[int, ...]]]
    ) -> list[TensorData]:
        """The tensors of a file; FileError unless they are the expected ones."""
        found = list(file)
        if [t[:3] for t in found] != list(expected):
            raise FileError(f"{file.path} is no state of stage {self.stage} of this job")
        return found

    def touch(self) -> None:
        """The state has changed: known roots no longer hold."""
        self._leaves = None

    def _tensors(self, part: str) -> list[TensorData]:
        found = [
            TensorData(name, _NAMES[tensor.dtype], tuple(tensor.shape), tensor_bytes(tensor))
            for name, tensor in sorted(self._parts[part].items())
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
        settle_all(self.begin_save(directory))
        return self.roots()

    def begin_save(self, directory: Path) -> list[Aside]:
        """The files of `save`, written but neither synced nor in their places: settle them, in
        this order. The slot may go on meanwhile. OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        files: list[Aside] = []
        try:
            for part in PARTS:
                path = directory / part_file(part)
                files.append(begin_safetensors(path, self._tensors(part)))
        except BaseException:  # whatever it was: no half file stays
            for file in files:
                file.discard()
            raise
        return files

    def load(self, directory: Path) -> Roots:
        """Take the state from a snapshot; FileError when it is not one of this slot.

        Returns the roots of what was read; the caller compares them with the ones it expects.
        """
        for part in PARTS:
            with StateFile(directory / part_file(part)) as file:
                self._take(part, self._checked(file, self._expected(part)))
        self.touch()
        return self.roots()

    def _take(self, part: str, found: list[TensorData]) -> None:
        with torch.no_grad():
            for name, dtype, shape, data in found:
                if name == "step" and part == "lane":
                    self.step = int.from_bytes(data, "little", signed=True)
                    if not 0 <= self.step <= self.spec.train.steps:
                        raise FileError(f"a state after {self.step} steps is none of this job")
                    continue
                values = np.frombuffer(data, dtype=_LAYOUTS[dtype]).reshape(shape).copy()
                self._parts[part][name].copy_(torch.from_numpy(values))
