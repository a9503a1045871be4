"""The market agent: does for its node what the chain expects of it.

It looks at the finalized state after each block, asks `duties` what stands, and starts what is not
yet under way. Each duty runs as a task of its own; one that failed, or whose transaction never came
to stand in a block, is tried again some blocks later for as long as the chain still expects it. A
fault in one duty never disturbs another or the daemon; a database that fails ends the node.
"""

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from tdmld.chain.crypto import KeyPair, address, public_key
from tdmld.chain.errors import DecodeError, InvalidTransaction
from tdmld.chain.market import ask_pause
from tdmld.chain.records import SPLIT, Job
from tdmld.chain.state import State
from tdmld.chain.transactions import DIAL_OPEN, DIAL_PAIR, Ask, DialReceipt
from tdmld.node import duties, duty
from tdmld.node.chainerrors import ServiceBusy, SpecUnavailable, StoreError
from tdmld.node.chainservice import ChainService
from tdmld.node.errors import MachineError
from tdmld.node.jobfiles import unfinished_jobs
from tdmld.node.layout import Layout
from tdmld.node.machine import CarrierUp, LinkWaits, Machine, SegmentDone, SlotFailed, StepDone
from tdmld.node.peers import PeerBook
from tdmld.node.performer import Performer, Progress, Replay, SlotKey
from tdmld.node.seal import stored_names
from tdmld.node.workers import given_roots, shared_roots
from tdmld.p2p import PeerInfo
from tdmld.train.errors import TrainError
from tdmld.train.spec import Spec

log = logging.getLogger(__name__)

RETRY_BLOCKS = 6
"""A duty that still stands this many blocks after it was done or failed is done again."""
PUBLISHED_SECONDS = 3600.0
"""Between the publication of a text here and its offer on the chain."""
SERVED_JOBS = 64
"""Closed jobs whose members may still fetch the result from here; older ones are forgotten."""


@dataclass(frozen=True)
class AskPolicy:
    """What this node's owner offers at the market; see transactions.Ask."""

    class_id: str
    memory: int
    price: int
    audit_capacity: int
    standby_slots: int


class Witnessed(Protocol):
    """What others say of how this node's carrier can be reached (`reach`)."""

    @property
    def settled(self) -> bool:
        """Everybody who could be asked has answered: what is missing now may never come."""
        ...

    @property
    def closed(self) -> bool:
        """Others tried to dial our carrier, in vain."""
        ...

    def receipts(self) -> tuple[DialReceipt, ...]:
        """As an ask takes them: fresh, sorted by kind and witness."""
        ...


@dataclass
class _Attempt:
    running: bool = True
    height: int = 0
    again: bool = False
    """Something changed since it began: it is begun again as soon as it ends."""


