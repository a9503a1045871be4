"""Slots are killed, lose power or move to another machine: nothing is lost, nothing doubled."""

import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdmld.node import control, linkserver
from tdmld.train.digest import digest
from tests.node.slotpair import FRAMES, JOB, NAMES, ROUNDS, SEGMENT, Pair, payload

Act = Callable[[Pair], Awaitable[None]]


RATE = 50
"""Pauses before a redial go by so much faster. No jumps: threads at work are no idleness."""


def play(root: Path, act: Act, rate: float = RATE) -> Pair:
    """Run both slots to their end while `act` does its worst."""

    async def main() -> Pair:
        async with trio.open_nursery() as nursery:
            pair = Pair(root, nursery)
            pair.open(0, 0)
            pair.open(1, 0)
            await act(pair)
            with trio.fail_after(120 * rate):
                await pair.until_ended()
            for number in (0, 1):
                await pair.sides[number].life.server.close(abort=True)  # type: ignore[union-attr]
            nursery.cancel_scope.cancel()
        return pair

    pair = trio.run(main, clock=trio.testing.MockClock(rate=rate))
    pair.check()
    return pair


async def undisturbed(pair: Pair) -> None:
    """Nothing happens."""


def test_an_undisturbed_pair_runs_to_its_end(tmp_path: Path) -> None:
    pair = play(tmp_path, undisturbed)
    assert [side.made for side in pair.sides] == [FRAMES, FRAMES]


@pytest.mark.parametrize("number", [0, 1], ids=NAMES)
@pytest.mark.parametrize("frames", range(1, FRAMES + 1))
def test_a_slot_killed_after_any_frame_goes_on_where_its_worker_can(
    tmp_path: Path, number: int, frames: int
) -> None:
    async def act(pair: Pair) -> None:
        await pair.until_made(number, frames)
        await pair.kill(number)
        pair.open(number, pair.sides[number].finished)

    pair = play(tmp_path, act)
    assert pair.sides[1 - number].made == FRAMES  # the other end never noticed


@pytest.mark.parametrize("number", [0, 1], ids=NAMES)
def test_a_worker_that_begins_earlier_than_its_logs_gets_everything_from_disk(
    tmp_path: Path, number: int
) -> None:
    """Its newer states are gone; what it makes again is compared and dropped."""

    async def act(pair: Pair) -> None:
        side = pair.sides[number]
        await pair.until_made(number, 2 * SEGMENT + 1)
        await pair.kill(number)
        sizes = [side.log(n, d).stat().st_size for n in (0, 1) for d in ("sent", "received")]
        pair.open(number, 0)
        await pair.until_made(number, 4 * SEGMENT + 1)
        assert sizes == [
            side.log(n, d).stat().st_size for n in (0, 1) for d in ("sent", "received")
        ]

    pair = play(tmp_path, act)
    assert pair.sides[number].given == list(range(FRAMES))
    segments = [event.segment for event in pair.sides[number].told(control.SegmentReported)]  # type: ignore[attr-defined]
    assert segments[-ROUNDS:] == list(range(ROUNDS))


@pytest.mark.parametrize("frames", [1, SEGMENT, SEGMENT + 1, FRAMES])
def test_both_ends_killed_at_once_go_on(tmp_path: Path, frames: int) -> None:
    async def act(pair: Pair) -> None:
        await pair.until_made(1, frames)
        await pair.kill(0)
        await pair.kill(1)
        for number in (1, 0):
            pair.open(number, pair.sides[number].finished)

    play(tmp_path, act)


@pytest.mark.parametrize("number", [0, 1], ids=NAMES)
@pytest.mark.parametrize("lost", [1, 60, 10_000], ids=["torn", "a frame", "everything"])
def test_a_machine_that_lost_power_makes_again_what_was_not_synced(
    tmp_path: Path, number: int, lost: int
) -> None:
    async def act(pair: Pair) -> None:
        await pair.until_made(number, SEGMENT + 2)
        await pair.kill(number)
        pair.lose_power(number, lambda path, size: max(size - lost, 0))
        pair.open(number, pair.sides[number].finished)

    play(tmp_path, act)


