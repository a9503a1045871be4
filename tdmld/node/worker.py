"""The worker process: `python -m tdmld.node.worker --socket FD --task JSON`, or a fork (`zygote`).

It computes, and nothing else: no network, no keys, no configuration. What it may see is named in
its task; what it says goes as packets through one inherited socket (`channel.py`). The text, for
a stage that reads it, is a memory file whose descriptor comes through another one. Modes:

    live      take the state at the boundary where the slot begins (or make boundary 0), report its
              roots, then run each segment that is granted; after each: state, list (both synced),
              then the packet, while the next segment runs (`segmentkeeper`)
    genesis   make the slot's boundary 0, report its roots, end
    replay    load a state, run one segment from logged frames, write its list, end

A live worker that begins before segments that the slot has run already runs them again: the same
comes out, and the list that is there stays (the salt of its seal may be on the chain). Another
record than before is an end: this machine cannot be relied on.

Exit status 0 means that the task was done or that the serving process ended it; else the status
(`worker_task`), a Failure packet and the last lines on stderr say why.
"""

import argparse
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tdmld.node.channel import (
    Failure,
    FrameMemory,
    Genesis,
    Segment,
    Step,
    WorkerChannel,
    link_memory,
)
from tdmld.node.errors import ControlError, FailureCause
from tdmld.node.layout import contributions, disk_text, list_file, state
from tdmld.node.parentdeath import die_with_parent, leave_no_core
from tdmld.node.segmentkeeper import SegmentKeeper
from tdmld.node.worker_task import EXIT_TASK, EXITS, Task, decode_task
from tdmld.train.channel import LogChannel
from tdmld.train.data import Tokens
from tdmld.train.digest import data_root
from tdmld.train.errors import FileError, TrainError
from tdmld.train.limits import SPEC_BYTES
from tdmld.train.numerics import check_environment, check_torch, worker_device
from tdmld.train.segment import StepReport, write_list
from tdmld.train.spec import Spec, decode_spec

if TYPE_CHECKING:
    from tdmld.train.slot import Slot

log = logging.getLogger(__name__)

OPEN_FILES = 512
"""Descriptors that a worker may have: sockets, state files, mapped logs, what torch opens."""


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
    """Do the task. TrainError, OSError, ControlError, MemoryError, RuntimeError of torch;
    WorkerChannel.Ended when told to stop."""
    from tdmld.train.slot import Slot

    check_torch()
    with Path(task.spec).open("rb") as file:
        spec = decode_spec(file.read(SPEC_BYTES + 1))
    tokens = None if text_fd is None else receive_text(spec, text_fd)
    memory = None
    if memory_fd is not None:
        memory = FrameMemory(memory_fd, link_memory(spec, task.lane, task.stage))
        os.close(memory_fd)
    channel = WorkerChannel(end, memory)
    slot = Slot.create(spec, task.stage, task.lane, tokens, worker_device())
    directory = Path(task.directory)
    if task.mode == "replay":
        _replay(task, spec, slot, directory, channel)
        return
    shared, lane = _begin(task, slot, directory)
    channel.report(Genesis(shared, lane, data_root(spec.shards)))
    if task.mode == "live":
        _live(task, spec, slot, directory, channel)


def _begin(task: Task, slot: "Slot", directory: Path) -> tuple[bytes, bytes]:
    """The state where the slot begins, on disk and in memory; gives its roots."""
    if not task.draw:
        return slot.load(state(directory, task.boundary))
    if task.given:
        slot.init_from_file(*map(Path, task.given))
    else:
        slot.init_from_seed()
    return slot.save(_new_state(directory, 0))


