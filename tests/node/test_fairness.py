"""Who may make us work, and whose turn it is."""

import pytest
import trio
import trio.testing

from tdmld.node import fairness
from tdmld.node.fairness import Allowance, Meter, Turns

SLOW = Allowance(work=0.1, size=1000, burst=2.0)


async def test_a_peer_is_heard_while_it_has_bytes_and_work(
    autojump_clock: trio.testing.MockClock,
) -> None:
    meter = Meter(SLOW)
    assert meter.open("a", 1999)
    assert meter.open("a", 5000), "it may overdraw once"
    assert not meter.open("a", 1)
    assert meter.open("b", 1), "another one's are its own"
    await trio.sleep(4.9)
    assert not meter.open("a", 1)
    await trio.sleep(0.2)
    assert meter.open("a", 1)


async def test_work_comes_back_with_time_and_is_not_hoarded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    meter = Meter(SLOW)
    meter.charge("a", 0.2)
    assert not meter.charge("a", 0)
    assert not meter.open("a", 1)
    await trio.sleep(1)
    assert meter.charge("a", 0)
    await trio.sleep(3600)
    meter.charge("a", 0.21)
    assert not meter.charge("a", 0)


async def test_what_is_remembered_of_peers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_METERED", 3)
    meter = Meter(SLOW)
    for name in "abcd":
        meter.charge(name, 1)
    assert len(meter._accounts) == 3
    assert not meter.charge("d", 0)


async def test_turns_go_round_among_sources_and_ours_comes_first() -> None:
    turns, served = Turns(first="us"), list[str]()

    async def wait(source: str, name: str) -> None:
        async with turns.of(source):
            served.append(name)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery, turns.of("a"):
        waiting = [("a", f"a{n}") for n in range(4)]
        for source, name in [*waiting, ("b", "b0"), ("us", "us0"), ("b", "b1"), ("c", "c0")]:
            nursery.start_soon(wait, source, name)
            await trio.testing.wait_all_tasks_blocked()
    assert served == ["us0", "a0", "b0", "c0", "a1", "b1", "a2", "a3"]
    async with turns.of("a"):
        pass


@pytest.mark.parametrize("granted", [False, True])
async def test_who_gives_up_its_turn_holds_up_nobody(granted: bool) -> None:
    turns, served = Turns(first=""), list[str]()

    async def wait(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with turns.of(name):
                served.append(name)
                await trio.lowlevel.checkpoint()

    impatient = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        await turns._take("holder")
        nursery.start_soon(wait, "impatient", impatient)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wait, "patient", trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        if granted:
            turns._pass_on()
            impatient.cancel()
        else:
            impatient.cancel()
            await trio.testing.wait_all_tasks_blocked()
            turns._pass_on()
    assert served[-1] == "patient"
    assert not turns._held
    assert not turns._waiting
