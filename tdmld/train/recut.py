"""A boundary as one directory, whatever the cuts: what another job goes on from.

    config.json, model.safetensors     the model as it stood there; from_pretrained loads it
    moments/boundary.json              `Boundary`: whose it is, and after how many steps
    moments/<lane>.safetensors         a lane's moments, in `diloco` its residuals too
    moments/outer.safetensors          in `diloco`: the momentum of the outer step

`write_boundary` makes it of the states of all slots; `Moments` reads it for `pretrained`, which
cuts it anew. Lanes that meet in every step have equal moments: then there is one file, and each
lane of the next job begins with it. Lanes that went apart have moments of their own: if those of
the next job go apart, too, lane l begins with those of lane l modulo their number, else all begin
with those of lane 0. A residual goes on in its own lane alone: elsewhere it would count twice.
Torch is not needed.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tdmld.files import FileTooLarge, read_file, write_file
from tdmld.train import limits
from tdmld.train.errors import FileError
from tdmld.train.export import Result, write_result
from tdmld.train.spec import Spec, spec_bytes, spec_id
from tdmld.train.statefile import (
    ITEM_BYTES,
    StateFile,
    TensorData,
    part_file,
    state_tensors,
    write_safetensors,
)

MOMENTS = "moments"
BOUNDARY_FILE = "boundary.json"
_OUTER = "outer"
_RESIDUAL = "residual."

States = Mapping[tuple[int, int], Path]
"""(lane, stage) -> directory with shared.safetensors and lane.safetensors."""


class Boundary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `boundary.json` says."""

    version: Literal[1]
    spec_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    boundary: Annotated[int, msgspec.Meta(ge=1, le=limits.STEPS)]
    step: Annotated[int, msgspec.Meta(ge=1, le=limits.STEPS)]
    lanes: Annotated[int, msgspec.Meta(ge=1, le=limits.LANES)]
    """Files of moments."""


def write_boundary(spec: Spec, boundary: int, states: States, out: Path) -> Result:
    """Write the directory of a boundary from the states of its slots; the model in it.

    Where lanes are equal a state of any lane does for a stage, and all that are given must agree.
    In `diloco` the state must be whole: the last boundary, or one whose outer step was made.
    FileError when states are missing, foreign, of another step, or differ where they must not;
    OSError from the disk.
    """
    if not 0 < boundary <= spec.rounds:
        raise FileError(f"boundary {boundary} is none of 1 to {spec.rounds}; name another one")
    if spec.is_diloco and boundary < spec.rounds:
        raise FileError(
            f"at boundary {boundary} an outer step is still to come; "
            f"use the last boundary, {spec.rounds}, of a diloco job"
        )
    step = spec.boundary_step(boundary)
    with ExitStack() as stack:
        shared: list[TensorData] = []
        lanes: list[list[TensorData]] = [[] for _ in range(spec.lanes if spec.is_diloco else 1)]
        for stage in range(spec.stages):
            here = [lane for lane in range(spec.lanes) if (lane, stage) in states]
            if not here or (spec.is_diloco and len(here) < spec.lanes):
                raise FileError(f"there is no state of every lane and stage; stage {stage} lacks")
            found = {
                (lane, part): _part(stack, spec, stage, part, states[lane, stage])
                for lane in here
                for part in ("shared", "lane")
            }
            _check_equal(spec, stage, found)
            shared += found[here[0], "shared"]
            for number, tensors in enumerate(lanes):
                lane = number if spec.is_diloco else here[0]
                own = found[lane, "lane"]
                done = next(t for t in own if t.name == "step")
                if int.from_bytes(done.data, "little", signed=True) != step:
                    raise FileError(f"the state of {lane}.{stage} is not of boundary {boundary}")
                tensors += [t for t in own if t.name != "step" or stage == 0]
        model = {w.name for stage in range(spec.stages) for w in spec.shared(stage)}
        place = out / MOMENTS
        (place / BOUNDARY_FILE).unlink(missing_ok=True)  # what was there before is whole no more
        result = write_result(spec, [t for t in shared if t.name in model], out)
        place.mkdir(exist_ok=True)
        for old in place.glob("*.safetensors"):
            old.unlink()
        for number, tensors in enumerate(lanes):
            write_safetensors(place / f"{number}.safetensors", tensors)
        if outer := [t for t in shared if t.name not in model]:
            write_safetensors(place / f"{_OUTER}.safetensors", outer)
    about = Boundary(
        version=1,
        spec_id=spec_id(spec_bytes(spec)).hex(),
        boundary=boundary,
        step=step,
        lanes=len(lanes),
    )
    text = json.dumps(msgspec.to_builtins(about), indent=1, sort_keys=True) + "\n"
    write_file(place / BOUNDARY_FILE, text.encode("ascii"))  # last: with it the directory is whole
    return result


