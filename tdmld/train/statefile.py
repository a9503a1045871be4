"""Snapshots: one safetensors file a part, written so that equal states are equal files.

Tensors stand in the order of their names, without gaps; the header is JSON with sorted keys and no
blanks, padded with blanks to a multiple of 8. Readers accept exactly this form, check sizes before
they read, and never run anything from the file. Neither torch nor numpy is needed.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, NamedTuple

import msgspec
from blake3 import blake3

from tdmld.files import Aside, write_aside
from tdmld.train import limits
from tdmld.train.digest import DIGEST_BYTES, Buffer, Leaf, digest, state_root
from tdmld.train.errors import FileError
from tdmld.train.spec import Spec

PARTS = ("shared", "lane")
ITEM_BYTES = {"F32": 4, "BF16": 2, "I64": 8}
_LENGTH = struct.Struct("<Q")
_NAME_CHARACTERS = 256


class TensorData(NamedTuple):
    """A tensor to write or as read: `data` holds its bytes, row-major and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Buffer


@dataclass(frozen=True)
class Manifest:
    """The leaves of a part, sorted by name, and their root."""

    leaves: tuple[Leaf, ...]
    root: bytes


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=2**40)], ...], msgspec.Meta(max_length=8)
    ]
    data_offsets: tuple[int, int]


class StateTensor(msgspec.Struct, frozen=True):
    """One tensor of a slot's state; `dtype` as safetensors spells it."""

    part: Literal["shared", "lane"]
    name: str
    dtype: str
    shape: tuple[int, ...]


def state_tensors(spec: Spec, stage: int) -> tuple[StateTensor, ...]:
    """Every tensor of a slot's state, shared part first, each part sorted by name.

    In `diloco` the shared part has the momentum of the outer step, too, and the lane part what was
    not told the other lanes yet.
    """
    weights = spec.weights(stage)

    def like_weights(part: Literal["shared", "lane"], kind: str) -> list[StateTensor]:
        return [StateTensor(part, f"{kind}.{w.name}", "F32", w.shape) for w in weights]

    shared = [StateTensor("shared", w.name, w.dtype, w.shape) for w in spec.shared(stage)]
    lane = [*like_weights("lane", "exp_avg"), *like_weights("lane", "exp_avg_sq")]
    lane.append(StateTensor("lane", "step", "I64", ()))
    if spec.is_diloco:
        shared += like_weights("shared", "outer")
        lane += like_weights("lane", "residual")
    parts = (sorted(part, key=lambda tensor: tensor.name) for part in (shared, lane))
    return tuple(tensor for part in parts for tensor in part)


def part_file(part: str) -> str:
    """File name of a part of a state: shared or lane."""
    return f"{part}.safetensors"


def _header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The header for tensors (name, dtype, shape), sorted by name."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    return text + b" " * (-len(text) % 8)


