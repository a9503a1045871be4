"""A worker that cheats: it flips the lowest bit of one gradient value, once.

Put before a worker's command line (`launcher` in tdmld.toml). It runs the ordinary worker in this
process with one function of the segment runner wrapped; nothing of the product knows of it. It lies
only as the live worker of stage 0, at step 5; replays by the same machine are honest.
"""

import runpy
import sys
from typing import Any

import msgspec
import torch

from tdmld.node.worker_task import Task
from tdmld.train import runner

LIE_AT_STEP = 5


def lie(collect: Any) -> Any:
    def collected(slot: Any) -> list[torch.Tensor]:
        gradients: list[torch.Tensor] = collect(slot)
        if slot.step == LIE_AT_STEP and slot.stage == 0:
            gradients[-1].view(torch.int32).view(-1)[0] ^= 1
        return gradients

    return collected


def main(command: list[str]) -> None:
    # command: python -m tdmld.node.worker ARGUMENTS
    arguments = command[3:]
    task = msgspec.json.decode(arguments[arguments.index("--task") + 1], type=Task)
    if task.mode == "live":
        runner.collect_gradients = lie(runner.collect_gradients)
    sys.argv = [command[2], *arguments]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)


main(sys.argv[1:])
