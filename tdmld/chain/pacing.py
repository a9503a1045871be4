"""When a view begins and when it has lasted too long: blocks on demand, without a wall clock.

Any time-out is safe in Simplex, so these rules decide only speed and rest. Times are seconds of
a local monotonic clock.

Rules
  P1  A view is entered by certificate. Entering it starts no timer.
  P2  A view begins at start = max(entered, first demand, last block + interval). The leader
      proposes then; everybody else counts the view's time-out from then.
  P3  Demand is: something to put into a block or to commit by one (`Situation.work`), a message of
      this view (`Situation.heard`), or no block for `heartbeat`. A notarized block above the
      finalized head counts only after `patience`, normally its finalization is in flight; else
      each block would ask for the next on a machine whose finalizations take an interval.
  P4  When demand vanishes the timer is disarmed; the next demand starts a new one.
  P5  The time-out grows by half for each failed view in a row, up to MAX_TIMEOUT, and is reset
      by a notarization. While the leader is not connected it is `leader_away`.
  P6  No proposal and no timer while less than a quorum of stake, oneself included, is connected.
  P7  After the time-out one's votes are repeated every REPEAT seconds until the view ends.
  P8  A leader whose execution lags behind finality does not propose (`Situation.may_propose`).
"""

from dataclasses import dataclass

from tdmld.chain.consensus import EnterView

MAX_TIMEOUT = 30.0
GROWTH = 1.5
MAX_GROWTHS = 20
REPEAT = 1.0
IDLE = 3600.0
"""Deadline in seconds where nothing is due: the shell wakes us when something changes."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. `interval` is a genesis parameter, the others are local choices."""

    interval: float
    timeout: float
    leader_away: float
    heartbeat: float

    @property
    def patience(self) -> float:
        """How long a finalization may be in flight before a block is made for it (P3)."""
        return max(self.interval, self.timeout / 2)


@dataclass(frozen=True, slots=True)
class Situation:
    """What the shell sees now."""

    view: int
    leading: bool
    may_propose: bool
    leader_connected: bool
    quorum_connected: bool
    work: bool
    heard: bool
    unfinalized_tip: bool


@dataclass(frozen=True, slots=True)
class Propose:
    """Build the block of `view` now."""

    view: int


@dataclass(frozen=True, slots=True)
class TimeOut:
    """Nullify `view`."""

    view: int


@dataclass(frozen=True, slots=True)
class Repeat:
    """Say one's votes and the certificates of the view again."""


Action = Propose | TimeOut | Repeat


class Pacing:
    """The timer of the current view. `now` never decreases."""

    def __init__(self, times: Times, now: float) -> None:
        self._times = times
        self._last_block = now - times.interval
        self._entered = now
        self._demand: float | None = None
        self._failed = 0
        self._said_at = now
        self._timed_out = False

    @property
    def failed(self) -> int:
        """Views that failed in a row."""
        return self._failed

    def enter(self, effect: EnterView, now: float) -> None:
        """P1, P5."""
        self._entered = now
        self._demand = None
        self._timed_out = False
        self._failed = self._failed + 1 if effect.failed else 0

    def block_seen(self, now: float) -> None:
        """A valid proposal was made or received."""
        self._last_block = max(self._last_block, now)

    def tick(self, now: float, situation: Situation) -> tuple[list[Action], float]:
        """What to do now, and when to ask again unless something changes before."""
        times = self._times
        due = self._last_block + times.interval
        beat = self._last_block + times.heartbeat
        if not situation.quorum_connected:
            self._demand = None
            return [], now + IDLE
        late = self._last_block + times.patience if situation.unfinalized_tip else beat
        if not (situation.work or situation.heard or now >= min(beat, late)):
            self._demand = None
            self._timed_out = False
            return [], min(beat, late)
        if self._demand is None:
            self._demand = now
        start = max(self._entered, self._demand, due)
        end = start + self._limit(situation)
        if now < start:
            return [], start
        if now < end:
            proposing = situation.leading and situation.may_propose
            return [Propose(situation.view)] if proposing else [], end
        actions: list[Action] = []
        if not self._timed_out:
            self._timed_out = True
            self._said_at = now
            actions.append(TimeOut(situation.view))
        elif now >= self._said_at + REPEAT:
            self._said_at = now
            actions.append(Repeat())
        return actions, self._said_at + REPEAT

    def _limit(self, situation: Situation) -> float:
        """P5."""
        if not situation.leading and not situation.leader_connected:
            return self._times.leader_away
        growth = GROWTH ** min(self._failed, MAX_GROWTHS)
        return min(self._times.timeout * growth, MAX_TIMEOUT)
