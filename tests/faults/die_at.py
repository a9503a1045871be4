"""Workers that die, or let others die, at named points of the schedule.

Put before a worker's command line (`launcher` in tdmld.toml), followed by a directory. It runs the
ordinary worker in this process with a few functions wrapped; nothing of the product knows of it.
The directory holds

    plan.json          [{"name", "point", "slot", "step", "victims", "after"}, ...]
    <spec>/slot.<l>.<s>    pid of the worker that has the slot now, and of its daemon
    <spec>/log.<l>.<s>.<pid>    a line for each step that it began or ended: kind, step, time
    done.<name>        written just before the kill of that name: each happens once

A point is a place in the worker's program in a given step of a given slot. Victims are named
`worker:<l>.<s>` or `carrier:<l>.<s>`; all get SIGKILL, the process that reads the plan last.
`after` names a kill that must have happened before: a kill during the replay that follows it.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kin
import torch

from tdmld.node.channel import WorkerChannel
from tdmld.train import model, runner, segment
from tdmld.train import slot as slots
from tdmld.train.slot import Slot
from tdmld.train.spec import spec_bytes, spec_id

FORWARD, BACKWARD, BETWEEN = "forward", "backward", "between"
SYNCHRONISATION, SNAPSHOT, COMMITMENT = "synchronisation", "snapshot", "commitment"


class Reaper:
    """What one worker process knows of the plan. Idle until a live segment runs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._slot: Slot | None = None
        self._plan: list[dict[str, Any]] = []
        self._place = directory
        self._met: dict[tuple[str, int], int] = {}

    def live(self, slot: Slot) -> None:
        """A segment of a live slot begins."""
        if self._slot is None:
            self._slot = slot
            self._plan = json.loads((self._directory / "plan.json").read_text())
            self._place = self._directory / spec_id(spec_bytes(slot.spec)).hex()[:16]
            self._place.mkdir(exist_ok=True)
            where = self._place / f"slot.{self._name}"
            where.with_suffix(f".{os.getpid()}.new").write_text(f"{os.getpid()} {kin.daemon()}")
            where.with_suffix(f".{os.getpid()}.new").replace(where)

    @property
    def _name(self) -> str:
        assert self._slot is not None
        return f"{self._slot.lane}.{self._slot.stage}"

    def log(self, kind: str, step: int) -> None:
        """One line: "begin" or "end", the step, the time."""
        if self._slot is not None:
            with (self._place / f"log.{self._name}.{os.getpid()}").open("a") as file:
                file.write(f"{kind} {step} {time.monotonic()}\n")

    def reached(self, point: str, step: int, occasion: int = 0) -> None:
        """The worker stands at a point of the schedule; `occasion`: which time in this step."""
        if self._slot is None:
            return
        times = self._met[point, step] = self._met.get((point, step), -1) + 1
        for entry in self._plan:
            due = (entry["point"], entry["slot"], entry["step"]) == (point, self._name, step)
            if due and times == occasion and self._may(entry):
                with contextlib.suppress(FileExistsError):
                    (self._directory / f"done.{entry['name']}").open("x").close()
                    self._kill(entry["victims"])

    def _may(self, entry: dict[str, Any]) -> bool:
        after = entry.get("after")
        return after is None or (self._directory / f"done.{after}").exists()

    def _kill(self, victims: list[str]) -> None:
        self.log("kill", -1)
        pids = [pid for victim in victims for pid in self._pids(victim)]
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _pids(self, victim: str) -> Iterator[int]:
        kind, _, name = victim.partition(":")
        worker, daemon = map(int, (self._place / f"slot.{name}").read_text().split())
        if kind == "worker":
            yield worker
        else:
            yield from (
                pid
                for pid, parent, words in kin.processes()
                if parent == daemon and b"tdmld.node.carrier" in words
            )


def wrap(reaper: Reaper) -> None:
    """Put the points into the worker's program."""

    def around(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        setattr(owner, name, functools.wraps(getattr(owner, name))(make(getattr(owner, name))))

    def running(run: Any) -> Any:
        def run_segment(slot: Slot, number: int, channel: Any, *rest: Any, **named: Any) -> Any:
            if isinstance(channel, WorkerChannel):
                reaper.live(slot)
            return run(slot, number, channel, *rest, **named)

        return run_segment

    def stepping(run: Any) -> Any:
        def step(self: Any) -> Any:
            number = self.slot.step
            reaper.log("begin", number)
            reaper.reached(BETWEEN, number)
            found = run(self)
            reaper.log("end", number)
            return found

        return step

    def at(point: str) -> Callable[[Any], Any]:
        """Before the second call of a function in a step."""

        def wrapped(function: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if reaper._slot is not None:
                    reaper.reached(point, reaper._slot.step, occasion=1)
                return function(*arguments, **named)

            return call

        return wrapped

    def sending(send: Any) -> Any:
        def call(self: WorkerChannel, link: str, seq: int, payload: Any) -> None:
            send(self, link, seq, payload)
            if link.startswith("lane") and reaper._slot is not None:
                reaper.reached(SYNCHRONISATION, reaper._slot.step)

        return call

    def listing(write: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            write(*arguments, **named)
            # Lists are written while the next segment runs: the slot may stand elsewhere.
            if steps := arguments[1].steps:
                reaper.reached(COMMITMENT, steps[-1].step + 1)

        return call

    around(runner, "run_segment", running)
    around(runner._Step, "run", stepping)
    around(model.StageModule, "forward", at(FORWARD))
    around(torch.autograd, "backward", at(BACKWARD))
    around(slots, "begin_safetensors", at(SNAPSHOT))
    around(WorkerChannel, "send", sending)
    around(segment, "write_list", listing)


def main(arguments: list[str]) -> None:
    # arguments: DIRECTORY python -m MODULE ARGUMENTS
    directory, _, _, module, *rest = arguments
    wrap(Reaper(Path(directory)))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
