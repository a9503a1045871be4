"""A seeded world around the consensus core: network, disk, clocks, crashes, attackers; one Random.

Nodes run the production `Simplex`, `Pacing` and `BlockTree`. The world keeps what must hold:
no two honest nodes finalize different blocks at a height, nobody honest signs against itself, and
after the world has calmed every transaction becomes final everywhere and the chain comes to rest.
"""

import heapq
import random
from dataclasses import dataclass, field, replace

from tdmld.chain.blocks import Block, Certificate, Header, Kind, Vote, block_hash
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import (
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
from tdmld.chain.leader import Rotation
from tdmld.chain.pacing import Pacing, Propose, Repeat, Situation, TimeOut, Times
from tdmld.chain.pending import BlockTree

GENESIS = bytes(31) + b"\x01"
NO_SIGNATURE = bytes(64)


class Violation(AssertionError):
    """Safety is broken."""


class Stuck(AssertionError):
    """Liveness is broken."""


@dataclass
class Plan:
    """One schedule. Probabilities are per message; times in seconds."""

    stakes: tuple[int, ...]
    twin: int | None = None
    gone: int | None = None
    """At the end of the chaos the power fails everywhere, and this one does not come back."""
    chaos: float = 15.0
    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.05
    slow: float = 0.0
    partitions: int = 0
    crashes: int = 0
    transactions: int = 6
    calm: float = 240.0
    times: Times = field(default_factory=lambda: Times(0.5, 2.0, 0.3, 30.0))
    rest: bool = True


def random_plan(rng: random.Random) -> Plan:
    """Everything that goes wrong, in random doses."""
    count = rng.randint(4, 7)
    stakes = tuple(rng.choice((1, 1, 1, 2, 3)) for _ in range(count))
    faulty = [i for i, stake in enumerate(stakes) if stake * 3 < sum(stakes)]
    return Plan(
        stakes,
        twin=rng.choice(faulty) if faulty and rng.random() < 0.5 else None,
        chaos=rng.uniform(4, 12),
        loss=rng.choice((0.0, 0.02, 0.2)),
        duplicate=rng.choice((0.0, 0.1)),
        delay=rng.choice((0.01, 0.05, 0.6)),
        slow=rng.choice((0.0, 0.1)),
        partitions=rng.randint(0, 2),
        crashes=rng.randint(0, 4),
        transactions=rng.randint(2, 6),
    )


@dataclass
class Disk:
    """A log whose tail is lost at a crash unless it was synced."""

    log: list[Vote | Block | Certificate | tuple[list[Block], Certificate]] = field(
        default_factory=list
    )
    synced: int = 0


class Node:
    """One validator process: the shell's duties, without their input and output."""

    simplex = Simplex

    def __init__(self, world: "World", name: int, index: int) -> None:
        self.world, self.name, self.index = world, name, index
        self.honest = True
        self.gone = False
        self.disk = Disk()
        self.pool: dict[bytes, None] = {}
        self.seed = 0
        self.up = False
        self.boot()

    # ---- start, crash ----------------------------------------------------------------------

    def stored_votes(self) -> list[Vote]:
        return [row for row in self.disk.log if isinstance(row, Vote)]

    def stored_certificates(self) -> list[Certificate]:
        return [row for row in self.disk.log if isinstance(row, Certificate)]

    def boot(self) -> None:
        self.up = True
        self.life = self.world.token()
        self.chain: list[Block] = []
        self.certificate: Certificate | None = None
        for row in self.disk.log:
            if isinstance(row, tuple):
                self.chain += row[0]
                self.certificate = row[1]
        head = self.chain[-1] if self.chain else None
        self.tree = BlockTree(
            len(self.chain),
            block_hash(head.header) if head else GENESIS,
            head.header.view if head else 0,
        )
        self.core = self.simplex(
            self.world.plan.stakes,
            self.index,
            head.header.view if head else 0,
            self.tree.head,
            self.stored_votes(),
        )
        self.pacing = Pacing(self.world.plan.times, self.world.now)
        self.outbox: list[Vote | Block] = []
        self.unstored: list[Certificate] = []
        self.writing = False
        self.want: tuple[int, bytes] | None = None
        self.asked = -9.0
        self.wake_at = 0.0
        self.proposed: set[int] = set()
        self.judged: set[bytes] = set()
        for row in self.disk.log:
            if isinstance(row, Block):
                self.tree.add(row)
                if self.world.leader(row.header.view) == self.index:
                    self.proposed.add(row.header.view)
        self.act(self.core.start(self.stored_certificates()))
        self.judge()
        self.tick()

    def crash(self) -> None:
        self.up = False
        keep = self.world.rng.randint(self.disk.synced, len(self.disk.log))
        del self.disk.log[keep:]
        self.disk.synced = len(self.disk.log)

    # ---- effects ---------------------------------------------------------------------------

    def act(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case CastVote(kind, view, block):
                    self.outbox.append(Vote(kind, view, block, self.index, NO_SIGNATURE))
                case Certified(certificate, forward):
                    self.unstored.append(certificate)
                    if forward:
                        self.world.broadcast(self, certificate)
                case EnterView():
                    self.pacing.enter(effect, self.world.now)
                case Finalized(view, block):
                    self.want = (view, block)
                case Answer(voter):
                    for certificate in self.core.certificates():
                        self.world.send(self, voter, certificate)
                case Conflict(first, _):
                    self.world.accused.add(first.voter)
        self.finish()
        self.write()

    def finish(self) -> None:
        """Turn a finalization into chain, as soon as the bodies are there."""
        if self.want is None:
            return
        view, block = self.want
        path = self.tree.path(block)
        if path is None:
            return
        self.want = None
        certificate = self.core.finalization(view)
        if path and certificate is not None:
            self.extend(path, certificate)

    def extend(self, path: list[Block], certificate: Certificate) -> None:
        self.disk.log.append((path, certificate))
        self.chain += path
        self.certificate = certificate
        header = path[-1].header
        self.tree.finalize(len(self.chain), block_hash(header), header.view)
        for body in path:
            for raw in body.transactions:
                self.pool.pop(raw, None)
        self.world.finalized(self)

    def write(self) -> None:
        if self.outbox and not self.writing:
            self.writing = True
            delay = self.world.rng.uniform(0.001, 0.01)
            self.world.later(delay, self, self.life, "written", len(self.outbox))

    def written(self, count: int) -> None:
        batch, self.outbox = self.outbox[:count], self.outbox[count:]
        self.writing = False
        self.disk.log += batch
        for vote in batch:
            body = self.tree.get(vote.hash) if isinstance(vote, Vote) else None
            if body is not None:
                self.disk.log.append(body)
        self.disk.log += self.unstored
        self.unstored = []
        self.disk.synced = len(self.disk.log)
        if self.world.crash_after_sync(self):
            return
        for row in batch:
            if isinstance(row, Vote):
                self.world.published(self, row)
            self.world.broadcast(self, row)
        for row in batch:
            if isinstance(row, Vote):
                self.act(self.core.add_vote(row))
        self.write()

    # ---- messages --------------------------------------------------------------------------

    def receive(self, source: int, message: object) -> None:
        match message:
            case Vote():
                if self.core.wants_vote(message):
                    self.act(self.core.add_vote(message))
            case Certificate():
                if self.core.wants_certificate(message):
                    self.act(self.core.add_certificate(message))
            case Block():
                wanted = message.header.height <= len(self.chain) + 8
                if self.tree.add(message, wanted=wanted):
                    self.finish()
            case ("hello", height):
                for certificate in self.core.certificates():
                    self.world.send_name(self, source, certificate)
                for vote in self.core.repeat()[0]:
                    self.world.send_name(self, source, vote)
                if height < len(self.chain):
                    self.receive(source, ("ask", height, ZERO_HASH))
            case ("ask", height, block):
                body = self.tree.get(block)
                if body is not None:
                    self.world.send_name(self, source, body)
                if height < len(self.chain):
                    rows = self.chain[height:]
                    self.world.send_name(self, source, ("blocks", rows, self.certificate))
            case ("blocks", rows, certificate):
                rows = [row for row in rows if row.header.height > len(self.chain)]
                if rows and rows[0].header.parent == self.tree.head:
                    self.extend(rows, certificate)
                    self.act(self.core.jump(certificate))
                    if self.want and self.want[0] <= certificate.view:
                        self.want = None
                    self.finish()
            case bytes():
                if not any(message in body.transactions for body in self.chain):
                    self.pool[message] = None
        self.judge()

    def judge(self) -> None:
        """Hand blocks whose parent is known to the core."""
        for key, body in self.tree.items():
            header = body.header
            if key in self.judged or not (
                header.parent in self.judged or header.parent == self.tree.head
            ):
                continue
            self.judged.add(key)
            self.pacing.block_seen(self.world.now)
            self.act(
                self.core.add_block(
                    header.view,
                    key,
                    Proposed(header.parent_view, header.parent, not body.transactions),
                )
            )

    # ---- time ------------------------------------------------------------------------------

    def work(self) -> bool:
        path = self.tree.path(self.core.tip[1]) or []
        held = {raw for body in path for raw in body.transactions}
        return any(raw not in held for raw in self.pool)

    def tick(self) -> None:
        world, core = self.world, self.core
        reachable = [n for n in world.nodes if n.up and world.connected(self, n)]
        voters = {n.index for n in reachable} | {self.index}
        leader = world.leader(core.view)
        actions, deadline = self.pacing.tick(
            world.now,
            Situation(
                core.view,
                leader == self.index,
                core.may_propose() and core.view not in self.proposed,
                leader in voters,
                sum(world.plan.stakes[i] for i in voters) >= core._quorum,
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
                    world.timeouts += 1
                    self.act(core.time_out(view))
                case Repeat():
                    votes, certificates = core.repeat()
                    for message in (*votes, *certificates):
                        world.broadcast(self, message)
        missing = self.tree.missing(core.tip[1])
        if (self.want or missing) and world.now >= self.asked + 0.2:
            self.asked = world.now
            block = self.tree.missing(self.want[1]) if self.want else missing
            world.broadcast(self, ("ask", len(self.chain), block))
        if self.want or missing:
            deadline = min(deadline, world.now + 0.2)
        deadline = max(deadline, world.now + 0.005)
        if self.wake_at <= world.now or deadline < self.wake_at:
            self.wake_at = deadline
            world.later(deadline - world.now, self, self.life, "wake", 0)

    def propose(self, view: int) -> None:
        parent = self.core.parent()
        path = self.tree.path(parent.hash) if parent else None
        if parent is None or path is None:
            return
        held = {raw for body in path for raw in body.transactions}
        body = tuple(raw for raw in self.pool if raw not in held)
        if self.core.depth >= 8:
            body = ()
        height = len(self.chain) + len(path) + 1
        self.seed += 1
        header = Header(
            0,
            height,
            view,
            parent.view,
            parent.hash,
            self.name * 1000 + self.seed,
            bytes(32),
            b"",
            ZERO_HASH,
            0,
            ZERO_HASH,
        )
        block = Block(header, NO_SIGNATURE, body)
        self.world.blocks_made += 1
        self.proposed.add(view)
        self.tree.add(block, wanted=True)
        self.outbox.append(block)
        for certificate in parent.why:
            self.world.broadcast(self, certificate)
        self.judge()
        self.write()


class World:
    """Owns time, the network, the faults and the only source of randomness."""

    def __init__(self, plan: Plan, seed: int, node: type[Node] = Node) -> None:
        self.plan, self.rng = plan, random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Node, int, str, object]] = []
        self._serial = 0
        self._rotation = Rotation(plan.stakes)
        self.accused: set[int] = set()
        self.timeouts = self.blocks_made = self.events = 0
        self.groups: dict[int, int] | None = None
        self.agreed: list[bytes] = []
        self.signed: dict[tuple[int, Kind, int], bytes] = {}
        self.nodes: list[Node] = []
        self.calm = False
        for name in range(len(plan.stakes)):
            self.nodes.append(node(self, name, name))
        if plan.twin is not None:
            self.nodes.append(node(self, len(plan.stakes), plan.twin))
            for twin in self.nodes:
                twin.honest = twin.index != plan.twin
        self._crashes = plan.crashes

    def token(self) -> int:
        self._serial += 1
        return self._serial

    def leader(self, view: int) -> int:
        return self._rotation.leader(view)

    # ---- network ---------------------------------------------------------------------------

    def connected(self, one: Node, other: Node) -> bool:
        if self.groups is None or one is other:
            return True
        return self.groups[one.name] == self.groups[other.name]

    def later(self, delay: float, node: Node, life: int, what: str, data: object) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (self.now + delay, self._serial, node, life, what, data))

    def _transmit(self, source: Node, target: Node, message: object) -> None:
        plan, rng = self.plan, self.rng
        if not target.up or not self.connected(source, target):
            return
        if not self.calm and plan.loss and rng.random() < plan.loss:
            return
        for _ in range(2 if not self.calm and rng.random() < plan.duplicate else 1):
            delay = rng.uniform(0.2, 1.0) * (0.02 if self.calm else plan.delay)
            if not self.calm and rng.random() < plan.slow:
                delay += rng.uniform(0, 4)
            self.later(delay, target, target.life, "message", (source.name, message))

    def broadcast(self, source: Node, message: object) -> None:
        for target in self.nodes:
            if target is not source:
                self._transmit(source, target, message)

    def send(self, source: Node, index: int, message: object) -> None:
        for target in self.nodes:
            if target.index == index and target is not source:
                self._transmit(source, target, message)

    def send_name(self, source: Node, name: int, message: object) -> None:
        self._transmit(source, self.nodes[name], message)

    # ---- what must hold --------------------------------------------------------------------

    def finalized(self, node: Node) -> None:
        if not node.honest:
            return
        for height, body in enumerate(node.chain):
            key = block_hash(body.header)
            if height == len(self.agreed):
                self.agreed.append(key)
            elif self.agreed[height] != key:
                raise Violation(f"two blocks final at height {height + 1}")

    def published(self, node: Node, vote: Vote) -> None:
        if not node.honest:
            return
        known = self.signed.setdefault((node.name, vote.kind, vote.view), vote.hash)
        both = (node.name, Kind.NULLIFY, vote.view), (node.name, Kind.FINALIZE, vote.view)
        if known != vote.hash or all(key in self.signed for key in both):
            raise Violation(f"node {node.name} signed against itself in view {vote.view}")

    # ---- faults ----------------------------------------------------------------------------

    def crash_after_sync(self, node: Node) -> bool:
        """The crash point between storing and sending."""
        if not self.calm and self._crashes and self.rng.random() < 0.02:
            self.stop(node)
            return True
        return False

    def stop(self, node: Node) -> None:
        self._crashes -= 1
        node.crash()
        self.later(self.rng.uniform(0.2, 4.0), node, node.life, "boot", None)

    def hello(self, node: Node) -> None:
        for other in self.nodes:
            if other is not node and other.up:
                self._transmit(node, other, ("hello", len(node.chain)))
                self._transmit(other, node, ("hello", len(other.chain)))

    def partition(self, on: bool) -> None:
        self.groups = {n.name: self.rng.randrange(2) for n in self.nodes} if on else None
        if not on:
            for node in self.nodes:
                if node.up:
                    self.hello(node)

    # ---- the run ---------------------------------------------------------------------------

    def submit(self, number: int) -> None:
        raw = b"tx%d" % number
        origin = self.rng.choice([node for node in self.nodes if node.honest])
        origin.pool[raw] = None
        self.broadcast(origin, raw)
        if origin.up:
            origin.tick()

    def _schedule(self) -> None:
        plan, rng = self.plan, self.rng
        nobody = self.nodes[0]
        for number in range(plan.transactions):
            self.later(rng.uniform(0, plan.chaos), nobody, -1, "submit", number)
        for _ in range(plan.partitions):
            begin = rng.uniform(0, plan.chaos)
            self.later(begin, nobody, -1, "partition", True)
            self.later(begin + rng.uniform(0.5, 5), nobody, -1, "partition", False)
        for _ in range(plan.crashes):
            self.later(rng.uniform(0, plan.chaos), nobody, -1, "crash", None)

    def step(self) -> None:
        self.now, _, node, life, what, data = heapq.heappop(self._queue)
        self.events += 1
        if node.gone:
            pass
        elif what == "submit":
            assert isinstance(data, int)
            self.submit(data)
        elif what == "partition":
            if not (data and self.calm):
                self.partition(bool(data))
        elif what == "crash":
            victim = self.rng.choice(self.nodes)
            if self._crashes > 0 and victim.up:
                self.stop(victim)
        elif what == "boot":
            if not node.up:
                node.boot()
                self.hello(node)
        elif node.up and life == node.life:
            if what == "message":
                source, message = data  # type: ignore[misc]
                node.receive(source, message)
            elif what == "written":
                assert isinstance(data, int)
                node.written(data)
            if node.up:
                node.tick()

    def run_until(self, end: float) -> None:
        while self._queue and self._queue[0][0] <= end:
            self.step()
        self.now = max(self.now, end)

    def pending(self) -> bool:
        want = {b"tx%d" % n for n in range(self.plan.transactions)}
        heads = set()
        for node in self.nodes:
            if node.honest and not node.gone:
                held = {raw for body in node.chain for raw in body.transactions}
                if want - held:
                    return True
                heads.add(node.tree.head)
        return len(heads) != 1

    def heal(self) -> None:
        """The end of chaos: all up, all connected, prompt delivery, transactions told again."""
        self.calm = True
        self.groups = None
        self._crashes = 0
        if self.plan.gone is not None:
            for node in self.nodes:
                node.gone = node.index == self.plan.gone
                if node.up:
                    node.crash()
        for node in self.nodes:
            if not node.up and not node.gone:
                node.boot()
        for node in self.nodes:
            self.hello(node)
        for number in range(self.plan.transactions):
            for node in self.nodes:
                if node.honest and not node.gone:
                    node.receive(node.name, b"tx%d" % number)
                    node.tick()

    def run(self) -> "World":
        """Chaos, then calm; raises Violation or Stuck."""
        self._schedule()
        self.run_until(self.plan.chaos)
        self.heal()
        end = self.now + self.plan.calm
        while self.pending():
            if not self._queue or self._queue[0][0] > end:
                raise Stuck(f"views {[n.core.view for n in self.nodes]} at {self.now:.1f} s")
            self.step()
        return self


def run_seed(seed: int, node: type[Node] = Node) -> World:
    """One random schedule."""
    plan = random_plan(random.Random(seed))
    return World(plan, seed + 1_000_000, node).run()


def run_power_failure(seed: int, node: type[Node] = Node) -> World:
    """One random schedule, at whose end all restart but one."""
    rng = random.Random(seed)
    plan = replace(random_plan(rng), twin=None, partitions=2, loss=0.2)
    total = sum(plan.stakes)
    weak = [i for i, stake in enumerate(plan.stakes) if stake * 3 < total]
    plan = replace(plan, gone=rng.choice(weak) if weak else None)
    return World(plan, seed + 1_000_000, node).run()
