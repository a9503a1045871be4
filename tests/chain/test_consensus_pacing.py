"""The rules P1 to P8 of pacing, one by one, on a clock made of numbers."""

import dataclasses

from tdmld.chain.consensus import EnterView
from tdmld.chain.pacing import GROWTH, REPEAT, Pacing, Propose, Repeat, Situation, TimeOut, Times

TIMES = Times(interval=0.5, timeout=2.0, leader_away=0.3, heartbeat=30.0)
REST = Situation(
    view=1,
    leading=False,
    may_propose=True,
    leader_connected=True,
    quorum_connected=True,
    work=False,
    heard=False,
    unfinalized_tip=False,
)
WORK = dataclasses.replace(REST, work=True)
LEADING = dataclasses.replace(WORK, leading=True)


def pacing() -> Pacing:
    made = Pacing(TIMES, 100.0)
    made.enter(EnterView(1, False), 100.0)
    return made


def test_p1_entering_a_view_starts_no_timer() -> None:
    made = pacing()
    assert made.tick(100.0, REST) == ([], 129.5)
    assert made.tick(129.0, REST)[0] == []


def test_p2_the_leader_waits_for_the_interval_after_the_last_block() -> None:
    made = pacing()
    assert made.tick(100.0, LEADING)[0] == [Propose(1)]
    made.block_seen(100.0)
    made.enter(EnterView(2, False), 100.1)
    following = dataclasses.replace(LEADING, view=2)
    assert made.tick(100.2, following) == ([], 100.5)
    assert made.tick(100.5, following)[0] == [Propose(2)]


def test_p2_the_time_out_counts_from_the_first_demand() -> None:
    made = pacing()
    made.tick(110.0, WORK)
    assert made.tick(111.9, WORK) == ([], 112.0)
    assert made.tick(112.0, WORK)[0] == [TimeOut(1)]


def test_p3_the_heartbeat_is_demand() -> None:
    made = pacing()
    leading = dataclasses.replace(REST, leading=True)
    assert made.tick(129.4, leading)[0] == []
    assert made.tick(129.5, leading)[0] == [Propose(1)]


def test_p3_a_finalization_in_flight_is_no_demand_until_it_is_late() -> None:
    made = pacing()
    made.block_seen(100.0)
    tip = dataclasses.replace(REST, leading=True, unfinalized_tip=True)
    assert made.tick(100.6, tip) == ([], 101.0)
    assert made.tick(101.0, tip)[0] == [Propose(1)]


def test_p4_a_timer_does_not_outlive_its_demand() -> None:
    made = pacing()
    made.tick(100.0, WORK)
    made.tick(100.1, REST)
    assert made.tick(110.0, WORK)[0] == []
    assert made.tick(111.9, WORK)[0] == []
    assert made.tick(112.0, WORK)[0] == [TimeOut(1)]


def test_p5_the_time_out_grows_with_failed_views_and_is_reset() -> None:
    made = pacing()
    made.enter(EnterView(2, True), 100.0)
    made.enter(EnterView(3, True), 100.0)
    assert made.tick(100.0, WORK)[1] == 100.0 + 2.0 * GROWTH**2
    made.enter(EnterView(4, False), 100.0)
    assert made.tick(100.0, WORK)[1] == 102.0
    for view in range(5, 200):
        made.enter(EnterView(view, True), 100.0)
    assert made.tick(100.0, WORK)[1] == 130.0


def test_p5_an_absent_leader_is_waited_for_briefly() -> None:
    made = pacing()
    away = dataclasses.replace(WORK, leader_connected=False)
    made.tick(100.0, away)
    assert made.tick(100.3, away)[0] == [TimeOut(1)]


def test_p6_nothing_happens_below_a_quorum_and_the_timer_starts_afresh() -> None:
    made = pacing()
    alone = dataclasses.replace(LEADING, quorum_connected=False)
    assert made.tick(100.0, alone)[0] == []
    assert made.tick(200.0, alone)[0] == []
    assert made.tick(201.0, WORK)[0] == []
    assert made.tick(203.0, WORK)[0] == [TimeOut(1)]


def test_p7_votes_are_repeated_until_the_view_ends() -> None:
    made = pacing()
    made.tick(100.0, WORK)
    assert made.tick(102.0, WORK) == ([TimeOut(1)], 102.0 + REPEAT)
    assert made.tick(102.5, WORK)[0] == []
    assert made.tick(103.0, WORK)[0] == [Repeat()]
    assert made.tick(104.0, WORK)[0] == [Repeat()]


def test_p8_a_leader_that_may_not_propose_does_not() -> None:
    made = pacing()
    lagging = dataclasses.replace(LEADING, may_propose=False)
    assert made.tick(100.0, lagging)[0] == []
    assert made.tick(102.0, lagging)[0] == [TimeOut(1)]
