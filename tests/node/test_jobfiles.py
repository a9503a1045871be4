"""What stays and what goes of a job's files."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from tdmld.node.errors import ContentMismatch, MachineError
from tdmld.node.jobfiles import (
    boundaries,
    check_contribution,
    discard_job,
    forget_copies,
    forget_slot,
    has_frames,
    has_part,
    keep_newest_logs,
    remove_leftovers,
    take_contribution,
)
from tdmld.node.layout import Layout
from tdmld.node.machine_types import SlotAssignment, SlotId
from tdmld.node.resume import made_under, take_up
from tdmld.train.digest import digest, link_root
from tdmld.train.framelog import FrameLogWriter
from tests.train.support import family_spec
from tests.train.test_spec import DILOCO


def fill(owner: Path, segments: int) -> None:
    for name in ("ring", "list", "state", "contribution"):
        (owner / name).mkdir(parents=True)
    put(owner, segments)


def put(owner: Path, segments: int) -> None:
    for name in ("ring", "list", "state", "contribution"):
        (owner / name).mkdir(parents=True, exist_ok=True)
    for segment in range(segments):
        (owner / "ring" / f"{segment}.up.sent").touch()
        (owner / "list" / str(segment)).touch()
        (owner / "contribution" / f"{segment}.1").touch()
    for boundary in range(segments + 1):
        (owner / "state" / str(boundary)).mkdir(exist_ok=True)


def rings(owner: Path) -> list[int]:
    return sorted(int(path.name.split(".")[0]) for path in (owner / "ring").iterdir())


def rounds(owner: Path) -> list[int]:
    return sorted(int(path.name.split(".")[0]) for path in (owner / "contribution").iterdir())


def test_what_nobody_needs_any_more_goes(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    forget_slot(tmp_path, 3)
    assert rings(tmp_path) == [3, 4]
    assert boundaries(tmp_path) == [3, 4, 5]
    # A segment needs what was contributed to the round before it.
    assert rounds(tmp_path) == [2, 3, 4]


def test_the_newest_two_states_stay_even_when_nobody_needs_them(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    forget_slot(tmp_path, 6)
    assert rings(tmp_path) == []
    assert boundaries(tmp_path) == [4, 5]


def test_nothing_that_is_needed_goes(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    forget_slot(tmp_path, 0)
    assert rings(tmp_path) == [0, 1, 2, 3, 4]
    assert boundaries(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_standby_keeps_everything_from_the_boundary_that_was_proven_on(tmp_path: Path) -> None:
    fill(tmp_path, 11)
    for unfinished in ("9.new", "12.new"):
        (tmp_path / "state" / unfinished).mkdir()
    forget_copies(tmp_path, 10)
    assert boundaries(tmp_path) == [10, 11]
    assert sorted(path.name for path in (tmp_path / "state").glob("*.new")) == ["12.new"]
    assert rounds(tmp_path) == [9, 10]


def test_a_job_that_is_over_keeps_lists_and_result(tmp_path: Path) -> None:
    fill(tmp_path / "slot-0.0", 2)
    fill(tmp_path / "standby-0.1", 2)
    (tmp_path / "result").mkdir()
    (tmp_path / "audit").mkdir()
    discard_job(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "slot-0.0"]
    assert [path.name for path in (tmp_path / "slot-0.0").iterdir()] == ["list"]


def slot_of(epoch: int, incarnation: int, start: int) -> SlotAssignment:
    return SlotAssignment(
        bytes(32), b"{}", SlotId(0, 0), epoch, incarnation, (), frozenset(), start
    )


def test_a_slot_keeps_what_it_made_under_its_own_epoch_and_incarnation(tmp_path: Path) -> None:
    owner, spec = tmp_path / "slot", tmp_path / "spec.json"
    take_up(owner, spec, slot_of(1, 2, 0))
    assert made_under(owner) == (1, 2)
    assert spec.read_bytes() == b"{}"
    put(owner, 3)
    take_up(owner, spec, slot_of(1, 2, 1))
    assert boundaries(owner) == [*rings(owner), 3] == [0, 1, 2, 3]


@pytest.mark.parametrize("under", [(2, 0), (1, 3)])
def test_what_an_older_epoch_or_incarnation_made_goes_from_the_start_on(
    under: tuple[int, int], tmp_path: Path
) -> None:
    owner, spec = tmp_path / "slot", tmp_path / "spec.json"
    take_up(owner, spec, slot_of(1, 2, 0))
    put(owner, 4)
    take_up(owner, spec, slot_of(*under, 2))
    assert made_under(owner) == under
    assert boundaries(owner) == [0, 1, 2]
    assert rings(owner) == rounds(owner) == [0, 1]
    assert sorted(path.name for path in (owner / "list").iterdir()) == ["0", "1"]


def test_lists_that_are_committed_to_stay_when_a_slot_begins_below_them(tmp_path: Path) -> None:
    """The salt of a seal that is on the chain is nowhere else."""
    owner, spec = tmp_path / "slot", tmp_path / "spec.json"
    take_up(owner, spec, slot_of(1, 2, 0))
    put(owner, 5)
    take_up(owner, spec, replace(slot_of(2, 2, 1), committed=3))
    assert sorted(path.name for path in (owner / "list").iterdir()) == ["0", "1", "2"]
    assert rings(owner) == rounds(owner) == [0]


def test_a_slot_never_goes_back_to_an_older_epoch(tmp_path: Path) -> None:
    owner, spec = tmp_path / "slot", tmp_path / "spec.json"
    take_up(owner, spec, slot_of(3, 0, 0))
    put(owner, 2)
    with pytest.raises(MachineError, match="newer"):
        take_up(owner, spec, slot_of(2, 9, 0))
    assert boundaries(owner) == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[-1,2,3]", b"9" * 500])
def test_files_of_which_nobody_knows_when_they_were_made_go(content: bytes, tmp_path: Path) -> None:
    owner, spec = tmp_path / "slot", tmp_path / "spec.json"
    put(owner, 2)
    (owner / "incarnation").write_bytes(content)
    assert made_under(owner) is None
    take_up(owner, spec, slot_of(0, 0, 1))
    assert boundaries(owner) == [0, 1]


def test_contributions_are_taken_from_another_place_here_when_they_are_right(
    tmp_path: Path,
) -> None:
    right, wrong, target = (tmp_path / name for name in ("right", "wrong", "dir/target"))
    right.write_bytes(b"told")
    wrong.write_bytes(b"tole")
    name = blake3(b"told").digest()
    assert not take_contribution(target, name, 4, [wrong])
    assert not take_contribution(target, name, 3, [right])
    assert take_contribution(target, name, 4, [wrong, right])
    assert target.read_bytes() == b"told"
    target.unlink()
    target.write_bytes(b"spoilt")
    assert not take_contribution(target, name, 4, [wrong])
    assert not target.exists()


def test_frames_are_what_their_root_says_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "0.up.received"
    with FrameLogWriter(path, 10) as log:
        for seq in range(3):
            log.append(seq, bytes(64), b"%d" % seq)
    root = link_root((seq, digest(b"%d" % seq)) for seq in range(3))
    assert has_frames(path, root, 10)
    assert not has_frames(path, bytes(32), 10)
    assert not has_frames(tmp_path / "nothing", root, 10)
    path.write_bytes(b"\xff" * 200)
    assert not has_frames(path, root, 10)


def test_garbage_is_no_state(tmp_path: Path) -> None:
    path = tmp_path / "shared.safetensors"
    path.write_bytes(b"\xff" * 100)
    assert not has_part(path, bytes(32))
    assert not has_part(tmp_path / "nothing" / "shared.safetensors", bytes(32))


def test_what_a_killed_run_had_not_finished_goes_and_the_rest_stays(tmp_path: Path) -> None:
    slot = tmp_path / "jobs" / "aa" / "slot-0.0"
    kept = [
        slot / "state" / "1" / "shared.safetensors",
        slot / "list" / "0",
        tmp_path / "content/ab/abcd",
    ]
    gone = [
        slot / "state" / "1" / ".lane.safetensors.7.1.new",
        slot / "list" / ".1.7.2.new",
        tmp_path / "jobs" / "aa" / ".spec.json.7.3.new",
        tmp_path / "jobs" / "aa" / "standby-0.1" / "state" / "2.new" / "shared.safetensors",
        tmp_path / "jobs" / "aa" / "audit" / "0.0.1" / "x",
        tmp_path / "content" / "ab" / "abff.1234.part",
    ]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    remove_leftovers(Layout(tmp_path))
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


def test_the_newest_logs_of_workers_stay(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"worker-{9 - number}-0.0-live.log"
        path.touch()
        os.utime(path, (number, number))
    (tmp_path / "daemon.jsonl").touch()
    keep_newest_logs(tmp_path, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["daemon.jsonl", "worker-5-0.0-live.log", "worker-6-0.0-live.log"]


def test_a_contribution_is_read_before_it_is_attested(tmp_path: Path) -> None:
    spec = family_spec("llama", 2, pipeline__lanes=DILOCO)
    path = tmp_path / "3.1"
    path.write_bytes(bytes(spec.contribution_bytes(0)))
    with pytest.raises(ContentMismatch):
        check_contribution(spec, (1, 0, 3), path)
