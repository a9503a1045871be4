"""A child process that does not outlive whoever started it, and leaves no image of itself."""

import ctypes
import resource
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(channel: int) -> None:
    """In a child: have the kernel kill it when the *thread* that started it ends. OSError.

    `channel` is the inherited socket whose other end the parent holds: it tells whether the parent
    ended before this call. Process ids do not: in a container the parent may have the number 1, and
    orphans go to another one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    poller = select.poll()
    poller.register(channel, 0)
    if any(event & select.POLLHUP for _, event in poller.poll(0)):
        sys.exit("the process that started this one is gone")


def leave_no_core() -> None:
    """In a child that holds plaintext or keys: a crash writes no memory to the disk.

    A limit of 0 bytes is for files alone; a program that core_pattern names would get the core all
    the same (core(5)). With 1 byte Linux gives it none either. Who may not raise a limit of 0 keeps
    that.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if most == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
