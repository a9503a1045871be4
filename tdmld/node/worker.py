"""The worker process: `python -m tdmld.node.worker --socket FD --task JSON`.

It computes, and nothing else: no network, no keys, no configuration. What it may see is named in
its task; what it says goes as packets through one inherited socket (`channel.py`). The text, for
a stage that reads it, is a memory file whose descriptor comes through another one. Modes:

    live      draw the state of a slot, save boundary 0, then run each segment that is granted;
              after each: state, list (both synced), then the packet
    genesis   draw the state of a slot, save boundary 0, report the roots, end
    replay    load a state, run one segment from logged frames, write its list, end

Exit status 0 means that the task was done or that the serving process ended it; else a Failure
packet and the last lines on stderr say why.
"""

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tdmld.node.channel import Failure, FrameMemory, Genesis, Segment, Step, WorkerChannel
from tdmld.node.errors import ControlError
from tdmld.node.layout import disk_text, list_file, state
from tdmld.node.parentdeath import die_with_parent, leave_no_core
from tdmld.node.worker_task import TASK_BYTES, Task
from tdmld.train.channel import LogChannel
from tdmld.train.data import Tokens
from tdmld.train.digest import data_root
from tdmld.train.errors import FileError, TrainError
from tdmld.train.limits import SPEC_BYTES
from tdmld.train.numerics import check_environment, check_torch
from tdmld.train.segment import StepReport, write_list
from tdmld.train.spec import Spec, decode_spec

if TYPE_CHECKING:
    from tdmld.train.slot import Slot

log = logging.getLogger(__name__)

SALT_BYTES = 32
EXIT_FAILED = 1
EXIT_TASK = 2


def receive_text(spec: Spec, text_fd: int) -> Tokens:
    """The text that the carrier sent; FileError when it sent none or another one."""
    with socket.socket(fileno=text_fd) as source:
        _, descriptors, _, _ = socket.recv_fds(source, 16, 1)
    if len(descriptors) != 1:
        raise FileError("the carrier sent no text")
    try:
        return Tokens.from_memory(spec, descriptors[0])
    finally:
        os.close(descriptors[0])


def run_task(task: Task, end: socket.socket, memory_fd: int | None, text_fd: int | None) -> None:
    """Do the task. TrainError, OSError, ControlError; WorkerChannel.Ended when told to stop."""
    from tdmld.train.slot import Slot

    check_torch()
    with Path(task.spec).open("rb") as file:
        spec = decode_spec(file.read(SPEC_BYTES + 1))
    tokens = None if text_fd is None else receive_text(spec, text_fd)
    memory = None
    if memory_fd is not None:
        memory = FrameMemory(memory_fd, spec.links(task.lane, task.stage), spec.stages, spec.frame_bytes)
    channel = WorkerChannel(end, memory)
    slot = Slot.create(spec, task.stage, task.lane, tokens)
    directory = Path(task.directory)
    if task.mode == "replay":
        _replay(task, spec, slot, directory, channel)
        return
    slot.init_from_seed()
    shared, lane = slot.save(_new_state(directory, 0))
    channel.report(Genesis(shared, lane, data_root(spec.shards)))
    if task.mode == "live":
        _live(spec, slot, directory, channel)


def _live(spec: Spec, slot: "Slot", directory: Path, channel: WorkerChannel) -> None:
    from tdmld.train.runner import run_segment

    def on_step(report: StepReport) -> None:
        channel.report(
            Step(
                report.step,
                report.loss,
                report.seconds,
                report.waiting,
                report.verifying,
                report.gradient_norm,
            )
        )

    for segment in range(spec.rounds):
        channel.wait_for_grant(segment)
        record = run_segment(slot, segment, channel, on_step)
        slot.save(_new_state(directory, segment + 1))
        write_list(list_file(directory, segment), record, secrets.token_bytes(SALT_BYTES))
        channel.report(Segment(segment))


def _replay(task: Task, spec: Spec, slot: "Slot", directory: Path, channel: WorkerChannel) -> None:
    from tdmld.train.runner import run_segment

    slot.load(state(directory, task.segment))
    links = spec.links(task.lane, task.stage)
    with LogChannel(directory, task.segment, links, spec.frame_bytes) as frames:
        record = run_segment(slot, task.segment, frames, lambda report: None)
    path = list_file(directory, task.segment)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_list(path, record)
    channel.report(Segment(task.segment))


def _new_state(directory: Path, boundary: int) -> Path:
    path = state(directory, boundary)
    path.mkdir(parents=True, exist_ok=True)
    return path


def main(argv: Sequence[str]) -> int:
    """Run one worker; gives the exit status."""
    parser = argparse.ArgumentParser(description="A tdmld worker; started by the daemon.")
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--text", type=int)
    parser.add_argument("--task", required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(arguments.socket)
    leave_no_core()
    end = socket.socket(fileno=arguments.socket)
    try:
        check_environment()
        if len(arguments.task) > TASK_BYTES:
            raise ControlError("the task is too long")
        task = msgspec.json.decode(arguments.task, type=Task)
        os.nice(task.niceness)
        run_task(task, end, arguments.memory, arguments.text)
    except WorkerChannel.Ended:
        return 0
    except msgspec.MsgspecError as error:
        log.error("malformed task: %s", error)
        return EXIT_TASK
    except (TrainError, OSError, ControlError) as error:
        # The one boundary of this process: whatever stopped the task becomes its last words.
        text = disk_text(error) if isinstance(error, OSError) else str(error)
        log.error("%s: %s", type(error).__name__, text)
        try:
            WorkerChannel(end, None).report(Failure(text))
        except ControlError:
            log.error("and nobody is there to hear it")
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
