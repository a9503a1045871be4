"""What this node knows of the slots that it runs beyond the chain: for people, and for its own
judgement of what is too slow. Seconds are of trio's clock; nothing here is ever hashed.

Where the time of a step went:

    compute    the worker computed
    waiting    it waited for frames of its neighbours or siblings
    wire       it spelled and read frames
    verifying  it hashed frames and gradients
    saving     it wrote the state and the list at the end of a segment
    chain      it waited for leave to go on: settlement, or a round that is not decided
"""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tdmld.node.machine_types import StepDone

KINDS = ("compute", "waiting", "wire", "verifying", "saving", "chain")
RECENT_STEPS = 64
"""Steps that means are taken over."""


@dataclass
class Progress:
    """One slot that this node runs. `phase` and `failed` are short phrases."""

    phase: str = "waiting"
    failed: str = ""
    step: int = 0
    """Steps done."""
    loss: float | None = None
    gradient_norm: float = 0.0
    seconds: float = 0.0
    """Of the last step."""
    restarts: int = 0
    """Times that its worker was started again."""
    _recent: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _between: dict[str, float] = field(default_factory=dict)
    """What passed since the last step, by kind."""
    _stepped: float | None = None
    _stalled: float | None = None

    def step_done(self, event: StepDone, now: float) -> None:
        """A step was finished."""
        self.phase, self.step, self.failed = "running", event.step + 1, ""
        self.loss, self.gradient_norm, self.seconds = event.loss, event.gradient_norm, event.seconds
        self._recent.append({**dict.fromkeys(KINDS, 0.0), **event.timings, **self._between})
        self._seconds.append(event.seconds)
        self._between = {}
        self._stepped = now

    def segment_done(self, now: float, *, stalls: bool) -> None:
        """A segment and its state are on disk; `stalls`: the next one is not allowed yet."""
        if self._stepped is not None:
            self._between["saving"] = now - self._stepped
        if stalls:
            self.phase, self._stalled = "waiting for the chain", now

    def granted(self, now: float) -> None:
        """The next segment is allowed."""
        if self._stalled is not None:
            self._between["chain"] = self._between.get("chain", 0.0) + now - self._stalled
            self._stalled = None

    def stopped(self, reason: str) -> None:
        """Its worker is gone. What passes until the next step belongs to no kind."""
        self.phase, self.failed = "failed", reason
        self._stepped = self._stalled = None
        self._between = {}

    @property
    def times(self) -> Mapping[str, float]:
        """Mean seconds of the recent steps by kind; empty before the first one."""
        count = len(self._recent)
        return {kind: sum(step[kind] for step in self._recent) / count for kind in KINDS if count}

    @property
    def step_seconds(self) -> float:
        """What a step usually takes here, in seconds: the median of the recent ones, so that a
        long wait is no measure of what is usual. 0 before the first one."""
        return statistics.median(self._seconds) if self._seconds else 0.0
