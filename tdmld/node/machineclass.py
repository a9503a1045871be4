"""The class that a machine's asks name: machines whose arithmetic should be bit-identical.

A name proves nothing; audits do. It groups machines of one instruction set, one set of vector
extensions and one build of each numeric package, the things on which bits were seen to depend; or,
where a GPU computes, its model and the builds of the libraries whose kernels it runs.
"""

import platform
import re
from importlib.metadata import distributions, version
from pathlib import Path

from tdmld.chain.crypto import sha256
from tdmld.errors import UserError

_PACKAGES = ("numpy", "torch", "transformers")
_CPU_INFO_BYTES = 1 << 16
_DRIVER = Path("/proc/driver/nvidia")


def machine_class(device: str = "cpu") -> str:
    """For example `x86_64-torch2.13.0-9f31c0aa`, or `nvidia-h100-80gb-hbm3-torch2.13.0-41ac07e2`;
    at most 64 characters. UserError when there is no such GPU."""
    packages = [f"{package} {version(package)}" for package in _PACKAGES]
    torch = version("torch").partition("+")[0]
    if device == "cpu":
        name, facts = platform.machine(), [_vector_extensions()]
    else:
        model = _gpu_model(int(device.partition(":")[2]))
        name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:32]
        facts = [model, *_gpu_libraries()]
    told = "\n".join([name, *facts, *packages])
    return f"{name}-torch{torch}-{sha256(told.encode()).hex()[:8]}"


def _gpu_model(number: int) -> str:
    """The model of a GPU, counted by PCI address, as the driver tells it without being loaded."""
    paths = sorted(_DRIVER.glob("gpus/*/information"))
    if number < len(paths):
        with paths[number].open("rb") as file:
            text = file.read(_CPU_INFO_BYTES).decode("ascii", "replace")
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model" and value.strip():
                return value.strip()
    raise UserError(
        f"there is no GPU {number} on this machine",
        why=f"the NVIDIA driver tells of {len(paths)} in {_DRIVER}",
        next='set device = "cpu", or the number of one that is there',
        exit_code=2,
    )


def _gpu_libraries() -> list[str]:
    """Name and version of each installed library with kernels for GPUs, and torch's build."""
    found = {
        f"{name} {distribution.version}"
        for distribution in distributions()
        if (name := str(distribution.metadata["Name"]).lower()).startswith("nvidia-")
    }
    return [*sorted(found), f"torch {version('torch')}"]


def _vector_extensions() -> str:
    """The CPU's flags that kernels dispatch on, in one order; empty where nothing tells."""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            text = file.read(_CPU_INFO_BYTES).decode("ascii", "replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            kept = (f for f in value.split() if f.startswith(("avx", "fma", "amx", "sve", "asimd")))
            return " ".join(sorted(kept))
    return ""
