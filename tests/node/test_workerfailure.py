"""Why a worker ended: what it says itself, its exit status, and what the kernel did meanwhile."""

import errno
import signal
from pathlib import Path

import pytest
import torch
import trio

from tdmld.node import supervise
from tdmld.node.errors import ControlError, FailureCause
from tdmld.node.supervise import Child
from tdmld.node.worker import describe
from tdmld.node.worker_task import CAUSES, EXITS
from tdmld.node.workers import cause_named
from tdmld.train.errors import FileError

CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    " tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)\nframes follow"
)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FailureCause.DISK_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FailureCause.DISK_FULL),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), FailureCause.OUT_OF_MEMORY),
        (OSError(errno.EIO, "Input/output error"), FailureCause.DIED),
        (MemoryError(), FailureCause.OUT_OF_MEMORY),
        (RuntimeError(CPU_ALLOCATOR), FailureCause.OUT_OF_MEMORY),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            FailureCause.OUT_OF_MEMORY,
        ),
        (torch.AcceleratorError("an illegal memory access was encountered"), FailureCause.DEVICE),
        (RuntimeError("CUDA error: device-side assert triggered"), FailureCause.DEVICE),
        (FileError("no snapshot"), FailureCause.REFUSED),
        (ControlError("gone"), FailureCause.DIED),
    ],
)
def test_a_worker_names_the_cause(error: Exception, cause: FailureCause) -> None:
    found = describe(error)
    assert found is not None
    assert found[0] is cause
    assert "\n" not in found[1]
    assert CAUSES[EXITS[cause]] is cause
    assert cause_named(cause.value) is cause


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("weight")])
def test_a_defect_is_not_explained_away(error: Exception) -> None:
    assert describe(error) is None


def test_a_word_that_is_no_cause_is_none() -> None:
    assert cause_named("") is cause_named("nonsense") is FailureCause.DIED


@pytest.mark.parametrize(
    ("words", "kills", "cause"),
    [
        ("exit 12", (0, 0), FailureCause.DISK_FULL),
        ("exit 1", (0, 0), FailureCause.DIED),
        ("exit 77", (0, 5), FailureCause.DIED),
        ("kill -TERM $$", (3, 4), FailureCause.KILLED),
        ("kill -KILL $$", (3, 3), FailureCause.KILLED),
        ("kill -KILL $$", (3, 4), FailureCause.OUT_OF_MEMORY),
    ],
)
async def test_the_end_of_a_process_has_a_cause(
    words: str,
    kills: tuple[int, int],
    cause: FailureCause,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, after = kills
    monkeypatch.setattr(supervise, "memory_kills", lambda: before)
    child = Child(("sh", "-c", words), (), {}, tmp_path / "log")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.watch)
        await child.ended.wait()
    monkeypatch.setattr(supervise, "memory_kills", lambda: after)
    assert child.cause is cause
    named = "out of memory" in child.epitaph()
    assert named == (cause is FailureCause.OUT_OF_MEMORY)
    assert (child.status == -signal.SIGKILL) == ("KILL" in words)


def test_the_kernel_is_asked_for_its_kills() -> None:
    assert supervise.memory_kills() >= 0
