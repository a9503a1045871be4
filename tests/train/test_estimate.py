"""What a job will take: the played step, speeds, and the cuts that are suggested."""

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tdmld.train.budget import stage_memory
from tdmld.train.errors import SpecError
from tdmld.train.estimate import (
    Line,
    PartSeconds,
    Seconds,
    balanced,
    play,
    seconds_of_speed,
    segment_overhead,
    stage_seconds,
    with_cuts,
)
from tdmld.train.families import FAMILIES
from tdmld.train.family import Part
from tdmld.train.spec import Spec, stage_parameters
from tests.train.support import FAMILY_CONFIGS, family_spec, make_spec
from tests.train.test_spec import DILOCO

FREE = Line(1e15, 0.0)


def seconds_of(*layers: float, entry: float = 0.0, head: float = 0.0) -> Seconds:
    """Backwards take twice as long as forwards; nothing else takes time."""

    def part(value: float) -> PartSeconds:
        return PartSeconds(value / 3, 2 * value / 3)

    return Seconds(part(entry), tuple(map(part, layers)), part(head), 0.0, 0.0)


def test_one_stage_takes_the_sum_of_its_parts() -> None:
    step = play(make_spec(pipeline__cuts=[0, 4]), seconds_of(1, 1, 1, 1, head=2), [FREE], [1.0])
    assert step.seconds == pytest.approx(4 * 6)
    assert step.bubble == pytest.approx(0)


@pytest.mark.parametrize("stages", [2, 4])
def test_the_bubble_of_equal_stages_is_that_of_1f1b(stages: int) -> None:
    spec = make_spec(pipeline__cuts=list(range(0, 5, 4 // stages)), train__micro_batches=8)
    step = play(spec, seconds_of(1, 1, 1, 1), [FREE] * stages, [1.0] * stages)
    assert step.bubble == pytest.approx((stages - 1) / (8 + stages - 1))


def test_a_slow_line_and_a_slow_node_lengthen_the_step() -> None:
    spec, seconds = make_spec(), seconds_of(1, 1, 1, 1)
    fast = play(spec, seconds, [FREE] * 2, [1.0, 1.0])
    frame = spec.link_frame_bytes(0, "down")
    slow_line = play(spec, seconds, [Line(frame / 10, 0.0), FREE], [1.0, 1.0])
    assert slow_line.seconds > 4 * 10
    late = play(spec, seconds, [Line(1e15, 0.5)] * 2, [1.0, 1.0])
    assert late.seconds > fast.seconds + 0.9
    slow_node = play(spec, seconds, [FREE] * 2, [1.0, 0.5])
    assert slow_node.seconds > 4 * 4


def test_a_ring_is_played_to_its_end() -> None:
    spec = family_spec("gemma", 3)
    step = play(spec, seconds_of(1, 1, 1, 1, head=1), [FREE] * 3, [1.0] * 3)
    assert sum(step.busy) == pytest.approx(4 * 5)


def test_recomputing_costs_a_second_forward() -> None:
    spec = make_spec()
    again = msgspec.structs.replace(spec, train=msgspec.structs.replace(spec.train, recompute=True))
    seconds = seconds_of(3, 3, 3, 3)
    assert stage_seconds(spec, 0, seconds)["B"] == pytest.approx(4)
    assert stage_seconds(again, 0, seconds)["B"] == pytest.approx(6)


def every_cut(layers: int, stages: int, empty: bool) -> list[tuple[int, ...]]:
    inner = itertools.combinations_with_replacement(range(layers + 1), stages - 1)
    found = [(0, *cuts, layers) for cuts in inner]
    return [
        cuts
        for cuts in found
        if all(a < b for a, b in itertools.pairwise(cuts[1 if empty else 0 :]))
    ]


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 0.3, 2.0)])
def test_the_suggested_cuts_are_the_best_of_all(family: str, speeds: tuple[float, ...]) -> None:
    config = FAMILIES[family].canonical(FAMILY_CONFIGS[family] | {"num_hidden_layers": 7})
    spec = family_spec(family, 2, config=config, pipeline__cuts=[0, 3, 7])
    seconds = seconds_of(1, 4, 1, 1, 5, 1, 2, entry=0.5, head=3)

    def slowest(cuts: tuple[int, ...]) -> float:
        cut = with_cuts(spec, cuts)
        return max(
            sum(stage_seconds(cut, stage, seconds).values()) / speed
            for stage, speed in enumerate(speeds)
        )

    found = balanced(spec, seconds, speeds, [None] * len(speeds))
    every = every_cut(7, len(speeds), empty=family == "gemma")
    assert found.slowest == pytest.approx(min(map(slowest, every)))
    assert slowest(found.cuts) == pytest.approx(found.slowest)