def _live(task: Task, spec: Spec, slot: "Slot", directory: Path, channel: WorkerChannel) -> None:
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

    with SegmentKeeper(directory, channel) as keeper:
        for segment in range(task.boundary, spec.rounds):
            if not channel.may_run(segment):
                # What it waits for may follow from the segment that is being kept.
                keeper.wait()
            included = channel.wait_for_grant(segment)
            record = run_segment(
                slot,
                segment,
                channel,
                on_step,
                included=included,
                contributions=contributions(directory),
            )
            keeper.wait()
            keeper.keep(record, slot.begin_save(_new_state(directory, segment + 1)))
        keeper.wait()


def _replay(task: Task, spec: Spec, slot: "Slot", directory: Path, channel: WorkerChannel) -> None:
    from tdmld.train.runner import run_segment

    segment = task.boundary
    slot.load(state(directory, segment))
    links = spec.logged_links(task.lane, task.stage, segment)
    with LogChannel(directory, segment, links, spec.frame_bytes) as frames:
        record = run_segment(
            slot,
            segment,
            frames,
            lambda report: None,
            included=task.included,
            contributions=contributions(directory),
        )
    path = list_file(directory, segment)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_list(path, record)
    channel.report(Segment(segment))


def _new_state(directory: Path, boundary: int) -> Path:
    path = state(directory, boundary)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _limit(task: Task) -> None:
    """What this process may take of the machine. OSError, ValueError when that cannot be set."""
    os.nice(task.niceness)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    if task.memory:
        _lower(resource.RLIMIT_DATA, task.memory)


def _lower(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    limit = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (limit, limit))


def describe(error: Exception) -> tuple[FailureCause, str] | None:
    """Why a task could not be done, and that in words; None for a defect of the program."""
    text = str(error) or type(error).__name__
    match error:
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return FailureCause.DISK_FULL, disk_text(error)
        case OSError() if error.errno == errno.ENOMEM:
            return FailureCause.OUT_OF_MEMORY, f"out of memory: {text}"
        case MemoryError():
            return FailureCause.OUT_OF_MEMORY, f"out of memory: {text}"
        case TrainError():
            return FailureCause.REFUSED, text
        case OSError() | ControlError():
            return FailureCause.DIED, text
    torch = sys.modules.get("torch")
    line = text.partition("\n")[0]
    if torch is None or not isinstance(error, RuntimeError):
        return None
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        # The CPU allocator raises a plain RuntimeError.
        return FailureCause.OUT_OF_MEMORY, f"out of memory: {line}"
    if isinstance(error, torch.AcceleratorError) or "CUDA" in line or "cuDNN" in line:
        return FailureCause.DEVICE, f"the device failed: {line}"
    return None


def serve(task_text: str, end: socket.socket, memory_fd: int | None, text_fd: int | None) -> int:
    """Do one task; gives the exit status of this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(end.fileno())
    leave_no_core()
    try:
        check_environment()
        task = decode_task(task_text)
        _limit(task)
        run_task(task, end, memory_fd, text_fd)
    except WorkerChannel.Ended:
        return 0
    except msgspec.MsgspecError as error:
        log.error("malformed task: %s", error)
        return EXIT_TASK
    except (TrainError, OSError, ControlError, MemoryError, RuntimeError) as error:
        # The one boundary of this process: whatever stopped the task becomes its last words.
        found = describe(error)
        if found is None:
            raise
        cause, text = found
        log.error("%s: %s", type(error).__name__, text)
        try:
            WorkerChannel(end, None).report(Failure(text, cause.value))
        except ControlError:
            log.error("and nobody is there to hear it")
        return EXITS[cause]
    return 0


def say_to_stderr() -> None:
    """Log lines go to this process's stderr, which is its own file."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        force=True,
    )


def main(argv: Sequence[str]) -> int:
    """Run one worker; gives the exit status."""
    parser = argparse.ArgumentParser(description="A tdmld worker; started by the daemon.")
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--text", type=int)
    parser.add_argument("--task", required=True)
    arguments = parser.parse_args(argv)
    say_to_stderr()
    end = socket.socket(fileno=arguments.socket)
    return serve(arguments.task, end, arguments.memory, arguments.text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
