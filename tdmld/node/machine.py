"""The machine: what this node does for jobs, as seen by the daemon.

A Machine supervises one carrier process (network, content, frame logs) and one worker process for
each slot, audit or drawing (torch). Killing any of them disturbs neither the daemon nor the others:

    worker dies    SlotFailed with the exit status and its last words
    carrier dies   CarrierDown, SlotFailed for each open slot, restart with back-off, CarrierUp
    daemon dies    carrier and workers end (end of file, parent-death signal)

Open a Machine in the main thread: the parent-death signal of a child belongs to the thread that
started it.
"""

import logging
import math
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import trio

from tdmld.node import channel, control
from tdmld.node.carrierclient import CarrierClient
from tdmld.node.errors import (
    AuditImpossible,
    ContentUnavailable,
    MachineError,
    WorkerFailed,
)
from tdmld.node.gather import Gatherer
from tdmld.node.jobfiles import (
    discard_job,
    discard_settled,
    forget_older_states,
    has_state,
    remove_files,
    remove_tree,
    state_limit,
)
from tdmld.node.layout import Layout, list_file, state
from tdmld.node.liveslots import LiveSlots
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
from tdmld.node.prepare import prepare
from tdmld.node.reachcarrier import ReachCarrier
from tdmld.node.seal import sealing
from tdmld.node.workers import WorkerLauncher
from tdmld.p2p import Ban, PeerInfo
from tdmld.train.errors import FileError
from tdmld.train.segment import SegmentRecord, read_list
from tdmld.train.spec import decode_spec
from tdmld.train.statefile import PARTS, keyed_state_hash, part_file

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


log = logging.getLogger(__name__)

CARRIER_GRACE_SECONDS = 3.0
MAX_WAITING_STEPS = 256
"""StepDone events that a slow consumer may have waiting before new ones are left out."""
KEPT_BOUNDARIES = 2

R = TypeVar("R", bound=control.Reply)
Key = tuple[bytes, SlotId]