@pytest.mark.parametrize("number", [0, 1], ids=NAMES)
@pytest.mark.parametrize("frames", [1, SEGMENT, 2 * SEGMENT - 1, FRAMES])
def test_a_machine_that_has_nothing_takes_a_slot_over(
    tmp_path: Path, number: int, frames: int
) -> None:
    async def act(pair: Pair) -> None:
        await pair.until_made(number, frames)
        start = pair.sides[number].finished
        await pair.kill(number)
        pair.replace(number)
        pair.open(number, start)

    pair = play(tmp_path, act)
    assert pair.sides[1 - number].made == FRAMES


@pytest.mark.parametrize("number", [0, 1], ids=NAMES)
def test_whoever_is_opened_again_is_not_kept_waiting_for_a_redial(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(pair: Pair) -> None:
        await pair.until_made(number, SEGMENT + 1)
        for name in ("REDIAL_FIRST_SECONDS", "REDIAL_LAST_SECONDS", "PATIENCE_SECONDS"):
            monkeypatch.setattr(linkserver, name, 10_000)
        await pair.kill(number)
        pair.open(number, pair.sides[number].finished)

    play(tmp_path, act, rate=1)


def test_who_takes_over_after_the_goodbye_is_served_as_well(tmp_path: Path) -> None:
    async def act(pair: Pair) -> None:
        await pair.until_ended()
        for number in (0, 1):
            await pair.kill(number)
            pair.replace(number)
            pair.open(number, 1)
            await pair.until_ended()

    play(tmp_path, act)


@pytest.mark.parametrize("number", [0, 1], ids=NAMES)
def test_a_slot_opened_again_after_the_end_gets_its_goodbye(tmp_path: Path, number: int) -> None:
    async def act(pair: Pair) -> None:
        await pair.until_ended()
        await pair.kill(number)
        pair.open(number, ROUNDS)

    pair = play(tmp_path, act)
    assert pair.sides[number].made == FRAMES


def test_a_worker_that_makes_another_frame_than_before_stops_the_slot(tmp_path: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            pair = Pair(tmp_path, nursery)
            pair.open(0, 0)
            await pair.until_made(0, 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await pair.kill(0)
            path = pair.sides[0].log(0, "sent")
            raw = path.read_bytes()
            other = payload(0, 0)[:-1] + b"?"
            forged = raw[: -len(other)] + other
            path.write_bytes(forged.replace(digest(payload(0, 0)), digest(other)))
            pair.open(0, 0)
            while not (found := pair.sides[0].told(control.SlotBroken)):
                await pair.sides[0].moved.wait()
            (broken,) = found
            assert isinstance(broken, control.SlotBroken)
            assert "not reliable" in broken.text
            assert broken.cause == "link"
            assert broken.slot == control.Slot(JOB, 0, 0)
            nursery.cancel_scope.cancel()

    trio.run(main)


def _at_most(kept: int, path: Path, size: int) -> int:
    return min(size, kept)


Harm = tuple[int, int, str, int, int]
harms = st.lists(
    st.tuples(
        st.integers(0, 1),  # who
        st.integers(0, 7),  # after so many frames more
        st.sampled_from(["kill", "power", "machine", "both"]),
        st.integers(0, 250),  # bytes that a power cut leaves of each open log
        st.integers(0, 2),  # so many boundaries before the newest one does it begin again
    ),
    max_size=6,
)


@given(harms)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_frame_is_lost_or_doubled_whatever_is_taken_away(harm: list[Harm]) -> None:
    held = [0, 0]
    """A machine that has nothing begins where a copy of the state is; nobody forgets what is after
    the lower one of both."""

    async def act(pair: Pair) -> None:
        for number, more, how, kept, back in harm:
            side = pair.sides[number]
            if side.made + more <= FRAMES:
                await pair.until_made(number, side.made + more)
            struck = (0, 1) if how == "both" else (number,)
            for one in struck:
                await pair.kill(one)
            for one in struck:
                start = max(pair.sides[one].finished - back, held[one])
                if how == "power":
                    pair.lose_power(one, partial(_at_most, kept))
                if how == "machine":
                    # Both must be able to drive each other from there.
                    start = held[one]
                    pair.replace(one)
                pair.open(one, start)

    with tempfile.TemporaryDirectory() as directory:
        play(Path(directory), act)
