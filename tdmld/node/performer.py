"""What each duty does: the deeds of one node in its jobs.

`duties` says what stands, the agent when it is begun and tried again; here it is done: with the
machine, and by a transaction that tells the chain. Whatever is remembered here is a cache or can be
found again; what a job needs lies on disk or on the chain. Slots of our own are in `slotwork`,
copies and contributions in `copywork`, audits in `auditwork`.
"""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from tdmld.chain.crypto import KeyPair, address, public_key
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import Job, JobStatus
from tdmld.chain.state import State
from tdmld.chain.transactions import Accept, AttestResult, Decline, Payload
from tdmld.node import duty
from tdmld.node.auditwork import AuditWork, Replay
from tdmld.node.chainerrors import SpecUnavailable
from tdmld.node.chainservice import ChainService
from tdmld.node.copywork import CopyWork
from tdmld.node.desk import Desk, segment_of, slot_id, slot_of
from tdmld.node.layout import free_bytes
from tdmld.node.machine import (
    LinkWaits,
    Machine,
    SegmentDone,
    SlotFailed,
    SlotId,
    StateSource,
    StepDone,
)
from tdmld.node.offers import OfferRefused, check_offer, check_room
from tdmld.node.progress import Progress
from tdmld.node.slotwork import SlotKey, SlotWork
from tdmld.train.errors import TrainError
from tdmld.train.spec import Spec

__all__ = ["Performer", "Progress", "Replay", "SlotKey"]

log = logging.getLogger(__name__)

Deed = Callable[[], Awaitable[None]]