def test_cuts_keep_within_the_memory_given() -> None:
    config = FAMILIES["llama"].canonical(
        FAMILY_CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 1024}
    )
    spec = make_spec(config=config)
    seconds = seconds_of(1, 1, 1, 1)
    assert balanced(spec, seconds, [1.0, 1.0], [None, None]).cuts == (0, 2, 4)
    small = stage_memory(with_cuts(spec, (0, 3, 4)), 1)
    assert balanced(spec, seconds, [1.0, 1.0], [None, small]).cuts == (0, 3, 4)
    with pytest.raises(SpecError, match="fits the memory"):
        balanced(spec, seconds, [1.0, 1.0], [small // 2, small])


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(SpecError, match="cut of 4 layers into 5"):
        balanced(make_spec(), seconds_of(1, 1, 1, 1), [1.0] * 5, [None] * 5)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "resnet"])
def test_every_part_of_a_model_is_measured(family: str) -> None:
    from tdmld.train.timing import measure

    spec = family_spec(family, 2)
    told: list[str] = []
    seconds = measure(spec, told.append)
    assert len(seconds.layers) == 4
    every = [seconds.entry, *seconds.layers, seconds.head]
    assert all(one.forward > 0 and one.backward >= 0 for one in every)
    assert seconds.optimizer > 0 < seconds.hash
    assert (told[0], told[-2:]) == ("embedding", ["head", "optimizer"])


def test_between_segments_the_whole_state_is_hashed() -> None:
    seconds = seconds_of_speed(make_spec(), 1e9)
    for lanes, size in (({"count": 1, "mode": "sync"}, 12), (DILOCO, 20)):
        spec = make_spec(pipeline__lanes=lanes)
        largest = max(stage_parameters(spec, stage) for stage in range(2))
        assert segment_overhead(spec, seconds) == pytest.approx(size * largest * seconds.hash)


def test_a_second_forward_is_not_measured_and_then_counted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tdmld.train import timing
    from tdmld.train.model import loose_part as whole

    measured: list[bool] = []

    def loose_part(spec: Spec, part: Part) -> object:
        measured.append(spec.train.recompute)
        return whole(spec, part)

    monkeypatch.setattr(timing, "loose_part", loose_part)
    spec = make_spec()
    timing.measure(
        msgspec.structs.replace(spec, train=msgspec.structs.replace(spec.train, recompute=True))
    )
    assert not any(measured)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_a_speed_gives_seconds_without_a_run(family: str) -> None:
    spec = family_spec(family, 2)
    slow, fast = (seconds_of_speed(spec, flops) for flops in (1e9, 2e9))
    assert slow.layers[0].forward == pytest.approx(2 * fast.layers[0].forward)
    assert slow.head.both > 0


def estimate(job: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    from tdmld.cli import main

    assert main(["job", "estimate", str(job), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def job(tmp_path: Path) -> Path:
    from tests.train.support import CONFIG, TEXT
    from tests.train.test_jobfile import JOB

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_bytes(TEXT)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path / "job.toml"


def test_the_command_tells_what_a_job_takes(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate(job, capsys)
    assert found["measured"] is True
    assert [stage["layers"] for stage in found["stages"]] == [[0, 2], [2, 4]]
    assert found["stages"][0]["links"].keys() == {"down"}
    assert found["hours"] > 0 < found["price_at_most"]
    slow = estimate(job, capsys, "--gflops", "1", "--mbps", "0.01", "--latency", "100")
    fast = estimate(job, capsys, "--gflops", "1", "--speed", "2", "--speed", "4")
    assert slow["measured"] is False
    assert slow["hours"] > 10 * fast["hours"]


@pytest.mark.parametrize(
    "options",
    [("--mbps", "0"), ("--speed", "1", "--speed", "1", "--speed", "1"), ("--latency", "-1")],
)
def test_values_that_mean_nothing_are_refused(
    options: tuple[str, ...], job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tdmld.cli import main

    assert main(["job", "estimate", str(job), *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_the_text_for_people_names_the_stages(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tdmld.cli import main

    assert main(["job", "estimate", str(job), "--gflops", "5"]) == 0
    text = capsys.readouterr().out
    assert "bubble" in text
    assert "would give" in text
