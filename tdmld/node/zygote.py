"""The process that workers are forked from: `python -m tdmld.node.zygote --control FD`.

Importing torch and the models' code takes seconds and a quarter of a gigabyte; here it happens
once. A worker that is forked starts in milliseconds, shares those pages with all others, and
computes the same bits as one that was started by itself: the environment is pinned before the
imports, nothing has run yet, and no thread exists that a fork would lose.

    daemon -> zygote   Fork(id, task, memory, text) with descriptors: the worker's packet socket,
                       its log, then frame memory and the text's socket if the flags say so
    zygote -> daemon   Ready(); Forked(id, pid) with a pidfd, before the worker can be reaped;
                       Ended(pid, status), after its process group was killed and it was reaped

The zygote ends when the daemon does (end of file, parent-death signal), its workers with it (theirs
belongs to the zygote). Once a thread exists, no worker is forked any more: whoever asks starts a
process of its own.
"""

import argparse
import array
import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tdmld.node.control import MESSAGE_BYTES
from tdmld.node.errors import ControlError
from tdmld.node.parentdeath import die_with_parent, leave_no_core
from tdmld.node.worker_task import TASK_BYTES
from tdmld.train.numerics import check_environment, check_torch

log = logging.getLogger(__name__)

MAX_FORK_DESCRIPTORS = 4
NOT_FORKED = -1
PRELOADED = (
    "tdmld.node.worker",
    "tdmld.train.runner",
    "transformers.models.llama.modeling_llama",
)
"""The last one for what the code of all models imports, which transformers puts off."""


class Fork(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Fork a worker for a task (`worker_task`, as text)."""

    id: int
    task: str
    memory: bool
    text: bool


class Ready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Everything is imported."""


class Forked(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The worker of request `id` runs. NOT_FORKED: it could not be, and no pidfd comes along."""

    id: int
    pid: int


class Ended(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A worker ended; negative: the signal."""

    pid: int
    status: int


FromZygote = Ready | Forked | Ended
_encoder = msgspec.msgpack.Encoder()
_fork = msgspec.msgpack.Decoder(Fork)
_from_zygote = msgspec.msgpack.Decoder(FromZygote)


def encode(message: Fork | Ready | Forked | Ended) -> bytes:
    """The bytes of a message. ControlError when the task is too long."""
    if isinstance(message, Fork) and len(message.task) > TASK_BYTES:
        raise ControlError("the task is too long")
    return _encoder.encode(message)


def decode(raw: bytes) -> FromZygote:
    """What a zygote said; ControlError."""
    try:
        return _from_zygote.decode(raw)  # type: ignore[no-any-return]
    except msgspec.MsgspecError as error:
        raise ControlError(f"malformed message of the zygote: {error}") from error


class Work(NamedTuple):
    """What a forked worker is to do: `worker.serve` takes it."""

    task: str
    end: socket.socket
    memory: int | None
    text: int | None


class Zygote:
    """Serves one daemon. `run` returns in the zygote when the daemon is gone, and in each forked
    worker with its work."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pidfds: dict[int, int] = {}
        """pidfd -> pid of living workers."""
        self._poll = select.poll()

    def run(self) -> Work | None:
        """Fork and reap until the daemon closes the socket."""
        self._say(Ready())
        self._poll.register(self._control, select.POLLIN)
        while True:
            for ready, _ in self._poll.poll():
                if ready != self._control.fileno():
                    self._reap(ready)
                    continue
                raw, descriptors, _, _ = socket.recv_fds(
                    self._control, MESSAGE_BYTES, MAX_FORK_DESCRIPTORS
                )
                if not raw:
                    return None
                work = self._begin(_fork.decode(raw), descriptors)
                if work is not None:
                    return work

    def _begin(self, request: Fork, descriptors: list[int]) -> Work | None:
        """Fork. In the zygote None; in the worker its work."""
        zygote, pid = os.getpid(), NOT_FORKED
        if len(os.listdir("/proc/self/task")) > 1:
            log.warning("a thread runs here; workers cannot be forked any more")
        else:
            try:
                pid = os.fork()
            except OSError as error:
                log.warning("a worker cannot be forked: %s", error)
        if pid == 0:
            return self._become(request, descriptors, zygote)
        for descriptor in descriptors:
            os.close(descriptor)
        if pid == NOT_FORKED:
            self._say(Forked(request.id, pid))
            return None
        pidfd = os.pidfd_open(pid)
        self._pidfds[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._say(Forked(request.id, pid), pidfd)
        return None

    def _become(self, request: Fork, descriptors: list[int], zygote: int) -> Work:
        """In the worker: a session, a log and descriptors of its own, nobody else's."""
        os.setsid()
        self._control.close()
        for pidfd in self._pidfds:
            os.close(pidfd)
        end, output, *others = descriptors
        os.dup2(output, sys.stdout.fileno())
        os.dup2(output, sys.stderr.fileno())
        os.close(output)
        # What die_with_parent looks at tells whether the daemon lives, not whether the zygote does.
        # It sets the signal; who had died before it did is seen by the new parent.
        sock = socket.socket(fileno=end)
        die_with_parent(end)
        if os.getppid() != zygote:
            sys.exit("the process that forked this one is gone")
        memory = others.pop(0) if request.memory else None
        text = others.pop(0) if request.text else None
        return Work(request.task, sock, memory, text)

    def _reap(self, pidfd: int) -> None:
        pid = self._pidfds.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Not reaped yet, so the number still names this worker's group and nobody else's.
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self._say(Ended(pid, os.waitstatus_to_exitcode(status)))

    def _say(self, message: Ready | Forked | Ended, *descriptors: int) -> None:
        rights = array.array("i", descriptors).tobytes()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        self._control.sendmsg([encode(message)], ancillary)


def import_everything() -> None:
    """Everything that a worker imports, with torch's settings made."""
    check_environment()
    check_torch()
    for name in PRELOADED:
        importlib.import_module(name)

    # What is here now is never garbage: a collection in a worker would only copy its pages.
    gc.collect()
    gc.freeze()


def main(argv: Sequence[str]) -> int:
    """Run a zygote or, in a fork, a worker; gives the exit status."""
    parser = argparse.ArgumentParser(description="The process tdmld workers are forked from.")
    parser.add_argument("--control", type=int, required=True)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(arguments.control)
    leave_no_core()
    import_everything()
    try:
        work = Zygote(socket.socket(fileno=arguments.control)).run()
    except ConnectionError:
        return 0  # the daemon is gone
    if work is None:
        return 0
    from tdmld.node.worker import say_to_stderr, serve

    say_to_stderr()
    return serve(work.task, work.end, work.memory, work.text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
