"""The class that a machine's asks name: machines whose arithmetic should be bit-identical.

A name proves nothing; audits do. It groups machines of one instruction set, one set of vector
extensions and one build of each numeric package, the things on which bits were seen to depend.
"""

import platform
from importlib.metadata import version
from pathlib import Path

from tdmld.chain.crypto import sha256

_PACKAGES = ("numpy", "torch", "transformers")
_CPU_INFO_BYTES = 1 << 16


def machine_class() -> str:
    """For example `x86_64-torch2.13.0-9f31c0aa`; at most 64 characters."""
    packages = [f"{package} {version(package)}" for package in _PACKAGES]
    told = "\n".join([platform.machine(), _vector_extensions(), *packages])
    torch = version("torch").partition("+")[0]
    return f"{platform.machine()}-torch{torch}-{sha256(told.encode()).hex()[:8]}"


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
