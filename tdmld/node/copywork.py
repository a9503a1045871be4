"""What this node does besides its own slots: copies as the standby, contributions, testimony."""

import logging

import trio

from tdmld.chain.complaints import (
    Witness,
)
from tdmld.chain.crypto import address
from tdmld.chain.records import Job
from tdmld.chain.segments import neighbours
from tdmld.chain.settlement import allowed
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    AttestContributions,
    AttestGenesis,
    StandbyProof,
)
from tdmld.node import duty
from tdmld.node.desk import (
    Desk,
    roots_at,
    segment_of,
    sessions_at_stage,
    slot_id,
    slot_of,
)
from tdmld.node.errors import ContentError
from tdmld.node.rounds import contribution_of

log = logging.getLogger(__name__)

MARGIN_BLOCKS = 5
"""A witness has spoken so long before its time is over."""
PROBE_SECONDS = 1.0


class CopyWork:
    """Does the duties of a standby, and those of a worker towards its siblings."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._held: set[tuple[bytes, int, int, int]] = set()
        """(job, slot, epoch, boundary) of the copies that are known to be here, as the standby."""

    async def prepare(self, state: State, job: Job, index: int) -> None:
        """See duty.PrepareCopy."""
        desk, slot = self._desk, slot_id(job, index)
        raw, _ = await desk.spec(job)
        if not job.is_own(0):
            await desk.machine.fetch_data(job.id, raw, desk.holders_of_data(state, job))
        given = desk.others([job.source_session, *sessions_at_stage(state, job, index)])
        await desk.machine.fetch_given(job.id, raw, slot, given)
        roots = await desk.machine.genesis_roots(job.id, raw, slot)
        await desk.submit(AttestGenesis(job.id, index, roots.shared, roots.lane, roots.data))

    async def hold(self, state: State, job: Job, index: int, epoch: int, boundary: int) -> None:
        """See duty.HoldState."""
        at = (job.id, index, epoch, boundary)
        roots = roots_at(state, job, index, boundary)
        if at in self._held or roots is None:
            return
        desk = self._desk
        raw, _ = await desk.spec(job)
        contribution = contribution_of(desk, state, job, index, boundary - 1)
        await desk.machine.hold_state(
            job.id,
            raw,
            slot_id(job, index),
            boundary,
            desk.holders_of_state(state, job, index),
            roots,
            contribution,
        )
        self._held.add(at)

    async def prove(self, state: State, job: Job, todo: duty.ProveState) -> None:
        """See duty.ProveState."""
        desk, boundary = self._desk, todo.segment + 1
        segment = segment_of(state, job, todo.slot, todo.segment)
        if job.standby is not None and job.standby.node == desk.node:
            await self.hold(state, job, todo.slot, todo.epoch, boundary)
        value = await desk.machine.keyed_hash(
            job.id, slot_id(job, todo.slot), boundary, segment.proof_key
        )
        epoch = desk.epoch(job.id)
        await desk.submit(
            StandbyProof(job.id, epoch, todo.slot, todo.incarnation, todo.segment, value)
        )

    async def hold_contributions(
        self, state: State, job: Job, todo: duty.HoldContributions
    ) -> None:
        """See duty.HoldContributions. What cannot be brought now is tried again later."""
        desk, slot = self._desk, slot_id(job, todo.slot)
        raw, _ = await desk.spec(job)
        brought = []
        for lane in todo.lanes:
            other = job.slot_at(lane, slot.stage)
            source = contribution_of(desk, state, job, other, todo.round)
            if source is None:
                continue
            try:
                await desk.machine.hold_contributions(job.id, raw, slot, todo.round, {lane: source})
            except ContentError as error:
                log.warning("%s: the one of lane %d: %s", todo, lane, error)
            else:
                brought.append(lane)
        found = state.round(job.id, todo.round)
        held = 0 if found is None else found.attested[todo.slot]
        lanes = {lane for lane in range(job.lanes) if held >> lane & 1} | set(brought)
        if brought:
            attested = tuple(sorted(lanes))
            await desk.submit(
                AttestContributions(job.id, todo.epoch, todo.slot, todo.round, attested)
            )

    async def testify(self, state: State, job: Job, todo: duty.TryDelivery) -> None:
        """See duty.TryDelivery."""
        desk, slot = self._desk, slot_id(job, todo.slot)
        raw, spec = await desk.spec(job)
        accused = address(slot_of(state, job, todo.slot).worker.session)
        # An accuser that names a frame of later segments must not win: nobody owes it yet.
        due = allowed(state, job, todo.slot, neighbours(job, todo.slot))
        owed = todo.seq < due * spec.link_frames(slot.lane, slot.stage, todo.link)
        case = slot_of(state, job, todo.slot).case
        last = 0 if case is None else case.until - MARGIN_BLOCKS
        delivered = not owed
        while not delivered:
            delivered = await desk.machine.probe_frame(
                job.id, raw, slot, todo.epoch, todo.link, todo.seq, accused
            )
            if desk.chain.height >= last:
                break  # whoever has just been started again had its time
            if not delivered:
                await trio.sleep(PROBE_SECONDS)
        log.warning(
            "%s: the frame was %s",
            todo,
            "delivered" if delivered and owed else "not owed" if delivered else "not delivered",
        )
        await desk.submit(
            Witness(job.id, todo.epoch, todo.slot, todo.incarnation, todo.opened, delivered)
        )

    def forget(self, job: bytes) -> None:
        """The job is over."""
        self._held = {at for at in self._held if at[0] != job}
