"""The slots that this machine works on: opened, watched, reported, ended."""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from tdmld.node import control
from tdmld.node.carrierclient import CarrierClient
from tdmld.node.errors import ContentMismatch, FailureCause, MachineError, WorkerFailed
from tdmld.node.layout import Layout, list_file
from tdmld.node.machine_types import (
    Event,
    GenesisRoots,
    LinkWaits,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotFinished,
    SlotId,
    StateRoots,
    StepDone,
)
from tdmld.node.workers import LiveSlot, WorkerLauncher, cause_named
from tdmld.train.errors import FileError
from tdmld.train.segment import read_list
from tdmld.train.spec import Spec, decode_spec

log = logging.getLogger(__name__)

WORKER_GRACE_SECONDS = 3.0
CLOSE_SECONDS = 10.0
"""The carrier closes a slot in less; one that hangs must not keep a daemon from stopping."""


class LiveSlots:
    """Supervision of live slots. `emit` takes events for the daemon; it never blocks.

    A slot fails once: SlotFailed is emitted when `open` had returned, else `open` raises. Run
    `handle_events` in one task.
    """

    def __init__(
        self,
        layout: Layout,
        workers: WorkerLauncher,
        carrier: CarrierClient,
        nursery: trio.Nursery,
        emit: Callable[[Event], None],
    ) -> None:
        self._layout = layout
        self._workers = workers
        self._carrier = carrier
        self._nursery = nursery
        self._emit = emit
        self._slots: dict[tuple[bytes, SlotId], LiveSlot] = {}
        # Filled by the carrier's reader, which must not wait for disk; the slots' own pace
        # (a few packets a step) bounds it.
        self._incoming, self._to_handle = trio.open_memory_channel[control.SlotEvent](math.inf)

    def received(self, event: control.SlotEvent) -> None:
        """Take an event of the carrier."""
        self._incoming.send_nowait(event)

    async def absent(self, job: bytes, slot: SlotId) -> None:
        """Return when nothing is left of a slot that failed or was closed. MachineError when the
        slot is open."""
        live = self._slots.get((job, slot))
        if live is not None:
            if live.failure is None and not live.closing:
                raise MachineError(f"slot {slot} of job {job.hex()} is open already")
            await live.gone.wait()

    def worker_pid(self, job: bytes, slot: SlotId) -> int | None:
        """Process id of a slot's worker while it runs."""
        live = self._slots.get((job, slot))
        running = live is not None and live.child_started and not live.child.ended.is_set()
        return live.child.pid if live is not None and running else None

    def spec_of(self, job: bytes, slot: SlotId) -> Spec | None:
        """The spec of an open slot."""
        live = self._slots.get((job, slot))
        return live.spec if live is not None else None

    async def open(
        self, assignment: SlotAssignment, text: int | None, directory: Path
    ) -> GenesisRoots:
        """Start worker and links, wait for the state; `text` is the descriptor from which the
        worker gets the text. WorkerFailed, ContentMismatch, CarrierUnavailable."""
        job, slot = assignment.job, assignment.slot
        spec = decode_spec(assignment.spec)
        links = wire_links(spec, assignment)
        live = LiveSlot(assignment, spec)
        self._slots[job, slot] = live
        try:
            live.child = await self._workers.start_live(live, assignment, text, directory)
            self._nursery.start_soon(self._watch, live)
            wire_slot = control.Slot(job, *slot)
            await self._carrier.call(
                lambda n: control.OpenSlot(
                    n,
                    wire_slot,
                    assignment.epoch,
                    assignment.incarnation,
                    spec.rounds,
                    assignment.start,
                    links,
                ),
                control.Done,
                live.carrier_descriptors,
            )
            await live.ready.wait()
        except BaseException:
            # The caller learns of it from the exception: no SlotFailed for a slot never opened.
            live.closing = True
            with trio.CancelScope(shield=True):
                await self._end(live, abort=True)
            raise
        if live.failure is None and live.roots is not None and _fits(live.roots, assignment.roots):
            live.announced = True
            return live.roots
        live.closing = True
        with trio.CancelScope(shield=True):
            await self._end(live, abort=True)
        if live.failure is not None or live.roots is None:
            raise live.failure or WorkerFailed("the worker said nothing")
        raise ContentMismatch(
            f"the state of slot {slot} at boundary {assignment.start} is not the one that the chain"
            " names; it was removed: fetch it again"
        )

    async def grant(
        self, job: bytes, slot: SlotId, until: int, included: Mapping[int, tuple[int, ...]]
    ) -> None:
        """See Machine.grant."""
        live = self._slots.get((job, slot))
        if live is None:
            return
        wire_slot = control.Slot(job, *slot)
        # A grant tells of one segment which lanes enter it; those before it must know theirs.
        borders = [n + 1 for n in sorted(included) if live.granted <= n < until]
        for border in dict.fromkeys([*borders, until]):
            lanes = included.get(border - 1, ())
            await self._carrier.call(
                lambda n, b=border, i=lanes: control.Grant(n, wire_slot, b, i),  # type: ignore[misc]
                control.Done,
            )
            live.granted = max(live.granted, border)

    async def set_link_peer(
        self, job: bytes, slot: SlotId, link: str, session: str, incarnation: int
    ) -> None:
        """See Machine.set_link_peer."""
        if (job, slot) in self._slots:
            wire_slot = control.Slot(job, *slot)
            await self._carrier.call(
                lambda n: control.SetLinkPeer(n, wire_slot, link, session, incarnation),
                control.Done,
            )

    async def discard(self, job: bytes, slot: SlotId, keep_from: int) -> None:
        """Let the carrier forget digests of segments < `keep_from`."""
        if (job, slot) in self._slots:
            wire_slot = control.Slot(job, *slot)
            await self._carrier.call(
                lambda n: control.Discard(n, wire_slot, keep_from), control.Done
            )

    async def close(self, job: bytes, slot: SlotId, reason: str) -> None:
        """See Machine.close_slot."""
        live = self._slots.get((job, slot))
        if live is not None:
            log.info("slot %s of job %s is closed: %s", slot, job.hex()[:12], reason)
            live.closing = True
            if not live.announced:
                # Whoever is in `open` waits for a state that nobody will draw any more.
                text = f"the slot was closed meanwhile: {reason}"
                live.failure = live.failure or WorkerFailed(text, FailureCause.KILLED)
                live.ready.set()
            await self._end(live, abort=False)

    async def close_job(self, job: bytes, reason: str) -> None:
        """Close every slot of a job."""
        for open_job, slot in list(self._slots):
            if open_job == job:
                await self.close(job, slot, reason)

    def kill_all(self) -> None:
        """End all workers at once and silently: the machine is being closed."""
        for live in self._slots.values():
            live.closing = True
            if live.child_started:
                live.child.kill()

    def fail_all(self, reason: str, cause: FailureCause) -> None:
        """The carrier is gone, and every slot with it."""
        for live in list(self._slots.values()):
            self._fail(live, reason, cause)

    async def _end(self, live: LiveSlot, *, abort: bool) -> None:
        """Stop links and worker of a slot and forget it."""
        key = (live.job, live.slot)
        wire_slot = control.Slot(live.job, *live.slot)
        try:
            with trio.move_on_after(CLOSE_SECONDS):
                await self._carrier.call(
                    lambda n: control.CloseSlot(n, wire_slot, abort), control.Done
                )
        except MachineError as error:
            log.info("slot %s: the carrier could not close it: %s", live.slot, error)
        if live.child_started:
            await live.child.stop(0 if abort else WORKER_GRACE_SECONDS)
        live.close()
        if self._slots.get(key) is live:
            del self._slots[key]
        live.gone.set()

    async def _watch(self, live: LiveSlot) -> None:
        await live.child.ended.wait()
        if live.child.status != 0:
            self._fail(live, f"the worker process {live.child.epitaph()}", live.child.cause)

    def _fail(self, live: LiveSlot, reason: str, cause: FailureCause) -> None:
        """A slot cannot go on. Said once; its worker and links are ended in the background."""
        if live.closing or live.failure:
            return
        live.failure = WorkerFailed(reason, cause)
        live.ready.set()
        if live.child_started:
            live.child.kill()
        if live.announced:
            self._emit(SlotFailed(live.job, live.slot, reason, cause))
            self._nursery.start_soon(partial(self._end, live, abort=True))

    async def handle_events(self) -> None:
        """Turn what the carrier says into events, in order; until cancelled."""
        async for event in self._to_handle:
            live = self._slots.get((event.slot.job, SlotId(event.slot.lane, event.slot.stage)))
            if live is None or live.failure:
                continue
            match event:
                case control.GenesisReported():
                    live.roots = GenesisRoots(event.shared, event.lane, event.data)
                    live.ready.set()
                case control.StepReported():
                    self._step(live, event)
                case control.SegmentReported(_, segment):
                    await self._segment(live, segment)
                case control.SlotEnded():
                    self._emit(SlotFinished(live.job, live.slot))
                case control.WaitReported(_, link, seq, seconds):
                    self._emit(LinkWaits(live.job, live.slot, link, seq, seconds))
                case control.SlotBroken(_, text, word):
                    self._fail(live, text, cause_named(word))

    def _step(self, live: LiveSlot, event: control.StepReported) -> None:
        timings = {
            "compute": max(event.seconds - event.waiting - event.verifying, 0.0),
            "waiting": event.waiting,
            "verifying": event.verifying,
        }
        self._emit(
            StepDone(
                live.job,
                live.slot,
                event.step,
                event.loss,
                event.seconds,
                timings,
                event.gradient_norm,
            )
        )

    async def _segment(self, live: LiveSlot, segment: int) -> None:
        path = list_file(self._layout.slot(live.job, *live.slot), segment)
        try:
            stored = await trio.to_thread.run_sync(read_list, path)
        except FileError as error:
            text = f"the list of segment {segment} cannot be read: {error}"
            self._fail(live, text, FailureCause.REFUSED)
            return
        self._emit(SegmentDone(live.job, live.slot, stored.record, stored.salt, live.under))


def _fits(found: GenesisRoots, expected: StateRoots | None) -> bool:
    return expected is None or (found.shared, found.lane) == expected


def wire_links(spec: Spec, assignment: SlotAssignment) -> tuple[control.Link, ...]:
    """What the carrier must know of a slot's links. MachineError when the assignment names others
    than the spec has."""
    lane, stage = assignment.slot
    names = spec.links(lane, stage)
    if tuple(peer.name for peer in assignment.links) != names:
        raise MachineError(f"slot {assignment.slot} has the links {', '.join(names) or 'none'}")
    return tuple(
        control.Link(
            name,
            session,
            *spec.other_end(lane, stage, name),
            spec.training_rounds,
            spec.link_frames(lane, stage, name),
            spec.link_frame_bytes(stage, name),
            spec.link_ahead(stage, name),
            spec.link_places(stage, name),
            incarnation,
        )
        for name, session, incarnation in assignment.links
    )
