"""Audits that this node was drawn for: replay, commitment, opening."""

import logging
from dataclasses import dataclass, field

import trio
from blake3 import blake3

from tdmld.chain import limits as chain_limits
from tdmld.chain.crypto import address
from tdmld.chain.records import Job
from tdmld.chain.segments import other_end
from tdmld.chain.state import State
from tdmld.chain.transactions import AuditCommit, AuditFail, AuditOpen
from tdmld.node import duty
from tdmld.node.desk import Desk, segment_of, sessions_at_stage, slot_id, slot_of
from tdmld.node.errors import AuditImpossible, WorkerFailed
from tdmld.node.machine import AuditTask, LinkSource, StateRoots
from tdmld.node.rounds import contributions_for, included_in
from tdmld.plaintext import plain

log = logging.getLogger(__name__)

MARGIN_BLOCKS = 2
"""A transaction submitted now stands in a block so soon."""
_At = tuple[bytes, int, int, int, int]
"""Job, slot, epoch, incarnation, segment."""


@dataclass
class Replay:
    """An audit's replay under way; `until`: height at which it is given up, to say so in time."""

    until: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class AuditWork:
    """Does the duties of an auditor."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.auditing: dict[tuple[bytes, int, int], Replay] = {}
        """(job, slot, segment) of what is being replayed."""
        self._found: dict[_At, bytes] = {}

    async def replay(self, state: State, job: Job, todo: duty.ReplaySegment) -> None:
        """See duty.ReplaySegment."""
        at = (job.id, todo.slot, todo.segment)
        replay = self.auditing[at] = Replay(_last_chance(state, *at))
        found = None
        try:
            with replay.scope:
                found = await self._find(state, job, todo)
            if found is None:
                raise AuditImpossible(
                    "not done in time: who holds the inputs is too slow, or we are"
                )
        except (AuditImpossible, WorkerFailed) as error:
            # A replay that breaks here says nothing about the worker: let another one try.
            log.warning("audit %s: %s", todo, error)
            missing = plain(str(error))[: chain_limits.MISSING_BYTES]
            epoch = self._desk.epoch(job.id)
            fail = AuditFail(job.id, epoch, todo.slot, todo.segment, missing)
            await self._desk.submit(fail)
            return
        finally:
            if self.auditing.get(at) is replay:
                del self.auditing[at]
        commitment = blake3(found + self._salt(todo) + self._desk.node).digest()
        await self._desk.submit(
            AuditCommit(job.id, self._desk.epoch(job.id), todo.slot, todo.segment, commitment)
        )

    async def open_verdict(self, state: State, job: Job, todo: duty.OpenVerdict) -> None:
        """See duty.OpenVerdict."""
        found = await self._find(state, job, todo)
        salt = self._salt(todo)
        epoch = self._desk.epoch(job.id)
        await self._desk.submit(AuditOpen(job.id, epoch, todo.slot, todo.segment, found, salt))

    async def _find(
        self, state: State, job: Job, todo: duty.ReplaySegment | duty.OpenVerdict
    ) -> bytes:
        """The list root that the replay of a segment gives."""
        at = (job.id, todo.slot, todo.epoch, todo.incarnation, todo.segment)
        if at not in self._found:
            raw, _ = await self._desk.spec(job)
            task = audit_task(self._desk, state, job, todo.slot, todo.segment, raw)
            record = await self._desk.machine.audit(task)
            stage, lane = job.stage_of(todo.slot), job.lane_of(todo.slot)
            self._found[at] = record.list_root(job.id, stage, lane)
        return self._found[at]

    def _salt(self, todo: duty.ReplaySegment | duty.OpenVerdict) -> bytes:
        """The salt of our audit: the same after a restart, and another one when it is repeated."""
        numbers = (todo.epoch, todo.incarnation, todo.segment)
        return self._desk.salt(
            todo.job
            + todo.slot.to_bytes(4, "big")
            + b"".join(number.to_bytes(8, "big") for number in numbers)
        )

    def forget(self, job: bytes) -> None:
        """The job is over."""
        for at in [at for at in self._found if at[0] == job]:
            del self._found[at]


def audit_task(
    desk: Desk, state: State, job: Job, index: int, number: int, raw: bytes
) -> AuditTask:
    """What has to be brought together to replay a committed segment."""
    segment = segment_of(state, job, index, number)
    links = {}
    for roots in segment.links:
        other = slot_of(state, job, other_end(job, index, roots.link)[0]).worker
        sources = (address(other.session),) if other.session else ()
        links[roots.link] = LinkSource(roots.received, sources)
    holders = [slot_of(state, job, index).worker.session]
    if job.standby is not None:
        holders.append(job.standby.session)
    if number == 0:
        holders += [job.source_session, *sessions_at_stage(state, job, index)]
    return AuditTask(
        job=job.id,
        spec=raw,
        slot=slot_id(job, index),
        segment=number,
        start=StateRoots(segment.start_shared, segment.start_lane),
        links=links,
        state_holders=tuple(address(session) for session in dict.fromkeys(holders) if session),
        data_holders=tuple(desk.holders_of_data(state, job)),
        included=included_in(state, job, number),
        contributions=contributions_for(desk, state, job, index, number),
    )


def _last_chance(state: State, job: bytes, index: int, number: int) -> int:
    """The height at which an AuditFail is still in time: silence would be our fault."""
    audit = state.audit(job, index, number)
    assert audit is not None, "duties speak of audits that are drawn"
    return audit.until - max(MARGIN_BLOCKS, (audit.until - audit.drawn) // 10)
