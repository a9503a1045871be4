"""What a coalition aims at, by the real draws of the chain: each aim says whether a mix is bad luck
for the coalition, and how often a mix that nobody knows would be.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from msgspec.structs import replace

from tdmld.chain import audits, limits, market
from tdmld.chain.crypto import sha256
from tdmld.chain.execution import Execution
from tdmld.chain.ledger import BlockContext
from tdmld.chain.records import Job, StandingAsk
from tdmld.chain.state import u64
from tests.chain.test_jobs import active
from tests.chain.world import World, mark

RATE = 200_000
"""Audit rate of the simulated jobs, in millionths."""


class Aim(Protocol):
    """One draw that the coalition wants to end well: a segment that is not audited, a place."""

    @property
    def name(self) -> str: ...

    @property
    def delay(self) -> int:
        """Blocks from what is drawn over to the height that draws."""
        ...

    def lost(self, mix: bytes, tainted: bool, trial: int) -> bool:
        """Whether the draw ends badly for the coalition."""
        ...

    def chance(self, tainted: bool) -> float:
        """That it does, when the mix is not known."""
        ...


class Stage:
    """A job in a real ledger, once for all aims: seven owners, two workers, three that may audit
    and do not hold the state; two of those three are the coalition's."""

    @cached_property
    def world(self) -> World:
        return self._made[0]

    @cached_property
    def job(self) -> Job:
        return self.world.job(self._made[1])

    @cached_property
    def _made(self) -> tuple[World, bytes]:
        return active(audit_rate=RATE)

    @cached_property
    def run(self) -> Execution:
        """Its state is read only, and decoded once."""
        return Execution(self.world.state, self.world.genesis, self.context(b""))

    def context(self, mix: bytes) -> BlockContext:
        return BlockContext(self.world.height, 1, 0, 0, b"", mix)

    @cached_property
    def auditors(self) -> list[bytes]:
        """Owners that may audit, without the holder."""
        holder = None if self.job.standby is None else self.job.standby.owner
        return sorted(set(audits._eligible(self.run, self.job, ())) - {holder})


STAGE = Stage()


@dataclass(frozen=True)
class Unaudited:
    """AUDIT-1: the segment is not drawn."""

    name: str = "audit drawn"
    delay: int = 2

    def lost(self, mix: bytes, tainted: bool, trial: int) -> bool:
        return audits.is_drawn(mix, tainted, STAGE.job, 0, trial)

    def chance(self, tainted: bool) -> float:
        return 1.0 if tainted else RATE / limits.RATE_ONE


@dataclass(frozen=True)
class Friendly:
    """AUDIT-1, AUDIT-7: the segment is not drawn, or its auditor is of the coalition."""

    name: str = "audit by an outsider"
    delay: int = 2

    def lost(self, mix: bytes, tainted: bool, trial: int) -> bool:
        if not audits.is_drawn(mix, tainted, STAGE.job, 0, trial):
            return False
        run = Execution(STAGE.run.state, STAGE.run.genesis, STAGE.context(mix))
        found = audits.choose(run, STAGE.job, 0, trial, attempt=0, tried=())
        assert found is not None
        return found[1] not in STAGE.auditors[:2]

    @property
    def friends(self) -> float:
        """Half of the draws prefer the holder, who is not of the coalition."""
        return 1 / 2 * 2 / len(STAGE.auditors)

    def chance(self, tainted: bool) -> float:
        return (1 - self.friends) * (1.0 if tainted else RATE / limits.RATE_ONE)


ASK = StandingAsk(mark("session"), "cpu", 1 << 40, 1000, 4, 300, 900, 0, (), 1)
CANDIDATES = [
    market.Candidate(mark("node", n), mark("owner", n), ASK, limits.RATE_ONE, 1 << 40, 300)
    for n in range(6)
]
FRIENDS = {candidate.node for candidate in CANDIDATES[:2]}


@dataclass(frozen=True)
class Place:
    """MATCH-3, MATCH-4: a place of a job, where six nodes ask the same and two are the
    coalition's. Whether the height is tainted makes no difference."""

    name: str = "match: a slot"
    delay: int = 4
    standby: bool = False

    def lost(self, mix: bytes, tainted: bool, trial: int) -> bool:
        job = replace(STAGE.job, id=sha256(b"job", u64(trial)), class_wanted="cpu")
        found = market.cast(job, CANDIDATES, mix)
        assert found is not None
        member = found.standby if self.standby else found.workers[0]
        return member.node not in FRIENDS

    def chance(self, tainted: bool) -> float:
        return 2 / 3


AIMS: tuple[Aim, ...] = (
    Unaudited(),
    Friendly(),
    Place(),
    Place(name="match: the standby", standby=True),
)
