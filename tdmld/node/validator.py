"""A validator of one epoch: the shell that gives the core its signatures, disk, clock and streams.

    stream -> checks -> core -> effects -> writer: sign, guard, one synced batch -> send -> core

Rules of the shell
  N1  Nothing signed leaves before it is stored and synced; one task writes for all that waits.
  N2  After a restart stored bytes are sent again; nothing is signed a second time.
  N3  A body is judged by its height above the final head, never by its view: a certificate may
      overtake it. A body that is missing is asked for by id, then by height.
  N4  A block whose named state is not executed here yet waits; so does one from the near future.
  N5  Leaders name what they have executed, and propose nothing while execution lags.
  N6  A directory that never voted belongs perhaps to a validator that did. It says nothing before
      validators with a quorum of stake, itself included, have greeted it with what they know, and
      nothing in the next ABSTAIN_VIEWS views either. It cannot have voted beyond them: whoever
      voted in view v had seen v - 1 end, and one of those who ended it is honest and among the
      greeters, so they know of the end of v - 2. It does not abstain when they know no more than
      the begin of an epoch before which it was not elected: a validator that joins would cost its
      first epoch that time. Nor when it is needed: when a view has lasted SILENT_SECONDS longer
      than it should, the chain is stuck without it.
  N7  Nothing is proposed on the last block of an epoch. In views after its notarization everybody
      votes on that same block again, until it is final and executed here; then this object is over
      and the next epoch has one of its own (`succession`).
  N8  Whoever is seen to contradict itself is accused on the chain, by everybody who saw it. Who
      votes for another block than the leader showed us is asked for it: a leader that shows two
      blocks shows nobody both.
  N9  A validator whose node is jailed in the executed state says Return when it votes to finalize:
      then it is at work, and not behind. Once an epoch, and again while it is still jailed
      RETURN_AGAIN heights later (N8, N9: `claims`).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import trio

from tdmld.chain.blocks import (
    EPOCH_VIEWS,
    Block,
    Certificate,
    Committee,
    Kind,
    Vote,
    block_hash,
    ends_epoch,
    sign_vote,
    start_view,
    turn,
    verify_certificate,
    verify_vote,
)
from tdmld.chain.consensus import (
    MAX_CERTIFICATES,
    MAX_DEPTH,
    Answer,
    CastVote,
    Certified,
    Conflict,
    Effect,
    EnterView,
    Finalized,
    Proposed,
    Simplex,
)
from tdmld.chain.crypto import KeyPair
from tdmld.chain.errors import ChainError
from tdmld.chain.genesis import protocol_at
from tdmld.chain.ledger import next_due
from tdmld.chain.pacing import Pacing, Propose, Repeat, Situation, TimeOut, Times
from tdmld.chain.pending import MAX_BLOCKS
from tdmld.node.admission import Admission
from tdmld.node.bodies import Bodies
from tdmld.node.chainlinks import Link, Links
from tdmld.node.chainwire import (
    BlockRequest,
    ConsensusMessage,
    Hello,
    Proposal,
    Transactions,
)
from tdmld.node.claims import Claims
from tdmld.node.finality import Finality
from tdmld.node.proposer import Position, build_block
from tdmld.node.store import AppliedBlock

log = logging.getLogger(__name__)

MAX_FUTURE_MS = 10_000
"""A block's time may be this far ahead of our clock; until then it waits (N4)."""
MAX_BACKLOG = 3
"""Final, unexecuted blocks above which nothing is proposed (N5)."""
ASK_AGAIN = 0.2
LOOK_AGAIN = 1.0
"""Bodies that wait for their time are judged again so often (N4)."""
ANSWER_PAUSE = 0.2
NEAR_VIEWS = 16
"""Proposals of views further ahead are not kept unless asked for."""
ABSTAIN_VIEWS = 4
SILENT_SECONDS = 30.0
EVER = 2**63
"""Beyond every view."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What waits to be signed for: `items` in the order in which they leave, the bodies of what is
    notarized, and the certificates that the votes rest on."""

    items: Sequence[Vote | Block]
    bodies: Sequence[Block]
    certificates: Sequence[Certificate]


