"""The result of a job: a directory that `AutoModelForCausalLM.from_pretrained` loads.

It is made from the stages' shared states without torch, byte for byte the same wherever it is
made, so holders can attest one result id.
"""

import json
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from tdmld.files import write_file
from tdmld.train import limits
from tdmld.train.errors import FileError
from tdmld.train.spec import Spec
from tdmld.train.statefile import StateFile, TensorData, state_tensors, write_safetensors

RESULT_FILES = ("config.json", "model.safetensors")
"""What the result id covers, in this order."""
_CHUNK_BYTES = 1024 * 1024


def result_limits(spec: Spec) -> dict[str, int]:
    """The greatest size that each file of the spec's result may have, in bytes."""
    values = sum(weight.count for stage in range(spec.stages) for weight in spec.shared(stage))
    sizes = (limits.CONFIG_FILE_BYTES, 8 * values + limits.STATE_HEADER_BYTES)
    return dict(zip(RESULT_FILES, sizes, strict=True))


@dataclass(frozen=True)
class Result:
    """A written result: its id and (name, size) of its files."""

    result_id: bytes
    directory: Path
    files: tuple[tuple[str, int], ...]


def merge_states(spec: Spec, shared_files: Sequence[Path], out: Path) -> Result:
    """Write the result from one shared state file a stage, in the order of stages.

    FileError when the files together are not exactly the model's parameters. Data of the files is
    mapped, not loaded. The caller has compared each file's root with the chain.
    """
    if len(shared_files) != spec.stages:
        raise FileError(f"{len(shared_files)} state files for {spec.stages} stages")
    with ExitStack() as stack:
        tensors: list[TensorData] = []
        for stage, path in enumerate(shared_files):
            found = list(stack.enter_context(StateFile(path)))
            state = [t for t in state_tensors(spec, stage) if t.part == "shared"]
            if [tensor[:3] for tensor in found] != [(t.name, t.dtype, t.shape) for t in state]:
                raise FileError(f"{path} does not hold the weights of stage {stage}")
            # The outer step's momentum is part of the state and none of the model.
            model = {weight.name for weight in spec.shared(stage)}
            tensors.extend(tensor for tensor in found if tensor.name in model)
        return write_result(spec, tensors, out)


def write_result(spec: Spec, tensors: Sequence[TensorData], out: Path) -> Result:
    """Write config.json and model.safetensors from the whole model's parameters."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.dumps(spec.model.hugging_face(spec.config), indent=2, sort_keys=True) + "\n"
    write_file(out / "config.json", config.encode("ascii"))
    write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
    return read_result(out)


def read_result(directory: Path) -> Result:
    """The id of a result directory, from its bytes; FileError when a file is missing.

    id = BLAKE3(for each file: name length u16 ‖ name ‖ size u64 ‖ bytes), integers big-endian.
    """
    hasher, files = blake3(), []
    for name in RESULT_FILES:
        path = directory / name
        try:
            size = path.stat().st_size
            hasher.update(struct.pack("!H", len(name)) + name.encode() + struct.pack("!Q", size))
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    hasher.update(chunk)
        except OSError as error:
            raise FileError(f"result {path}: {error.strerror}") from error
        files.append((name, size))
    return Result(hasher.digest(), directory, tuple(files))
