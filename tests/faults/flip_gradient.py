"""A worker that cheats: it flips the lowest bit of one gradient value, once.

Put before a worker's command line (`launcher` in tdmld.toml), followed by the path of a file. It
runs the ordinary worker in this process with two functions of the segment runner wrapped; nothing
of the product knows of it. It lies only as a live worker of stage 0, at step 5, and only if nobody
lied before: who does makes the file, with the process id of its daemon in it. Replays are honest.
"""

import contextlib
import runpy
import sys
from pathlib import Path
from typing import Any

import kin
import torch

from tdmld.node.channel import WorkerChannel
from tdmld.train import runner

LIE_AT_STEP = 5


def lie(told: Path) -> None:
    """Wrap the runner."""
    collect, run = runner.collect_gradients, runner.run_segment
    live = [False]

    def run_segment(slot: Any, segment: int, channel: Any, *rest: Any, **named: Any) -> Any:
        live[0] = isinstance(channel, WorkerChannel)
        return run(slot, segment, channel, *rest, **named)

    def collected(slot: Any) -> list[torch.Tensor]:
        gradients = collect(slot)
        if live[0] and slot.step == LIE_AT_STEP and slot.stage == 0:
            with contextlib.suppress(FileExistsError), told.open("x") as file:
                file.write(str(kin.daemon()))
                gradients[-1].view(torch.int32).view(-1)[0] ^= 1
        return gradients

    runner.run_segment, runner.collect_gradients = run_segment, collected


def main(arguments: list[str]) -> None:
    # arguments: FILE python -m MODULE ARGUMENTS
    told, _, _, module, *rest = arguments
    lie(Path(told))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
