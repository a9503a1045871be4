"""The machine: what this node does for jobs, as seen by the daemon.

A Machine supervises one carrier process (network, content, frame logs) and one worker process for
each slot, audit or drawing (torch). Killing any of them disturbs neither the daemon nor the others:

    worker dies    SlotFailed with the exit status and its last words
    carrier dies   CarrierDown, SlotFailed for each open slot, restart with back-off, CarrierUp
    daemon dies    carrier and workers end (end of file, parent-death signal)

Open a Machine in the main thread: the parent-death signal of a child belongs to the thread that
started it.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tdmld.node.machine_types import (
    AuditTask,
    CarrierDown,
    CarrierUp,
    Event,
    GenesisRoots,
    LinkSource,
    ResultInfo,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotFinished,
    SlotId,
    StateRoots,
    StateSource,
    StepDone,
)
from tdmld.p2p import PeerInfo
from tdmld.train.segment import SegmentRecord

__all__ = [
    "AuditTask",
    "CarrierDown",
    "CarrierUp",
    "Event",
    "GenesisRoots",
    "LinkSource",
    "Machine",
    "ResultInfo",
    "SegmentDone",
    "SlotAssignment",
    "SlotFailed",
    "SlotFinished",
    "SlotId",
    "StateRoots",
    "StateSource",
    "StepDone",
    "open_machine",
]


@asynccontextmanager
async def open_machine(
    data_dir: Path,
    *,
    chain_id: bytes,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    launcher: Sequence[str] = (),
    content_quota: int = 64 << 30,
) -> AsyncIterator["Machine"]:
    """Start the carrier and give a Machine; leaving the block ends all of its processes.

    launcher       argv prefix of worker processes, for example ("nice", "-n", "5")
    content_quota  bytes that content/ may hold

    MachineError when the carrier does not come up (the text ends with its last words).
    """
    raise NotImplementedError
    yield


class Machine:
    """See the module. All methods may be called from any task of the daemon's trio run and may be
    cancelled; a cancelled `audit`, `genesis_roots` or `open_slot` ends its worker process."""

    session: str
    """PeerId of the carrier, from keys/session.key; the same after restarts."""
    addresses: tuple[str, ...]
    """Multiaddrs where the carrier listens."""
    events: trio.MemoryReceiveChannel[Event]
    """One consumer. StepDone may be left out when the consumer is slow, nothing else."""

    async def set_peers(self, peers: Sequence[PeerInfo]) -> None:
        """Replace the carriers (sessions) to keep a connection with."""
        raise NotImplementedError

    async def set_members(self, job: bytes, sessions: frozenset[str]) -> None:
        """Replace the sessions that may fetch this job's content from us; auditors are added when
        they are drawn. An empty set closes the job for others."""
        raise NotImplementedError

    async def import_text(self, path: Path) -> list[tuple[bytes, int]]:
        """Cut a text into shards of 1 MiB and keep them: [(shard id, size)]. ContentError."""
        raise NotImplementedError

    async def fetch(self, job: bytes, content: bytes, size: int, holders: Sequence[str]) -> Path:
        """Bring content by id from the first holder that gives it. At once when it is here.
        ContentError."""
        raise NotImplementedError

    async def fetch_data(self, job: bytes, spec: bytes, holders: Sequence[str]) -> None:
        """Bring all data shards of a spec. ContentError. Needed before `open_slot` and
        `genesis_roots`."""
        raise NotImplementedError

    async def open_slot(self, assignment: SlotAssignment) -> GenesisRoots:
        """Start the worker of a slot, draw its weights, write boundary 0, open the links (this also
        does `set_members`). The worker then waits for `grant`. WorkerFailed, ContentUnavailable
        (a shard is not here), CarrierUnavailable."""
        raise NotImplementedError

    async def grant(self, job: bytes, slot: SlotId, until_segment: int) -> None:
        """Let the worker run segments < `until_segment` (stall at D). Never takes anything back.
        Ignored when the slot is not open (it failed: the event says so)."""
        raise NotImplementedError

    async def genesis_roots(self, job: bytes, spec: bytes, slot: SlotId) -> GenesisRoots:
        """For a standby: draw the slot's state in a worker, keep it as boundary 0 of the standby
        copy, give the roots. WorkerFailed, ContentUnavailable."""
        raise NotImplementedError

    async def hold_state(
        self,
        job: bytes,
        spec: bytes,
        slot: SlotId,
        boundary: int,
        holders: Sequence[str],
        expected: StateRoots,
    ) -> None:
        """For a standby: bring a slot's state at a boundary, check both roots, sync it, keep the
        last two boundaries of the slot. At once when it is here. ContentError."""
        raise NotImplementedError

    async def keyed_hash(self, job: bytes, slot: SlotId, boundary: int, key: bytes) -> bytes:
        """The StandbyProof of a state that is here (own slot or standby copy), 32 bytes.
        ContentUnavailable when it is not."""
        raise NotImplementedError

    async def audit(self, task: AuditTask) -> SegmentRecord:
        """Fetch the inputs of a segment, check them against the task's roots, replay it in a worker
        process, give the record found. AuditImpossible names what was missing; WorkerFailed when
        the replay itself broke on our side."""
        raise NotImplementedError

    async def make_result(
        self, job: bytes, spec: bytes, final: Mapping[SlotId, StateSource]
    ) -> ResultInfo:
        """Gather the shared parts at the last boundary for every stage of one lane (own slot,
        standby copy, or from holders), merge them into jobs/<job>/result and serve that.
        ContentError."""
        raise NotImplementedError

    async def fetch_result(
        self, job: bytes, result_id: bytes, holders: Sequence[str], out: Path
    ) -> ResultInfo:
        """For the submitter: bring the result into the new directory `out`; its id is checked.
        ContentError."""
        raise NotImplementedError

    async def settled(self, job: bytes, slot: SlotId, segment: int) -> None:
        """The chain settled this segment. Call it for *every* slot of a job in which we have a slot
        or standby, ours or not: frames go when the segment is settled at both ends of their
        link, states when the segment that they start is settled and two later ones are here."""
        raise NotImplementedError

    async def close_slot(self, job: bytes, slot: SlotId, reason: str) -> None:
        """Stop a slot's worker and links; files stay. No SlotFailed follows."""
        raise NotImplementedError

    async def close_job(self, job: bytes, reason: str) -> None:
        """Stop every slot, drawing and audit of the job; drop frames, states and audits; keep the
        result and lists. Members may still fetch the result."""
        raise NotImplementedError
