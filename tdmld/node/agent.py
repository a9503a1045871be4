"""The market agent: does for its node what the chain expects of it.

It looks at the finalized state after each block, asks `duties` what stands, and starts what is not
yet under way. Each duty runs as a task of its own; one that failed, or whose transaction never came
to stand in a block, is tried again some blocks later for as long as the chain still expects it. A
fault in one duty never disturbs another or the daemon; a database that fails ends the node.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from blake3 import blake3

from tdmld.chain import limits as chain_limits
from tdmld.chain.crypto import KeyPair, address, public_key
from tdmld.chain.errors import DecodeError, InvalidTransaction
from tdmld.chain.market import ask_pause
from tdmld.chain.records import Job, JobStatus, Segment, SlotState
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Accept,
    Ask,
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
from tdmld.node.chainerrors import ServiceBusy, SpecUnavailable, StoreError
from tdmld.node.chainservice import ChainService
from tdmld.node.errors import AuditImpossible, MachineError, WorkerFailed
from tdmld.node.jobfiles import unfinished_jobs
from tdmld.node.layout import Layout, free_bytes, list_file
from tdmld.node.machine import (
    AuditTask,
    CarrierUp,
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
from tdmld.node.peers import PeerBook
from tdmld.p2p import PeerInfo
from tdmld.plaintext import plain
from tdmld.train.errors import TrainError
from tdmld.train.segment import StoredList, read_list
from tdmld.train.spec import Spec, decode_spec

log = logging.getLogger(__name__)

_OFFSETS = {"up": -1, "down": 1}
"""Which stage is at the other end of a link."""
RETRY_BLOCKS = 6
"""A duty that still stands this many blocks after it was done or failed is done again."""
MARGIN_BLOCKS = 2
"""A transaction submitted now stands in a block so soon."""
PUBLISHED_SECONDS = 3600.0
"""Between the publication of a text here and its offer on the chain."""
SERVED_JOBS = 64
"""Closed jobs whose members may still fetch the result from here; older ones are forgotten."""
SlotKey = tuple[bytes, int]
Party = frozenset[tuple[bytes, bytes]]
"""(node key, session key) of everybody who has to do with a job."""


@dataclass(frozen=True)
class AskPolicy:
    """What this node's owner offers at the market; see transactions.Ask."""

    class_id: str
    memory: int
    price: int
    audit_capacity: int
    standby_slots: int


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
class _Attempt:
    running: bool = True
    height: int = 0