class Performer:
    """Does duties. All methods may be cancelled; what they raise is the agent's to log.

    `again(key)` is called when duties of a slot can be done that could not be a moment ago.
    """

    def __init__(
        self,
        key: KeyPair,
        chain_id: bytes,
        chain: ChainService,
        machine: Machine,
        data_dir: Path,
        again: Callable[[SlotKey], None] = lambda key: None,
    ) -> None:
        self._desk = Desk(key, chain_id, chain, machine, data_dir)
        self._chain, self._machine = chain, machine
        self._slots = SlotWork(self._desk, again)
        self._copies = CopyWork(self._desk)
        self._audits = AuditWork(self._desk)

    @property
    def progress(self) -> dict[SlotKey, Progress]:
        """The newest step of each slot that this node runs."""
        return self._slots.progress

    @property
    def auditing(self) -> dict[tuple[bytes, int, int], Replay]:
        """(job, slot, segment) of what is being replayed for an audit."""
        return self._audits.auditing

    def action(self, state: State, job: Job, todo: duty.Duty) -> Deed:
        """The coroutine function that does `todo`."""
        found = self._of_slot(state, job, todo) or self._of_others(state, job, todo)
        assert found is not None, f"no action for {todo}"
        return found

    def _of_slot(self, state: State, job: Job, todo: duty.Duty) -> Deed | None:
        slots = self._slots
        match todo:
            case duty.PrepareSlot():
                return lambda: slots.prepare(state, job, todo.slot)
            case duty.OpenSlot():
                return lambda: slots.open(job, todo)
            case duty.ReachPeers():
                return lambda: slots.reach(job, todo)
            case duty.RunSegments():
                return lambda: slots.run(state, job, todo)
            case duty.CommitSegment():
                return lambda: slots.commit(job, todo)
            case duty.OpenSeal():
                return lambda: slots.open_seal(job, todo)
            case duty.SayPresent():
                return lambda: slots.say_present(todo)
            case duty.ForgetSegments():
                return lambda: slots.forget_segments(job, todo)
        return None

    def _of_others(self, state: State, job: Job, todo: duty.Duty) -> Deed | None:
        copies, audits = self._copies, self._audits
        match todo:
            case duty.TakePlace():
                return lambda: self._take_place(state, job, todo)
            case duty.PrepareCopy():
                return lambda: copies.prepare(state, job, todo.slot)
            case duty.HoldState(_, slot, epoch, boundary):
                return lambda: copies.hold(state, job, slot, epoch, boundary)
            case duty.ProveState():
                return lambda: copies.prove(state, job, todo)
            case duty.HoldContributions():
                return lambda: copies.hold_contributions(state, job, todo)
            case duty.TryDelivery():
                return lambda: copies.testify(state, job, todo)
            case duty.ReplaySegment():
                return lambda: audits.replay(state, job, todo)
            case duty.OpenVerdict():
                return lambda: audits.open_verdict(state, job, todo)
            case duty.MakeResult():
                return lambda: self._make_result(state, job)
        return None

    # the beginning and the end ---------------------------------------------------------------

    async def _take_place(self, state: State, job: Job, todo: duty.TakePlace) -> None:
        try:
            raw, spec = await self.spec(job)
            check_offer(job, raw, spec)
            free = await trio.to_thread.run_sync(free_bytes, self._desk.data_dir)
            check_room(spec, todo.slot, free)
        except SpecUnavailable as error:
            asked = _asked_at(state, job, todo)
            if self._chain.height < asked + self._chain.genesis.parameters.accept_window // 2:
                raise  # its gossip may still be on the way
            log.warning("job %s: declined, %s", job.id.hex()[:12], error)
            await self.submit(Decline(job.id, todo.attempt, todo.slot))
            return
        except (OfferRefused, TrainError) as error:
            log.warning("job %s: declined, %s", job.id.hex()[:12], error)
            await self.submit(Decline(job.id, todo.attempt, todo.slot))
            return
        self._machine.warm_up()
        session = public_key(self._machine.session)
        await self.submit(Accept(job.id, todo.attempt, todo.slot, session))

    async def _make_result(self, state: State, job: Job) -> None:
        raw, spec = await self.spec(job)
        lane = next(lane for lane in range(job.lanes) if lane not in job.lost_lanes)
        final: dict[SlotId, StateSource] = {}
        for stage in range(spec.stages):
            index = job.slot_at(lane, stage)
            segment = segment_of(state, job, index, job.rounds - 1)
            holders = [slot_of(state, job, index).worker]
            if job.standby is not None:
                holders.append(job.standby)
            sessions = tuple(address(member.session) for member in holders if member.session)
            final[slot_id(job, index)] = StateSource(segment.end_shared, sessions)
        result = await self._machine.make_result(job.id, raw, final)
        await self.submit(AttestResult(job.id, result.result_id))

    async def close_strays(self, state: State) -> None:
        """Stop what runs for slots that are not this node's any more."""
        await self._slots.close_strays(state)

    def forget(self, job: bytes) -> None:
        """A job is over."""
        for work in (self._slots, self._copies, self._audits, self._desk):
            work.forget(job)

    # what the machine says -------------------------------------------------------------------

    def step_done(self, key: SlotKey, event: StepDone) -> None:
        """A worker of ours finished a step."""
        self._slots.step_done(key, event)

    def segment_done(self, key: SlotKey, event: SegmentDone) -> duty.CommitSegment | None:
        """A worker of ours finished a segment; the duty that can be done now."""
        return self._slots.segment_done(key, event)

    def slot_failed(self, key: SlotKey, event: SlotFailed) -> None:
        """A worker of ours is gone."""
        self._slots.slot_failed(key, event)

    async def link_waits(self, key: SlotKey, event: LinkWaits) -> None:
        """A worker of ours waits for a frame."""
        await self._slots.link_waits(key, event)

    # small things ----------------------------------------------------------------------------

    async def submit(self, payload: Payload) -> None:
        """Sign a node transaction and hand it to the chain."""
        await self._desk.submit(payload)

    async def spec(self, job: Job) -> tuple[bytes, Spec]:
        """A job's spec, as bytes and as a value. SpecUnavailable, TrainError."""
        return await self._desk.spec(job)

    def known_spec(self, job: bytes) -> Spec | None:
        """A job's spec when it was needed before."""
        return self._desk.known_spec(job)


def _asked_at(state: State, job: Job, todo: duty.TakePlace) -> int:
    """The height at which this node was given the place, as near as the chain says."""
    if job.status is JobStatus.MATCHED:
        return job.matched
    former = () if todo.slot == STANDBY_SLOT else slot_of(state, job, todo.slot).former
    return former[-1].height if former else job.repaired
