"""One process: the product's succession of validators, with a directory, a pool, links and a clock
that are simulated. What is done here in the product's place is what its tasks do (write, execute,
wait for the time), catch-up and gossip; no decision of a validator is.

Messages are events; `world.point` is where a crash may fall.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdmld.chain.blocks import (
    Block,
    Certificate,
    Vote,
    check_finalization,
    ends_epoch,
    epoch_of,
    follows,
    start_view,
)
from tdmld.chain.consensus import Simplex
from tdmld.chain.crypto import sha256
from tdmld.chain.pacing import Pacing
from tdmld.chain.pending import BlockTree
from tdmld.node.chainservice import QUIET_SECONDS
from tdmld.node.chainwire import Announcement, Blocks, BlocksRequest, Transactions
from tdmld.node.finality import Finality
from tdmld.node.store import AppliedBlock
from tdmld.node.sync import PAUSE, ROUNDS, BadAnswer, SyncServer, check_blocks
from tdmld.node.validator import Batch
from tests.simulation.disk import Disk, Store
from tests.simulation.facts import Key, now, peer_of
from tests.simulation.invariants import Stuck, Violation
from tests.simulation.parts import Eyes, Pool, Terms, WatchedBodies, Wires

if TYPE_CHECKING:
    from tests.simulation.world import World

SYNC_BLOCKS = 16
MAX_SPIN = 200
"""Ticks in a row without time passing, above which the shell is said to spin."""


class Node:
    """A process; the classes of its parts are replaced by attackers and mutants."""

    simplex: type[Simplex] = Simplex
    pacing_type: type[Pacing] = Pacing
    tree_type: type[BlockTree] = BlockTree
    bodies_type: type[WatchedBodies] = WatchedBodies
    validator_type: type[Eyes] = Eyes
    succession_type: type[Terms] = Terms
    links_type: type[Wires] = Wires
    store_type: type[Store] = Store
    start_view = staticmethod(start_view)
    follows = staticmethod(follows)
    check_blocks = staticmethod(check_blocks)

    def __init__(self, world: "World", name: int, number: int, honest: bool = True) -> None:
        """`name` is the process, `number` its key: twins share one."""
        self.world, self.name, self.number, self.honest = world, name, number, honest
        self.key, self.peer = Key(number), peer_of(number)
        self.disk = Disk()
        self.up = self.gone = False
        self.hoard: list[object] = []
        """What an attacker keeps from epoch to epoch."""
        self.helps = True
        """Whether others get the blocks that they ask for."""
        plan = world.plan
        self.skew = plan.skews[number] if plan.skews else 0.0
        self._rate = plan.rates[number] if plan.rates else 1.0

    # ---- clocks ----------------------------------------------------------------------------

    def clock(self) -> float:
        """The monotonic clock: too fast or too slow."""
        return self.world.now * self._rate

    def now_ms(self) -> int:
        """The wall clock: wrong."""
        return int((2000 + self.world.now + self.skew) * 1000)

    # ---- start, crash ----------------------------------------------------------------------

    def boot(self) -> None:
        """A new process on the old directory."""
        world = self.world
        self.up, self.life = True, world.token()
        self.reached: set[tuple[int, int]] = set()
        """(name, life) of the processes that are linked, and of those that are connected."""
        self.met: set[tuple[int, int]] = set()
        self.writing = self.executing = self.turned = False
        self.running: Eyes | None = None
        """The validator whose tasks run: after a turn not at once."""
        self.timer = -1.0
        self.rounds = 0
        self.hints: list[str] = []
        self.heard_block = False
        self.store = self.store_type(self)
        self.finality = Finality(self.store)  # type: ignore[arg-type]
        self.server = SyncServer(self.store, None, None)  # type: ignore[arg-type]
        self.pool = Pool(self)
        self.finality.on_executed.append(self.pool.executed)
        self.finality.on_final.append(self.finalized)
        self.links = self.links_type(self)
        self.succession = self.succession_type(self)
        self.succession.seat(self.links)
        self.finality.on_executed.append(self.executed)
        world.point(self, "boot")
        self.succession.start()
        self.open(None)
        world.later(world.plan.times.heartbeat + QUIET_SECONDS, self, "listen", None)

    def stop(self) -> None:
        """The process dies, and the machine with it."""
        self.up = False
        self.disk.crash(self.world.rng)

    @property
    def validator(self) -> Eyes | None:
        """Our part in the present epoch."""
        return self.succession.validator  # type: ignore[return-value]

    @property
    def part(self) -> Eyes:
        """The same, of one that surely has a part."""
        assert self.validator is not None
        return self.validator

    @property
    def core(self) -> Simplex:
        return self.part.core

    @property
    def height(self) -> int:
        """The final height."""
        return self.finality.height

    # ---- what tasks do ---------------------------------------------------------------------

    def wake(self) -> None:
        if self.validator is not None:
            self.validator.wake()

    @property
    def woken(self) -> bool:
        validator = self.running
        return validator is not None and validator._wake.is_set()

    def after(self) -> None:
        """What became due while the process ran: for the tasks that wait for it."""
        validator = self.running
        if validator is not None:
            while validator._claims.pending:
                now(validator._claims.say_next())
            if validator._outbox and not self.writing:
                self.writing = True
                delay = 0.001 + 0.009 * self.world.rng.random()
                self.world.later(delay, self, "written", (validator, validator._batch()))
        if self.finality._queue and not self.executing:
            self.executing = True
            longest = self.world.plan.execution if not self.world.calm else 0.01
            self.world.later(self.world.rng.random() * longest, self, "execute", None)

    def written(self, data: tuple[Eyes, Batch]) -> None:
        """Store, send, count: in this order. What is being written when an epoch ends is sent."""
        validator, batch = data
        self.world.point(self, "persist")
        kept = validator._record(batch)
        validator._publish(batch, kept)
        validator._count(kept)
        self.writing = False
        if self.turned:
            self.open(None)

    def execute(self, _: object) -> None:
        """`Finality.run`."""
        self.world.point(self, "apply")
        applied = self.store.apply(*self.finality._queue[0])
        self.world.point(self, "applied")
        self.finality._queue.popleft()
        self.executing, self.world.executed = False, True
        self.finality._publish(applied)

    def open(self, _: object) -> None:
        """The tasks of the present epoch's validator begin."""
        self.turned = False
        self.running = self.validator
        now(self.succession.open())
        self.wake()

    def wake_up(self, at: float) -> None:
        if at == self.timer:
            self.wake()

    def run_clock(self) -> None:
        """Tick while something changes, then sleep until the deadline."""
        validator, spins, deadline = self.running, 0, self.world.now
        if validator is None:
            return
        while validator._wake.is_set():
            validator._wake = type(validator._wake)()
            deadline = validator._tick() / self._rate
            spins += 1
            if spins > MAX_SPIN:
                raise Stuck(f"node {self.name} spins")
        self.timer = max(deadline, self.world.now + 1e-6)
        self.world.later(self.timer - self.world.now, self, "wake_up", self.timer)

    # ---- finality --------------------------------------------------------------------------

    def finalized(self, blocks: Sequence[Block]) -> None:
        self.world.point(self, "final")
        for block in blocks:
            self.world.watcher.final(self, block)

    def executed(self, applied: AppliedBlock) -> None:
        """As `ChainService` does: tell followers, and begin the next epoch."""
        self.heard_block = True
        header = applied.block.header
        committee = self.succession.committee
        leads = committee.nodes[committee.leader(header.view + 1)]
        mine = self.validator is not None and self.key.public in (header.proposer, leads)
        if mine and applied.certificate is not None:
            self.announce(applied.block, applied.certificate)
        if ends_epoch(applied.height, self.world.plan.epoch_blocks):
            former, self.turned, self.running = self.validator, True, None
            self.succession.turn()
            if former is not None:
                self.ends(former)
            self.world.point(self, "turn")
            if not self.writing:
                self.world.later(0.0, self, "begin", None)

    def ends(self, former: Eyes) -> None:
        """Its clock was woken, and runs before it hears that it is cancelled."""
        try:
            over = former._tick() == math.inf
        except IndexError:  # it asks the new links for validators that its epoch does not have
            over = False
        if not over:
            raise Violation(f"node {self.name}: a validator acts after its epoch")

    def begin(self, _: object) -> None:
        if self.turned and not self.writing:
            self.open(None)

    # ---- messages --------------------------------------------------------------------------

    def on_message(self, source: "Node", message: object) -> None:
        """From a link, or beside it: catch-up, gossip, and what users submit."""
        match message:
            case BlocksRequest(start, count):
                if self.helps:
                    self.world.send(self, source, self.server.blocks(start, count))
            case Blocks():
                self.on_blocks(source, message)
            case Announcement():
                self.on_announcement(source, message)
            case _:
                link = self.links.of(source.number)
                if link is not None:
                    now(self.succession.receive(link, message))  # type: ignore[arg-type]
                elif isinstance(message, Transactions):
                    self.pool.enqueue(message.raws, source.peer)

    def submitted(self, raw: bytes) -> None:
        """A transaction of a user, to be spread."""
        self.pool.enqueue((raw,), "")
        for peer in self.world.connected(self):
            self.world.send(self, peer, Transactions((raw,)))

    def greet(self, process: "Node") -> None:
        """A new link."""
        for message in self.succession.greet():
            if isinstance(message, Vote):
                self.world.watcher.sent(self, message)
            self.world.transmit(self, process, message)
        self.wake()

    def meet(self, process: "Node") -> None:
        """A new connection."""
        if self.validator is None:
            self.hint(process.peer)

    # ---- gossip (`ChainService._heard`) ----------------------------------------------------

    def announce(self, block: Block, certificate: Certificate) -> None:
        notice = Announcement(block.header, block.signature, certificate, block.transactions)
        for peer in self.world.connected(self):
            self.world.send(self, peer, notice)

    def on_announcement(self, source: "Node", notice: Announcement) -> None:
        header, finality, committee = notice.header, self.finality, self.succession.committee
        if header.height <= finality.height:
            return
        epoch_blocks = self.world.plan.epoch_blocks
        if epoch_of(header.height, epoch_blocks) != committee.epoch:
            self.hint(source.peer)
        elif not check_finalization(committee, header, epoch_blocks, notice.certificate):
            return
        elif self.validator is not None:
            self.succession.certificate(notice.certificate)
        elif header.parent == finality.hash and notice.transactions is not None:
            block = Block(header, notice.signature, notice.transactions)
            self.succession.adopt([block], notice.certificate)
        else:
            self.hint(source.peer)

    def listen(self, _: object) -> None:
        """A follower that hears nothing asks."""
        if not self.heard_block and self.validator is None:
            self.hint(None)
        self.heard_block = False
        self.world.later(self.world.plan.times.heartbeat + QUIET_SECONDS, self, "listen", None)

    # ---- catch-up (`SyncClient`) -----------------------------------------------------------

    def hint(self, peer: str | None) -> None:
        """There may be final blocks above ours."""
        if peer is not None and len(self.hints) < 64:
            self.hints.append(peer)
        if not self.rounds:
            self.rounds = ROUNDS
            self.sync_round(None)

    def sync_round(self, _: object) -> None:
        """Ask the hinted peers first, everybody later, until nobody has more."""
        if not self.rounds:
            return
        self.rounds -= 1
        hinted, self.hints = self.hints, []
        for peer in self.world.connected(self):
            if not hinted or peer.peer in hinted:
                self.ask(peer)
        if self.rounds:
            self.world.later(PAUSE, self, "sync_round", None)

    def ask(self, peer: "Node") -> None:
        self.world.send(self, peer, BlocksRequest(self.height + 1, SYNC_BLOCKS))

    def on_blocks(self, source: "Node", answer: Blocks) -> None:
        epoch_blocks, finality = self.world.plan.epoch_blocks, self.finality
        if ends_epoch(finality.height, epoch_blocks) and finality.backlog:
            return  # only then is it known who validates; the next round asks again
        committee = self.store.committee(epoch_of(finality.height + 1, epoch_blocks))
        assert committee is not None
        try:
            found = self.check_blocks(
                committee, epoch_blocks, finality.height, finality.hash, answer
            )
        except BadAnswer:
            return
        if found is None:
            if answer.height <= self.height and not (self.hints or self.lacks_a_body()):
                self.rounds = 0
            return
        self.succession.adopt(*found)
        if answer.height > self.height:
            self.ask(source)

    def lacks_a_body(self) -> bool:
        return self.validator is not None and self.validator._missing() is not None

    def knows(self, raw: bytes) -> bool:
        """Whether a transaction is executed here."""
        return sha256(raw) in self.store.done