class Validator:
    """One validator's part in one epoch; the head is the block before it or of it. `hint_sync` asks
    for catch-up; `now_ms` is the wall clock, `now` the monotonic one. Only `run` waits: whoever
    calls the other methods in its place has the same validator without tasks."""

    links: Links
    """Set by the service before `run`."""

    def __init__(
        self,
        key: KeyPair,
        committee: Committee,
        finality: Finality,
        admission: Admission,
        times: Times,
        *,
        now_ms: Callable[[], int],
        hint_sync: Callable[[int | None], None],
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        me = committee.index(key.public)
        if me is None:
            raise ValueError("this key does not validate")
        self.key, self._committee, self._me = key, committee, me
        self._finality, self._admission = finality, admission
        self._store = store = finality.store
        self._genesis = store.genesis
        self._now_ms, self._now = now_ms, now
        self._hint_sync = hint_sync
        store.bind(key.public)
        self._newborn = store.signer is None
        """Whether N6 still waits for greetings, and from whom they came."""
        self._greeted = {me}
        former = store.committee(committee.epoch - 1) if committee.epoch else None
        self._joins = former is None or former.index(key.public) is None
        self._late_since = 0.0
        self._seen_view = 0
        self._rotation = committee.rotation
        head, blocks = store.head, self._genesis.parameters.epoch_blocks
        self._epoch_blocks, self._sets = blocks, store.set_ids(committee.epoch)
        view = start_view(head.height, head.view, blocks)
        self.core = Simplex(committee.stakes, me, view, head.hash, store.votes())
        if self._newborn:
            self.core.silence(EVER)
        self._pacing = Pacing(times, now())
        self._bodies = Bodies(finality, committee, self._rotation, lambda: now_ms() + MAX_FUTURE_MS)
        self._proposed: set[int] = set()
        self._want: Finalized | None = None
        self._asked = -ASK_AGAIN
        self._claims = Claims(key, store, admission)
        self._outbox: list[Vote | Block] = []
        self._outbox_news = trio.Event()
        self._unstored: list[Certificate] = []
        """Certificates seen since the last batch was written; the next one takes them along."""
        self._wake = trio.Event()
        self._over = False
        self._due = next_due(store.get) is not None
        for block in store.bodies():
            self._bodies.tree.add(block, wanted=True)
            if block.header.proposer == key.public:
                self._proposed.add(block.header.view)
        finality.on_executed.append(self._executed)

    @property
    def view(self) -> int:
        return self.core.view

    def wake(self) -> None:
        """Something changed: look again at what is due."""
        self._wake.set()

    @property
    def epoch(self) -> int:
        return self._committee.epoch

    def close(self) -> None:
        """The epoch is over: follow nothing any more. Cancel `run` too; a task of it that was woken
        before runs once more, when the links are those of the next epoch already."""
        self._over = True
        self._finality.on_executed.remove(self._executed)

    def start(self) -> None:
        """Draw the conclusions of what is stored. Call once, before the first message comes."""
        self._act(self.core.start(self._store.view_certificates()))
        self._judge()
        self._speak_when_greeted()

    async def run(self) -> None:
        """Validate for ever. SignGuardError and StoreError end the node."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            nursery.start_soon(self._clock)
            nursery.start_soon(self._claims.run)

    # ---- effects -----------------------------------------------------------------------------

    def _act(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case CastVote(kind, view, block):
                    chain_id = self._committee.chain_id
                    self._post(sign_vote(self.key, chain_id, kind, view, block, self._me))
                    if kind is Kind.FINALIZE and self._finality.backlog <= MAX_BACKLOG:
                        self._claims.at_work()
                case Certified(certificate, forward):
                    self._unstored.append(certificate)
                    if forward:
                        self.links.broadcast(certificate)
                case EnterView(view, failed):
                    if not failed:
                        self._block_seen(view - 1)
                    self._pacing.enter(effect, self._now())
                case Finalized():
                    self._want = effect
                case Answer(voter):
                    self._help(voter)
                case Conflict(first, second):
                    self._claims.voted_twice(self._committee.nodes[first.voter], first, second)
        if effects:
            self._again()
            self._finish()
            self.wake()

    def _again(self) -> None:
        """N7: the block of this view is the last of the epoch, once that is notarized."""
        core = self.core
        tip = core.parent()
        if tip is None or tip.hash == self._finality.hash or tip.view <= core.final_view:
            return
        header = self._bodies.header(tip.hash)
        if header is not None and ends_epoch(header.height, self._epoch_blocks):
            again = Proposed(tip.view, tip.hash, True)
            if not core.knows(core.view, tip.hash):
                self._act(core.add_block(core.view, tip.hash, again))

    def _post(self, item: Vote | Block) -> None:
        self._outbox.append(item)
        self._outbox_news.set()

    def _help(self, voter: int) -> None:
        link, now = self.links.get(voter), self._now()
        if link is not None and now >= link.answered + ANSWER_PAUSE:
            link.answered = now
            for certificate in self.core.certificates():
                link.tell(certificate)

    def _finish(self) -> None:
        """Hand a finalized block and its ancestors on, as soon as the bodies are there (N3)."""
        want = self._want
        if want is None:
            return
        path = self._bodies.tree.path(want.hash)
        certificate = self.core.finalization(want.view)
        if path is None or certificate is None:
            return
        self._want = None
        if path:
            self._adopt(path, certificate)

    def adopt(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        """Take final blocks from sync or gossip; they follow the final head."""
        self._adopt(blocks, certificate)
        if self._want is not None and self._want.view <= certificate.view:
            self._want = None
        self._act(self.core.jump(certificate))
        self._finish()
        self._judge()
        self.wake()

    def _adopt(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        self._finality.advance(blocks, certificate)
        self._bodies.finalize(blocks)
        view = blocks[-1].header.view
        self._unstored = [known for known in self._unstored if known.view > view]
        self._proposed = {proposed for proposed in self._proposed if proposed > view}
        self._claims.forget(view)

    def _executed(self, applied: AppliedBlock) -> None:
        self._bodies.executed(applied)
        self._due = next_due(self._store.get) is not None
        self._judge()
        self.wake()

    # ---- the writer (N1) ---------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            while not self._outbox:
                self._outbox_news = trio.Event()
                await self._outbox_news.wait()
            batch = self._batch()
            kept = await trio.to_thread.run_sync(self._record, batch)
            self._publish(batch, kept)
            self._count(kept)

    def _batch(self) -> Batch:
        """All that waits; what comes while it is written waits for the next batch."""
        items, self._outbox = self._outbox, []
        certificates, self._unstored = self._unstored, []
        notarized = [
            item.hash for item in items if isinstance(item, Vote) and item.kind is Kind.NOTARIZE
        ]
        bodies = [
            body
            for key in notarized
            if (body := self._bodies.tree.get(key)) is not None and body not in items
        ]
        return Batch(items, bodies, certificates)

    def _record(self, batch: Batch) -> list[Vote]:
        """In a thread. The votes that may be sent."""
        votes = [item for item in batch.items if isinstance(item, Vote)]
        proposals = [item for item in batch.items if isinstance(item, Block)]
        return self._store.record(
            self.key.public, votes, proposals, batch.bodies, batch.certificates
        )

    def _publish(self, batch: Batch, kept: Sequence[Vote]) -> None:
        for item in batch.items:
            if isinstance(item, Block):
                if item.header.view > self.core.final_view:
                    self.links.broadcast(self._proposal(item))
            elif item in kept:
                self.links.broadcast(item)

    def _count(self, kept: Sequence[Vote]) -> None:
        """S9."""
        for vote in kept:
            self._act(self.core.add_vote(vote))

    def _proposal(self, block: Block) -> Proposal:
        """With what its voters may lack, while it is the current view's."""
        parent = self.core.parent() if block.header.view == self.core.view else None
        return Proposal(block, parent.why if parent is not None else ())

    # ---- messages ----------------------------------------------------------------------------

    def greet(self) -> Iterator[object]:
        """What a new link is told: height, certificates, own votes and proposals (N2)."""
        known = self.core.certificates()
        final = self._store.certificate(self._store.height)
        if final is not None and self.core.finalization(self.core.final_view) is None:
            known = (final, *known)
        yield Hello(self._finality.height, known[:MAX_CERTIFICATES])
        yield from known[MAX_CERTIFICATES:]
        for block in self._store.bodies():
            if block.header.view > self.core.final_view and (
                block.header.proposer == self.key.public
            ):
                yield self._proposal(block)
        yield from (vote for vote in self._store.votes() if vote.view > self.core.final_view)
        waiting = [transaction.raw for transaction in self._admission.select(())]
        for start in range(0, len(waiting), 16):
            yield Transactions(tuple(waiting[start : start + 16]))

    async def receive(self, link: Link, message: ConsensusMessage) -> None:
        """One message of a linked validator. Waits for nothing but the signatures of a block."""
        match message:
            case Vote():
                if self.core.wants_vote(message) and verify_vote(self._committee, message):
                    news = not self.core.heard(message.view)
                    self._act(self.core.add_vote(message))
                    if news:
                        self.wake()  # that somebody wants this view to end is demand (P3)
                    self._compare(link, message)
            case Certificate():
                self.certificate(message)
            case Proposal(block, why):
                for certificate in why:
                    self.certificate(certificate)
                await self._body(block)
            case Hello(height, certificates):
                for certificate in certificates:
                    self.certificate(certificate)
                if height > self._finality.height:
                    self._hint_sync(link.index)
                if link.index is not None:
                    self._greeted.add(link.index)
                self._speak_when_greeted()
            case BlockRequest(wanted):
                body = self._bodies.tree.get(wanted)
                if body is not None:
                    link.tell(Proposal(body, ()))
            case Transactions(raws):
                if link.index is not None:
                    self._admission.enqueue(raws, link.index)

    def certificate(self, certificate: Certificate) -> None:
        """A certificate from anybody; checked here."""
        if self.core.wants_certificate(certificate) and verify_certificate(
            self._committee, certificate
        ):
            self._act(self.core.add_certificate(certificate))

    # ---- a directory that never voted (N6) ---------------------------------------------------

    def _speak_when_greeted(self) -> None:
        if not self._newborn or self._committee.weight(self._greeted) < self._committee.quorum:
            return
        self._newborn = False
        view = self.core.view
        until = 0 if self._joins and turn(view) == 1 else view + ABSTAIN_VIEWS
        if until:
            log.warning(
                "this directory has no record of votes, but the chain is running: "
                "not voting until view %d, in case this key voted elsewhere",
                until,
            )
        self._act(self.core.silence(until))
        self.wake()  # perhaps it is our turn to lead

    def _speak_although_silent(self) -> None:
        view = self.core.view
        log.warning("the chain stands still in view %d: voting in it after all", view)
        self._newborn = False
        self._act(self.core.silence(view - 1))
        self._act(self.core.time_out(view))

    async def _body(self, block: Block) -> None:
        """Check a body as far as it can be checked alone, then keep it."""
        header, key = block.header, block_hash(block.header)
        wanted = key == self._missing()
        final = self._finality.header
        if header.height <= final.height or header.view <= final.view or key in self._bodies.tree:
            return
        if not wanted and header.view > self.core.view + NEAR_VIEWS:
            return
        try:
            unknown = self._bodies.check(block, self._admission.pool.__contains__, wanted=wanted)
        except ChainError as error:
            log.warning("a bad block of view %d: %s", header.view, error)
            return
        self._claims.led(header, block.signature)
        if not all(await self._admission.verified(unknown)):
            log.warning("view %d: a transaction in the block is not signed", header.view)
            return
        if len(self._bodies.tree) >= MAX_BLOCKS:
            self._bodies.make_room(self.core.view, self.core.notarized().values())
        if self._bodies.tree.add(block, wanted=wanted or key == self._missing()):
            self._finish()
            self._judge()
            self.wake()

    def _compare(self, link: Link, vote: Vote) -> None:
        """N8: has this voter been shown another block than we have?"""
        if (
            vote.kind is Kind.NOTARIZE
            and vote.hash not in self._bodies.tree  # N7: a last block, voted on again
            and self._claims.contradicts(vote.view, vote.hash)
        ):
            link.tell(BlockRequest(vote.hash))

    # ---- judging (N3, N4) --------------------------------------------------------------------

    def _judge(self) -> None:
        """Hand every block to the core whose parent, state and time are in order by now."""
        while (found := self._bodies.next_valid()) is not None:
            key, block = found
            header = block.header
            if header.view == self.core.view:
                self._block_seen(header.view)
            parent_view = max(header.parent_view, self.epoch * EPOCH_VIEWS)
            proposed = Proposed(parent_view, header.parent, not block.transactions)
            self._act(self.core.add_block(header.view, key, proposed))
        self._again()

    def _block_seen(self, view: int) -> None:
        """The block of a view puts the next one off by an interval (P2): once, whatever else its
        leader makes up for that view."""
        if view > self._seen_view:
            self._seen_view = view
            self._pacing.block_seen(self._now())

    def _missing(self) -> bytes | None:
        """The body that is needed most: of what is final, then of what is notarized."""
        wanted = () if self._want is None else (self._want.hash,)
        return self._bodies.missing(*wanted, self.core.tip[1])

    # ---- time --------------------------------------------------------------------------------

    async def _clock(self) -> None:
        while True:
            self._wake = trio.Event()
            deadline = self._tick()
            with trio.move_on_at(deadline):
                await self._wake.wait()

    def _tick(self) -> float:
        if self._over:
            return math.inf
        now, core = self._now(), self.core
        leader = self._rotation.leader(turn(core.view))
        connected = self.links.indices | {self._me}
        quorum = self._committee.weight(connected) >= self._committee.quorum
        actions, deadline = self._pacing.tick(
            now,
            Situation(
                view=core.view,
                leading=leader == self._me,
                may_propose=self._may_propose(),
                leader_connected=leader in connected,
                quorum_connected=quorum,
                work=self._work(),
                heard=core.heard(core.view),
                unfinalized_tip=core.tip[0] > core.final_view,
            ),
        )
        for action in actions:
            match action:
                case Propose(view):
                    self._propose(view)
                case TimeOut(view):
                    log.info("view %d took too long (leader %d)", view, leader)
                    self._late_since = now
                    self._act(core.time_out(view))
                case Repeat():
                    if core.view <= core.silent and now > self._late_since + SILENT_SECONDS:
                        self._speak_although_silent()
                    self._act(core.time_out(core.view))  # it may have fallen into a silence (N6)
                    votes, certificates = core.repeat()
                    for message in (*certificates, *votes):
                        self.links.broadcast(message)
        if self._ask(now):
            deadline = min(deadline, self._asked + ASK_AGAIN)
        if self._bodies.undecided:
            self._judge()
            deadline = min(deadline, now + LOOK_AGAIN)
        return deadline

    def _ask(self, now: float) -> bool:
        """Ask for a missing body (N3); whether one is missing."""
        missing = self._missing()
        if missing is None:
            return False
        if now >= self._asked + ASK_AGAIN:
            self._asked = now
            self.links.broadcast(BlockRequest(missing))
            self._hint_sync(None)
        return True

    def _work(self) -> bool:
        """P3: transactions, due entries, or a state root that no header commits yet."""
        tip, head = self.core.tip[1], self._store.head
        header = self._bodies.header(tip) or self._finality.header
        committed = header.state_root == head.state_root or self._finality.backlog > 0
        return self._due or not committed or self._admission.waiting(self._bodies.held(tip))

    def _may_propose(self) -> bool:
        return (
            self.core.may_propose()
            and self.core.view not in self._proposed
            and self._finality.backlog <= MAX_BACKLOG
        )

    def _propose(self, view: int) -> None:
        """Build, sign and post the block of `view` (N5)."""
        found, head = self.core.parent(), self._store.head
        if found is None or self._bodies.tree.path(found.hash) is None:
            return
        parent, mix = self._bodies.header(found.hash), self._bodies.mix(found.hash)
        history = self._store.history_root(head.height)
        if parent is None or mix is None or history is None or parent.state_height > head.height:
            return
        if ends_epoch(parent.height, self._epoch_blocks) and found.view > self.epoch * EPOCH_VIEWS:
            return
        full = self.core.depth >= MAX_DEPTH
        held = self._bodies.held(found.hash)
        body = [] if full else [item.raw for item in self._admission.select(held)]
        block = build_block(
            self.key,
            self._committee.chain_id,
            Position(view, parent, found.hash, mix),
            body,
            protocol=protocol_at(self._genesis, parent.height + 1),
            now_ms=self._now_ms(),
            state_height=head.height,
            history_root=history,
            state_root=head.state_root,
            sets=self._sets,
        )
        self._proposed.add(view)
        self._bodies.tree.add(block, wanted=True)
        self._post(block)
        self._judge()
