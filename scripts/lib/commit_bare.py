"""Runs a module of the product without evidence: for `scripts/bench commit`, and for nothing else.

    commit_bare.py -m MODULE ARGUMENTS      stands where the Python interpreter would stand

Workers and carriers are the ordinary ones, with a few functions replaced in their process: every
digest is 32 zero bytes, nothing is signed or checked, and frames pass through memory instead of a
log. The product itself has no such switch.
"""

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NO_DIGEST = bytes(32)
NO_SIGNATURE = bytes(64)


def no_digest(*_: object) -> bytes:
    return NO_DIGEST


def no_root(leaves: Iterable[object]) -> bytes:
    """The leaves are still asked for: they are views of what is there, made for nothing else."""
    return NO_DIGEST


def bare_worker() -> None:
    """Digests of frames, roots of gradients, digests of the tensors of a state."""
    from tdmld.train import runner, slot

    runner.digest = no_digest
    runner.merkle_root = no_root
    slot.digest = no_digest


def bare_carrier() -> None:
    """Digests and signatures of frames, and their logs."""
    from tdmld.node import link, linkserver, ring

    linkserver.digest = no_digest
    link.LinkSigner.sign_frame = lambda *_: NO_SIGNATURE
    link.LinkSigner.check_frame = lambda *_: True

    kept: dict[tuple[str, str, int], bytes] = {}

    async def append(
        self: Any, name: str, way: str, seq: int, signature: bytes, payload: Any, value: bytes
    ) -> None:
        kept[name, way, seq] = bytes(payload)
        # Far more than any neighbour lags behind.
        kept.pop((name, way, seq - KEPT_FRAMES), None)

    async def read_sent(self: Any, name: str, seq: int, buffer: Any) -> tuple[bytes, Any]:
        return NO_SIGNATURE, memoryview(kept[name, "sent", seq])

    async def read_received(self: Any, name: str, seq: int, place: Any) -> None:
        place[:] = kept[name, "received", seq]

    def length(self: Any, name: str, way: str, seq: int) -> int:
        return len(kept[name, way, seq])

    ring.SlotRing.append = append
    ring.SlotRing.read_sent = read_sent
    ring.SlotRing.read_received = read_received
    ring.SlotRing.length = length


KEPT_FRAMES = 16


def main(arguments: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    _, module, *rest = arguments
    if module.endswith(".carrier"):
        bare_carrier()
    elif module.endswith((".worker", ".zygote")):
        bare_worker()
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
