"""Where a worker computes: the CPU, or the one GPU that its environment lets it see.

Copies between host and GPU go through page-locked buffers, on streams of their own: a frame that
leaves waits for its own copy alone, not for what was queued behind it, and one that arrives is
copied while the GPU computes. On the CPU all of this is nothing. Bits on a GPU are those of its
class: model, driver-independent libraries and the pins of `numerics`.
"""

from functools import lru_cache

import numpy as np
import torch

from tdmld.train.digest import Buffer
from tdmld.train.errors import NumericsError

CPU = torch.device("cpu")


def open_device(name: str) -> torch.device:
    """The device "cpu" or "cuda:0", ready; NumericsError when there is no such GPU."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise NumericsError('no GPU can be used by torch here; set device = "cpu"')
        torch.cuda.set_device(device)
    return device


class _Copies:
    """The two streams on which a GPU's copies run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in page-locked memory; returns when it is there."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            done.record(self._out)
        tensor.record_stream(self._out)  # its memory is not given to others before
        done.synchronize()
        return host

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A copy on the GPU of a page-locked tensor; what is computed next waits for it."""
        now = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._in):
            tensor = host.to(self.device, non_blocking=True)
        now.wait_stream(self._in)
        tensor.record_stream(now)
        return tensor


@lru_cache(maxsize=1)
def _copies(device: torch.device) -> _Copies:
    return _Copies(device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in host memory: itself on the CPU, else a copy that is complete."""
    return tensor if tensor.device.type == "cpu" else _copies(tensor.device).to_host(tensor)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor where the model is: itself on the CPU."""
    return tensor if device.type == "cpu" else _copies(device).to_device(tensor.pin_memory())


def bytes_on(payload: Buffer, device: torch.device) -> torch.Tensor:
    """Bytes as a uint8 tensor of their own memory where the model is."""
    if device.type == "cpu":
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    host = torch.empty(len(payload), dtype=torch.uint8, pin_memory=True)
    host.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
    return _copies(device).to_device(host)
