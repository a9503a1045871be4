"""Mutants of pacing: each breaks one rule of P1 to P8, by subclassing or by blinding it."""

import dataclasses

from tdmld.chain.consensus import EnterView
from tdmld.chain.pacing import Action, Pacing, Repeat, Situation, TimeOut


class Blinded(Pacing):
    """Sees something else than what is."""

    def see(self, now: float, situation: Situation) -> Situation:
        return situation

    def tick(self, now: float, situation: Situation) -> tuple[list[Action], float]:
        return super().tick(now, self.see(now, situation))


class TimerAtEntry(Blinded):
    """P1: entering a view starts its timer."""

    def see(self, now: float, situation: Situation) -> Situation:
        return dataclasses.replace(situation, work=True)


class NoInterval(Pacing):
    """P2: the next block at once."""

    def block_seen(self, now: float) -> None:
        super().block_seen(now - self._times.interval)


class TimerFromEntry(Pacing):
    """P2: the time-out counts from the entry, not from the first demand."""

    def tick(self, now: float, situation: Situation) -> tuple[list[Action], float]:
        wanted = situation.work or situation.heard
        if self._demand is None and wanted and situation.quorum_connected:
            self._demand = self._entered
        last, self._last_block = self._last_block, min(self._last_block, self._entered - 9)
        try:
            return super().tick(now, situation)
        finally:
            self._last_block = last


class NoHeartbeat(Pacing):
    """P3: no block without work."""

    def tick(self, now: float, situation: Situation) -> tuple[list[Action], float]:
        if not (situation.work or situation.heard or situation.unfinalized_tip):
            self._demand = None
            return [], now + 3600
        return super().tick(now, situation)


class DeafPacing(Blinded):
    """P3: that others want the view to end is no demand."""

    def see(self, now: float, situation: Situation) -> Situation:
        return dataclasses.replace(situation, heard=False)


class NoPatience(Blinded):
    """P3: a notarized block asks for the next at once."""

    def see(self, now: float, situation: Situation) -> Situation:
        return dataclasses.replace(situation, work=situation.work or situation.unfinalized_tip)


class NoTip(Blinded):
    """P3: a finalization that is late is never demand."""

    def see(self, now: float, situation: Situation) -> Situation:
        return dataclasses.replace(situation, unfinalized_tip=False)


class TimerOutlivesDemand(Pacing):
    """P4: the timer of a demand that vanished runs on."""

    def tick(self, now: float, situation: Situation) -> tuple[list[Action], float]:
        before = self._demand
        actions, deadline = super().tick(now, situation)
        if self._demand is None and situation.quorum_connected:
            self._demand = before
        return actions, deadline


class NeverGrows(Pacing):
    """P5: the time-out stays what it is."""

    def enter(self, effect: EnterView, now: float) -> None:
        super().enter(dataclasses.replace(effect, failed=False), now)


class NeverShrinks(Pacing):
    """P5: a notarization does not reset the time-out."""

    def enter(self, effect: EnterView, now: float) -> None:
        failed = self._failed
        super().enter(effect, now)
        self._failed = max(self._failed, failed)


class WaitsForTheAbsent(Blinded):
    """P5: a leader that is not connected is waited for like any other."""

    def see(self, now: float, situation: Situation) -> Situation:
        return dataclasses.replace(situation, leader_connected=True)


class TalksAlone(Blinded):
    """P6: proposes and times out below a quorum."""

    def see(self, now: float, situation: Situation) -> Situation:
        return dataclasses.replace(situation, quorum_connected=True)


class SaysItOnce(Pacing):
    """P7: nothing is repeated."""

    def tick(self, now: float, situation: Situation) -> tuple[list[Action], float]:
        actions, deadline = super().tick(now, situation)
        return [action for action in actions if not isinstance(action, Repeat)], deadline


class NeverTimesOut(Pacing):
    """P2: waits for ever for its leader."""

    def tick(self, now: float, situation: Situation) -> tuple[list[Action], float]:
        actions, deadline = super().tick(now, situation)
        return [action for action in actions if not isinstance(action, TimeOut | Repeat)], deadline
