"""A job's files on this machine: preparing, checking, discarding. Blocking: call it in a thread."""

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from tdmld.files import sync_directory, write_file
from tdmld.node.layout import Layout, list_file
from tdmld.train.digest import digest, link_root
from tdmld.train.errors import FileError
from tdmld.train.export import Result, merge_states, read_result
from tdmld.train.framelog import read_frames
from tdmld.train.limits import STATE_HEADER_BYTES
from tdmld.train.spec import Spec, stage_parameters
from tdmld.train.statefile import PARTS, part_file, read_manifest

JOB_BYTES = 32
KEPT_STATES = 2
"""Newest states of an own slot that are never removed while the job goes on."""
_STATE_VALUES = 2
"""The lane part has two moments a weight; the shared part one value."""


def state_limit(spec: Spec, stage: int) -> int:
    """The greatest size of one part of a stage's state, in bytes."""
    return 4 * _STATE_VALUES * stage_parameters(spec, stage) + STATE_HEADER_BYTES


def prepare_directory(directory: Path, spec_path: Path, spec: bytes, fresh: bool) -> None:
    """Make a worker's directory and the job's spec file. With `fresh`, what an earlier attempt left
    there goes first."""
    if fresh:
        remove_tree(directory)
    for name in ("state", "list", "contribution"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    if not spec_path.exists() or spec_path.read_bytes() != spec:
        write_file(spec_path, spec)


def has_part(path: Path, root: bytes) -> bool:
    """Whether a state file is whole and has this root."""
    try:
        return read_manifest(path).root == root
    except FileError:
        return False


def has_state(directory: Path, roots: Sequence[bytes]) -> bool:
    """Whether both parts are there with these roots."""
    return all(
        has_part(directory / part_file(part), root) for part, root in zip(PARTS, roots, strict=True)
    )


def has_frames(path: Path, root: bytes, frame_bytes: int) -> bool:
    """Whether a frame log is whole and has this link root."""
    try:
        found = ((frame.seq, digest(frame.payload)) for frame in read_frames(path, frame_bytes))
        return link_root(found) == root
    except (FileError, OSError):
        return False


def boundaries(owner: Path) -> list[int]:
    """Boundaries of the states below a slot or standby directory, ascending."""
    directory = owner / "state"
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def forget_slot(owner: Path, keep_from: int) -> None:
    """Of an own slot: remove frames of segments < `keep_from`, contributions that no segment from
    there on needs, and states that only those need, except the newest ones: a worker may have to go
    on from there."""
    _forget_files(owner / "ring", keep_from)
    _forget_files(owner / "contribution", keep_from - 1)
    _forget_states(owner, keep_from, boundaries(owner)[-KEPT_STATES:])


def forget_copies(owner: Path, keep_from: int) -> None:
    """Of a standby copy: remove states before boundary `keep_from`, contributions that nobody needs
    to go on from there, and what was never brought whole of older ones."""
    _forget_states(owner, keep_from, [])
    _forget_files(owner / "contribution", keep_from - 1)


def _forget_states(owner: Path, keep_from: int, kept: Sequence[int]) -> None:
    for boundary in boundaries(owner):
        if boundary < keep_from and boundary not in kept:
            remove_tree(owner / "state" / str(boundary))
    for partial in (owner / "state").glob("*.new"):
        if partial.stem.isdecimal() and int(partial.stem) < keep_from:
            remove_tree(partial)


def _forget_files(directory: Path, keep_from: int) -> None:
    """Remove files that are named after a segment or round < `keep_from`."""
    if directory.is_dir():
        for path in directory.iterdir():
            number = path.name.partition(".")[0]
            if number.isdecimal() and int(number) < keep_from:
                path.unlink(missing_ok=True)


def discard_job(directory: Path) -> None:
    """Keep the spec, the lists and the result of a job that is over."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.startswith(("standby-", "audit", "gathered")):
            remove_tree(path)
        elif path.name.startswith("slot-"):
            for name in ("ring", "state", "contribution"):
                remove_tree(path / name)


def unfinished_jobs(layout: Layout) -> set[bytes]:
    """Jobs that have files here which `discard_job` would remove: after a restart nobody else
    remembers those that ended meanwhile."""
    found = set()
    for pattern in ("*/standby-*", "*/audit", "*/gathered", "*/slot-*/ring", "*/slot-*/state"):
        for path in layout.jobs.glob(pattern):
            name = path.relative_to(layout.jobs).parts[0]
            with suppress(ValueError):
                found.add(bytes.fromhex(name))
    return {job for job in found if len(job) == JOB_BYTES}


def remove_leftovers(layout: Layout) -> None:
    """At start: what a run that was killed had not finished."""
    found = [*layout.jobs.glob("*/audit"), *layout.jobs.glob("*/gathered")]
    for directory in (layout.jobs, layout.content):
        found += [*directory.rglob("*.new"), *directory.rglob("*.part")]
    for path in found:
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)


def keep_newest_logs(directory: Path, count: int) -> None:
    """At start: every worker has a log of its own, and only the newest ones help anybody."""
    logs = sorted(directory.glob("worker-*"), key=lambda path: path.stat().st_mtime)
    remove_files(logs[:-count])


def replace_directory(aside: Path, target: Path) -> None:
    """Let a finished directory appear under its name, durably."""
    remove_tree(target)
    aside.rename(target)
    sync_directory(target.parent)


def write_result(spec: Spec, shared: Sequence[Path], target: Path) -> Result:
    """Merge the stages' shared parts; the result appears whole. FileError, OSError."""
    aside = target.with_name(f"{target.name}.new")
    remove_tree(aside)
    try:
        merge_states(spec, shared, aside)
        replace_directory(aside, target)
    finally:
        remove_tree(aside)
    return read_result(target)


def is_used_directory(path: Path) -> bool:
    """Whether something is there already that must not be overwritten."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def move_up(directory: Path) -> None:
    """Move the files of a directory into the one that holds it."""
    for path in sorted(directory.iterdir()):
        path.rename(directory.parent / path.name)


def remove_unfinished(aside: Path) -> None:
    """Remove a directory of ours, and the one that holds it if there is nothing else in it."""
    remove_tree(aside)
    with suppress(OSError):
        aside.parent.rmdir()


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory of ours with everything in it; nothing when it is not there."""
    shutil.rmtree(path, ignore_errors=True)
