"""A boundary's states become the first states of another job: of other cuts, of other lanes."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tdmld.node.layout import Layout
from tdmld.train.data import Tokens
from tdmld.train.errors import FileError, SpecError
from tdmld.train.jobfile import load_job_file
from tdmld.train.pretrained import Pretrained
from tdmld.train.recut import MOMENTS, write_boundary
from tdmld.train.schedule import step_frames
from tdmld.train.spec import Spec, spec_bytes
from tests.train.support import (
    CUTS,
    FAMILY_CONFIGS,
    check_equal,
    family_spec,
    going_on,
    run_job,
    slot_place,
    text_of,
    tokens_of,
)
from tests.train.test_jobfile import JOB

STEPS: dict[str, Any] = {
    "train__steps": 6,
    "pipeline__segment_steps": 2,
    "train__wire": "fp32",
    "clip": {"kind": "none"},
}
TWO = {"count": 2, "mode": "sync"}


def states_at(spec: Spec, root: Path, boundary: int) -> dict[tuple[int, int], Path]:
    return {
        (lane, stage): slot_place(root, lane, stage) / "state" / str(boundary)
        for lane in range(spec.lanes)
        for stage in range(spec.stages)
    }


def stopped(spec: Spec, place: Path, boundary: int = 1) -> tuple[Tokens, Path, Any]:
    """(data, the directory of a boundary, the records) of a job that ran to its end."""
    data = tokens_of(spec, text_of(spec.family))
    records = run_job(spec, data, place / "first")
    write_boundary(spec, boundary, states_at(spec, place / "first", boundary), place / "boundary")
    return data, place / "boundary", records


def changed(spec: Spec, **pipeline: Any) -> Spec:
    return msgspec.structs.replace(
        spec, pipeline=msgspec.structs.replace(spec.pipeline, **pipeline)
    )


@pytest.mark.parametrize(
    ("family", "lanes"),
    [
        ("llama", 2),
        ("gemma", 1),
        ("resnet", 2),
        pytest.param("llama", 1, marks=pytest.mark.slow),
        pytest.param("gemma", 2, marks=pytest.mark.slow),
    ],
)
def test_the_same_cuts_go_on_as_if_they_had_never_stopped(
    family: str, lanes: int, tmp_path: Path
) -> None:
    more = {"pipeline__lanes": TWO} if lanes == 2 else {}
    spec = family_spec(family, 2, **STEPS, **more)
    data, boundary, before = stopped(spec, tmp_path)
    again = going_on(spec, boundary)
    assert (again.first_step, again.rounds, again.boundary_step(1)) == (2, 2, 4)
    for stage in range(2):
        for link in again.links(0, stage):
            numbers = [f.seq for f in step_frames(again, 0, stage, 2) if f.link == link]
            assert min(numbers) == 0  # frames are counted from the job's own first step
    after = run_job(again, data, tmp_path / "second", given=boundary)
    for slot, records in after.items():
        for number, record in enumerate(records):
            old = before[slot][number + 1]
            assert (record.start_shared, record.start_lane) == (old.start_shared, old.start_lane)
            assert (record.end_shared, record.end_lane) == (old.end_shared, old.end_lane)
            assert record.losses == old.losses
            assert [step.gradient for step in record.steps] == [s.gradient for s in old.steps]


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", 1),
        ("gemma", 3),
        ("resnet", 3),
        pytest.param("llama", 3, marks=pytest.mark.slow),
        pytest.param("gemma", 1, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 3, marks=pytest.mark.slow),
        pytest.param("resnet", 1, marks=pytest.mark.slow),
    ],
)
def test_other_cuts_equal_the_reference_that_goes_on(
    family: str, stages: int, tmp_path: Path
) -> None:
    spec = family_spec(family, 2, **STEPS)
    _, boundary, before = stopped(spec, tmp_path)
    again = going_on(changed(spec, cuts=tuple(CUTS[stages])), boundary)
    check_equal(again, tmp_path / "second", given=boundary, replay=True)
    # Wires that round nothing and no clipping by stage: the cuts have no say in the bits.
    told = [r for own in before.values() if own[0].has_loss for r in own][1:]
    losses = json.loads((tmp_path / "second" / "reference" / "roots.json").read_text())["losses"]
    assert losses == [loss for record in told for loss in record.losses or ()]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"count": 1, "mode": "sync"}, TWO),
        (TWO, {"count": 1, "mode": "sync"}),
        (TWO, {"count": 3, "mode": "sync", "weights": [1, 2, 1]}),
    ],
)
def test_another_number_of_lanes_equals_the_reference_that_goes_on(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    spec = family_spec("resnet", 2, **STEPS, pipeline__lanes=first)
    _, boundary, _ = stopped(spec, tmp_path)
    wanted = family_spec("resnet", 3, **STEPS, pipeline__lanes=second)
    check_equal(going_on(wanted, boundary), tmp_path / "second", given=boundary)


OUTER = {"lr": "0.7", "momentum": "0.9", "nesterov": True}
OUTER |= {"density": 256, "bits": 8, "feedback": "0.95"}


def apart(lanes: int) -> dict[str, Any]:
    return {"count": lanes, "mode": "diloco", "outer": OUTER}


@pytest.mark.parametrize(
    ("first", "second"),
    [(TWO, apart(2)), (apart(2), apart(2)), (apart(2), apart(3)), (apart(2), TWO)],
)
def test_lanes_that_go_apart_begin_and_end_as_the_reference_does(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    spec = family_spec("llama", 2, **STEPS, pipeline__lanes=first)
    _, boundary, _ = stopped(spec, tmp_path, spec.rounds)
    wanted = family_spec("llama", 3, **(STEPS | {"train__steps": 10}), pipeline__lanes=second)
    check_equal(going_on(wanted, boundary), tmp_path / "second", given=boundary)


def test_a_boundary_with_an_outer_step_to_come_is_refused(tmp_path: Path) -> None:
    spec = family_spec("llama", 2, **STEPS, pipeline__lanes=apart(2))
    with pytest.raises(FileError, match="still to come"):
        write_boundary(spec, 1, {}, tmp_path)


def test_a_boundary_is_a_model_that_can_be_judged(tmp_path: Path) -> None:
    from tdmld.train.evaluate import heldout_loss

    spec = family_spec("llama", 2, **STEPS)
    data, boundary, _ = stopped(spec, tmp_path)
    assert 0 < heldout_loss(boundary, spec, data) < 10


def test_states_that_are_missing_foreign_or_unequal_are_refused(tmp_path: Path) -> None:
    spec = family_spec("llama", 2, **STEPS, pipeline__lanes=TWO)
    run_job(spec, tokens_of(spec), tmp_path / "first")
    states = states_at(spec, tmp_path / "first", 1)
    out = tmp_path / "out"
    write_boundary(spec, 1, {slot: path for slot, path in states.items() if slot[0] == 1}, out)
    with pytest.raises(FileError, match="no state of every"):
        write_boundary(spec, 1, {(0, 0): states[0, 0]}, out)
    with pytest.raises(FileError, match="no state of stage 1"):
        write_boundary(spec, 1, {(0, 0): states[0, 0], (0, 1): states[0, 0]}, out)
    with pytest.raises(FileError, match="not of boundary 2"):
        write_boundary(spec, 2, states, out)
    with pytest.raises(FileError, match="none of 1 to 3"):
        write_boundary(spec, 4, states, out)
    other = states_at(spec, tmp_path / "first", 2)
    with pytest.raises(FileError, match="differ"):
        write_boundary(spec, 1, states | {(1, 1): other[1, 1]}, out)


def test_a_boundary_written_over_another_one_leaves_nothing_of_it(tmp_path: Path) -> None:
    """Else a job of lanes that meet in outer steps would go on with a foreign momentum."""
    data = tokens_of(family_spec("llama"))
    first = family_spec("llama", 2, **STEPS, pipeline__lanes=apart(2))
    run_job(first, data, tmp_path / "first")
    out = tmp_path / "out"
    write_boundary(first, first.rounds, states_at(first, tmp_path / "first", first.rounds), out)
    assert (out / MOMENTS / "outer.safetensors").exists()
    second = family_spec("llama", 2, **STEPS)
    run_job(second, data, tmp_path / "second")
    states = states_at(second, tmp_path / "second", 1)
    write_boundary(second, 1, states, out)
    names = {path.name for path in (out / MOMENTS).iterdir()}
    assert names == {"boundary.json", "0.safetensors"}
    # What is half written is no boundary.
    spoilt = {slot: path for slot, path in states.items() if slot != (0, 0)}
    with pytest.raises(FileError, match="no state of every"):
        write_boundary(second, 1, spoilt, out)
    assert (out / MOMENTS / "boundary.json").exists()  # nothing was begun


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """A job file that names a boundary's directory."""
    config = FAMILY_CONFIGS["llama"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = family_spec("llama", 2, **STEPS)
    _, boundary, _ = stopped(spec, tmp_path)
    (tmp_path / "text.txt").write_bytes(text_of("llama"))
    path = tmp_path / "job.toml"
    named = JOB.replace('init = "seed"', f'init = "{boundary.name}"')
    path.write_text(named.replace("segment_steps = 3", "segment_steps = 2"))
    return path


def test_a_job_file_names_the_boundary(resumed: Path, tmp_path: Path) -> None:
    found = load_job_file(resumed)
    spec = found.spec
    assert spec.first_step == 2
    files = Pretrained(tmp_path / "boundary").write_all(spec, tmp_path / "files")
    from tdmld.train.statefile import read_manifest

    assert len(files) == 2 * spec.slots
    for root, path in files.items():
        parts = [read_manifest(path, part=part).root for part in ("shared", "lane")]
        assert root in parts


def test_a_boundary_that_was_changed_or_cut_short_is_refused(resumed: Path, tmp_path: Path) -> None:
    spec = load_job_file(resumed).spec
    moments = tmp_path / "boundary" / MOMENTS
    path = moments / "boundary.json"
    whole = path.read_text()
    for raw in ("", "[]", "[" * 60_000, whole.replace('"lanes": 1', '"lanes": 2')):
        path.write_text(raw)
        with pytest.raises(SpecError, match="init"):
            load_job_file(resumed)
    path.write_text(whole.replace('"step": 2', '"step": 5000'))
    with pytest.raises(SpecError, match=r"init\.step"):
        load_job_file(resumed)
    path.write_text(whole)
    shutil.copy(tmp_path / "boundary" / "model.safetensors", moments / "0.safetensors")
    with pytest.raises(SpecError, match="no exp_avg"):
        load_job_file(resumed)
    (moments / "0.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(SpecError, match="init"):
        Pretrained(tmp_path / "boundary").write_all(spec, tmp_path / "files")


@pytest.mark.parametrize(
    ("init", "field"),
    [
        ({"lane_roots": ["00" * 32] * 2}, "init.lane_roots"),
        ({"step": 2}, "init.lane_roots"),
        ({"step": 2, "lane_roots": ["00" * 32]}, "init.lane_roots"),
        ({"step": 6, "lane_roots": ["00" * 32] * 2}, "init.step"),
        ({"step": 3, "lane_roots": ["00" * 32] * 2}, "pipeline.segment_steps"),
    ],
)
def test_a_spec_that_goes_on_from_nowhere_is_refused(init: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        family_spec("llama", 2, **STEPS, init={"kind": "given", "roots": ["00" * 32] * 2} | init)
    assert caught.value.field == field


def held(spec: Spec, first: Path, data_dir: Path) -> str:
    """A node's directory with the states of all stages; the job's id."""
    job = bytes(range(32))
    layout = Layout(data_dir)
    layout.job(job).mkdir(parents=True)
    layout.spec(job).write_bytes(spec_bytes(spec))
    for stage in range(spec.stages):
        source = slot_place(first, 0, stage) / "state"
        shutil.copytree(source, layout.standby(job, 0, stage) / "state")
    return job.hex()


def test_the_command_takes_the_newest_boundary_that_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tdmld.cli import main

    spec = family_spec("llama", 2, **STEPS)
    run_job(spec, tokens_of(spec), tmp_path / "first")
    job = held(spec, tmp_path / "first", tmp_path / "node")
    last = Layout(tmp_path / "node").standby(bytes.fromhex(job), 0, 1) / "state" / "3"
    shutil.rmtree(last)
    options = ["--data-dir", str(tmp_path / "node"), "--out", str(tmp_path / "out"), "--json"]
    assert main(["job", "recut", job[:12], *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["boundary"], found["step"]) == (2, 4)
    again = going_on(spec, tmp_path / "out")
    assert again.rounds == 1
    assert main(["job", "recut", job[:12], "--boundary", "3", *options]) == 1
    assert "no state of every" in capsys.readouterr().err
    assert main(["job", "recut", "ff", *options]) == 4
