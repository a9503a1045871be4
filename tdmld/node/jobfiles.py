"""A job's files on this machine: preparing, checking, discarding. Blocking: call it in a thread."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path

from blake3 import blake3

from tdmld.files import read_file, sync_directory, write_file
from tdmld.node.errors import ContentMismatch
from tdmld.node.layout import Layout
from tdmld.train.digest import digest, link_root
from tdmld.train.errors import FileError
from tdmld.train.export import Result, merge_states, read_result
from tdmld.train.framelog import read_frames
from tdmld.train.limits import STATE_HEADER_BYTES
from tdmld.train.spec import Spec
from tdmld.train.statefile import ITEM_BYTES, PARTS, part_file, read_manifest, state_tensors

JOB_BYTES = 32
KEPT_STATES = 2
"""Newest states of an own slot that are never removed while the job goes on."""
_COPY_BYTES = 1 << 20


def state_limit(spec: Spec, stage: int) -> int:
    """The greatest size of one part of a stage's state, in bytes."""
    sizes = dict.fromkeys(PARTS, STATE_HEADER_BYTES)
    for tensor in state_tensors(spec, stage):
        sizes[tensor.part] += prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    return max(sizes.values())


def prepare_directory(directory: Path, spec_path: Path, spec: bytes) -> None:
    """Make a worker's directory and the job's spec file. OSError."""
    for name in ("state", "list", "contribution"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    if not spec_path.exists() or spec_path.read_bytes() != spec:
        write_file(spec_path, spec)


def has_part(path: Path, root: bytes, part: str | None = None) -> bool:
    """Whether a state file is whole and has this root; its name says which part it is, unless
    `part` does."""
    try:
        return read_manifest(path, part=part).root == root
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


def check_contribution(spec: Spec, place: tuple[int, int, int], path: Path) -> None:
    """ContentMismatch unless the file is a contribution to (lane, stage, round). What is no
    contribution and gets in stops every lane: only what was read may be attested."""
    from tdmld.train.compress import Place, read_contribution  # numpy, for those who need it

    try:
        read_contribution(spec, Place(*place), path)
    except FileError as error:
        raise ContentMismatch(str(error)) from error


def has_content(path: Path, content: bytes, limit: int) -> bool:
    """Whether a file is there and has this BLAKE3; one of more than `limit` bytes has not."""
    try:
        return blake3(read_file(path, limit)).digest() == content
    except OSError:
        return False


def take_part(path: Path, root: bytes, copies: Sequence[Path]) -> bool:
    """Let a state file appear at `path` that is here already; whether one of `copies` had this
    root. The bytes are shared: files of states are never changed, only replaced. OSError."""
    return _take(path, copies, lambda copy: has_part(copy, root))


def take_contribution(path: Path, content: bytes, limit: int, copies: Sequence[Path]) -> bool:
    """Let a contribution appear at `path` that is here already, perhaps there; whether one of
    `copies` had this id. A wrong one at `path` is removed. OSError."""
    if has_content(path, content, limit):
        return True
    path.unlink(missing_ok=True)
    others = [copy for copy in copies if copy != path]
    return _take(path, others, lambda copy: has_content(copy, content, limit))


def _take(path: Path, copies: Sequence[Path], is_right: Callable[[Path], bool]) -> bool:
    for copy in copies:
        if is_right(copy):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                path.hardlink_to(copy)
            except FileNotFoundError:
                continue  # it was removed meanwhile
            sync_directory(path.parent)
            return True
    return False


def keep_given(source: Path, root: bytes, target: Path) -> None:
    """Keep a copy of a file that a job with given weights begins with. FileError when it has not
    this root, OSError."""
    if any(has_part(target, root, part) for part in PARTS):
        return
    if not any(has_part(source, root, part) for part in PARTS):
        raise FileError(f"{source} does not hold what the spec names; cut the weights again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        write_file(target, iter(partial(file.read, _COPY_BYTES), b""))


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
    for unfinished in (owner / "state").glob("*.new"):
        if unfinished.stem.isdecimal() and int(unfinished.stem) < keep_from:
            remove_tree(unfinished)


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
            (path / "incarnation").unlink(missing_ok=True)


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