def _part(stack: ExitStack, spec: Spec, stage: int, part: str, directory: Path) -> list[TensorData]:
    path = directory / part_file(part)
    found = list(stack.enter_context(StateFile(path)))
    expected = [(t.name, t.dtype, t.shape) for t in state_tensors(spec, stage) if t.part == part]
    if [tensor[:3] for tensor in found] != expected:
        raise FileError(f"{path} is no state of stage {stage} of this job")
    return found


def _check_equal(spec: Spec, stage: int, found: Mapping[tuple[int, str], list[TensorData]]) -> None:
    """FileError unless the lanes agree on what they share."""
    for part in ("shared",) if spec.is_diloco else ("shared", "lane"):
        parts = [tensors for (_, name), tensors in found.items() if name == part]
        if any(_bytes(parts[0]) != _bytes(other) for other in parts[1:]):
            raise FileError(f"the lanes' states of stage {stage} differ; one of them is wrong")


def _bytes(tensors: list[TensorData]) -> list[memoryview]:
    return [memoryview(tensor.data) for tensor in tensors]


class Moments:
    """The moments of a boundary's directory, mapped. FileError when they are not whole."""

    def __init__(self, directory: Path) -> None:
        place = directory / MOMENTS
        path = place / BOUNDARY_FILE
        try:
            about = msgspec.json.decode(read_file(path, limits.MANIFEST_BYTES), type=Boundary)
        except FileTooLarge as error:
            raise FileError(f"{path} is too long; write the boundary again") from error
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}; write the boundary again") from error
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: {error}; write the boundary again") from error
        self.about = about
        self._files: list[StateFile] = []
        self._lanes = [self._read(place / f"{n}.safetensors") for n in range(about.lanes)]
        outer = place / f"{_OUTER}.safetensors"
        self._outer = self._read(outer) if outer.exists() else {}

    def _read(self, path: Path) -> dict[str, TensorData]:
        file = StateFile(path)
        self._files.append(file)  # what it gives out lives as long as it does
        return {tensor.name: tensor for tensor in file}

    @property
    def step(self) -> int:
        """Steps done."""
        return self.about.step

    def outer(self, name: str, shape: tuple[int, ...]) -> TensorData:
        """A momentum of the outer step; zeros where the job before had none."""
        return _taken(self._outer, name, "F32", shape, self._outer == {})

    def lane(self, spec: Spec, lane: int, stage: int) -> list[TensorData]:
        """The lane part that a slot of a job with this spec begins with, by name."""
        own = self._lanes[lane % len(self._lanes) if spec.is_diloco else 0]
        beside = lane >= len(self._lanes)
        return [
            _taken(own, t.name, t.dtype, t.shape, _fresh(t.name, own, beside))
            for t in state_tensors(spec, stage)
            if t.part == "lane"
        ]


def _fresh(name: str, own: Mapping[str, TensorData], beside: bool) -> bool:
    """Whether a residual begins with zeros: in a lane more, or after a job that had none."""
    return name.startswith(_RESIDUAL) and (beside or name not in own)


def _taken(
    files: Mapping[str, TensorData], name: str, dtype: str, shape: tuple[int, ...], zeros: bool
) -> TensorData:
    if zeros:
        return TensorData(name, dtype, shape, bytes(prod(shape) * ITEM_BYTES[dtype]))
    found = files.get(name)
    if found is None or found[:3] != (name, dtype, shape):
        raise FileError(f"the boundary has no {name} of this shape; it is of another model")
    return found