def write_safetensors(
    path: Path, tensors: Sequence[TensorData], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors, in any order given, durably. The same tensors always give the same file.

    ValueError for a tensor whose bytes do not fit its shape; OSError leaves an old file in place.
    """
    begin_safetensors(path, tensors, metadata).settle()


def begin_safetensors(
    path: Path, tensors: Sequence[TensorData], metadata: Mapping[str, str] | None = None
) -> Aside:
    """As `write_safetensors`, but nothing is synced or in its place before the caller settles it.
    The tensors may change meanwhile."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    for before, tensor in zip([None, *ordered], ordered, strict=False):
        size = prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if memoryview(tensor.data).nbytes != size or (before and before.name == tensor.name):
            raise ValueError(f"tensor {tensor.name}: wrong size, or the second of this name")
    header = _header([tensor[:3] for tensor in ordered], metadata or {})
    chunks: list[bytes | memoryview] = [_LENGTH.pack(len(header)), header]
    chunks += [memoryview(tensor.data) for tensor in ordered]
    return write_aside(path, chunks)


class StateFile:
    """A snapshot file, mapped. Iterates over its tensors in the order of names, without copying.

    FileError when the file is not of the form that `write_safetensors` makes, or larger than
    `limit` bytes.
    """

    def __init__(self, path: Path, limit: int = limits.STATE_FILE_BYTES) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FileError(f"snapshot {path}: {error}") from error
        self._view = memoryview(self._map)
        try:
            if len(self._view) > limit:
                raise FileError(f"{path}: {len(self._view)} bytes, at most {limit} are allowed")
            self._entries, self._data = self._parse()
        except BaseException:
            self.close()
            raise

    def _parse(self) -> tuple[list[tuple[str, _Entry]], int]:
        view, path = self._view, self.path
        length = _LENGTH.unpack_from(view)[0] if len(view) >= 8 else -1
        if not 2 <= length <= min(limits.STATE_HEADER_BYTES, len(view) - 8) or length % 8:
            raise FileError(f"{path} is no snapshot: header of {length} bytes; fetch it again")
        raw = bytes(view[8 : 8 + length])
        try:
            found = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            metadata = found.pop("__metadata__", None)
            names = dict(msgspec.json.decode(metadata, type=dict[str, str])) if metadata else {}
            entries = [(k, msgspec.json.decode(v, type=_Entry)) for k, v in found.items()]
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise FileError(f"{path} is no snapshot: {error}; fetch it again") from error
        if len(entries) > limits.STATE_TENSORS:
            raise FileError(f"{path}: {len(entries)} tensors, at most {limits.STATE_TENSORS}")
        entries.sort(key=lambda pair: pair[0])
        offset = 0
        for name, entry in entries:
            size = prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 0)
            if entry.data_offsets != (offset, offset + size) or entry.dtype not in ITEM_BYTES:
                raise FileError(f"{path}: tensor {name[:64]} has a wrong dtype, size or place")
            if not name.isascii() or not 0 < len(name) <= _NAME_CHARACTERS:
                raise FileError(f"{path}: a tensor's name must be short ASCII")
            offset += size
        shapes = [(name, entry.dtype, entry.shape) for name, entry in entries]
        if 8 + length + offset != len(view) or _header(shapes, names) != raw:
            raise FileError(f"{path} is truncated or not written canonically; fetch it again")
        return entries, 8 + length

    def __iter__(self) -> Iterator[TensorData]:
        for name, entry in self._entries:
            first, last = entry.data_offsets
            data = self._view[self._data + first : self._data + last]
            yield TensorData(name, entry.dtype, entry.shape, data)

    def data(self) -> memoryview:
        """The bytes of all tensors in the order of names."""
        return self._view[self._data :]

    def manifest(self, part: str) -> Manifest:
        """The leaves and root of the file as the part `part`."""
        leaves = tuple(
            Leaf(name, part, dtype, shape, digest(data)) for name, dtype, shape, data in self
        )
        return Manifest(leaves, state_root(leaves))

    def close(self) -> None:
        """Unmap the file, at once or when the last tensor's data that was given out is dropped."""
        self._view.release()
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> "StateFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_manifest(
    path: Path, limit: int = limits.STATE_FILE_BYTES, *, part: str | None = None
) -> Manifest:
    """The leaves and root of a snapshot file, recomputed from its bytes.

    `part` is shared or lane; without it the file's name says so. FileError as for StateFile.
    """
    part = path.name.partition(".")[0] if part is None else part
    if part not in PARTS:
        raise ValueError(f"a state has the parts {PARTS}, not {part!r}")
    with StateFile(path, limit) as file:
        return file.manifest(part)


def keyed_state_hash(key: bytes, files: Sequence[Path]) -> bytes:
    """Proof of holding a state: BLAKE3, keyed by 32 bytes nobody knew before, of all leaf bytes.

    `files` are the parts' files, shared before lane; within each the tensors stand by name.
    """
    if len(key) != DIGEST_BYTES:
        raise ValueError("the key has 32 bytes")
    hasher = blake3(key=key)
    for path in files:
        with StateFile(path) as file:
            hasher.update(file.data())
    return hasher.digest()
