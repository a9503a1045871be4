"""Where a job's time goes: what a slot's steps say, and which slot holds the others up."""

from typing import Any

import pytest

from tdmld.chain.codec import decode, encode
from tdmld.node.bottleneck import SlotTimes, bottleneck
from tdmld.node.jobreports import PHASE_CHARACTERS, REPORT_BYTES, Report, slot_report
from tdmld.node.machine import SlotId, StepDone
from tdmld.node.progress import KINDS, RECENT_STEPS, Progress


def step(number: int, seconds: float = 1.0, loss: float | None = 2.5, **timings: float) -> StepDone:
    return StepDone(bytes(32), SlotId(0, 0), number, loss, seconds, timings, 0.25)


def times(stage: int, **seconds: float) -> SlotTimes:
    return SlotTimes(0, stage, {**dict.fromkeys(KINDS, 0.0), **seconds})


def test_the_time_between_steps_is_told_from_their_own() -> None:
    progress = Progress()
    progress.step_done(step(0, compute=0.6, waiting=0.4), now=10.0)
    progress.segment_done(now=10.5, stalls=True)
    assert progress.phase == "waiting for the chain"
    progress.granted(now=12.5)
    progress.step_done(step(1, compute=0.8, waiting=0.2), now=13.5)
    assert progress.times == pytest.approx(
        {
            "compute": 0.7,
            "waiting": 0.3,
            "wire": 0.0,
            "verifying": 0.0,
            "saving": 0.25,
            "chain": 1.0,
        }
    )
    assert (progress.step, progress.loss, progress.phase) == (2, 2.5, "running")


def test_what_passes_while_a_worker_is_gone_belongs_to_no_kind() -> None:
    progress = Progress()
    progress.step_done(step(0, compute=1.0), now=1.0)
    progress.segment_done(now=2.0, stalls=True)
    progress.stopped("it died")
    progress.granted(now=100.0)
    progress.step_done(step(1, compute=1.0), now=101.0)
    assert progress.times["chain"] == progress.times["saving"] == 0.0
    assert progress.failed == ""


def test_one_long_wait_does_not_change_what_is_usual() -> None:
    progress = Progress()
    for number in range(9):
        progress.step_done(step(number, seconds=60.0 if number == 4 else 0.5), now=float(number))
    assert progress.step_seconds == 0.5


def test_only_recent_steps_count() -> None:
    progress = Progress()
    for number in range(2 * RECENT_STEPS):
        progress.step_done(step(number, compute=float(number < RECENT_STEPS)), now=0.0)
    assert progress.times["compute"] == 0.0


def test_nothing_is_known_before_the_first_step() -> None:
    assert bottleneck([]) is None
    assert bottleneck([times(0)]) is None
    assert Progress().times == {}


@pytest.mark.parametrize(
    ("slots", "stage", "kind"),
    [
        ([times(0, compute=0.9, waiting=0.1), times(1, compute=0.3, waiting=0.7)], 0, "compute"),
        (
            [times(0, compute=0.2, waiting=0.8), times(1, verifying=0.7, compute=0.3)],
            1,
            "verifying",
        ),
        ([times(0, compute=0.1, waiting=0.9), times(1, compute=0.2, waiting=0.8)], 1, "waiting"),
        ([times(0, compute=0.2, chain=0.8), times(1, compute=0.3, chain=0.7)], 1, "chain"),
        ([times(0, compute=0.2, chain=0.8), times(1, compute=0.9, chain=0.1)], 1, "compute"),
        ([times(0, saving=0.8, compute=0.2)], 0, "saving"),
    ],
)
def test_the_busiest_slot_holds_the_others_up(
    slots: list[SlotTimes], stage: int, kind: str
) -> None:
    found = bottleneck(slots)
    assert found is not None
    assert (found.stage, found.kind) == (stage, kind)
    assert 0 < found.share <= 1
    assert found.text


def test_a_report_says_what_the_slot_knows_and_nothing_that_cannot_be_read() -> None:
    progress = Progress()
    progress.step_done(step(6, compute=0.5, waiting=0.25), now=1.0)
    progress.stopped("x" * 1000)
    report = slot_report(3, progress)
    raw = encode(Report((report,)))
    assert decode(Report, raw, REPORT_BYTES).slots == (report,)
    assert (report.slot, report.step, report.loss, report.norm) == (3, 7, 2_500_000, 250_000)
    assert report.seconds["compute"] == 0.5
    assert len(report.phase) == PHASE_CHARACTERS


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0])
def test_a_loss_that_is_no_number_breaks_no_report(loss: float) -> None:
    progress = Progress()
    progress.step_done(step(0, loss=loss), now=1.0)
    assert slot_report(0, progress).loss == 0


def test_a_report_of_every_slot_that_a_job_may_have_fits() -> None:
    progress = Progress()
    timings: dict[str, Any] = dict.fromkeys(("compute", "waiting", "wire", "verifying"), 1e6)
    progress.step_done(step(2**40, **timings), now=1.0)
    progress.stopped("x" * 1000)
    reports = tuple(slot_report(slot, progress) for slot in range(256))
    assert len(encode(Report(reports))) <= REPORT_BYTES
