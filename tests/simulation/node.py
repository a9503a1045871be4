"""One validator process: the shell's duties (N1 to N6) in the shell's order, without its input and
output. `tdmld/node/validator.py` is the original; core, pacing, block tree and rotation are the
product's own. Messages are calls of the `on_...` methods; `world.point` is where a crash may fall.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdmld.chain.blocks import Block, Certificate, Header, Kind, Vote, block_hash, check_child
from tdmld.chain.codec import ZERO_HASH
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
from tdmld.chain.errors import InvalidBlock
from tdmld.chain.pacing import Pacing, Propose, Repeat, Situation, TimeOut
from tdmld.chain.pending import MAX_BLOCKS, BlockTree
from tdmld.node.bodies import MAX_TRIES
from tdmld.node.validator import (
    ABSTAIN_VIEWS,
    ANSWER_PAUSE,
    ASK_AGAIN,
    EVER,
    LOOK_AGAIN,
    MAX_BACKLOG,
    MAX_FUTURE_MS,
    NEAR_VIEWS,
    SILENT_SECONDS,
)
from tests.simulation.disk import Applied, Disk, Signed
from tests.simulation.facts import GENESIS, body_root, next_root, public, signature
from tests.simulation.invariants import Stuck

if TYPE_CHECKING:
    from tests.simulation.world import World

SYNC_BLOCKS = 16
SYNC_ROUNDS = 6
SYNC_PAUSE = 0.5
MAX_SPIN = 200
"""Ticks in a row without time passing, above which the shell is said to spin."""
GENESIS_HEADER = Header(0, 0, 0, 0, GENESIS, 0, ZERO_HASH, b"", ZERO_HASH, 0, *[ZERO_HASH] * 4)


class Ignored(InvalidBlock):
    """Forged, or one block too many of its leader: no verdict on the block."""


class Node:
    """A validator; attackers and mutants are subclasses."""

    simplex: type[Simplex] = Simplex
    pacing_type: type[Pacing] = Pacing
    tree_type: type[BlockTree] = BlockTree

    def __init__(self, world: "World", name: int, index: int, honest: bool = True) -> None:
        self.world, self.name, self.index, self.honest = world, name, index, honest
        self.disk = Disk()
        self.pool: dict[bytes, None] = {}
        self.up = False
        plan = world.plan
        self._skew = plan.skews[index] if plan.skews else 0.0
        self._rate = plan.rates[index] if plan.rates else 1.0

    # ---- clocks ----------------------------------------------------------------------------

    def clock(self) -> float:
        """The monotonic clock: too fast or too slow."""
        return self.world.now * self._rate

    def now_ms(self) -> int:
        """The wall clock: wrong."""
        return int((1000 + self.world.now + self._skew) * 1000)

    # ---- start, crash ----------------------------------------------------------------------

    def stored_votes(self) -> list[Vote]:
        return self.disk.votes()

    def stored_certificates(self) -> list[Certificate]:
        return self.disk.view_certificates()

    def boot(self) -> None:
        """A new process on the old directory."""
        world, disk = self.world, self.disk
        self.up, self.life = True, world.token()
        self.queue: list[tuple[Block, Certificate | None]] = []
        self.chain: list[Applied] = disk.chain()
        self.roots = [ZERO_HASH, *(row.root for row in self.chain)]
        self.done = {raw for row in self.chain for raw in row.block.transactions}
        self.pool = {}
        header = self.chain[-1].block.header if self.chain else GENESIS_HEADER
        self.height = self.executed = header.height
        self.header, self.executed_header = header, header
        self.head = block_hash(header) if self.chain else GENESIS
        self.electorate = world.committee(self.height + 1)
        self.core = self.simplex(
            self.electorate.stakes, self.index, header.view, self.head, self.stored_votes()
        )
        now = self.clock()
        self.pacing = self.pacing_type(world.plan.times, now)
        self.tree = self.tree_type(self.height, self.head, header.view)
        self.valid = {self.head}
        self.undecided: dict[bytes, Block] = {}
        self.proposed: set[int] = set()
        self.outbox: list[Vote | Block] = []
        self.unstored: list[Certificate] = []
        self.writing = self.executing = False
        self.want: Finalized | None = None
        self.asked = -ASK_AGAIN
        self.seen_view = 0
        self.tries: dict[int, int] = {}
        self.answered: dict[int, float] = {}
        self.woken = True
        self.timer = 0.0
        self.syncing = 0
        self.newborn = not disk.signer
        self.greeted = {self.index}
        self.late_since = 0.0
        if self.newborn:
            self.core.silence(EVER)
        for block in disk.bodies():
            self.keep(block, True)
            if block.header.proposer == public(self.index):
                self.proposed.add(block.header.view)
        world.point(self, "boot")
        self.act(self.core.start(self.stored_certificates()))
        self.judge()
        self.speak_when_greeted()

    def stop(self) -> None:
        """The process dies, and the machine with it."""
        self.up = False
        self.disk.crash(self.world.rng)

    # ---- sending ---------------------------------------------------------------------------

    def say(self, what: str, data: object) -> None:
        """To every linked validator."""
        self.world.broadcast(self, what, data)

    def tell(self, name: int, what: str, data: object) -> None:
        """To one node."""
        self.world.send(self, name, what, data)

    def say_vote(self, vote: Vote) -> None:
        self.world.watcher.sent(self, vote)
        self.say("on_vote", vote)

    def say_proposal(self, block: Block) -> None:
        """With what its voters may lack, while it is the current view's."""
        parent = self.core.parent() if block.header.view == self.core.view else None
        self.say("on_proposal", (block, parent.why if parent is not None else ()))

    # ---- effects ---------------------------------------------------------------------------

    def act(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case CastVote(kind, view, block):
                    self.world.watcher.cast(self, kind, view)
                    self.post(Vote(kind, view, block, self.index, signature(self.index)))
                case Certified(certificate, forward):
                    self.world.watcher.certified(self, certificate)
                    self.unstored.append(certificate)
                    if forward:
                        self.say("on_certificate", certificate)
                case EnterView(view, failed):
                    if not failed:
                        self.block_seen(view - 1)
                    self.pacing.enter(effect, self.clock())
                case Finalized():
                    self.want = effect
                case Answer(voter):
                    self.help(voter)
                case Conflict(first, _):
                    self.world.accused.add(first.voter)
        if effects:
            self.finish()
            self.woken = True

    def post(self, item: Vote | Block) -> None:
        self.outbox.append(item)
        self.write()

    def help(self, voter: int) -> None:
        now = self.clock()
        if now >= self.answered.get(voter, -ANSWER_PAUSE) + ANSWER_PAUSE:
            self.answered[voter] = now
            for peer in self.world.linked(self, voter):
                for certificate in self.core.certificates():
                    self.tell(peer.name, "on_certificate", certificate)

    def finish(self) -> None:
        """Hand a finalized block and its ancestors on, as soon as the bodies are there (N3)."""
        want = self.want
        if want is None:
            return
        path = self.tree.path(want.hash)
        certificate = self.core.finalization(want.view)
        if path is None or certificate is None:
            return
        self.want = None
        if path:
            self.extend(path, certificate)

    def adopt(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        """Final blocks from sync."""
        self.extend(blocks, certificate)
        if self.want is not None and self.want.view <= certificate.view:
            self.want = None
        self.act(self.core.jump(certificate))
        self.finish()
        self.judge()
        self.woken = True

    def extend(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        """The final head moves; execution follows."""
        self.world.point(self, "final")
        for block in blocks:
            assert block.header.parent == self.head, "final blocks must follow the head"
            self.height, self.header = block.header.height, block.header
            self.head = block_hash(block.header)
            self.done.update(block.transactions)
            for raw in block.transactions:
                self.pool.pop(raw, None)
            self.queue.append((block, certificate if block is blocks[-1] else None))
            self.world.watcher.final(self, self.height, block)
        view = self.header.view
        self.tree.finalize(self.height, self.head, view)
        self.forget()
        self.proposed = {made for made in self.proposed if made > view}
        self.unstored = [known for known in self.unstored if known.view > view]
        self.tries = {tried: tries for tried, tries in self.tries.items() if tried > view}
        self.run_queue()

    def forget(self) -> None:
        """What the tree holds no more."""
        tree = self.tree
        self.valid = {key for key in self.valid if key in tree or key == self.head}
        self.undecided = {key: b for key, b in self.undecided.items() if key in tree}

    # ---- execution -------------------------------------------------------------------------

    @property
    def backlog(self) -> int:
        return self.height - self.executed

    def run_queue(self) -> None:
        if self.queue and not self.executing:
            self.executing = True
            longest = self.world.plan.execution if not self.world.calm else 0.01
            self.world.later(self.world.rng.random() * longest, self, "execute", None)

    def execute(self, _: object) -> None:
        self.world.point(self, "apply")
        block, certificate = self.queue.pop(0)
        key = block_hash(block.header)
        row = Applied(block, certificate, next_root(self.roots[-1], key, block.transactions))
        self.disk.apply(row)
        self.world.point(self, "applied")
        self.chain.append(row)
        self.roots.append(row.root)
        self.executed, self.executed_header = block.header.height, block.header
        self.executing = False
        if key == self.head:
            self.valid.add(key)
        self.judge()
        self.woken = True
        self.run_queue()

    # ---- the writer (N1) -------------------------------------------------------------------

    def write(self) -> None:
        """One thread writes all that waits; what comes meanwhile waits for the next batch."""
        if not self.outbox or self.writing:
            return
        self.writing = True
        batch, self.outbox = self.outbox, []
        certificates, self.unstored = self.unstored, []
        votes = [item for item in batch if isinstance(item, Vote)]
        proposals = [item for item in batch if isinstance(item, Block)]
        notarized = [vote.hash for vote in votes if vote.kind is Kind.NOTARIZE]
        bodies = [
            body
            for key in notarized
            if (body := self.tree.get(key)) is not None and body not in proposals
        ]
        signed = Signed(tuple(votes), tuple(proposals), tuple(bodies), tuple(certificates))
        delay = 0.001 + 0.009 * self.world.rng.random()
        self.world.later(delay, self, "written", (batch, signed))

    def written(self, data: tuple[list[Vote | Block], Signed]) -> None:
        """Store, send, count: in this order."""
        batch, signed = data
        self.world.point(self, "persist")
        kept = self.record(signed)
        self.world.point(self, "send")
        self.publish(batch, kept)
        self.world.point(self, "count")
        for vote in kept:
            self.act(self.core.add_vote(vote))
        self.writing = False
        self.write()

    def record(self, signed: Signed) -> Sequence[Vote]:
        kept = self.disk.record(signed) if self.honest else signed.votes
        for block in signed.proposals:
            self.world.watcher.proposed(self, block)
        for vote in kept:
            self.world.watcher.stored(self, vote)
        return kept

    def publish(self, batch: Sequence[Vote | Block], kept: Sequence[Vote]) -> None:
        for item in batch:
            if isinstance(item, Block):
                if item.header.view > self.core.final_view:
                    self.say_proposal(item)
            elif item in kept:
                self.say_vote(item)

    # ---- messages --------------------------------------------------------------------------

    def linked(self, peer: "Node") -> None:
        """A link to `peer` begins: hello, then stored votes and proposals (N2)."""
        known = self.core.certificates()
        final = self.chain[-1].certificate if self.chain else None
        if final is not None and self.core.finalization(self.core.final_view) is None:
            known = (final, *known)
        self.tell(peer.name, "on_hello", (self.height, known[:MAX_CERTIFICATES]))
        for certificate in known[MAX_CERTIFICATES:]:
            self.tell(peer.name, "on_certificate", certificate)
        for block in self.disk.proposals():
            if block.header.view > self.core.final_view:
                parent = self.core.parent() if block.header.view == self.core.view else None
                why = parent.why if parent is not None else ()
                self.tell(peer.name, "on_proposal", (block, why))
        for vote in self.disk.votes():
            self.world.watcher.sent(self, vote)
            self.tell(peer.name, "on_vote", vote)
        for raw in self.pool:
            self.tell(peer.name, "on_transaction", raw)
        self.woken = True

    def genuine(self, vote: Vote) -> bool:
        return vote.signature == signature(vote.voter) and (vote.kind is Kind.NULLIFY) == (
            vote.hash == ZERO_HASH
        )

    def on_vote(self, _: int, vote: Vote) -> None:
        if self.core.wants_vote(vote) and self.genuine(vote):
            news = not self.core.heard(vote.view)
            self.act(self.core.add_vote(vote))
            self.woken |= news

    def on_certificate(self, _: int, certificate: Certificate) -> None:
        if self.core.wants_certificate(certificate) and self.holds(certificate):
            self.act(self.core.add_certificate(certificate))

    def holds(self, certificate: Certificate) -> bool:
        """`verify_certificate`."""
        voters = [voter for voter, _ in certificate.signatures]
        stakes = self.electorate.stakes
        return (
            voters == sorted(set(voters))
            and sum(stakes[voter] for voter in voters) >= self.core._quorum
            and all(mark == signature(voter) for voter, mark in certificate.signatures)
        )

    def on_proposal(self, source: int, data: tuple[Block, tuple[Certificate, ...]]) -> None:
        block, why = data
        for certificate in why:
            self.on_certificate(source, certificate)
        header, key = block.header, block_hash(block.header)
        wanted = key == self.missing()
        if header.height <= self.height or header.view <= self.header.view or key in self.tree:
            return
        if not wanted and header.view > self.core.view + NEAR_VIEWS:
            return
        try:
            self.check(block, wanted)
        except Ignored:
            return
        except InvalidBlock as error:
            self.world.watcher.rejected(self, header, str(error))
            return
        if len(self.tree) >= MAX_BLOCKS:
            self.tree.make_room(self.core.view, self.core.notarized().values())
            self.forget()
        if self.keep(block, wanted):
            self.finish()
            self.judge()
            self.woken = True

    def keep(self, block: Block, wanted: bool) -> bool:
        if not self.tree.add(block, wanted=wanted):
            return False
        self.undecided[block_hash(block.header)] = block
        return True

    def check(self, block: Block, wanted: bool) -> None:
        """`check_block`; of one view only a few bodies are looked at."""
        header = block.header
        if block.signature != signature(int.from_bytes(header.proposer, "big")):
            raise Ignored("the leader's signature does not verify")
        if header.proposer != public(self.electorate.rotation.leader(header.view)):
            raise InvalidBlock("not the leader's")
        tries = self.tries.get(header.view, 0)
        if not wanted and tries >= MAX_TRIES:
            raise Ignored("its leader has made up enough blocks for this view")
        self.tries[header.view] = tries + 1
        if header.view <= header.parent_view:
            raise InvalidBlock("not after its parent")
        if header.state_height >= header.height:
            raise InvalidBlock("state not below")
        if body_root(block.transactions) != header.tx_root:
            raise InvalidBlock("another body")

    def on_hello(self, source: int, data: tuple[int, tuple[Certificate, ...]]) -> None:
        height, certificates = data
        for certificate in certificates:
            self.on_certificate(source, certificate)
        if height > self.height:
            self.sync(source)
        self.greeted.add(self.world.nodes[source].index)
        self.speak_when_greeted()

    def on_transaction(self, _: int, raw: bytes) -> None:
        if raw not in self.done and raw not in self.pool:
            self.pool[raw] = None
            self.woken = True

    def receive(self, raw: bytes) -> None:
        """A transaction of a user, to be spread."""
        self.on_transaction(self.name, raw)
        self.say("on_transaction", raw)

    def on_request(self, source: int, key: bytes) -> None:
        block = self.tree.get(key)
        if block is not None:
            self.tell(source, "on_proposal", (block, ()))

    # ---- sync ------------------------------------------------------------------------------

    def sync(self, source: int | None) -> None:
        """A hint that there may be final blocks above ours."""
        if not self.syncing:
            self.syncing = SYNC_ROUNDS
            self.sync_round(source)

    def sync_round(self, source: int | None) -> None:
        """Ask the hinted peer first, everybody later, until nobody has more."""
        if not self.syncing:
            return
        self.syncing -= 1
        if source is not None:
            self.tell(source, "on_blocks_request", self.height + 1)
        else:
            self.say("on_blocks_request", self.height + 1)
        if self.syncing:
            self.world.later(SYNC_PAUSE, self, "sync_round", None)

    def on_blocks_request(self, source: int, start: int) -> None:
        found = self.chain[start - 1 : start - 1 + SYNC_BLOCKS]
        while found and found[-1].certificate is None:
            found.pop()
        self.tell(source, "on_blocks", (self.executed, [row.block for row in found], found))

    def on_blocks(self, source: int, data: tuple[int, list[Block], list[Applied]]) -> None:
        top, blocks, rows = data
        fresh = [block for block in blocks if block.header.height > self.height]
        if not fresh:
            if top <= self.height and not self.missing():
                self.syncing = 0
            return
        certificate = rows[-1].certificate
        head, height = self.head, self.height
        for block in fresh:
            height += 1
            if block.header.parent != head or block.header.height != height:
                return
            head = block_hash(block.header)
        if (
            certificate is None
            or certificate.kind is not Kind.FINALIZE
            or certificate.hash != head
            or certificate.view != fresh[-1].header.view
            or not self.holds(certificate)
        ):
            return
        self.adopt(fresh, certificate)
        if top > self.height:
            self.tell(source, "on_blocks_request", self.height + 1)

    # ---- a directory that never voted (N6) -------------------------------------------------

    def speak_when_greeted(self) -> None:
        stakes = self.electorate.stakes
        if not self.newborn or sum(stakes[i] for i in self.greeted) < self.electorate.quorum:
            return
        self.newborn = False
        view = self.core.view
        self.act(self.core.silence(0 if view == 1 else view + ABSTAIN_VIEWS))

    def speak_although_silent(self) -> None:
        view = self.core.view
        self.newborn = False
        self.act(self.core.silence(view - 1))
        self.act(self.core.time_out(view))

    # ---- judging (N3, N4) ------------------------------------------------------------------

    def judge(self) -> None:
        """Hand every block to the core whose parent, state and time are in order by now."""
        found = True
        while found:
            found = False
            for key, block in list(self.undecided.items()):
                header = block.header
                try:
                    fine = self.verdict(header)
                except InvalidBlock as error:
                    self.world.watcher.rejected(self, header, str(error))
                    del self.undecided[key]
                    continue
                if fine:
                    del self.undecided[key]
                    self.valid.add(key)
                    self.world.watcher.notarizable(self, header)
                    if header.view == self.core.view:
                        self.block_seen(header.view)
                    proposed = Proposed(header.parent_view, header.parent, not block.transactions)
                    self.act(self.core.add_block(header.view, key, proposed))
                    found = True
                    break

    def block_seen(self, view: int) -> None:
        """Once a view, whatever else its leader makes up (P2)."""
        if view > self.seen_view:
            self.seen_view = view
            self.pacing.block_seen(self.clock())

    def header_of(self, key: bytes) -> Header | None:
        if key == self.head:
            return self.header
        block = self.tree.get(key)
        return None if block is None else block.header

    def root_at(self, height: int) -> bytes | None:
        return self.roots[height] if height <= self.executed else None

    def verdict(self, header: Header) -> bool:
        """Whether the block may be notarized; raises InvalidBlock when it never may."""
        parent = self.header_of(header.parent)
        if parent is None or header.parent not in self.valid:
            return False
        check_child(parent, header.parent, header, 1_000_000)
        root = self.root_at(header.state_height)
        if root is None or header.time_ms > self.now_ms() + MAX_FUTURE_MS:
            return False
        if root != header.state_root:
            raise InvalidBlock("the state root is another one here")
        return True

    def missing(self) -> bytes | None:
        """The body that is needed most: of what is final, then of what is notarized."""
        wanted = (self.core.tip[1],) if self.want is None else (self.want.hash, self.core.tip[1])
        for key in wanted:
            lacking = None if key == self.head else self.tree.missing(key)
            if lacking is not None:
                return lacking
        return None

    # ---- time ------------------------------------------------------------------------------

    def wake_up(self, at: float) -> None:
        if at == self.timer:
            self.woken = True

    def run_clock(self) -> None:
        """Tick while something changes, then sleep until the deadline."""
        spins = 0
        while self.woken:
            self.woken = False
            deadline = self.tick() / self._rate
            spins += 1
            if spins > MAX_SPIN:
                raise Stuck(f"node {self.name} spins")
        self.timer = max(deadline, self.world.now + 1e-6)
        self.world.later(self.timer - self.world.now, self, "wake_up", self.timer)

    def tick(self) -> float:
        now, core = self.clock(), self.core
        leader = self.electorate.rotation.leader(core.view)
        connected = self.world.indices(self)
        actions, deadline = self.pacing.tick(
            now,
            Situation(
                core.view,
                leader == self.index,
                self.may_propose(),
                leader in connected,
                self.world.weight(connected) >= self.electorate.quorum,
                self.work(),
                core.heard(core.view),
                core.tip[0] > core.final_view,
            ),
        )
        for action in actions:
            match action:
                case Propose(view):
                    self.propose(view)
                case TimeOut(view):
                    self.world.timeouts += 1
                    self.late_since = now
                    self.act(core.time_out(view))
                case Repeat():
                    if core.view <= core.silent and now > self.late_since + SILENT_SECONDS:
                        self.speak_although_silent()
                    self.make_up(core.view)
                    self.repeat()
        if self.ask(now):
            deadline = min(deadline, self.asked + ASK_AGAIN)
        if self.undecided:
            self.judge()
            deadline = min(deadline, now + LOOK_AGAIN)
        return deadline

    def make_up(self, view: int) -> None:
        """A time-out may have fallen into a silence (N6)."""
        self.act(self.core.time_out(view))

    def repeat(self) -> None:
        votes, certificates = self.core.repeat()
        for certificate in certificates:
            self.say("on_certificate", certificate)
        for vote in votes:
            self.say_vote(vote)

    def ask(self, now: float) -> bool:
        """Ask for a missing body (N3); whether one is missing."""
        missing = self.missing()
        if missing is None:
            return False
        if now >= self.asked + ASK_AGAIN:
            self.asked = now
            self.say("on_request", missing)
            self.sync(None)
        return True

    def held(self, tip: bytes) -> set[bytes]:
        return {raw for block in self.tree.path(tip) or () for raw in block.transactions}

    def work(self) -> bool:
        """P3: transactions, or a state root that no header commits yet."""
        tip = self.core.tip[1]
        header = self.header_of(tip) or self.header
        if header.state_root != self.roots[-1] and self.backlog == 0:
            return True
        if not self.pool:
            return False
        held = self.held(tip)
        return any(raw not in held for raw in self.pool)

    def may_propose(self) -> bool:
        return (
            self.core.may_propose()
            and self.core.view not in self.proposed
            and self.backlog <= MAX_BACKLOG
        )

    def build(self, view: int) -> Block | None:
        """The block of `view` (N5)."""
        found = self.core.parent()
        if found is None or self.tree.path(found.hash) is None:
            return None
        parent = self.header_of(found.hash)
        if parent is None or found.hash not in self.valid:
            return None
        if parent.state_height > self.executed:
            return None
        held = self.held(found.hash)
        full = self.core.depth >= MAX_DEPTH
        body = () if full else tuple(raw for raw in self.pool if raw not in held)
        return self.make(view, parent, found.hash, body)

    def make(self, view: int, parent: Header, parent_hash: bytes, body: tuple[bytes, ...]) -> Block:
        header = Header(
            0,
            parent.height + 1,
            view,
            parent.view,
            parent_hash,
            max(parent.time_ms + 1, self.now_ms()),
            public(self.index),
            b"",
            body_root(body),
            self.executed,
            ZERO_HASH,
            self.roots[-1],
            ZERO_HASH,
            ZERO_HASH,
        )
        return Block(header, signature(self.index), body)

    def propose(self, view: int) -> None:
        block = self.build(view)
        if block is None:
            return
        self.world.watcher.proposing(self, block)
        self.world.blocks_made += 1
        self.proposed.add(view)
        self.keep(block, True)
        self.post(block)
        self.judge()