@dataclass
class Agent:
    """One node's market agent. `run` serves until cancelled.

    `on_step` is a callback for each step that a slot of this node finished, for status displays.
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
    witnessed: Witnessed
    on_step: Callable[[StepDone], None] = lambda step: None

    def __post_init__(self) -> None:
        self._performer = Performer(
            self.key, self.chain_id, self.chain, self.machine, self.data_dir, self._again
        )
        self._attempts: dict[object, _Attempt] = {}
        self._stages: dict[bytes, int] = {}
        self._known: set[bytes] = set()
        self._parties: dict[bytes, duties.Party] = {}
        self._told: dict[bytes, tuple[duties.Party, bool]] = {}
        """Of each job: whom the machine knows as its members, and whether its spec was here then:
        which given weights are theirs stands in it."""
        self._lost: Counter[bytes] = Counter()
        """Of each job: how many had lost a place when the machine was told of its members."""
        self._served: deque[bytes] = deque()
        self._published: dict[frozenset[bytes], float] = {}
        """Names of contents that were published here -> until when they are kept for their
        offer."""
        self._peers: frozenset[PeerInfo] = frozenset()
        self._news = trio.Event()

    @property
    def progress(self) -> dict[SlotKey, Progress]:
        """The newest step of each slot that this node runs."""
        return self._performer.progress

    @property
    def auditing(self) -> dict[tuple[bytes, int, int], Replay]:
        """(job, slot, segment) of what is being replayed for an audit."""
        return self._performer.auditing

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
                self.look_again()

    def look_again(self) -> None:
        """Something changed that duties do not say: the machine, or who reached it."""
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
            if job_id in self._known and self._performer.known_spec(job_id) is None:
                standing.add(("spec", job_id))
                self._start(nursery, ("spec", job_id), partial(self._load_spec, job))
            for todo in duties.duties(state, self.key.public, job):
                if not isinstance(todo, duty.CloseJob):
                    action = self._performer.action(state, job, todo)
                elif job_id in self._known:
                    action = partial(self._close_job, job)
                else:
                    continue
                standing.add(todo)
                self._start(nursery, todo, action)
        try:
            await self._performer.close_strays(state)
        except MachineError as error:
            log.info("a slot that is not ours any more: %s", error)
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
            log.warning("%s: %s", key, error)
        except StoreError:
            raise
        except Exception:
            # A defect in one duty must not end the node: its votes and its other jobs go on.
            log.exception("%s failed", key)
        finally:
            if self._attempts.pop(key, _Attempt()).again:
                self.look_again()
            else:
                self._attempts[key] = _Attempt(running=False, height=self.chain.height)

    # the node itself -------------------------------------------------------------------------

    def _ask_is_due(self, state: State, height: int) -> bool:
        if state.node(self.key.public) is None:
            return False
        ask, parameters = state.ask(self.key.public), self.chain.genesis.parameters
        receipts = self.witnessed.receipts()
        opened = sum(receipt.kind == DIAL_OPEN for receipt in receipts)
        # Another one is allowed only a part of an epoch later: wait for what is on its way.
        ready = opened >= parameters.dial_receipts or self.witnessed.settled
        if ask is None:
            return ready
        paths = {receipt.witness for receipt in receipts if receipt.kind == DIAL_PAIR}
        due = (
            ask.until_height < height + self.ask_blocks // 2
            or ask.session != self._session
            or ask.open < parameters.dial_receipts <= opened
            or bool(parameters.dial_receipts and paths.difference(ask.paths))
            or (opened < parameters.dial_receipts <= ask.open and self.witnessed.closed)
        )
        return ready and due and height + 1 >= ask.height + ask_pause(parameters)

    async def _publish_ask(self) -> None:
        assert self.ask is not None
        policy, counted = self.ask, self.chain.genesis.parameters.dial_receipts
        await self._performer.submit(
            Ask(
                session=self._session,
                class_id=policy.class_id,
                memory=policy.memory,
                price=policy.price,
                audit_capacity=policy.audit_capacity,
                standby_slots=policy.standby_slots,
                until_height=self.chain.height + self.ask_blocks,
                receipts=self.witnessed.receipts() if counted else (),
            )
        )

    @property
    def _session(self) -> bytes:
        return public_key(self.machine.session)

    async def _close_job(self, job: Job) -> None:
        log.info("job %s is %s %s", job.id.hex()[:12], job.status, job.reason)
        await self.machine.close_job(job.id, f"{job.status}: {job.detail or job.reason}")
        await self._drop_data(job)
        self._performer.forget(job.id)
        self._stages.pop(job.id, None)
        self._parties.pop(job.id, None)
        self._told.pop(job.id, None)
        self._lost.pop(job.id, None)
        self._served.append(job.id)
        self._known.discard(job.id)
        while len(self._served) > SERVED_JOBS:
            await self.machine.set_members(self._served.popleft(), frozenset())

    async def _load_spec(self, job: Job) -> None:
        """Everything about a job's content stands in its spec."""
        await self._performer.spec(job)
        self.look_again()

    async def _drop_data(self, job: Job) -> None:
        """Remove the text of a job that is over, unless another one needs it."""
        state, needed = self.chain.state(), set[bytes]()
        try:
            dropped = _contents((await self._performer.spec(job))[1])
            for other in filter(None, map(state.job, self._known - {job.id})):
                needed |= _contents((await self._performer.spec(other))[1])
        except (SpecUnavailable, TrainError) as error:
            log.info("the text of job %s stays: %s", job.id.hex()[:12], error)
            return
        now = trio.current_time()
        self._published = {text: at for text, at in self._published.items() if at > now}
        needed.update(*self._published)
        await self.machine.drop_data(dropped - needed)

    def published(self, spec: Spec) -> None:
        """Keep the text of a spec whose offer is on its way to the chain."""
        self._published[_contents(spec)] = trio.current_time() + PUBLISHED_SECONDS

    # what the machine says -------------------------------------------------------------------

    async def _follow_machine(self) -> None:
        async for event in self.machine.events:
            match event:
                case CarrierUp():
                    # A new process knows nobody; the next look tells it.
                    self._told.clear()
                    self._peers = frozenset()
                    self._forget_attempts(duty.OpenSlot, duty.PrepareSlot)
                case StepDone() | SegmentDone() | SlotFailed() | LinkWaits():
                    if event.job in self._stages:
                        await self._take_event(event)
                case _:
                    log.info("machine: %s", event)

    async def _take_event(self, event: StepDone | SegmentDone | SlotFailed | LinkWaits) -> None:
        """What happened in a slot of a job that is not closed."""
        key = (event.job, event.slot.index(self._stages[event.job]))
        match event:
            case StepDone():
                self._performer.step_done(key, event)
                self.on_step(event)
            case SegmentDone():
                if self._performer.segment_done(key, event) is None:
                    self._again(key)
                self._forget_attempts(duty.CommitSegment, key=key)
            case SlotFailed():
                self._performer.slot_failed(key, event)
                self._again(key)
            case LinkWaits():
                try:
                    await self._performer.link_waits(key, event)
                except (InvalidTransaction, ServiceBusy) as error:
                    log.info("the chain was not told of a stall: %s", error)

    def _again(self, key: SlotKey) -> None:
        """What stands for a slot can be done now, or anew."""
        self._forget_attempts(
            duty.OpenSlot, duty.ReachPeers, duty.RunSegments, duty.CommitSegment, key=key
        )

    def _forget_attempts(self, *kinds: type[duty.Duty], key: SlotKey | None = None) -> None:
        """Begin duties of these kinds at once where they stand; of one slot, or of all."""
        for todo in list(self._attempts):
            if isinstance(todo, kinds) and key in (None, (todo.job, todo.slot)):  # type: ignore[attr-defined]  # all of these kinds have a slot
                if self._attempts[todo].running:
                    self._attempts[todo].again = True
                else:
                    del self._attempts[todo]
        self.look_again()

    # who belongs to a job --------------------------------------------------------------------

    async def _tell_machine(self, state: State, job_id: bytes) -> None:
        """Tell the carrier who belongs to a job that concerns this node, and where they are."""
        job = state.job(job_id)
        if job is None or (job.final and job_id not in self._known):
            return
        party = duties.party(state, job)
        if self.key.public not in {node for node, _ in party}:
            return
        if not job.final:
            self._known.add(job.id)
        self._stages[job.id] = len(job.stages)
        told = (party, self._performer.known_spec(job.id) is not None)
        if self._told.get(job.id) != told:
            await self._tell_members(state, job, duties.sessions(party))
            self._told[job.id] = told
            self._parties[job.id] = party
        await self._tell_peers()

    async def _tell_members(self, state: State, job: Job, members: frozenset[str]) -> None:
        """Who may have a job's content. The source of a sealed one gives it a new key when somebody
        has lost a place: what is sealed from then on is not for them."""
        sealed = job.spec_id if job.privacy == "sealed" else None
        lost = len(duties.lost_places(state, job))
        spec = self._performer.known_spec(job.id)
        given = () if spec is None else sorted(shared_roots(spec))
        if sealed is not None and job.source == self.key.public and lost > self._lost[job.id]:
            await self.machine.rekey(job.id, members, sealed, given=given)
        else:
            await self.machine.set_members(
                job.id,
                members,
                sealed,
                private=job.privacy == SPLIT,
                given=given,
            )
        self._lost[job.id] = lost

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


def _contents(spec: Spec) -> frozenset[bytes]:
    """What of a job lies in the content store: its text, and the weights that it begins with."""
    return frozenset(stored_names(spec)) | frozenset(given_roots(spec))