@dataclass
class Agent:
    """One node's market agent. `run` serves until cancelled.

    `progress` and `on_step` are for status displays: the newest step of each slot that this node
    runs, and a callback for each step.
    """

    key: KeyPair
    chain_id: bytes
    chain: ChainService
    machine: Machine
    book: PeerBook
    data_dir: Path
    ask: AskPolicy | None
    ask_blocks: int
    """How far ahead an ask runs; it is renewed at the half."""
    on_step: Callable[[StepDone], None] = lambda step: None
    progress: dict[SlotKey, Progress] = field(default_factory=dict)
    auditing: dict[tuple[bytes, int, int], Replay] = field(default_factory=dict)
    """(job, slot, segment) of what is being replayed for an audit."""

    def __post_init__(self) -> None:
        self._attempts: dict[object, _Attempt] = {}
        self._lists: dict[tuple[bytes, int, int], StoredList] = {}
        self._found: dict[tuple[bytes, int, int], bytes] = {}
        self._specs: dict[bytes, tuple[bytes, Spec]] = {}
        self._stages: dict[bytes, int] = {}
        self._open: set[SlotKey] = set()
        self._known: set[bytes] = set()
        self._parties: dict[bytes, Party] = {}
        self._served: deque[bytes] = deque()
        self._told: dict[SlotKey, int] = {}
        self._published: dict[tuple[bytes, ...], float] = {}
        """Shards of texts that were published here -> until when they are kept for their offer."""
        self._peers: frozenset[PeerInfo] = frozenset()
        self._news = trio.Event()
        self._salt_key = blake3(self.key.seed, derive_key_context="tdmld 1 salts").digest()

    async def run(self) -> None:
        """Serve until cancelled."""
        self._known |= await trio.to_thread.run_sync(unfinished_jobs, Layout(self.data_dir))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_machine)
            nursery.start_soon(self._follow_chain)
            while True:
                news = self._news
                await self._look(nursery)
                await news.wait()

    async def _follow_chain(self) -> None:
        with closing(self.chain.heads()) as heads:
            async for _ in heads:
                self._look_again()

    def _look_again(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # what stands -----------------------------------------------------------------------------

    async def _look(self, nursery: trio.Nursery) -> None:
        """Start every duty that stands and is not under way. One look at a time."""
        state = self.chain.state()
        standing: set[object] = {"ask"}
        if self.ask is not None and self._ask_is_due(state, self.chain.height):
            self._start(nursery, "ask", self._publish_ask)
        for job_id in sorted({*state.active_jobs(), *self._known}):
            try:
                await self._tell_machine(state, job_id)
            except MachineError as error:
                log.info("members of job %s: %s", job_id.hex()[:12], error)
            # Read after the wait: the state goes on meanwhile, and a look must see one moment.
            job = state.job(job_id)
            if job is None:
                continue
            for todo in duty.duties(state, self.key.public, job):
                if isinstance(todo, duty.CloseJob):
                    if job_id not in self._known:
                        continue
                    self._known.discard(job_id)
                standing.add(todo)
                self._start(nursery, todo, self._action(state, job, todo))
        for replay in self.auditing.values():
            if self.chain.height >= replay.until:
                replay.scope.cancel()
        for gone in [key for key, a in self._attempts.items() if key not in standing]:
            if not self._attempts[gone].running:
                del self._attempts[gone]

    def _start(
        self,
        nursery: trio.Nursery,
        key: object,
        action: Callable[[], Awaitable[None]],
    ) -> None:
        attempt, height = self._attempts.get(key), self.chain.height
        if attempt is not None and (attempt.running or height < attempt.height + RETRY_BLOCKS):
            return
        self._attempts[key] = _Attempt()
        nursery.start_soon(self._perform, key, action)

    async def _perform(self, key: object, action: Callable[[], Awaitable[None]]) -> None:
        """The boundary of a duty: what it raises is logged, and the duty is tried again later."""
        try:
            await action()
        except (
            MachineError,
            TrainError,
            DecodeError,
            InvalidTransaction,
            ServiceBusy,
            SpecUnavailable,
            OSError,
        ) as error:
            log.warning("%s: %s", _describe(key), error)
        except StoreError:
            raise
        except Exception:
            # A defect in one duty must not end the node: its votes and its other jobs go on.
            log.exception("%s failed", _describe(key))
        finally:
            self._attempts[key] = _Attempt(running=False, height=self.chain.height)

    def _action(self, state: State, job: Job, todo: duty.Duty) -> Callable[[], Awaitable[None]]:
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
            case duty.CloseJob():
                return lambda: self._close_job(job)
            case _:
                raise AssertionError(f"no action for {todo}")

    # the node itself -------------------------------------------------------------------------

    def _ask_is_due(self, state: State, height: int) -> bool:
        if state.node(self.key.public) is None:
            return False
        ask = state.ask(self.key.public)
        if ask is None:
            return True
        stale = ask.until_height < height + self.ask_blocks // 2 or ask.session != self._session
        return stale and height + 1 >= ask.height + ask_pause(self.chain.genesis.parameters)

    async def _publish_ask(self) -> None:
        assert self.ask is not None
        policy = self.ask
        await self._submit(
            Ask(
                session=self._session,
                class_id=policy.class_id,
                memory=policy.memory,
                price=policy.price,
                audit_capacity=policy.audit_capacity,
                standby_slots=policy.standby_slots,
                until_height=self.chain.height + self.ask_blocks,
            )
        )

    @property
    def _session(self) -> bytes:
        return public_key(self.machine.session)

    # preparing -------------------------------------------------------------------------------

    async def _take_place(self, job: Job, todo: duty.TakePlace) -> None:
        self._known.add(job.id)
        try:
            raw, spec = await self._spec(job)
            check_offer(job, raw, spec)
            check_room(spec, todo.slot, await trio.to_thread.run_sync(free_bytes, self.data_dir))
        except SpecUnavailable as error:
            if self.chain.height < job.matched + self.chain.genesis.parameters.accept_window // 2:
                raise  # its gossip may still be on the way
            log.warning("job %s: declined, %s", job.id.hex()[:12], error)
            await self._submit(Decline(job.id, todo.attempt, todo.slot))
            return
        except (OfferRefused, TrainError) as error:
            log.warning("job %s: declined, %s", job.id.hex()[:12], error)
            await self._submit(Decline(job.id, todo.attempt, todo.slot))
            return
        await self._submit(Accept(job.id, todo.attempt, todo.slot, self._session))

    async def _prepare_slot(self, state: State, job: Job, index: int) -> None:
        raw, spec = await self._spec(job)
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
                members=_sessions(self._party(state, job)),
            )
        )
        self._open.add((job.id, index))
        self._set_phase(job.id, index, "ready")
        await self._submit(AttestGenesis(job.id, index, roots.shared, roots.lane, roots.data))

    async def _prepare_copy(self, state: State, job: Job, index: int) -> None:
        raw, spec = await self._spec(job)
        await self.machine.fetch_data(job.id, raw, self._holders_of_data(state, job))
        roots = await self.machine.genesis_roots(job.id, raw, SlotId.of(index, spec.stages))
        await self._submit(AttestGenesis(job.id, index, roots.shared, roots.lane, roots.data))

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
        await self._submit(
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
        raw, _ = await self._spec(job)
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
        await self._submit(StandbyProof(job.id, job.epoch, index, incarnation, number, value))

    async def _forget(self, job: Job, todo: duty.ForgetSegments) -> None:
        key = (job.id, todo.slot)
        for number in range(self._told.get(key, 0), todo.settled):
            await self.machine.settled(job.id, self._slot(job, todo.slot), number)
            self._told[key] = number + 1
            self._lists.pop((job.id, todo.slot, number), None)

    # audits ----------------------------------------------------------------------------------

    async def _replay(self, state: State, job: Job, todo: duty.ReplaySegment) -> None:
        at = (job.id, todo.slot, todo.segment)
        self._known.add(job.id)
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
            log.warning("audit %s: %s", _describe(todo), error)
            missing = plain(str(error))[: chain_limits.MISSING_BYTES]
            await self._submit(AuditFail(job.id, job.epoch, todo.slot, todo.segment, missing))
            return
        finally:
            self.auditing.pop(at, None)
        salt = self._salt(job, todo.slot, todo.segment)
        commitment = blake3(found + salt + self.key.public).digest()
        await self._submit(AuditCommit(job.id, job.epoch, todo.slot, todo.segment, commitment))

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
            raw, spec = await self._spec(job)
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
        await self._submit(Open(job.id, job.epoch, index, number, stored.salt, root))

    async def _open_verdict(self, state: State, job: Job, todo: duty.OpenVerdict) -> None:
        found = await self._find(state, job, todo.slot, todo.segment)
        salt = self._salt(job, todo.slot, todo.segment)
        await self._submit(AuditOpen(job.id, job.epoch, todo.slot, todo.segment, found, salt))

    # the end ---------------------------------------------------------------------------------

    async def _make_result(self, state: State, job: Job) -> None:
        raw, spec = await self._spec(job)
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
        await self._submit(AttestResult(job.id, result.result_id))

    async def _close_job(self, job: Job) -> None:
        log.info("job %s is %s %s", job.id.hex()[:12], job.status, job.reason)
        await self.machine.close_job(job.id, f"{job.status}: {job.detail or job.reason}")
        caches: tuple[dict[Any, Any], ...] = (self.progress, self._lists, self._found, self._told)
        for cache in caches:
            for at in [at for at in cache if at[0] == job.id]:
                del cache[at]
        self._open = {key for key in self._open if key[0] != job.id}
        await self._drop_data(job)
        self._specs.pop(job.id, None)
        self._stages.pop(job.id, None)
        if self._parties.pop(job.id, None) is not None:
            self._served.append(job.id)
        while len(self._served) > SERVED_JOBS:
            await self.machine.set_members(self._served.popleft(), frozenset())

    async def _drop_data(self, job: Job) -> None:
        """Remove the text of a job that is over, unless another one needs it."""
        state, needed = self.chain.state(), set[bytes]()
        try:
            dropped = {content for content, _ in (await self._spec(job))[1].shards}
            for other in filter(None, map(state.job, self._known - {job.id})):
                needed |= {content for content, _ in (await self._spec(other))[1].shards}
        except (SpecUnavailable, TrainError) as error:
            log.info("the text of job %s stays: %s", job.id.hex()[:12], error)
            return
        now = trio.current_time()
        self._published = {text: at for text, at in self._published.items() if at > now}
        needed.update(*self._published)
        await self.machine.drop_data(dropped - needed)

    def published(self, spec: Spec) -> None:
        """Keep the text of a spec whose offer is on its way to the chain."""
        shards = tuple(content for content, _ in spec.shards)
        self._published[shards] = trio.current_time() + PUBLISHED_SECONDS

    # what the machine says -------------------------------------------------------------------

    async def _follow_machine(self) -> None:
        async for event in self.machine.events:
            match event:
                case CarrierUp():
                    # A new process knows nobody; the next look tells it.
                    self._parties.clear()
                    self._peers = frozenset()
                    self._look_again()
                case StepDone() | SegmentDone() | SlotFailed():
                    if event.job in self._stages:
                        self._take_event(event)
                case _:
                    log.info("machine: %s", event)

    def _take_event(self, event: StepDone | SegmentDone | SlotFailed) -> None:
        """What happened in a slot of a job that is not closed."""
        key = (event.job, event.slot.index(self._stages[event.job]))
        match event:
            case StepDone():
                progress = self._progress(*key)
                progress.phase, progress.step = "running", event.step + 1
                progress.loss, progress.seconds = event.loss, event.seconds
                self.on_step(event)
            case SegmentDone(record=record, salt=salt):
                self._lists[*key, record.segment] = StoredList(salt, record)
                todo = duty.CommitSegment(*key, record.segment)
                if not (attempt := self._attempts.get(todo)) or not attempt.running:
                    self._attempts.pop(todo, None)
                self._look_again()
            case SlotFailed(reason=reason):
                self._open.discard(key)
                self._fail(key, reason)

    # small things ----------------------------------------------------------------------------

    async def _submit(self, payload: Payload) -> None:
        await self.chain.submit(sign_transaction(self.key, self.chain_id, payload))

    async def _spec(self, job: Job) -> tuple[bytes, Spec]:
        if job.id not in self._specs:
            raw = await self.chain.fetch_spec(job.spec_id)
            self._specs[job.id] = (raw, decode_spec(raw))
        return self._specs[job.id]

    async def _tell_machine(self, state: State, job_id: bytes) -> None:
        """Tell the carrier who belongs to a job that concerns this node, and where they are."""
        job = state.job(job_id)
        if job is None or (job.final and job_id not in self._known):
            return
        party = self._party(state, job)
        if self.key.public not in {node for node, _ in party}:
            return
        if not job.final:
            self._known.add(job.id)
        self._stages[job.id] = len(job.stages)
        if self._parties.get(job.id) != party:
            await self.machine.set_members(job.id, _sessions(party))
            self._parties[job.id] = party
        await self._tell_peers()

    def _party(self, state: State, job: Job) -> Party:
        """Everybody who has to do with a job. A session is empty before its node accepted."""
        found = {(job.source, job.source_session)}
        if job.standby is not None:
            found.add((job.standby.node, job.standby.session))
        if job.status is JobStatus.OFFERED:
            return frozenset(found)
        for index, slot in enumerate(duty.assigned(state, job)):
            found.add((slot.worker.node, slot.worker.session))
            for number in range(slot.settled, slot.committed):
                audit = state.audit(job.id, index, number)
                if audit is not None and audit.held:
                    found.add((audit.auditor, audit.session))
        return frozenset(found)

    async def _tell_peers(self) -> None:
        """Where the sessions are. Only the record of the node whose session the chain says it is
        counts: anybody may sign a record that names somebody else's session."""
        found: dict[str, list[str]] = {}
        for node, session in frozenset().union(*self._parties.values()):
            record = self.book.node(node)
            if record is not None and record.session == session:
                found.setdefault(address(session), []).extend(record.session_addresses)
        found.pop(self.machine.session, None)
        peers = frozenset(PeerInfo(session, tuple(at)) for session, at in found.items())
        if peers != self._peers:
            await self.machine.set_peers(sorted(peers, key=lambda info: info.peer_id))
            self._peers = peers

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


def _sessions(party: Party) -> frozenset[str]:
    """Carriers' PeerIds, of those who have said theirs."""
    return frozenset(address(session) for _, session in party if session)


def _describe(key: object) -> str:
    """A duty in words for the log."""
    if not isinstance(key, duty.Duty):
        return str(key)
    rest = [f"{name} {getattr(key, name)}" for name in key.__dataclass_fields__ if name != "job"]
    return " ".join([type(key).__name__, "of job", key.job.hex()[:12], *rest])
