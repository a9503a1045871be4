"""The rotation of leaders: proportional, smooth, bounded, the same everywhere."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdmld.chain.leader import MAX_PERIOD, Rotation, seats


def test_equal_stakes_lead_in_turn() -> None:
    rotation = Rotation([100] * 5)
    assert [rotation.leader(view) for view in range(6)] == [0, 1, 2, 3, 4, 0]


def test_a_heavy_validator_is_spread_over_the_period() -> None:
    rotation = Rotation([3, 1, 1, 1])
    leaders = [rotation.leader(view) for view in range(6)]
    assert Counter(leaders) == {0: 3, 1: 1, 2: 1, 3: 1}
    assert all(pair != (0, 0) for pair in itertools.pairwise(leaders))


def test_a_far_view_needs_no_history() -> None:
    rotation = Rotation([5, 3, 7])
    assert rotation.leader(10**15) == Rotation([5, 3, 7]).leader(10**15)


def test_an_empty_or_worthless_set_is_refused() -> None:
    with pytest.raises(ValueError, match="stake"):
        Rotation([])
    with pytest.raises(ValueError, match="stake"):
        Rotation([1, 0])


def test_who_does_not_lead_has_no_turns() -> None:
    """LEAD-1: the others share them as if it were not there."""
    rotation = Rotation([6, 9, 2, 12], [True, True, False, True])
    assert rotation.turns == (2, 3, 0, 4)
    assert rotation.period == 9
    assert 2 not in {rotation.leader(view) for view in range(9)}


def test_somebody_leads() -> None:
    with pytest.raises(ValueError, match="leads"):
        Rotation([1, 2], [False, False])
    with pytest.raises(ValueError, match="validators"):
        Rotation([1, 2], [True])


@given(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=9))
def test_a_rotation_is_that_of_those_who_lead(rows: list[tuple[int, bool]]) -> None:
    rows = [(5, True), *rows]
    whole = Rotation([stake for stake, _ in rows], [leads for _, leads in rows])
    alone = Rotation([stake for stake, leads in rows if leads])
    places = [index for index, (_, leads) in enumerate(rows) if leads]
    for view in range(alone.period):
        assert whole.leader(view) == places[alone.leader(view)]


@given(st.lists(st.integers(1, 2**62), min_size=1, max_size=40))
def test_shares_follow_stakes_up_to_a_seat_each(stakes: list[int]) -> None:
    turns = seats(stakes)
    assert min(turns) >= 1
    assert sum(turns) <= MAX_PERIOD
    total, period = sum(stakes), sum(turns)
    for stake, turn in zip(stakes, turns, strict=True):
        assert abs(turn - stake * period / total) <= len(stakes) + 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_no_prefix_strays_far_from_its_share(stakes: list[int]) -> None:
    rotation, count = Rotation(stakes), Counter[int]()
    turns = seats(stakes)
    for view in range(rotation.period):
        count[rotation.leader(view)] += 1
        for index, turn in enumerate(turns):
            assert abs(count[index] - turn * (view + 1) / rotation.period) < len(stakes)
