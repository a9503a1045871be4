"""Going on from given weights: a Hugging Face directory, cut into the stages' first states.

A directory holds safetensors files, one or several, and nothing is run from it. Each weight is
looked for under the names that published files use; bf16 and fp16 values become fp32, exactly.
What a stage begins with is one canonical file (`statefile`), and its root is the content id that
the spec names. A directory that `recut` wrote has moments, too: the job goes on where another one
stood, and each slot begins with a second file, the lane part. Torch is not needed.
"""

import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import msgspec

from tdmld.train import limits
from tdmld.train.digest import Leaf, digest, state_root
from tdmld.train.errors import FileError, SpecError
from tdmld.train.family import Weight
from tdmld.train.recut import MOMENTS, Moments
from tdmld.train.spec import Spec
from tdmld.train.specfields import GivenInit
from tdmld.train.statefile import TensorData, state_tensors, write_safetensors

_LENGTH = struct.Struct("<Q")
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Found(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Pretrained:
    """The tensors of a directory's safetensors files, mapped.

    SpecError when there are none, or when a file is not one: the directory is the submitter's own.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tensors: dict[str, _Found] = {}
        paths = sorted(directory.glob("*.safetensors"))
        if not 0 < len(paths) <= limits.SOURCE_FILES:
            raise SpecError(
                "init",
                f"{directory} has {len(paths)} safetensors files",
                f'name a directory with 1 to {limits.SOURCE_FILES} of them, or write "seed"',
            )
        self.moments = _moments(directory)
        for path in paths:
            for name, found in _read(path).items():
                if name in self._tensors:
                    raise SpecError("init", f"{path}: {name} is there twice", "remove one file")
                self._tensors[name] = found

    def tensor(self, spec: Spec, weight: Weight) -> TensorData:
        """A weight of the spec's model; SpecError when it is missing or has another shape."""
        for names in spec.model.source_names(weight.name, weight.shape):
            if all(name in self._tensors for name in names):
                pieces = [self._tensors[name] for name in names]
                if sum(prod(piece.shape) for piece in pieces) != weight.count or (
                    len(pieces) == 1 and pieces[0].shape != weight.shape
                ):
                    raise SpecError(
                        "init",
                        f"{weight.name} has the shape {list(pieces[0].shape)}, the config wants "
                        f"{list(weight.shape)}",
                        "use the config of that directory",
                    )
                data = [_converted(piece, weight.dtype) for piece in pieces]
                whole = data[0] if len(data) == 1 else b"".join(data)
                return TensorData(weight.name, weight.dtype, weight.shape, whole)
        raise SpecError(
            "init", f"{self.directory} has no {weight.name}", "use a directory of the same family"
        )

    def stage(self, spec: Spec, stage: int) -> Iterator[TensorData]:
        """The shared state that a stage begins with, tensor by tensor, by name."""
        weights = {weight.name: weight for weight in spec.shared(stage)}
        if self.moments is None:
            return (self.tensor(spec, weight) for weight in weights.values())
        with _as_spec_errors():
            return iter(
                [
                    self.tensor(spec, weights[tensor.name])
                    if tensor.name in weights
                    else self.moments.outer(tensor.name, tensor.shape)
                    for tensor in state_tensors(spec, stage)
                    if tensor.part == "shared"
                ]
            )

    def lane(self, spec: Spec, lane: int, stage: int) -> list[TensorData]:
        """The lane part that a slot begins with, of a directory with moments."""
        if self.moments is None:
            raise ValueError(f"{self.directory} has no moments")
        with _as_spec_errors():
            return self.moments.lane(spec, lane, stage)

    def init(self, spec: Spec) -> GivenInit:
        """What a spec, otherwise like `spec`, says of beginning with this directory."""
        roots = tuple(_root("shared", self.stage(spec, stage)) for stage in range(spec.stages))
        if self.moments is None:
            return GivenInit(roots)
        lanes = tuple(
            _root("lane", self.lane(spec, lane, stage))
            for lane in range(spec.lanes)
            for stage in range(spec.stages)
        )
        return GivenInit(roots, lanes, self.moments.step)

    def roots(self, spec: Spec) -> tuple[str, ...]:
        """The content id of each stage's first shared state, for the spec."""
        return self.init(spec).roots

    def write(self, spec: Spec, stage: int, path: Path) -> None:
        """Write the file that a stage begins with, durably; OSError."""
        write_safetensors(path, list(self.stage(spec, stage)))

    def write_lane(self, spec: Spec, lane: int, stage: int, path: Path) -> None:
        """Write the second file that a slot begins with, durably; OSError."""
        write_safetensors(path, self.lane(spec, lane, stage))

    def write_all(self, spec: Spec, directory: Path) -> dict[bytes, Path]:
        """Write every file that the slots of a job begin with: root -> file. Equal ones are one.

        `spec` is the one that names them. SpecError when this directory is not what it names.
        """
        init = self.init(spec)
        if init != spec.init:
            raise SpecError("init", f"{self.directory} has changed", "make the spec anew")
        directory.mkdir(parents=True, exist_ok=True)
        found: dict[bytes, Path] = {}
        for stage, root in enumerate(init.roots):
            found[bytes.fromhex(root)] = path = directory / root
            self.write(spec, stage, path)
        for number, root in enumerate(init.lane_roots):
            if bytes.fromhex(root) not in found:
                found[bytes.fromhex(root)] = path = directory / root
                self.write_lane(spec, *divmod(number, spec.stages), path)
        return found


def _moments(directory: Path) -> Moments | None:
    if not (directory / MOMENTS).exists():
        return None
    with _as_spec_errors():
        return Moments(directory)


@contextmanager
def _as_spec_errors() -> Iterator[None]:
    """The directory is the submitter's own: tell what is wrong with it as with the job file."""
    try:
        yield
    except FileError as error:
        problem, _, remedy = str(error).partition("; ")
        raise SpecError("init", problem, remedy or "write the boundary again") from error


def _root(part: str, tensors: Iterable[TensorData]) -> str:
    leaves = (Leaf(name, part, dtype, shape, digest(data)) for name, dtype, shape, data in tensors)
    return state_root(leaves).hex()


def _read(path: Path) -> Mapping[str, _Found]:
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        (length,) = _LENGTH.unpack_from(view)
        if not 2 <= length <= min(limits.STATE_HEADER_BYTES, len(view) - _LENGTH.size):
            raise ValueError(f"a header of {length} bytes")
        at = _LENGTH.size + length
        raw = msgspec.json.decode(bytes(view[_LENGTH.size : at]), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
        if len(entries) > limits.STATE_TENSORS:
            raise ValueError(f"{len(entries)} tensors")
    except (OSError, ValueError, struct.error, msgspec.MsgspecError, RecursionError) as error:
        raise SpecError(
            "init", f"{path} is no safetensors file: {error}", "fetch it again"
        ) from error
    data = view[at:]
    return {name: _entry(path, name, entry, data) for name, entry in entries.items()}


def _entry(path: Path, name: str, entry: _Entry, data: memoryview) -> _Found:
    first, last = entry.data_offsets
    item = _ITEM_BYTES.get(entry.dtype)
    if item is None:  # a mask, or a type that no weight has: an error only where it is asked for
        return _Found(entry.dtype, entry.shape, data[:0])
    if not 0 <= first <= last <= len(data) or last - first != prod(entry.shape) * item:
        raise SpecError("init", f"{path}: {name[:64]} has a wrong size or place", "fetch it again")
    return _Found(entry.dtype, entry.shape, data[first:last])


def _converted(found: _Found, wanted: str) -> bytes | memoryview:
    """The values as `wanted` (F32 or I64), exactly."""
    if found.dtype == wanted:
        return found.data
    if wanted != "F32" or found.dtype not in ("BF16", "F16"):
        raise SpecError(
            "init", f"values are {found.dtype}, not F32, BF16 or F16", "convert the files"
        )
    import numpy as np

    if found.dtype == "F16":
        return np.frombuffer(found.data, dtype="<f2").astype("<f4").tobytes()
    return (np.frombuffer(found.data, dtype="<u2").astype("<u4") << 16).tobytes()
