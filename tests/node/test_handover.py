"""Batches reach every destination in order, whatever the others do."""

from collections.abc import Sequence

import trio
import trio.testing

from tdmld.node.handover import MAX_BATCHES, HandOver


class Destinations:
    """Takes batches; `hangs` never returns from one."""

    def __init__(self, hangs: str = "") -> None:
        self.hangs = hangs
        self.taken: dict[str, list[bytes]] = {}
        self.now = 0
        self.most = 0

    async def deliver(self, to: str, batch: Sequence[bytes]) -> None:
        self.taken.setdefault(to, []).extend(batch)
        if to == self.hangs:
            await trio.sleep_forever()
        self.now += 1
        self.most = max(self.most, self.now)
        await trio.lowlevel.checkpoint()
        self.now -= 1


async def test_one_that_hangs_holds_up_nobody_else() -> None:
    there = Destinations(hangs="a")
    over = HandOver(there.deliver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(over.run)
        for number in range(5):
            for to in ("a", "b", "c"):
                over.send(to, [bytes([number])])
        await trio.testing.wait_all_tasks_blocked()
        assert there.taken == {
            "a": [b"\x00"],
            "b": [bytes([n]) for n in range(5)],
            "c": [bytes([n]) for n in range(5)],
        }
        over.send("d", [b"later"])
        over.send("b", [b"later"])
        await trio.testing.wait_all_tasks_blocked()
        assert there.taken["d"] == there.taken["b"][5:] == [b"later"]
        assert there.most == 2, "one batch at a time for each"
        nursery.cancel_scope.cancel()


async def test_what_waits_for_one_that_hangs_is_bounded() -> None:
    over = HandOver(Destinations(hangs="a").deliver)
    for number in range(2 * MAX_BATCHES):
        over.send("a", [bytes([number])])
    assert len(over._queues["a"]) == MAX_BATCHES
    assert over._queues["a"][-1] == [bytes([2 * MAX_BATCHES - 1])]
