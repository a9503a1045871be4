"""The machine: what this node does for jobs, as seen by the daemon.

A Machine supervises one carrier process (network, content, frame logs) and one worker process for
each slot, audit or drawing (torch). Killing any of them disturbs neither the daemon nor the others:

    worker dies    SlotFailed with the exit status and its last words
    carrier dies   CarrierDown, SlotFailed for each open slot, restart with back-off, CarrierUp
    daemon dies    carrier and workers end (end of file, parent-death signal)

A slot is taken up again in one way, whatever ended it, and wherever it was before: `resume_point`
says from which boundary, `fetch_slot_state` brings that state when it is not here, `open_slot` goes
on. What was computed before comes out the same, bit for bit, and goes to nobody who has it.

Open a Machine in the main thread: the parent-death signal of a child belongs to the thread that
started it.
"""

import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from tdmld.node import control
from tdmld.node.carrierclient import CarrierClient
from tdmld.node.errors import (
    AuditImpossible,
    ContentMismatch,
    ContentUnavailable,
    FailureCause,
    MachineError,
    WorkerFailed,
)
from tdmld.node.jobfiles import (
    check_contribution,
    discard_job,
    forget_copies,
    forget_slot,
    remove_tree,
)
from tdmld.node.layout import Layout, contribution_file, list_file, state
from tdmld.node.liveslots import LiveSlots
from tdmld.node.machine_content import ContentSide
from tdmld.node.machine_types import (
    AuditTask,
    CarrierDown,
    CarrierUp,
    ContributionSource,
    Event,
    GenesisRoots,
    LinkPeer,
    LinkSource,
    LinkWaits,
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
from tdmld.node.resume import resume_point, take_up
from tdmld.node.seal import sealing
from tdmld.node.workers import WorkerLauncher, shared_roots
from tdmld.train.errors import FileError
from tdmld.train.segment import SegmentRecord, read_list
from tdmld.train.spec import decode_spec
from tdmld.train.statefile import PARTS, keyed_state_hash, part_file

__all__ = [
    "AuditTask",
    "CarrierDown",
    "CarrierUp",
    "ContributionSource",
    "Event",
    "FailureCause",
    "GenesisRoots",
    "LinkPeer",
    "LinkSource",
    "LinkWaits",
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

CARRIER_GRACE_SECONDS = 3.0
MAX_WAITING_STEPS = 256
"""StepDone events that a slow consumer may have waiting before new ones are left out."""


@asynccontextmanager
async def open_machine(
    data_dir: Path,
    *,
    chain_id: bytes,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    launcher: Sequence[str] = (),
    content_quota: int = 64 << 30,
    niceness: int = 5,
    worker_memory: int = 0,
    device: str = "cpu",
) -> AsyncIterator["Machine"]:
    """Start the carrier and give a Machine; leaving the block ends all of its processes.

    launcher       argv prefix of the process that workers are forked from, and of workers that
                   are started without it; for example ("taskset", "-c", "0")
    content_quota  bytes that content/ may hold
    niceness       of worker processes, 0 to 19
    worker_memory  bytes of private memory that a worker may have (RLIMIT_DATA); 0: as many as it
                   can get
    device         where workers compute: "cpu", or "cuda:<number>" by the PCI bus

    MachineError when the carrier does not come up (the text ends with its last words).
    """
    layout, session = await trio.to_thread.run_sync(prepare, data_dir)
    config = control.Configure(str(layout.data_dir), chain_id, tuple(listen), content_quota)
    failure: MachineError | None = None
    async with trio.open_nursery() as nursery:
        workers = WorkerLauncher(layout, launcher, niceness, worker_memory, nursery, device)
        machine = Machine(layout, session, config, workers, nursery)
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


class Machine(ContentSide):
    """See the module. All methods may be called from any task of the daemon's trio run and may be
    cancelled; a cancelled `audit`, `genesis_roots` or `open_slot` ends its worker process."""

    session: str
    """PeerId of the carrier, from keys/session.key; the same after restarts."""
    events: trio.MemoryReceiveChannel[Event]
    """One consumer. StepDone may be left out when the consumer is slow, nothing else."""

    def __init__(
        self,
        layout: Layout,
        session: str,
        config: control.Configure,
        workers: WorkerLauncher,
        nursery: trio.Nursery,
    ) -> None:
        """Internal; use `open_machine`."""
        super().__init__(layout, session)
        self._nursery = nursery
        # Not bounded by number: at most a few events a segment and slot; steps are left out.
        self._events, self.events = trio.open_memory_channel[Event](math.inf)
        self._scopes: dict[bytes, set[trio.CancelScope]] = {}
        self._locks: dict[tuple[bytes, Path], trio.Lock] = {}
        """One task at a time works in a directory of a job."""
        self._workers = workers
        carrier = CarrierClient(
            config,
            layout.logs / "carrier.log",
            on_event=self._received,
            on_down=self._carrier_down,
            on_up=self._carrier_up,
            restore=self._restore,
        )
        self._attach(carrier)
        self._slots = LiveSlots(layout, self._workers, carrier, nursery, self._emit)

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

    # --- a slot of our own

    def warm_up(self) -> None:
        """A worker will be wanted soon: be ready to fork it. At once; nothing when that is so."""
        self._workers.warm_up()

    async def resume_point(
        self, job: bytes, slot: SlotId, epoch: int, incarnation: int, lowest: int
    ) -> int:
        """The newest boundary >= `lowest` from which our slot can go on: its state, and list and
        frames of the segment before it, are here whole and were made under this epoch and
        incarnation; else `lowest`. Reads and hashes what it finds."""
        directory, spec = self._layout.slot(job, *slot), self._layout.spec(job)
        async with self._lock(job, directory):
            return await trio.to_thread.run_sync(
                resume_point, directory, spec, slot, (epoch, incarnation), lowest
            )

    async def fetch_slot_state(
        self,
        job: bytes,
        spec: bytes,
        slot: SlotId,
        boundary: int,
        holders: Sequence[str],
        expected: StateRoots,
    ) -> None:
        """Bring the state with which our slot shall begin: from our standby copy, else from
        holders; both roots are checked. At once when it is here. ContentError."""
        owner = self._layout.slot(job, *slot)
        async with self._lock(job, owner):
            await self._gather.state(job, spec, slot, boundary, holders, expected, owner)

    async def hold_contributions(
        self,
        job: bytes,
        spec: bytes,
        slot: SlotId,
        number: int,
        sources: Mapping[int, ContributionSource],
    ) -> None:
        """In lanes mode `diloco`: bring contributions of round `number` (by lane) to our slot's
        directory, checked by their ids: siblings' ones to attest them, its own one for a slot that
        another node had before. At once for what is here. ContentError names what is missing;
        what came stays. ContentMismatch: it has the id, and is no contribution to this place."""
        owner = self._layout.slot(job, *slot)
        await self._gather.contributions(job, spec, slot, number, sources, owner)
        program = decode_spec(spec)
        for lane in sources:
            place, path = (lane, slot.stage, number), contribution_file(owner, number, lane)
            await trio.to_thread.run_sync(check_contribution, program, place, path)

    async def open_slot(self, assignment: SlotAssignment) -> GenesisRoots:
        """Start the worker of a slot at boundary `start`, open the links (this also does
        `set_members`); gives the roots of the state there. The worker then waits for `grant`.

        Boundary 0 is drawn or taken from the given weights (`fetch_given`), and written, when
        `roots` is None or no state is here. What an older epoch or incarnation left here from
        `start` on is removed first; what this one did is kept, made again and compared.
        WorkerFailed, ContentUnavailable (a shard or the state is not here), ContentMismatch (the
        state has other roots: it is removed, fetch it again), CarrierUnavailable, SpecError."""
        job, slot, raw = assignment.job, assignment.slot, assignment.spec
        directory, spec = self._layout.slot(job, *slot), decode_spec(raw)
        async with self._lock(job, directory):
            await self._slots.absent(job, slot)
            async with self._gather.text(raw, slot.stage) as text:
                await trio.to_thread.run_sync(
                    take_up, directory, self._layout.spec(job), assignment
                )
                await self.set_members(
                    job,
                    assignment.members,
                    sealing(raw),
                    private=spec.privacy == "split",
                    given=shared_roots(spec),
                )
                try:
                    return await self._slots.open(assignment, text, directory)
                except ContentMismatch:
                    spoilt = state(directory, assignment.start)
                    await trio.to_thread.run_sync(remove_tree, spoilt)
                    raise

    async def grant(
        self,
        job: bytes,
        slot: SlotId,
        until_segment: int,
        included: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        """Let the worker run segments < `until_segment` (stall at D). Never takes anything back.
        `included`, needed in lanes mode `diloco`: for each segment > 0 that is granted, the lanes
        of the round before that enter it; segments granted before may be named again. Ignored when
        the slot is not open (it failed: the event says so)."""
        await self._slots.grant(job, slot, until_segment, included or {})

    async def set_link_peer(
        self, job: bytes, slot: SlotId, link: str, session: str, incarnation: int
    ) -> None:
        """Another worker, `session`, has the slot at the other end of a link of our open slot now,
        under `incarnation`; older incarnations are not listened to any more. Nothing when the slot
        is not open or knows it."""
        await self._slots.set_link_peer(job, slot, link, session, incarnation)

    async def close_slot(self, job: bytes, slot: SlotId, reason: str) -> None:
        """Stop a slot's worker and links; files stay. No SlotFailed follows."""
        await self._slots.close(job, slot, reason)

    # --- standby, audit, result

    async def genesis_roots(self, job: bytes, spec: bytes, slot: SlotId) -> GenesisRoots:
        """For a standby: make the slot's first state in a worker (drawn, or from the given weights,
        see `fetch_given`), keep it as boundary 0 of the standby copy, give the roots. WorkerFailed,
        ContentUnavailable."""
        with self._scope(job, WorkerFailed):
            directory = self._layout.standby(job, *slot)
            async with self._lock(job, directory), self._gather.text(spec, slot.stage) as text:
                await self._gather.begin(job, spec, directory)
                report = await self._workers.draw(job, slot, decode_spec(spec), text, directory)
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
        contribution: ContributionSource | None = None,
    ) -> None:
        """For a standby: bring a slot's state at a boundary, check both roots, sync it. In lanes
        mode `diloco` with the slot's `contribution` of the round before `boundary` (if it made
        one): its state cannot go on without. At once for what is here. ContentError."""
        owner = self._layout.standby(job, *slot)
        async with self._lock(job, owner):
            await self._gather.state(job, spec, slot, boundary, holders, expected, owner)
        if contribution is not None:
            sources = {slot.lane: contribution}
            await self._gather.contributions(job, spec, slot, boundary - 1, sources, owner)

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
                        await self._workers.replay(task, text, directory)
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

    async def forget_segments(self, job: bytes, slot: SlotId, keep_from: int) -> None:
        """Nobody will ask for segments < `keep_from` of a slot any more: of our own slot their
        frames and contributions go, and the states that they start except the newest two; of a
        standby copy the states before boundary `keep_from`. Nothing that is not here."""
        own = self._layout.slot(job, *slot)
        await trio.to_thread.run_sync(forget_slot, own, keep_from)
        standby = self._layout.standby(job, *slot)
        await trio.to_thread.run_sync(forget_copies, standby, keep_from)
        await self._slots.discard(job, slot, keep_from)

    async def close_job(self, job: bytes, reason: str) -> None:
        """Stop every slot, drawing and audit of the job; drop frames, states and audits; keep the
        result and lists. Members may still fetch the result."""
        for scope in self._scopes.get(job, set()):
            scope.cancel()
        await self._slots.close_job(job, reason)
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
        self._slots.fail_all(f"the carrier process {reason}", FailureCause.CARRIER)

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
