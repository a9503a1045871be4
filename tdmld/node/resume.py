"""Taking a slot up again: where it can go on, and what must go first. Blocking: call in a thread.

What a slot did lies in its directory: a state at each boundary, a list and the frames of each
segment. A small file `incarnation` names the job epoch and the slot's incarnation under which they
were made. A rollback raises the one, another worker in the slot the other: what was made before
may differ from what is to be made now.
"""

from pathlib import Path

import msgspec

from tdmld.files import FileTooLarge, read_file, write_file
from tdmld.node.errors import MachineError
from tdmld.node.jobfiles import boundaries, has_frames, has_state, remove_files, remove_tree
from tdmld.node.layout import list_file, state
from tdmld.node.machine_types import SlotAssignment, SlotId
from tdmld.train.errors import FileError, SpecError
from tdmld.train.framelog import DIRECTIONS, frame_log_name
from tdmld.train.limits import SPEC_BYTES
from tdmld.train.segment import read_list
from tdmld.train.spec import Spec, decode_spec

_FILE_BYTES = 100
_NUMBERED = ("list", "ring", "contribution")
"""Directories of a slot whose files are named after their segment or round."""


class _Made(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Under which epoch and incarnation the files of a slot were made."""

    epoch: int
    incarnation: int


def made_under(owner: Path) -> tuple[int, int] | None:
    """(epoch, incarnation) of a slot's files; None when nothing says so."""
    try:
        found = msgspec.json.decode(read_file(owner / "incarnation", _FILE_BYTES), type=_Made)
    except (FileNotFoundError, FileTooLarge, msgspec.MsgspecError):
        return None
    return found.epoch, found.incarnation


def resume_point(
    owner: Path, spec_path: Path, slot: SlotId, under: tuple[int, int], lowest: int
) -> int:
    """See Machine.resume_point. `under`: epoch and incarnation."""
    if made_under(owner) != under:
        return lowest
    try:
        spec = decode_spec(read_file(spec_path, SPEC_BYTES))
    except (OSError, SpecError):
        return lowest
    for boundary in reversed(boundaries(owner)):
        if boundary <= lowest:
            break
        if _is_whole(owner, spec, slot, boundary):
            return boundary
    return lowest


def _is_whole(owner: Path, spec: Spec, slot: SlotId, boundary: int) -> bool:
    """Whether state, list and frames of the segment before a boundary agree.

    The worker writes state and list before the carrier has logged the last frames that it sent: a
    segment of which frames are missing must be run again, or nobody would ever get them.
    """
    segment = boundary - 1
    try:
        record = read_list(list_file(owner, segment)).record
    except FileError:
        return False
    if record.segment != segment or not has_state(
        state(owner, boundary), (record.end_shared, record.end_lane)
    ):
        return False
    for link in spec.logged_links(slot.lane, slot.stage, segment):
        roots = record.links.get(link)
        if roots is None:
            return False
        limit = spec.link_frame_bytes(slot.stage, link)
        for direction, root in zip(DIRECTIONS, roots, strict=True):
            path = owner / "ring" / frame_log_name(segment, link, direction)
            if not has_frames(path, root, limit):
                return False
    return True


def take_up(owner: Path, spec_path: Path, assignment: SlotAssignment) -> None:
    """Make a slot's directory ready for its worker: removes what an older epoch or incarnation
    left from `start` on (of lists from `committed` on, if that is more), and writes the file that
    names the new one. OSError."""
    under = (assignment.epoch, assignment.incarnation)
    for name in ("state", *_NUMBERED):
        (owner / name).mkdir(parents=True, exist_ok=True)
    if not spec_path.exists() or spec_path.read_bytes() != assignment.spec:
        write_file(spec_path, assignment.spec)
    before = made_under(owner)
    if before == under:
        return
    if before is not None and before > under:
        raise MachineError(
            f"{owner} was made under epoch and incarnation {before}, newer than {under}; the chain"
            " cannot have gone back: this is another job's directory"
        )
    remove_from(owner, assignment.start, assignment.committed)
    write_file(owner / "incarnation", msgspec.json.encode(_Made(*under)))


def remove_from(owner: Path, start: int, committed: int) -> None:
    """Remove what came out of segments >= `start`; the state at `start` stays, and so do the lists
    of segments < `committed`: nobody else has the salts of their seals."""
    for boundary in boundaries(owner):
        if boundary > start:
            remove_tree(state(owner, boundary))
    for name in _NUMBERED:
        first = max(start, committed) if name == "list" else start
        found = [path for path in (owner / name).iterdir() if _number(path) >= first]
        remove_files(found)


def _number(path: Path) -> int:
    """The segment or round that a file is named after; -1 for any other file."""
    number = path.name.partition(".")[0]
    return int(number) if number.isdecimal() else -1
