"""What each duty does: the deeds of one node in its jobs.

`duties` says what stands, the agent when it is begun and tried again; here it is done: with the
machine, and by a transaction that tells the chain. Whatever is remembered here is a cache or can be
found again; what a job needs lies on disk or on the chain.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from blake3 import blake3

from tdmld.chain import limits as chain_limits
from tdmld.chain.crypto import KeyPair, address, public_key
from tdmld.chain.records import Job, Segment, SlotState
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Accept,
    AttestGenesis,
    AttestResult,
    AuditCommit,
    AuditFail,
    AuditOpen,
    Commit,
    Decline,
    LinkRoots,
    Open,
    Payload,
    StandbyProof,
    sign_transaction,
)
from tdmld.node import duties as duty
from tdmld.node.chainerrors import SpecUnavailable
from tdmld.node.chainservice import ChainService
from tdmld.node.errors import AuditImpossible, WorkerFailed
from tdmld.node.layout import Layout, free_bytes, list_file
from tdmld.node.machine import (
    AuditTask,
    LinkSource,
    Machine,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotId,
    StateRoots,
    StateSource,
    StepDone,
)
from tdmld.node.offers import OfferRefused, check_offer, check_room
from tdmld.plaintext import plain
from tdmld.train.errors import TrainError
from tdmld.train.segment import StoredList, read_list
from tdmld.train.spec import Spec, decode_spec

log = logging.getLogger(__name__)

_OFFSETS = {"up": -1, "down": 1}
"""Which stage is at the other end of a link."""
MARGIN_BLOCKS = 2
"""A transaction submitted now stands in a block so soon."""
SlotKey = tuple[bytes, int]


@dataclass
class Progress:
    """What this node knows of a slot that it runs, beyond the chain. For people."""

    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    phase: str = "waiting"
    failed: str = ""


@dataclass
class Replay:
    """An audit's replay under way; `until`: height at which it is given up, to say so in time."""

    until: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass
