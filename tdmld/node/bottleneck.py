"""Which slot a job waits for, and why: from the mean times of the slots' recent steps.

Slots drive each other through their links, so all make steps at one pace: the slowest slot's. It
is the one that is busiest within a step, not the one whose steps take longest: the others spend the
difference waiting. Where even the busiest slot mostly waits, the links (or the schedule) are slow;
where the chain holds everybody up, it is settlement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tdmld.rpc.jobtypes import Bottleneck, TimeKind

BUSY: tuple[TimeKind, ...] = ("compute", "wire", "verifying", "saving")
MOSTLY = 0.5
"""Share of its time from which on something is the reason."""
REASONS = {
    "compute": "it computes",
    "wire": "it spells and reads frames",
    "verifying": "it hashes what it sends and receives",
    "saving": "it writes its state at the end of segments",
}


@dataclass(frozen=True)
class SlotTimes:
    """Mean seconds a step of one slot, by kind (progress.KINDS)."""

    lane: int
    stage: int
    times: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.times.values())

    @property
    def busy(self) -> float:
        return sum(self.times.get(kind, 0.0) for kind in BUSY)


def bottleneck(slots: Sequence[SlotTimes]) -> Bottleneck | None:
    """What holds the job up, or None before anything is known."""
    known = [slot for slot in slots if slot.total > 0]
    if not known:
        return None
    held = min(known, key=lambda slot: slot.times.get("chain", 0.0) / slot.total)
    chain = held.times.get("chain", 0.0) / held.total
    if chain >= MOSTLY:
        text = f"every slot waits for the chain {chain:.0%} of the time: settlement or a round"
        return _found(held, "chain", text)
    slowest = max(known, key=lambda slot: slot.busy)
    waiting = slowest.times.get("waiting", 0.0) / slowest.total
    where = f"stage {slowest.stage} of lane {slowest.lane}"
    if waiting >= MOSTLY:
        text = (
            f"the links: even the busiest slot, {where}, waits for frames {waiting:.0%} of the time"
        )
        return _found(slowest, "waiting", text)
    kind: TimeKind = max(BUSY, key=lambda kind: slowest.times.get(kind, 0.0))
    share = slowest.times.get(kind, 0.0) / slowest.total
    text = f"{where}: {REASONS[kind]} {share:.0%} of the time, {slowest.busy:.2f} s busy a step"
    return _found(slowest, kind, text)


def _found(slot: SlotTimes, kind: TimeKind, text: str) -> Bottleneck:
    share = slot.times.get(kind, 0.0) / slot.total
    return Bottleneck(lane=slot.lane, stage=slot.stage, kind=kind, share=share, text=text)
