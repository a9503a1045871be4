"""The slots that this node works in: opened, run, committed, taken up again, given up.

A slot is opened under the job's epoch and its own incarnation. Whatever ended it (its worker or the
carrier died, the daemon was restarted, the job was rolled back, another node had it before) it is
opened again in one way: at the newest boundary whose state is here under that name, else at the
newest that the chain can still begin at, whose state is fetched. Segments that stand on the chain
already are made again and compared.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import trio
from blake3 import blake3

from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
    Present,
    Stall,
)
from tdmld.chain.crypto import address
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.records import Job, JobStatus, SlotState
from tdmld.chain.segments import links_of, other_end
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    AttestGenesis,
    Commit,
    LaneMode,
    LinkRoots,
    Open,
)
from tdmld.node import duty
from tdmld.node.channel import WAITS_SECONDS
from tdmld.node.desk import Desk, roots_at, sessions_at_stage, slot_id, slot_of, worker_at
from tdmld.node.duties import party, sessions
from tdmld.node.errors import ContentError, WorkerFailed
from tdmld.node.layout import Layout, list_file
from tdmld.node.machine import (
    FailureCause,
    GenesisRoots,
    LinkPeer,
    LinkWaits,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotId,
    StateRoots,
    StepDone,
)
from tdmld.node.progress import Progress
from tdmld.node.rounds import contributions_for, included_in
from tdmld.train.segment import StoredList, read_list

log = logging.getLogger(__name__)

SlotKey = tuple[bytes, int]
"""(job, slot index)"""
RESTARTS = 3
"""Times that a slot is opened again within one segment before its node gives it up."""
BACK_OFF_SECONDS = 1.0
"""Before the second restart within a segment; twice as long before each further one."""
STALL_SECONDS = 30.0
"""A neighbour that delivers nothing for less than this, or less than STALL_SEGMENTS times what a
segment takes (half the chain's window, before anybody knows), is slow, not silent."""
STALL_SEGMENTS = 3
HOPELESS = frozenset({FailureCause.REFUSED})
"""The same again would end the same way."""
REASONS = {
    FailureCause.DEVICE: LeaveReason.DEVICE,
    FailureCause.DISK_FULL: LeaveReason.DISK,
    FailureCause.OUT_OF_MEMORY: LeaveReason.MEMORY,
}


@dataclass
class Opened:
    """A slot whose worker runs. `start`: the boundary it began at; `granted`: the first segment
    that it may not run."""

    slot: SlotId
    epoch: int
    incarnation: int
    start: int
    granted: int = 0
    lists: dict[int, StoredList] = field(default_factory=dict)
    """Of segments that were finished under this name."""
    told: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Link -> (session, incarnation) that it was told to be at the other end."""

    @property
    def name(self) -> tuple[int, int]:
        return self.epoch, self.incarnation


@dataclass
class _Trouble:
    """Failures since the newest segment that was ever finished."""

    count: int = 0
    cause: FailureCause = FailureCause.DIED
    reason: str = ""


class SlotWork:
    """Does the duties of a worker. `again(key)` is called when duties of a slot can be done that
    could not be a moment ago."""

    def __init__(self, desk: Desk, again: Callable[[SlotKey], None]) -> None:
        self._desk = desk
        self._again = again
        self.progress: dict[SlotKey, Progress] = {}
        """What is known of each slot that this node runs, for people."""
        self._opened: dict[SlotKey, Opened] = {}
        self._locks: dict[SlotKey, trio.Lock] = {}
        """One task at a time opens or closes a slot."""
        self._newest: dict[SlotKey, int] = {}
        """The first segment that was never finished here."""
        self._trouble: dict[SlotKey, _Trouble] = {}
        self._waits: dict[SlotKey, tuple[LinkWaits, float]] = {}
        """What the worker of a slot waits for, and when it said so last."""
        self._forgotten: dict[SlotKey, int] = {}

    # opening ---------------------------------------------------------------------------------

    async def prepare(self, state: State, job: Job, index: int) -> None:
        """See duty.PrepareSlot."""
        slot = slot_of(state, job, index)
        roots = await self._open(job.id, index, (job.epoch, slot.incarnation))
        if roots is not None:
            attestation = AttestGenesis(job.id, index, roots.shared, roots.lane, roots.data)
            await self._desk.submit(attestation)

    async def open(self, job: Job, todo: duty.OpenSlot) -> None:
        """See duty.OpenSlot."""
        name = (todo.epoch, todo.incarnation)
        if self._named(job.id, todo.slot, *name) is None:
            await self._open(job.id, todo.slot, name)

    async def close_strays(self, state: State) -> None:
        """Stop what runs for slots that are not this node's any more."""
        for key, opened in list(self._opened.items()):
            job = state.job(key[0])
            if job is None or job.final:
                continue  # closing the job ends it
            worker = slot_of(state, job, key[1]).worker
            if worker.node != self._desk.node or not worker.accepted:
                async with self._lock(key):
                    if self._opened.get(key) is opened:
                        del self._opened[key]
                        self.progress.pop(key, None)
                        reason = "another node has it now"
                        await self._desk.machine.close_slot(job.id, opened.slot, reason)

    async def _open(self, job_id: bytes, index: int, name: tuple[int, int]) -> GenesisRoots | None:
        """Open a slot under (epoch, incarnation); None when the chain has gone on meanwhile, or
        this node gave the slot up."""
        key, desk = (job_id, index), self._desk
        async with self._lock(key):
            state = desk.chain.state()
            job = state.job(job_id)
            if job is None or not self._is_ours(state, job, index, name):
                return None
            progress, slot = self.of(key), slot_id(job, index)
            desk.machine.warm_up()
            self._opened.pop(key, None)
            await desk.machine.close_slot(job_id, slot, "it is opened anew")
            if not await self._may_try(job, index, name):
                return None
            raw, spec = await desk.spec(job)
            if not job.is_own(0) and (
                job.status is JobStatus.PREPARING or spec.reads_text(slot.stage)
            ):
                progress.phase = "fetching data"
                await desk.machine.fetch_data(job_id, raw, desk.holders_of_data(state, job))
            start, roots = await self._begin(state, job, index, raw, name)
            progress.phase = f"loading the state after segment {start - 1}" if start else "drawing"
            links = tuple(
                LinkPeer(link, address(worker_at(state, job, index, link).session))
                for link in links_of(job, index)
            )
            assignment = SlotAssignment(
                job=job_id,
                spec=raw,
                slot=slot,
                epoch=name[0],
                incarnation=name[1],
                links=links,
                members=sessions(party(state, job)),
                start=start,
                roots=roots,
                committed=slot_of(state, job, index).committed,
            )
            try:
                found = await desk.machine.open_slot(assignment)
            except WorkerFailed as error:
                self._fail(key, str(error), error.cause)
                raise
            self._opened[key] = Opened(slot, *name, start)
            progress.phase, progress.failed = "ready", ""
            if key in self._trouble:
                progress.restarts += 1
            log.info("job %s slot %d is open at boundary %d", job_id.hex()[:12], index, start)
        self._again(key)
        return found

    async def _begin(
        self, state: State, job: Job, index: int, raw: bytes, name: tuple[int, int]
    ) -> tuple[int, StateRoots | None]:
        """The boundary to begin at, with the state there brought here, and its roots."""
        desk, slot, at = self._desk, slot_of(state, job, index), slot_id(job, index)
        start = await desk.machine.resume_point(job.id, at, *name, slot.committed)
        if start > slot.committed:
            record = (await self._stored(job.id, at, start - 1)).record
            return start, StateRoots(record.end_shared, record.end_lane)
        holders = desk.holders_of_state(state, job, index)
        for boundary in sorted({slot.committed, slot.held}, reverse=True):
            roots = roots_at(state, job, index, boundary)
            if boundary == 0 or roots is None:
                break
            try:
                await desk.machine.fetch_slot_state(job.id, raw, at, boundary, holders, roots)
            except ContentError as error:
                if boundary == slot.held:
                    raise
                log.info("job %s slot %d: %s", job.id.hex()[:12], index, error)
            else:
                return boundary, roots
        given = desk.others([job.source_session, *sessions_at_stage(state, job, index)])
        await desk.machine.fetch_given(job.id, raw, at, given)
        return 0, roots_at(state, job, index, 0)

    async def _may_try(self, job: Job, index: int, name: tuple[int, int]) -> bool:
        """Wait as long as failures teach; False when the slot was given up in words."""
        trouble = self._trouble.get((job.id, index))
        if trouble is None:
            return True
        if trouble.count <= RESTARTS and trouble.cause not in HOPELESS:
            await trio.sleep(BACK_OFF_SECONDS * (2 ** (trouble.count - 1) - 1))
            return True
        if job.status is JobStatus.ACTIVE:
            log.error("job %s slot %d is given up: %s", job.id.hex()[:12], index, trouble.reason)
            reason = REASONS.get(trouble.cause, LeaveReason.STOPPED)
            await self._desk.submit(Leave(job.id, name[0], index, name[1], reason))
        return False

    def _is_ours(self, state: State, job: Job, index: int, name: tuple[int, int]) -> bool:
        if job.final or job.status is JobStatus.FINISHING:
            return False
        slot = slot_of(state, job, index)
        mine = slot.worker.node == self._desk.node and slot.worker.accepted
        return mine and (job.epoch, slot.incarnation) == name

    def _named(self, job: bytes, index: int, epoch: int, incarnation: int) -> "Opened | None":
        """The slot, if it is open under this epoch and incarnation."""
        opened = self._opened.get((job, index))
        return opened if opened is not None and opened.name == (epoch, incarnation) else None

    def _lock(self, key: SlotKey) -> trio.Lock:
        return self._locks.setdefault(key, trio.Lock())

    # running ---------------------------------------------------------------------------------

    async def reach(self, job: Job, todo: duty.ReachPeers) -> None:
        """See duty.ReachPeers."""
        opened = self._named(job.id, todo.slot, todo.epoch, todo.incarnation)
        if opened is None:
            return
        for link, session, incarnation in todo.peers:
            if opened.told.get(link) != (session, incarnation):
                await self._desk.machine.set_link_peer(
                    job.id, opened.slot, link, address(session), incarnation
                )
                opened.told[link] = (session, incarnation)

    async def run(self, state: State, job: Job, todo: duty.RunSegments) -> None:
        """See duty.RunSegments."""
        opened = self._named(job.id, todo.slot, todo.epoch, todo.incarnation)
        if opened is None:
            return
        machine = self._desk.machine
        if job.lane_mode is not LaneMode.DILOCO:
            await machine.grant(job.id, opened.slot, todo.until)
            self._granted(job.id, todo.slot, opened, todo.until)
            return
        raw, _ = await self._desk.spec(job)
        for segment in range(max(opened.granted, opened.start), todo.until):
            sources = contributions_for(self._desk, state, job, todo.slot, segment)
            if sources:
                await machine.hold_contributions(job.id, raw, opened.slot, segment - 1, sources)
            included = {segment: included_in(state, job, segment)} if segment else {}
            await machine.grant(job.id, opened.slot, segment + 1, included)
            self._granted(job.id, todo.slot, opened, segment + 1)

    def _granted(self, job: bytes, index: int, opened: "Opened", until: int) -> None:
        if until > opened.granted:
            opened.granted = until
            self.of((job, index)).granted(trio.current_time())

    async def commit(self, job: Job, todo: duty.CommitSegment) -> None:
        """See duty.CommitSegment."""
        opened = self._named(job.id, todo.slot, todo.epoch, todo.incarnation)
        if opened is None:
            return
        at = (job.id, todo.slot, todo.segment)
        stored = opened.lists.get(todo.segment)
        if stored is None:
            if todo.segment >= opened.start:
                return  # it is not done yet
            stored = opened.lists[todo.segment] = await self._stored(job.id, opened.slot, at[2])
        record = stored.record
        await self._desk.submit(
            Commit(
                job=job.id,
                epoch=todo.epoch,
                slot=todo.slot,
                incarnation=todo.incarnation,
                segment=todo.segment,
                start_shared=record.start_shared,
                start_lane=record.start_lane,
                end_shared=record.end_shared,
                end_lane=record.end_lane,
                links=tuple(LinkRoots(r.link, r.sent, r.received) for r in record.link_roots),
                seal=blake3(stored.salt + record.steps_root).digest(),
                loss=record.loss_micro,
                contribution=record.contribution,
            )
        )

    async def open_seal(self, job: Job, todo: duty.OpenSeal) -> None:
        """See duty.OpenSeal."""
        stored = await self._stored(job.id, slot_id(job, todo.slot), todo.segment)
        root = stored.record.steps_root
        epoch = self._desk.epoch(job.id)
        await self._desk.submit(Open(job.id, epoch, todo.slot, todo.segment, stored.salt, root))

    async def _stored(self, job: bytes, slot: SlotId, segment: int) -> StoredList:
        directory = Layout(self._desk.data_dir).slot(job, *slot)
        return await trio.to_thread.run_sync(read_list, list_file(directory, segment))

    async def say_present(self, todo: duty.SayPresent) -> None:
        """See duty.SayPresent. Whoever waits in vain itself says that, too: else it would be found
        not to deliver what it cannot have."""
        key = (todo.job, todo.slot)
        waits, said = self._waits.get(key, (None, 0.0))
        if waits is not None and trio.current_time() < said + 1.5 * WAITS_SECONDS:
            with suppress(InvalidTransaction):  # a case against us may be open already
                await self._call_stall(key, waits)
        await self._desk.submit(
            Present(todo.job, todo.epoch, todo.slot, todo.incarnation, todo.opened)
        )

    # what the machine says -------------------------------------------------------------------

    def step_done(self, key: SlotKey, event: StepDone) -> None:
        """A step was finished."""
        self._waits.pop(key, None)
        self.of(key).step_done(event, trio.current_time())

    def segment_done(self, key: SlotKey, event: SegmentDone) -> duty.CommitSegment | None:
        """A segment was finished; the duty that can be done now."""
        opened = self._named(*key, *event.under)
        if opened is None:
            return None  # of a worker that was closed meanwhile
        record = event.record
        number = record.segment
        opened.lists[number] = StoredList(event.salt, record)
        stalls = number + 1 >= opened.granted
        self.of(key).segment_done(trio.current_time(), stalls=stalls)
        state = self._desk.chain.state()
        job = state.job(key[0])
        known = None if job is None else roots_at(state, job, key[1], number + 1)
        if known not in (None, (record.end_shared, record.end_lane)):
            del self._opened[key]
            reason = f"segment {number} came out otherwise than it was committed to"
            self._fail(key, reason, FailureCause.REFUSED)
            return None
        if number >= self._newest.get(key, -1):
            self._newest[key] = number + 1
            self._trouble.pop(key, None)
        return duty.CommitSegment(*key, *opened.name, number)

    def slot_failed(self, key: SlotKey, event: SlotFailed) -> None:
        """The worker of a slot is gone, with its links."""
        self._opened.pop(key, None)
        self._fail(key, event.reason, event.cause)

    def _fail(self, key: SlotKey, reason: str, cause: FailureCause) -> None:
        trouble = self._trouble.setdefault(key, _Trouble())
        trouble.count, trouble.cause, trouble.reason = trouble.count + 1, cause, reason
        self._waits.pop(key, None)
        self.of(key).stopped(reason)
        log.error("job %s slot %d failed: %s", key[0].hex()[:12], key[1], reason)

    async def link_waits(self, key: SlotKey, event: LinkWaits) -> None:
        """The worker of a slot waits for a frame; the chain is told when it is too long."""
        self._waits[key] = event, trio.current_time()
        self.of(key).phase = f"waiting for frame {event.seq} of {event.link}"
        if self._is_silent(key, event):
            await self._call_stall(key, event)

    async def _call_stall(self, key: SlotKey, event: LinkWaits) -> None:
        state, opened = self._desk.chain.state(), self._opened.get(key)
        job = state.job(key[0])
        if job is None or opened is None or not self._is_ours(state, job, key[1], opened.name):
            return
        other = slot_of(state, job, other_end(job, key[1], event.link)[0])
        if other.case is None and other.worker.accepted:
            number = slot_of(state, job, key[1]).stalls
            at = (job.id, opened.epoch, key[1], opened.incarnation)
            await self._desk.submit(Stall(*at, number, event.link, event.seq))

    def _is_silent(self, key: SlotKey, event: LinkWaits) -> bool:
        """Whether a neighbour has had enough time. One that took its slot a short while ago, or
        begins anew, first makes again what others have, from the newest state that was held."""
        chain, opened = self._desk.chain, self._opened.get(key)
        state = chain.state()
        job = state.job(key[0])
        if job is None or opened is None:
            return False
        segment = self._segment_seconds(job, slot_of(state, job, key[1]), key)
        patience = max(STALL_SECONDS, STALL_SEGMENTS * segment)
        other = slot_of(state, job, other_end(job, key[1], event.link)[0])
        again = segment * max(0, self._newest.get(key, 0) - other.held)
        blocks = chain.height - max(other.since, job.repaired)
        there = blocks * chain.genesis.parameters.interval_ms / 1000
        return event.seconds >= patience and there >= patience + again

    def _segment_seconds(self, job: Job, slot: SlotState, key: SlotKey) -> float:
        """What a segment takes, by our own steps; before the first of them here by the pace that
        the chain saw, or by the time that it leaves for the first one."""
        own = self.of(key).step_seconds * job.segment_steps
        parameters = self._desk.chain.genesis.parameters
        if own:
            return own
        blocks = parameters.activate_window / (2 * STALL_SEGMENTS)
        if slot.committed:
            seen = (slot.last_commit - job.active) / slot.committed
            blocks = min(seen, parameters.segment_window / STALL_SEGMENTS)
        return blocks * parameters.interval_ms / 1000

    # small things ----------------------------------------------------------------------------

    async def forget_segments(self, job: Job, todo: duty.ForgetSegments) -> None:
        """See duty.ForgetSegments."""
        key = (job.id, todo.slot)
        if self._forgotten.get(key, 0) < todo.keep_from:
            await self._desk.machine.forget_segments(
                job.id, slot_id(job, todo.slot), todo.keep_from
            )
            self._forgotten[key] = todo.keep_from
            opened = self._opened.get(key)
            for number in list(opened.lists) if opened is not None else ():
                if number < todo.keep_from and opened is not None:
                    del opened.lists[number]

    def of(self, key: SlotKey) -> Progress:
        """What is known of a slot for people."""
        return self.progress.setdefault(key, Progress())

    def forget(self, job: bytes) -> None:
        """The job is over."""
        caches: tuple[dict[SlotKey, Any], ...] = (
            self.progress,
            self._opened,
            self._locks,
            self._newest,
            self._trouble,
            self._waits,
            self._forgotten,
        )
        for cache in caches:
            for key in [key for key in cache if key[0] == job]:
                del cache[key]