@asynccontextmanager
async def open_machine(
    data_dir: Path,
    *,
    chain_id: bytes,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    launcher: Sequence[str] = (),
    content_quota: int = 64 << 30,
    niceness: int = 5,
) -> AsyncIterator["Machine"]:
    """Start the carrier and give a Machine; leaving the block ends all of its processes.

    launcher       argv prefix of worker processes, for example ("taskset", "-c", "0")
    content_quota  bytes that content/ may hold
    niceness       of worker processes, 0 to 19

    MachineError when the carrier does not come up (the text ends with its last words).
    """
    layout, session = await trio.to_thread.run_sync(prepare, data_dir)
    config = control.Configure(str(layout.data_dir), chain_id, tuple(listen), content_quota)
    failure: MachineError | None = None
    async with trio.open_nursery() as nursery:
        machine = Machine(layout, session, config, tuple(launcher), niceness, nursery)
        try:
            await machine._start()
        except MachineError as error:
            failure = error
        else:
            yield machine
            await machine._stop()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class Machine:
    """See the module. All methods may be called from any task of the daemon's trio run and may be
    cancelled; a cancelled `audit`, `genesis_roots` or `open_slot` ends its worker process."""

    session: str
    """PeerId of the carrier, from keys/session.key; the same after restarts."""
    reach: ReachCarrier
    """How the carrier can be reached by others, and others through it."""
    events: trio.MemoryReceiveChannel[Event]
    """One consumer. StepDone may be left out when the consumer is slow, nothing else."""

    def __init__(
        self,
        layout: Layout,
        session: str,
        config: control.Configure,
        launcher: tuple[str, ...],
        niceness: int,
        nursery: trio.Nursery,
    ) -> None:
        """Internal; use `open_machine`."""
        self.session = session
        self._layout = layout
        self._nursery = nursery
        # Not bounded by number: at most a few events a segment and slot; steps are left out.
        self._events, self.events = trio.open_memory_channel[Event](math.inf)
        self._peers: tuple[control.Peer, ...] = ()
        self._bans: tuple[control.Denied, ...] = ()
        self._members: dict[bytes, tuple[tuple[str, ...], bytes | None]] = {}
        """Of each job: who may have its content, and the spec id when its data is sealed."""
        self._scopes: dict[bytes, set[trio.CancelScope]] = {}
        self._settled: dict[Key, int] = {}
        self._locks: dict[tuple[bytes, Path], trio.Lock] = {}
        """One task at a time works in a directory of a job."""
        self._workers = WorkerLauncher(layout, launcher, niceness, nursery)
        self._carrier = CarrierClient(
            config,
            layout.logs / "carrier.log",
            on_event=self._received,
            on_down=self._carrier_down,
            on_up=self._carrier_up,
            restore=self._restore,
        )
        self.reach = ReachCarrier(self._carrier)
        self._gather = Gatherer(layout, session, self._carrier)
        self._slots = LiveSlots(layout, self._workers, self._carrier, nursery, self._emit)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs where the carrier can be dialled."""
        return self.reach.addresses

    @property
    def carrier_pid(self) -> int | None:
        """Process id of the carrier, for status."""
        return self._carrier.pid

    def worker_pid(self, job: bytes, slot: SlotId) -> int | None:
        """Process id of a slot's worker, for status."""
        return self._slots.worker_pid(job, slot)

    # --- peers and content

    async def set_peers(self, peers: Sequence[PeerInfo]) -> None:
        """Replace the carriers (sessions) to keep a connection with; the first ones, if they are
        more than one message holds."""
        self._peers = _that_fit(peers)
        await self._call(lambda n: control.SetPeers(n, self._peers), control.Done)

    async def set_bans(self, bans: Sequence[Ban]) -> None:
        """Replace whom the carrier refuses besides those that it found out itself; the first ones,
        if they are more than one message holds."""
        self._bans = tuple(
            control.Denied(ban.subject, ban.until, ban.reason[: control.MAX_REASON])
            for ban in bans[: control.MAX_BANS]
        )
        await self._call(lambda n: control.SetBans(n, self._bans), control.Done)

    async def set_members(
        self, job: bytes, sessions: frozenset[str], sealed: bytes | None = None
    ) -> None:
        """Replace the sessions that may fetch this job's content from us; auditors are added when
        they are drawn. `sealed`: the spec id of a sealed job; its members get the content key. An
        empty set closes the job for others."""
        named = self._name_members(job, sessions, sealed)
        await self._call(lambda n: control.SetMembers(n, job, named, sealed), control.Done)

    async def rekey(self, job: bytes, remaining: frozenset[str], sealed: bytes) -> None:
        """For the submitter, when a worker of a sealed job was replaced: `remaining` are its
        members now; what is sealed from now on is sealed under a new content key, which only they
        are given. ContentUnavailable when this node has not published the spec."""
        named = self._name_members(job, remaining, sealed)
        await self._call(lambda n: control.Rekey(n, job, named, sealed), control.Done)

    async def import_text(self, path: Path, sealed: bytes | None = None) -> list[tuple[bytes, int]]:
        """Cut a text into shards of 1 MiB and keep them: [(shard id, size)]; sealed under a content
        key of the spec id `sealed` when one is given. ContentError."""
        text = str(Path.cwd() / path)
        reply = await self._call(lambda n: control.ImportText(n, text, sealed), control.Imported)
        return list(reply.shards)

    async def fetch_data(self, job: bytes, spec: bytes, holders: Sequence[str]) -> None:
        """Bring all data shards of a spec, and the content key of sealed ones. ContentError. Needed
        before `open_slot` and `genesis_roots`. At once for what is here."""
        await self._gather.fetch_data(job, spec, holders)

    async def drop_data(self, names: Collection[bytes]) -> None:
        """Remove texts by their `seal.stored_names`: no job that is not over needs them."""
        await trio.to_thread.run_sync(remove_files, [self._layout.blob(name) for name in names])
        for name in names:
            await trio.to_thread.run_sync(remove_tree, self._layout.sealed(name))

    # --- a slot of our own

    async def open_slot(self, assignment: SlotAssignment) -> GenesisRoots:
        """Start the worker of a slot, draw its weights, write boundary 0, open the links (this also
        does `set_members`). The worker then waits for `grant`. WorkerFailed, ContentUnavailable
        (a shard is not here), CarrierUnavailable, SpecError."""
        directory = self._layout.slot(assignment.job, *assignment.slot)
        async with self._lock(assignment.job, directory):
            self._slots.check_absent(assignment.job, assignment.slot)
            async with self._gather.text(assignment.spec, assignment.slot.stage) as text:
                await self._gather.begin(assignment.job, assignment.spec, directory, fresh=True)
                sealed = sealing(assignment.spec)
                await self.set_members(assignment.job, assignment.members, sealed)
                return await self._slots.open(assignment, text, directory)

    async def grant(self, job: bytes, slot: SlotId, until_segment: int) -> None:
        """Let the worker run segments < `until_segment` (stall at D). Never takes anything back.
        Ignored when the slot is not open (it failed: the event says so)."""
        await self._slots.grant(job, slot, until_segment)

    async def close_slot(self, job: bytes, slot: SlotId, reason: str) -> None:
        """Stop a slot's worker and links; files stay. No SlotFailed follows."""
        await self._slots.close(job, slot, reason)

    # --- standby, audit, result

    async def genesis_roots(self, job: bytes, spec: bytes, slot: SlotId) -> GenesisRoots:
        """For a standby: draw the slot's state in a worker, keep it as boundary 0 of the standby
        copy, give the roots. WorkerFailed, ContentUnavailable."""
        with self._scope(job, WorkerFailed):
            directory = self._layout.standby(job, *slot)
            async with self._lock(job, directory), self._gather.text(spec, slot.stage) as text:
                await self._gather.begin(job, spec, directory, fresh=False)
                report = await self._workers.run(
                    job, slot, "genesis", text, directory, channel.Genesis
                )
            return GenesisRoots(report.shared, report.lane, report.data)
        raise AssertionError("unreachable")

    async def hold_state(
        self,
        job: bytes,
        spec: bytes,
        slot: SlotId,
        boundary: int,
        holders: Sequence[str],
        expected: StateRoots,
    ) -> None:
        """For a standby: bring a slot's state at a boundary, check both roots, sync it; keep one
        older state of the slot and all newer ones. At once when it is here. ContentError."""
        owner = self._layout.standby(job, *slot)
        target = state(owner, boundary)
        limit = state_limit(decode_spec(spec), slot.stage)
        async with self._lock(job, owner):
            if not await trio.to_thread.run_sync(has_state, target, expected):
                await self._gather.fetch_state(
                    job, slot, boundary, holders, expected, target, limit
                )
            await trio.to_thread.run_sync(forget_older_states, owner, boundary)

    async def keyed_hash(self, job: bytes, slot: SlotId, boundary: int, key: bytes) -> bytes:
        """The StandbyProof of a state that is here (own slot or standby copy), 32 bytes.
        ContentUnavailable when it is not."""
        for directory in self._layout.states(job, slot.lane, slot.stage, boundary):
            files = [directory / part_file(part) for part in PARTS]
            if all(file.is_file() for file in files):
                try:
                    return await trio.to_thread.run_sync(keyed_state_hash, key, files)
                except FileError as error:
                    raise ContentUnavailable(str(error)) from error
        raise ContentUnavailable(f"no state of slot {slot} at boundary {boundary} is here")

    async def audit(self, task: AuditTask) -> SegmentRecord:
        """Fetch the inputs of a segment, check them against the task's roots, replay it in a worker
        process, give the record found. AuditImpossible names what was missing; WorkerFailed when
        the replay itself broke on our side."""
        with self._scope(task.job, AuditImpossible):
            directory = self._layout.audit(task.job, task.slot.lane, task.slot.stage, task.segment)
            async with self._lock(task.job, directory):
                try:
                    await self._gather.audit_inputs(task, directory)
                    async with self._gather.text(task.spec, task.slot.stage) as text:
                        await self._workers.run(
                            task.job,
                            task.slot,
                            "replay",
                            text,
                            directory,
                            channel.Segment,
                            task.segment,
                        )
                    stored = await trio.to_thread.run_sync(
                        read_list, list_file(directory, task.segment)
                    )
                    return stored.record
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(remove_tree, directory)
        raise AssertionError("unreachable")

    async def make_result(
        self, job: bytes, spec: bytes, final: Mapping[SlotId, StateSource]
    ) -> ResultInfo:
        """Gather the shared parts at the last boundary for every stage of one lane (own slot,
        standby copy, or from holders), merge them into jobs/<job>/result and serve that.
        ContentError."""
        return await self._gather.make_result(job, spec, final)

    async def fetch_result(
        self, job: bytes, spec: bytes, result_id: bytes, holders: Sequence[str], out: Path
    ) -> ResultInfo:
        """For the submitter: bring the result into the new or empty directory `out`; its id is
        checked, and it appears whole. ContentError."""
        return await self._gather.fetch_result(job, spec, result_id, holders, out)

    # --- the end of things

    async def settled(self, job: bytes, slot: SlotId, segment: int) -> None:
        """The chain settled this segment. Call it for *every* slot of a job in which we have a slot
        or standby, ours or not: frames go when the segment is settled at both ends of their
        link, states when the segment that they start is settled and two later ones are here."""
        self._settled[job, slot] = max(segment, self._settled.get((job, slot), -1))
        for stage in (slot.stage - 1, slot.stage, slot.stage + 1):
            near = SlotId(slot.lane, stage)
            spec = self._slots.spec_of(job, near)
            if spec is None:
                continue
            count = spec.stages
            ends = [SlotId(slot.lane, s) for s in range(max(stage - 1, 0), min(stage + 2, count))]
            border = min(self._settled.get((job, end), -1) for end in ends)
            own = self._settled.get((job, near), -1)
            owner = self._layout.slot(job, *near)
            await trio.to_thread.run_sync(discard_settled, owner, border, own, KEPT_BOUNDARIES)
            if border >= 0:
                await self._slots.discard(job, near, border)

    async def close_job(self, job: bytes, reason: str) -> None:
        """Stop every slot, drawing and audit of the job; drop frames, states and audits; keep the
        result and lists. Members may still fetch the result."""
        for scope in self._scopes.get(job, set()):
            scope.cancel()
        await self._slots.close_job(job, reason)
        for key in [key for key in self._settled if key[0] == job]:
            del self._settled[key]
        for at in [at for at, lock in self._locks.items() if at[0] == job and not lock.locked()]:
            del self._locks[at]
        await trio.to_thread.run_sync(discard_job, self._layout.job(job))

    # --- inside

    async def _start(self) -> None:
        ready: control.Ready = await self._nursery.start(self._carrier.run)
        if ready.session != self.session:
            raise MachineError("the carrier has another session key than this node")
        self._nursery.start_soon(self._slots.handle_events)

    async def _stop(self) -> None:
        self._slots.kill_all()
        self._carrier.stop()
        with trio.move_on_after(CARRIER_GRACE_SECONDS):
            await self._carrier.ended.wait()

    async def _call(
        self,
        make: Callable[[int], control.Request],
        kind: type[R],
        descriptors: tuple[int, ...] = (),
    ) -> R:
        return await self._carrier.call(make, kind, descriptors)

    def _name_members(
        self, job: bytes, sessions: frozenset[str], sealed: bytes | None
    ) -> tuple[str, ...]:
        """Remember the members for a restarted carrier; as many as a message names."""
        named = tuple(sorted(sessions)[: control.MAX_MEMBERS])
        self._members[job] = (named, sealed)
        if not sessions:
            del self._members[job]
        return named

    def _restore(self) -> list[Callable[[int], control.Request]]:
        """What a restarted carrier must know."""
        requests: list[Callable[[int], control.Request]] = [
            *self.reach.restore(),
            lambda n: control.SetPeers(n, self._peers),
            lambda n: control.SetBans(n, self._bans),
        ]
        for job, (sessions, sealed) in self._members.items():
            requests.append(
                lambda n, j=job, s=sessions, k=sealed: control.SetMembers(n, j, s, k)  # type: ignore[misc]
            )
        return requests

    def _carrier_up(self, ready: control.Ready) -> None:
        restarted = bool(self.reach.addresses)
        self.reach.moved(ready.addresses)
        if restarted:
            self._emit(CarrierUp(ready.addresses))

    def _received(self, event: control.CarrierEvent) -> None:
        if isinstance(event, control.AddressesChanged):
            self.reach.moved(event.addresses)
        else:
            self._slots.received(event)

    def _carrier_down(self, reason: str) -> None:
        self._emit(CarrierDown(reason))
        self._slots.fail_all(f"the carrier process {reason}")

    def _lock(self, job: bytes, directory: Path) -> trio.Lock:
        return self._locks.setdefault((job, directory), trio.Lock())

    @contextmanager
    def _scope(self, job: bytes, kind: type[MachineError]) -> Iterator[None]:
        """Work that `close_job` can end; it then raises `kind`."""
        scopes = self._scopes.setdefault(job, set())
        with trio.CancelScope() as scope:
            scopes.add(scope)
            try:
                yield
            finally:
                scopes.discard(scope)
                if not scopes:
                    self._scopes.pop(job, None)
        if scope.cancelled_caught:
            raise kind("the job was closed meanwhile")

    def _emit(self, event: Event) -> None:
        waiting = self._events.statistics().current_buffer_used
        if not isinstance(event, StepDone) or waiting < MAX_WAITING_STEPS:
            self._events.send_nowait(event)


def _that_fit(peers: Sequence[PeerInfo]) -> tuple[control.Peer, ...]:
    """As many of `peers`, with as many addresses, as one SetPeers can carry."""
    found: list[control.Peer] = []
    size = 0
    for peer in peers:
        wire = control.Peer(peer.peer_id, tuple(peer.addresses)[: control.MAX_ADDRESSES])
        size += sum(len(text.encode()) + 4 for text in (wire.session, *wire.addresses))
        if size > control.MESSAGE_BYTES // 2 or len(found) == control.MAX_PEERS:
            log.warning("%d carriers are too many to stay connected with", len(peers))
            break
        found.append(wire)
    return tuple(found)
