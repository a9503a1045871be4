"""Pinned numerics: what must be equal in two processes for their bits to be equal.

`pinned_environment` is set by whoever starts a worker; the worker calls `check_environment` before
and `check_torch` after importing torch. Dispatch paths of the CPU are taken as found: they belong
to the class of the machine, and the class is found out by golden segments, not by names.
"""

import os
import zlib
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version

from tdmld.train.digest import digest
from tdmld.train.errors import NumericsError
from tdmld.train.spec import Spec, spec_bytes, spec_id
from tdmld.train.wireformat import split_name

PROGRAM_VERSION = 1
"""Raised whenever the arithmetic of a segment changes."""
ATTENTION = "eager"
"""Plain matrix products and a softmax: no kernel choice depends on shapes or masks."""
EXPERTS = "eager"
"""Experts one after the other, in their order."""

_SET = {
    "OMP_NUM_THREADS": "1",
    "OMP_DYNAMIC": "FALSE",
    "MKL_NUM_THREADS": "1",
    "MKL_DYNAMIC": "FALSE",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Empty: the worker computes on the CPU; else the number of its one GPU."""
_CUDA = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "NVIDIA_TF32_OVERRIDE": "0",
}
"""What makes a GPU's products deterministic, and of full precision."""
_UNSET = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Variables that choose code paths."""
_PACKAGES = ("numpy", "safetensors", "torch", "transformers")


def _pins(device: str) -> dict[str, str]:
    """The variables for a device "cpu" or "cuda:<number>"."""
    kind, _, number = device.partition(":")
    return _SET | ({_VISIBLE: ""} if kind == "cpu" else {**_CUDA, _VISIBLE: number})


def pinned_environment(
    base: Mapping[str, str] | None = None, device: str = "cpu"
) -> dict[str, str]:
    """The environment of a worker: `base` (the own one by default) with the pins forced.

    `device` is "cpu", or "cuda:<number>" with the number that the PCI bus gives the GPU.
    """
    given = os.environ if base is None else base
    return {key: value for key, value in given.items() if key not in _UNSET} | _pins(device)


def pin_process(environ: MutableMapping[str, str] = os.environ) -> None:
    """Force the pins on this process, before torch is imported (`reference`, `evaluate`)."""
    for key in _UNSET:
        environ.pop(key, None)
    environ.update(_pins("cpu"))


def worker_device(environ: Mapping[str, str] = os.environ) -> str:
    """Where this process computes, as torch calls it: "cpu", or "cuda:0", the one that it sees."""
    return "cuda:0" if environ.get(_VISIBLE) else "cpu"


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """NumericsError unless the pins hold; for a worker, before it imports torch."""
    number = environ.get(_VISIBLE, "")
    pins = _pins(f"cuda:{number}" if number.isdecimal() else "cpu")
    wrong = [key for key, value in pins.items() if environ.get(key) != value]
    wrong += [key for key in _UNSET if key in environ]
    if wrong:
        raise NumericsError(
            f"environment differs from the pinned one in {', '.join(sorted(wrong))}; "
            "start the worker with pinned_environment()"
        )


def check_torch() -> None:
    """Fix torch's own settings and check them. Imports torch."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs time and could hide nothing: nothing here reads it unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if torch.get_num_threads() != 1 or torch.get_float32_matmul_precision() != "highest":
        raise NumericsError(
            f"torch computes with {torch.get_num_threads()} threads and "
            f"{torch.get_float32_matmul_precision()} products; both are pinned to 1 and highest"
        )


def program_hash(spec: Spec) -> bytes:
    """Identity of the arithmetic: spec, program version, attention, pins and package versions."""
    lines = [
        f"program {PROGRAM_VERSION}",
        f"attention {ATTENTION}",
        f"experts {EXPERTS}",
        *(f"{key}={value}" for key, value in sorted(_pins("cpu").items())),
        *(f"{package} {version(package)}" for package in _PACKAGES),
    ]
    wires = (spec.train.wire,) if isinstance(spec.train.wire, str) else spec.train.wire
    if any(split_name(wire)[1] for wire in wires):
        lines.append(f"zlib {zlib.ZLIB_RUNTIME_VERSION}")
    return digest(b"tdmld program 1", spec_id(spec_bytes(spec)), "\n".join(lines).encode())
