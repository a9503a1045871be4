"""The initial draw: every machine draws the same weights from (seed, parameter name) alone.

    key    = BLAKE3("tdmld init 1" ‖ seed u64 big-endian ‖ parameter name in the whole model)
    stream = BLAKE3 XOF of nothing, keyed; four little-endian u16 a value, row-major
    value  = float32(sum of the four - 131070) * float32(std / 37837.23)

A sum of four uniforms has nearly a normal shape; the sum is exact, so there is one rounding.
"""

import struct

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from tdmld.train.family import Weight
from tdmld.train.spec import Spec

INIT_DOMAIN = b"tdmld init 1"
_SPREAD = 37837.23
"""Standard deviation of a sum of four uniform u16."""
_CHUNK = 1 << 18


def draw_normal(seed: int, name: str, count: int, std: float) -> NDArray[np.float32]:
    """`count` values for the parameter `name`, in row-major order."""
    key = blake3(INIT_DOMAIN + struct.pack("!Q", seed) + name.encode("ascii")).digest()
    stream = blake3(b"", key=key)
    scale = np.float32(std / _SPREAD)
    values = np.empty(count, dtype=np.float32)
    for at in range(0, count, _CHUNK):
        here = min(_CHUNK, count - at)
        raw = np.frombuffer(stream.digest(length=8 * here, seek=8 * at), dtype="<u2")
        sums = raw.reshape(here, 4).sum(axis=1, dtype=np.int32)
        values[at : at + here] = (sums - 131070).astype(np.float32) * scale
    return values


def draw_weight(spec: Spec, weight: Weight) -> NDArray[np.float32] | NDArray[np.int64]:
    """The first value of a parameter or buffer, in its shape."""
    if weight.initial == "normal":
        return draw_normal(spec.seed, weight.name, weight.count, weight.std).reshape(weight.shape)
    fill, dtype = int(weight.initial == "ones"), {"F32": np.float32, "I64": np.int64}[weight.dtype]
    return np.full(weight.shape, fill, dtype=dtype)
