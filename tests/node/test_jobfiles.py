"""What stays and what goes of a job's files."""

import os
from pathlib import Path

import pytest

from tdmld.node.errors import MachineError
from tdmld.node.jobfiles import (
    boundaries,
    discard_job,
    discard_settled,
    forget_older_states,
    has_frames,
    has_part,
    keep_newest_logs,
    prepare_directory,
    remove_leftovers,
)
from tdmld.node.layout import Layout
from tdmld.train.digest import digest, link_root
from tdmld.train.framelog import FrameLogWriter


def fill(owner: Path, segments: int) -> None:
    for name in ("ring", "list", "state"):
        (owner / name).mkdir(parents=True)
    for segment in range(segments):
        (owner / "ring" / f"{segment}.up.sent").touch()
        (owner / "list" / str(segment)).touch()
    for boundary in range(segments + 1):
        (owner / "state" / str(boundary)).mkdir()


def rings(owner: Path) -> list[int]:
    return sorted(int(path.name.split(".")[0]) for path in (owner / "ring").iterdir())


def test_frames_go_when_both_ends_are_settled_and_states_when_their_segment_is(
    tmp_path: Path,
) -> None:
    fill(tmp_path, 5)
    discard_settled(tmp_path, frames_until=1, states_until=2, kept_states=2)
    assert rings(tmp_path) == [2, 3, 4]
    assert boundaries(tmp_path) == [3, 4, 5]


def test_the_last_two_states_stay_even_when_everything_is_settled(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    discard_settled(tmp_path, frames_until=4, states_until=4, kept_states=2)
    assert rings(tmp_path) == []
    assert boundaries(tmp_path) == [4, 5]


def test_nothing_unsettled_goes(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    discard_settled(tmp_path, frames_until=-1, states_until=-1, kept_states=2)
    assert rings(tmp_path) == [0, 1, 2, 3, 4]
    assert boundaries(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_standby_keeps_the_last_two(tmp_path: Path) -> None:
    fill(tmp_path, 11)
    for unfinished in ("9.new", "12.new"):
        (tmp_path / "state" / unfinished).mkdir()
    forget_older_states(tmp_path, 11)
    assert boundaries(tmp_path) == [10, 11]
    assert sorted(path.name for path in (tmp_path / "state").glob("*.new")) == ["12.new"]


def test_a_job_that_is_over_keeps_lists_and_result(tmp_path: Path) -> None:
    fill(tmp_path / "slot-0.0", 2)
    fill(tmp_path / "standby-0.1", 2)
    (tmp_path / "result").mkdir()
    (tmp_path / "audit").mkdir()
    discard_job(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "slot-0.0"]
    assert [path.name for path in (tmp_path / "slot-0.0").iterdir()] == ["list"]


def test_a_slot_with_finished_segments_is_not_begun_again(tmp_path: Path) -> None:
    fill(tmp_path / "slot", 1)
    with pytest.raises(MachineError, match="finished segments"):
        prepare_directory(tmp_path / "slot", tmp_path / "spec.json", b"{}", True)


def test_what_an_unfinished_start_left_is_removed(tmp_path: Path) -> None:
    fill(tmp_path / "slot", 0)
    (tmp_path / "slot" / "ring" / "0.up.sent").touch()
    prepare_directory(tmp_path / "slot", tmp_path / "spec.json", b"{}", True)
    assert sorted(path.name for path in (tmp_path / "slot").iterdir()) == ["list", "state"]
    assert (tmp_path / "spec.json").read_bytes() == b"{}"


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


def test_a_standby_that_proves_an_older_state_keeps_it_and_the_newer_ones(tmp_path: Path) -> None:
    """Boundaries can come faster than the keys of their proofs."""
    fill(tmp_path, 4)
    forget_older_states(tmp_path, 2)
    assert boundaries(tmp_path) == [1, 2, 3, 4]


def test_the_newest_logs_of_workers_stay(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"worker-{9 - number}-0.0-live.log"
        path.touch()
        os.utime(path, (number, number))
    (tmp_path / "daemon.jsonl").touch()
    keep_newest_logs(tmp_path, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["daemon.jsonl", "worker-5-0.0-live.log", "worker-6-0.0-live.log"]
