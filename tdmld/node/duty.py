"""The kinds of duties: what the chain may expect of a node for one job.

A duty is a value. It stands as long as the state shows it undone and disappears when the state
shows it done, so a lost transaction, a restart and a late block need no special case; two that are
equal are the same one. `slot` is a slot index throughout. `epoch` is raised by a rollback of the
job, `incarnation` when another worker takes the slot: what is to be done again is another duty. Of
a committed segment they are those that its worker committed under.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Duty:
    """Something to do for one job."""

    job: bytes

    def __str__(self) -> str:
        """In words, for the log."""
        rest = [f"{name} {getattr(self, name)}" for name in self.__dataclass_fields__]
        return " ".join([type(self).__name__, "of job", self.job.hex()[:12], *rest[1:]])


@dataclass(frozen=True)
class TakePlace(Duty):
    """Accept or decline the place that we were given. `slot`: index or STANDBY_SLOT; `attempt`:
    the matching, the slot's incarnation for a replacement, the turn of a new standby."""

    attempt: int
    slot: int


@dataclass(frozen=True)
class PrepareSlot(Duty):
    """Fetch the data, draw the slot's weights, attest their roots, and be ready to run."""

    slot: int


@dataclass(frozen=True)
class PrepareCopy(Duty):
    """As the standby: draw a slot's weights too, and attest their roots."""

    slot: int


@dataclass(frozen=True)
class OpenSlot(Duty):
    """Have our slot's worker run under this epoch and incarnation, from whatever is here or can be
    fetched. It stands all the time: a worker or carrier that died, a restarted daemon, a rollback
    and a replacement are one thing."""

    slot: int
    epoch: int
    incarnation: int


@dataclass(frozen=True)
class ReachPeers(Duty):
    """Let the links of our slot know who is at their other ends: (link, session, incarnation)."""

    slot: int
    epoch: int
    incarnation: int
    peers: tuple[tuple[str, bytes, int], ...]


@dataclass(frozen=True)
class RunSegments(Duty):
    """Let the worker of our slot run segments below `until`: the stall at D, or before a round
    that is not decided."""

    slot: int
    epoch: int
    incarnation: int
    until: int


@dataclass(frozen=True)
class CommitSegment(Duty):
    """Commit to the next segment of our slot, as soon as it is done."""

    slot: int
    epoch: int
    incarnation: int
    segment: int


@dataclass(frozen=True)
class HoldContributions(Duty):
    """Bring what sibling lanes contributed in a round to the stage of our slot, and attest it.
    `lanes`: those that committed to it and whose contribution we have not attested."""

    slot: int
    epoch: int
    round: int
    lanes: tuple[int, ...]


@dataclass(frozen=True)
class ProveState(Duty):
    """Publish the keyed hash of the state after `segment`: as the standby, then as the worker."""

    slot: int
    epoch: int
    incarnation: int
    segment: int


@dataclass(frozen=True)
class HoldState(Duty):
    """As the standby: bring the state at `boundary` here."""

    slot: int
    epoch: int
    boundary: int


@dataclass(frozen=True)
class ReplaySegment(Duty):
    """As the drawn auditor: replay and commit to what was found."""

    slot: int
    epoch: int
    incarnation: int
    segment: int
    attempt: int


@dataclass(frozen=True)
class OpenSeal(Duty):
    """As the audited worker: open the seal of a commitment."""

    slot: int
    epoch: int
    incarnation: int
    segment: int


@dataclass(frozen=True)
class OpenVerdict(Duty):
    """As the auditor: open what was found."""

    slot: int
    epoch: int
    incarnation: int
    segment: int
    attempt: int


@dataclass(frozen=True)
class SayPresent(Duty):
    """Our slot is accused of not delivering, since the height `opened`: say that we are here."""

    slot: int
    epoch: int
    incarnation: int
    opened: int


@dataclass(frozen=True)
class TryDelivery(Duty):
    """As the standby and witness: ask an accused slot's carrier for the frame that its neighbour
    waits for, and say whether it came. `link`: as seen from the accused slot; `opened`: height."""

    slot: int
    epoch: int
    incarnation: int
    opened: int
    link: str
    seq: int


@dataclass(frozen=True)
class ForgetSegments(Duty):
    """Nobody can ask for segments of our slot or copy below `keep_from` any more: frames, states
    and contributions that only they needed may go."""

    slot: int
    keep_from: int


@dataclass(frozen=True)
class MakeResult(Duty):
    """Assemble, keep and attest the trained model."""


@dataclass(frozen=True)
class CloseJob(Duty):
    """The job is over: stop what runs for it."""