class Performer:
    """Does duties. All methods may be cancelled; what they raise is the agent's to log."""

    key: KeyPair
    chain_id: bytes
    chain: ChainService
    machine: Machine
    data_dir: Path
    progress: dict[SlotKey, Progress] = field(default_factory=dict)
    """The newest step of each slot that this node runs."""
    auditing: dict[tuple[bytes, int, int], Replay] = field(default_factory=dict)
    """(job, slot, segment) of what is being replayed for an audit."""

    def __post_init__(self) -> None:
        self._lists: dict[tuple[bytes, int, int], StoredList] = {}
        self._found: dict[tuple[bytes, int, int], bytes] = {}
        self._specs: dict[bytes, tuple[bytes, Spec]] = {}
        self._open: set[SlotKey] = set()
        self._told: dict[SlotKey, int] = {}
        self._salt_key = blake3(self.key.seed, derive_key_context="tdmld 1 salts").digest()

    def action(self, state: State, job: Job, todo: duty.Duty) -> Callable[[], Awaitable[None]]:
        """The coroutine function that does `todo`."""
        match todo:
            case duty.TakePlace():
                return lambda: self._take_place(job, todo)
            case duty.PrepareSlot():
                return lambda: self._prepare_slot(state, job, todo.slot)
            case duty.PrepareCopy():
                return lambda: self._prepare_copy(state, job, todo.slot)
            case duty.RunSegments():
                return lambda: self._run_segments(job, todo)
            case duty.CommitSegment():
                return lambda: self._commit(job, todo.slot, todo.segment)
            case duty.HoldState():
                return lambda: self._hold_state(state, job, todo.slot, todo.segment)
            case duty.ProveState():
                return lambda: self._prove_state(state, job, todo.slot, todo.segment)
            case duty.ReplaySegment():
                return lambda: self._replay(state, job, todo)
            case duty.OpenSeal():
                return lambda: self._open_seal(job, todo.slot, todo.segment)
            case duty.OpenVerdict():
                return lambda: self._open_verdict(state, job, todo)
            case duty.ForgetSegments():
                return lambda: self._forget(job, todo)
            case duty.MakeResult():
                return lambda: self._make_result(state, job)
            case _:
                raise AssertionError(f"no action for {todo}")

    # preparing -------------------------------------------------------------------------------

    async def _take_place(self, job: Job, todo: duty.TakePlace) -> None:
        try:
            raw, spec = await self.spec(job)
            check_offer(job, raw, spec)
            check_room(spec, todo.slot, await trio.to_thread.run_sync(free_bytes, self.data_dir))
        except SpecUnavailable as error:
            if self.chain.height < job.matched + self.chain.genesis.parameters.accept_window // 2:
                raise  # its gossip may still be on the way
            log.warning("job %s: declined, %s", job.id.hex()[:12], error)
            await self.submit(Decline(job.id, todo.attempt, todo.slot))
            return
        except (OfferRefused, TrainError) as error:
            log.warning("job %s: declined, %s", job.id.hex()[:12], error)
            await self.submit(Decline(job.id, todo.attempt, todo.slot))
            return
        await self.submit(Accept(job.id, todo.attempt, todo.slot, public_key(self.machine.session)))

    async def _prepare_slot(self, state: State, job: Job, index: int) -> None:
        raw, spec = await self.spec(job)
        slot = SlotId.of(index, spec.stages)
        if (job.id, index) in self._open:
            await self.machine.close_slot(job.id, slot, "prepared again")
        self._set_phase(job.id, index, "fetching data")
        await self.machine.fetch_data(job.id, raw, self._holders_of_data(state, job))
        self._set_phase(job.id, index, "drawing weights")
        roots = await self.machine.open_slot(
            SlotAssignment(
                job=job.id,
                spec=raw,
                slot=slot,
                epoch=job.epoch,
                incarnation=self._slot_state(state, job, index).incarnation,
                up=self._neighbour(state, job, index, _OFFSETS["up"]),
                down=self._neighbour(state, job, index, _OFFSETS["down"]),
                members=duty.sessions(duty.party(state, job)),
            )
        )
        self._open.add((job.id, index))
        self._set_phase(job.id, index, "ready")
        await self.submit(AttestGenesis(job.id, index, roots.shared, roots.lane, roots.data))

    async def _prepare_copy(self, state: State, job: Job, index: int) -> None:
        raw, spec = await self.spec(job)
        await self.machine.fetch_data(job.id, raw, self._holders_of_data(state, job))
        roots = await self.machine.genesis_roots(job.id, raw, SlotId.of(index, spec.stages))
        await self.submit(AttestGenesis(job.id, index, roots.shared, roots.lane, roots.data))

    # running ---------------------------------------------------------------------------------

    async def _run_segments(self, job: Job, todo: duty.RunSegments) -> None:
        key = (job.id, todo.slot)
        if key not in self._open:
            if self._progress(*key).failed == "":
                self._fail(key, "this node was restarted; its worker is gone")
            return
        await self.machine.grant(job.id, self._slot(job, todo.slot), todo.until)

    async def _commit(self, job: Job, index: int, number: int) -> None:
        stored = self._lists.get((job.id, index, number))
        if stored is None:
            return
        record = stored.record
        await self.submit(
            Commit(
                job=job.id,
                epoch=job.epoch,
                slot=index,
                incarnation=0,
                segment=number,
                start_shared=record.start_shared,
                start_lane=record.start_lane,
                end_shared=record.end_shared,
                end_lane=record.end_lane,
                links=tuple(LinkRoots(r.link, r.sent, r.received) for r in record.link_roots),
                seal=blake3(stored.salt + record.steps_root).digest(),
                loss=record.loss_micro,
            )
        )

    async def _hold_state(self, state: State, job: Job, index: int, number: int) -> None:
        raw, _ = await self.spec(job)
        segment = self._segment(state, job, index, number)
        worker = self._slot_state(state, job, index).worker
        await self.machine.hold_state(
            job.id,
            raw,
            self._slot(job, index),
            number + 1,
            [address(worker.session)],
            StateRoots(segment.end_shared, segment.end_lane),
        )

    async def _prove_state(self, state: State, job: Job, index: int, number: int) -> None:
        segment = self._segment(state, job, index, number)
        if job.standby is not None and job.standby.node == self.key.public:
            await self._hold_state(state, job, index, number)
        value = await self.machine.keyed_hash(
            job.id, self._slot(job, index), number + 1, segment.proof_key
        )
        incarnation = segment.incarnation
        await self.submit(StandbyProof(job.id, job.epoch, index, incarnation, number, value))

    async def _forget(self, job: Job, todo: duty.ForgetSegments) -> None:
        key = (job.id, todo.slot)
        for number in range(self._told.get(key, 0), todo.settled):
            await self.machine.settled(job.id, self._slot(job, todo.slot), number)
            self._told[key] = number + 1
            self._lists.pop((job.id, todo.slot, number), None)

    # audits ----------------------------------------------------------------------------------

    async def _replay(self, state: State, job: Job, todo: duty.ReplaySegment) -> None:
        at = (job.id, todo.slot, todo.segment)
        replay = self.auditing[at] = Replay(self._last_chance(state, *at))
        found = None
        try:
            with replay.scope:
                found = await self._find(state, job, todo.slot, todo.segment)
            if found is None:
                raise AuditImpossible(
                    "not done in time: who holds the inputs is too slow, or we are"
                )
        except (AuditImpossible, WorkerFailed) as error:
            # A replay that breaks here says nothing about the worker: let another one try.
            log.warning("audit %s: %s", todo, error)
            missing = plain(str(error))[: chain_limits.MISSING_BYTES]
            await self.submit(AuditFail(job.id, job.epoch, todo.slot, todo.segment, missing))
            return
        finally:
            self.auditing.pop(at, None)
        salt = self._salt(job, todo.slot, todo.segment)
        commitment = blake3(found + salt + self.key.public).digest()
        await self.submit(AuditCommit(job.id, job.epoch, todo.slot, todo.segment, commitment))

    @staticmethod
    def _last_chance(state: State, job: bytes, index: int, number: int) -> int:
        """The height at which an AuditFail is still in time: silence would be our fault."""
        audit = state.audit(job, index, number)
        assert audit is not None, "duties speak of audits that are drawn"
        return audit.until - max(MARGIN_BLOCKS, (audit.until - audit.drawn) // 10)

    async def _find(self, state: State, job: Job, index: int, number: int) -> bytes:
        """The list root that the replay of a segment gives."""
        at = (job.id, index, number)
        if at not in self._found:
            raw, spec = await self.spec(job)
            segment = self._segment(state, job, index, number)
            worker = self._slot_state(state, job, index).worker
            standby = [job.standby] if job.standby is not None else []
            links = {
                roots.link: LinkSource(roots.received, (neighbour,))
                for roots in segment.links
                if (neighbour := self._neighbour(state, job, index, _OFFSETS[roots.link]))
            }
            record = await self.machine.audit(
                AuditTask(
                    job=job.id,
                    spec=raw,
                    slot=SlotId.of(index, spec.stages),
                    segment=number,
                    start=StateRoots(segment.start_shared, segment.start_lane),
                    links=links,
                    state_holders=tuple(
                        address(m.session) for m in [worker, *standby] if m.session
                    ),
                    data_holders=tuple(self._holders_of_data(state, job)),
                )
            )
            self._found[at] = record.list_root(job.id, job.stage_of(index), job.lane_of(index))
        return self._found[at]

    async def _open_seal(self, job: Job, index: int, number: int) -> None:
        stored = self._lists.get((job.id, index, number))
        if stored is None:
            directory = Layout(self.data_dir).slot(job.id, *self._slot(job, index))
            stored = await trio.to_thread.run_sync(read_list, list_file(directory, number))
        root = stored.record.steps_root
        await self.submit(Open(job.id, job.epoch, index, number, stored.salt, root))

    async def _open_verdict(self, state: State, job: Job, todo: duty.OpenVerdict) -> None:
        found = await self._find(state, job, todo.slot, todo.segment)
        salt = self._salt(job, todo.slot, todo.segment)
        await self.submit(AuditOpen(job.id, job.epoch, todo.slot, todo.segment, found, salt))

    # the end ---------------------------------------------------------------------------------

    async def _make_result(self, state: State, job: Job) -> None:
        raw, spec = await self.spec(job)
        final: dict[SlotId, StateSource] = {}
        for index in range(spec.stages):
            segment = self._segment(state, job, index, job.rounds - 1)
            holders = [self._slot_state(state, job, index).worker]
            if job.standby is not None:
                holders.append(job.standby)
            final[SlotId.of(index, spec.stages)] = StateSource(
                segment.end_shared, tuple(address(member.session) for member in holders)
            )
        result = await self.machine.make_result(job.id, raw, final)
        await self.submit(AttestResult(job.id, result.result_id))

    # what the machine says, and the end -------------------------------------------------------

    def step_done(self, key: SlotKey, event: StepDone) -> None:
        progress = self._progress(*key)
        progress.phase, progress.step = "running", event.step + 1
        progress.loss, progress.seconds = event.loss, event.seconds

    def segment_done(self, key: SlotKey, event: SegmentDone) -> duty.CommitSegment:
        """The duty that can be done now."""
        self._lists[*key, event.record.segment] = StoredList(event.salt, event.record)
        return duty.CommitSegment(*key, event.record.segment)

    def slot_failed(self, key: SlotKey, event: SlotFailed) -> None:
        self._open.discard(key)
        self._fail(key, event.reason)

    def forget(self, job: bytes) -> None:
        """A job is over; its spec was used for the last time."""
        caches: tuple[dict[Any, Any], ...] = (self.progress, self._lists, self._found, self._told)
        for cache in caches:
            for at in [at for at in cache if at[0] == job]:
                del cache[at]
        self._open = {key for key in self._open if key[0] != job}
        self._specs.pop(job, None)

    # small things ----------------------------------------------------------------------------

    async def submit(self, payload: Payload) -> None:
        """Sign a node transaction and hand it to the chain."""
        await self.chain.submit(sign_transaction(self.key, self.chain_id, payload))

    async def spec(self, job: Job) -> tuple[bytes, Spec]:
        """A job's spec, as bytes and as a value. SpecUnavailable, TrainError."""
        if job.id not in self._specs:
            raw = await self.chain.fetch_spec(job.spec_id)
            self._specs[job.id] = (raw, decode_spec(raw))
        return self._specs[job.id]

    def _holders_of_data(self, state: State, job: Job) -> list[str]:
        workers = [slot.worker.session for slot in duty.assigned(state, job)]
        sessions = [job.source_session, *workers]
        mine = self.machine.session
        return [a for s in dict.fromkeys(sessions) if s and (a := address(s)) != mine]

    def _neighbour(self, state: State, job: Job, index: int, offset: int) -> str | None:
        stage = job.stage_of(index) + offset
        if not 0 <= stage < len(job.stages):
            return None
        return address(self._slot_state(state, job, index + offset).worker.session)

    def _segment(self, state: State, job: Job, index: int, number: int) -> Segment:
        segment = state.segment(job.id, index, number)
        assert segment is not None, "duties speak of committed segments only"
        return segment

    def _slot_state(self, state: State, job: Job, index: int) -> SlotState:
        slot = state.slot(job.id, index)
        assert slot is not None, "duties speak of matched slots only"
        return slot

    def _slot(self, job: Job, index: int) -> SlotId:
        return SlotId.of(index, len(job.stages))

    def _salt(self, job: Job, index: int, number: int) -> bytes:
        """The salt of our audit: the same after a restart, and nobody else's to guess."""
        what = job.id + index.to_bytes(4, "big") + number.to_bytes(8, "big")
        return blake3(what, key=self._salt_key).digest()

    def _progress(self, job: bytes, index: int) -> Progress:
        return self.progress.setdefault((job, index), Progress())

    def _set_phase(self, job: bytes, index: int, phase: str) -> None:
        self._progress(job, index).phase = phase

    def _fail(self, key: SlotKey, reason: str) -> None:
        progress = self._progress(*key)
        progress.phase, progress.failed = "failed", reason
        log.error("job %s slot %d failed: %s", key[0].hex()[:12], key[1], reason)
