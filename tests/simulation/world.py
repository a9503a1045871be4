"""Time, network, faults, and the only source of randomness: one `Random`; a seed is a history.

Nothing happens by itself: a heap of (time, node, method, data) is worked off in order. A message
that arrives after its receiver died, or that crosses a partition, is lost.
"""

import heapq
import random
from collections.abc import Callable

from tdmld.chain.blocks import Committee, turn, view_epoch
from tdmld.chain.consensus import Simplex
from tdmld.chain.crypto import sha256
from tdmld.node.chainwire import Hello
from tdmld.node.succession import MAX_EARLY
from tests.simulation.attackers.named import ABSENT, ATTACKERS, TWINS
from tests.simulation.elections import Elections
from tests.simulation.facts import standing_in
from tests.simulation.invariants import Stuck, Watcher
from tests.simulation.node import Node
from tests.simulation.plan import Plan, random_plan

POINTS = ("boot", "persist", "send", "sending", "count", "final", "apply", "applied", "turn")
"""Where a process may die, besides between two events."""
CRASH_CHANCE = 0.4
WIPED_FROM = 3
"""The first view in which a validator that joins, at genesis or later, loses its directory. Before
it N6 cannot help: nobody need know more than the begin of the epoch, and a lost directory looks
like one that never was."""
MAX_EVENTS = 400_000
TABLE_LIMIT = 4000
"""Entries that a core may hold, however long it is attacked."""

Interference = Callable[[Node, Node, object], float | None]


class Crash(BaseException):
    """A process dies here."""


class World:
    """One schedule. `node` is the class of honest nodes: mutants replace it."""

    def __init__(self, plan: Plan, seed: int, node: type[Node] = Node) -> None:
        if not standing_in():
            raise RuntimeError("worlds live within stand_ins()")
        self.plan, self.rng = plan, random.Random(seed)
        self.now = 0.0
        self.calm = self.executed = False
        self.unsettled = False
        """Who wants links with whom has changed."""
        self.elections = Elections(plan)
        self.watcher = Watcher(self)
        self.timeouts = self.blocks_made = self.events = self.restarts = 0
        self.crash_points: dict[str, int] = {}
        self.doomed: dict[int, str] = {}
        self.unwiped = plan.wiped
        self.told: list[bytes] = []
        self.jailed: dict[int, int] = {}
        """Node -> the height at which it was jailed, for traces (N9)."""
        self.interfere: Interference | None = None
        """A trace's own network: seconds to hold a message back, None to lose it."""
        self._queue: list[tuple[float, int, Node | None, int, str, object]] = []
        self._serial = 0
        self._groups: dict[int, int] | None = None
        self.nodes: list[Node] = []
        self.follows = node.follows
        named = dict(plan.attackers)
        for number in range(len(plan.stakes)):
            strategy = named.get(number)
            cls = node if strategy in (None, TWINS, ABSENT) else Node
            one = cls(self, number, number, honest=strategy is None)
            if strategy in ATTACKERS:
                one.validator_type = ATTACKERS[strategy]
            self.nodes.append(one)
        for number, strategy in plan.attackers:
            if strategy == TWINS:
                self.nodes.append(node(self, len(self.nodes), number, honest=False))
        self._attackers = frozenset(named)
        for one in self.nodes:
            self._start(one)

    # ---- who -------------------------------------------------------------------------------

    def committee(self, epoch: int = 0) -> Committee:
        """Who validates an epoch that is decided."""
        return self.watcher.committee(epoch)

    def is_honest(self, number: int) -> bool:
        return number not in self._attackers

    def blame(self, node: Node) -> None:
        """A trace makes this one do what nobody honest does."""
        self._attackers |= {node.number}
        node.honest = False

    def leader(self, view: int) -> Node:
        """Who leads a view."""
        committee = self.committee(view_epoch(view))
        public = committee.nodes[committee.leader(view)]
        return next(node for node in self.nodes if node.key.public == public)

    def token(self) -> int:
        self._serial += 1
        return self._serial

    # ---- links -----------------------------------------------------------------------------

    def together(self, one: Node, other: Node) -> bool:
        return self._groups is None or self._groups[one.name] == self._groups[other.name]

    def connected(self, node: Node) -> list[Node]:
        """Every process with another key that is up on the same side."""
        return [
            n for n in self.nodes if n.up and n.number != node.number and self.together(n, node)
        ]

    def relink(self) -> None:
        """Links are as both sides want them. What is new is greeted, once all have theirs."""
        self.unsettled = False
        fresh: list[tuple[Node, Node]] = []
        met: list[tuple[Node, Node]] = []
        for node in self.nodes:
            if not node.up:
                continue
            found: dict[int, list[Node]] = {}
            peers = self.connected(node)
            for peer in peers:
                if node.links.wants(peer.peer) and peer.links.wants(node.peer):
                    found.setdefault(peer.number, []).append(peer)
            reached = {(p.name, p.life) for row in found.values() for p in row}
            if reached != node.reached:
                node.links.reach(found)
                fresh += [(node, p) for row in found.values() for p in row
                          if (p.name, p.life) not in node.reached]  # fmt: skip
                node.reached = reached
                node.wake()
            known = {(p.name, p.life) for p in peers}
            met += [(node, p) for p in peers if (p.name, p.life) not in node.met]
            node.met = known
        for node, peer in fresh:
            if node.up:
                self._guarded(node, "greet", peer)
        for node, peer in met:
            if node.up:
                self._guarded(node, "meet", peer)

    # ---- messages --------------------------------------------------------------------------

    def later(self, delay: float, node: Node, what: str, data: object) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (self.now + delay, self._serial, node, node.life, what, data))

    def transmit(self, source: Node, target: Node, message: object, hold: float = 0) -> None:
        """One message on its way: lost, late, twice, overtaken. A hello is not lost: it begins
        a link, and links deliver or end."""
        rng, plan = self.rng, self.plan
        if not target.up:
            return
        if self.interfere is not None:
            more = self.interfere(source, target, message)
            if more is None:
                return
            hold += more
        if self.calm:
            delay = 0.004 + 0.016 * rng.random()
        else:
            if plan.loss and rng.random() < plan.loss and not isinstance(message, Hello):
                return
            if plan.held_back and self.watcher.holds_back(message, plan.held_back):
                return
            delay = plan.delay * (0.2 + 0.8 * rng.random())
            if plan.slow and rng.random() < plan.slow:
                delay += 4 * rng.random()
            if plan.duplicate and rng.random() < plan.duplicate:
                self._arrive(delay * 2 + hold, source, target, message)
        self._arrive(delay + hold, source, target, message)

    def _arrive(self, delay: float, source: Node, target: Node, message: object) -> None:
        self._serial += 1
        heapq.heappush(
            self._queue,
            (self.now + delay, self._serial, target, target.life, "", (source, message)),
        )

    def send(self, source: Node, target: Node, message: object) -> None:
        """Beside the links."""
        if target.up and source.up and self.together(source, target):
            self.transmit(source, target, message)

    # ---- faults ----------------------------------------------------------------------------

    def point(self, node: Node, name: str) -> None:
        """A place in the code where a crash may fall."""
        if self.doomed.get(node.name) == name and self.rng.random() < CRASH_CHANCE:
            self.crash_points[name] = self.crash_points.get(name, 0) + 1
            raise Crash

    def crash(self, node: Node) -> None:
        self.doomed.pop(node.name, None)
        self.restarts += 1
        node.stop()
        part = node.validator
        late = part is None or turn(part.view) >= WIPED_FROM or not part._joins
        if self.unwiped == node.number and late and self.rng.random() < 0.7:
            self.unwiped = None
            node.disk.wipe()
        self.unsettled = True
        if node.gone:
            return
        self.later(0.2 + 3.8 * self.rng.random(), node, "boot", None)

    def _start(self, node: Node) -> None:
        try:
            node.boot()
        except Crash:
            self.crash(node)
        self.relink()

    def vanish(self, number: object) -> None:
        """One goes, and does not come back."""
        node = next(one for one in self.nodes if one.number == number)
        node.gone = True
        if node.up:
            self.crash(node)

    def partition(self, on: bool) -> None:
        if self.calm and on:
            return
        self._groups = {n.name: self.rng.randrange(2) for n in self.nodes} if on else None
        self.relink()

    def edge(self) -> None:
        """The last block of an epoch was notarized for the first time: what the plan has for it."""
        plan, rng = self.plan, self.rng
        if self.calm:
            return
        for _ in range(plan.edge_crashes):
            self._doom(rng.choice(self.nodes), rng.choice(POINTS[1:]))
        if rng.random() < plan.edge_partitions:
            begin = self.now + rng.uniform(0, 0.3)
            self._at(begin, "partition", True)
            self._at(begin + rng.uniform(0.5, 5), "partition", False)

    def _doom(self, node: Node, name: str) -> None:
        if node.up:
            self.doomed.setdefault(node.name, name)

    # ---- the run ---------------------------------------------------------------------------

    def submit(self, number: int) -> None:
        """A transaction reaches one node, which spreads it."""
        raw = b"transaction %d" % number
        self.told.append(raw)
        origin = self.rng.choice([node for node in self.nodes if node.honest])
        if origin.up:
            self._guarded(origin, "submitted", raw)

    def _at(self, time: float, what: str, data: object) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (time, self._serial, None, 0, what, data))

    def _schedule(self) -> None:
        plan, rng = self.plan, self.rng
        for number in range(plan.transactions):
            self._at(rng.uniform(0, plan.chaos), "submit", number)
        for _ in range(plan.partitions):
            begin = rng.uniform(0, plan.chaos)
            self._at(begin, "partition", True)
            self._at(begin + rng.uniform(0.5, 5), "partition", False)
        for _ in range(plan.crashes):
            self._at(rng.uniform(0, plan.chaos), "strike", None)
        for number, strategy in plan.attackers:
            if strategy == ABSENT:
                self._at(rng.uniform(0, plan.chaos), "vanish", number)

    def strike(self, _: object) -> None:
        """A third of the crashes fall between events, the others where the code says `point`."""
        victims = [node for node in self.nodes if node.up and node.name not in self.doomed]
        if self.unwiped is not None:
            victims = [node for node in victims if node.number == self.unwiped] or victims
        if self.calm or not victims:
            return
        victim = self.rng.choice(victims)
        name = self.rng.choice((*POINTS[1:], "at once", "boot", "at once", "at once"))
        if name in ("at once", "boot"):
            self.crash(victim)
        if name != "at once":
            self.doomed[victim.name] = name

    def step(self) -> None:
        self.now, _, node, life, what, data = heapq.heappop(self._queue)
        self.events += 1
        if node is None:
            getattr(self, what)(data)
        elif what == "boot":
            if not (node.up or node.gone):
                self._start(node)
        elif node.up and life == node.life:
            if not what:
                self._guarded(node, "on_message", *data)  # type: ignore[misc]
            else:
                self._guarded(node, what, data)
        self.settle(node)

    def _guarded(self, node: Node, what: str, *arguments: object) -> None:
        """The process runs, and may die while it does."""
        try:
            getattr(node, what)(*arguments)
            node.after()
        except Crash:
            self.crash(node)

    def settle(self, touched: Node | None) -> None:
        """Run the clocks of all who were woken."""
        if self.unsettled:
            self.relink()
            touched = None
        for node in self.nodes if touched is None else (touched,):
            if node.up and node.woken:
                self._guarded(node, "run_clock")
                if self.unsettled:
                    self.settle(None)

    def run_until(self, end: float) -> None:
        self.settle(None)
        while self._queue and self._queue[0][0] <= end:
            self.step()
        self.now = max(self.now, end)

    def heal(self) -> None:
        """The end of chaos: all up, all linked anew, prompt delivery, transactions told again."""
        self.calm = True
        self.doomed.clear()
        self._groups = None
        for node in self.nodes:
            if not node.up and not node.gone:
                node.boot()
            node.reached, node.met = set(), set()
        self.relink()
        for node in self.nodes:
            node.pool.enqueue(self.told, "")
        self.settle(None)

    def pending(self) -> bool:
        """Whether something that must become final everywhere is not."""
        top = len(self.watcher.ids)
        honest = [node for node in self.nodes if node.honest]
        if any(node.store.height < top for node in honest):
            return True
        told = set(map(sha256, self.told))
        return not all(told <= node.store.done for node in honest)

    def run(self) -> "World":
        """Chaos, then calm; raises Violation or Stuck."""
        self._schedule()
        self.run_until(self.plan.chaos)
        self.heal()
        number, end = len(self.told), self.now + self.plan.calm
        waiting = self.pending()
        while True:
            if self.executed:
                waiting, self.executed = self.pending(), False
            if waiting:
                if not self._queue or self._queue[0][0] > end or self.events > MAX_EVENTS:
                    views = [node.validator and node.core.view for node in self.nodes]
                    heights = [node.height for node in self.nodes]
                    raise Stuck(f"views {views}, heights {heights} at {self.now:.1f} s")
                self.step()
            elif len(self.watcher.ids) < self.plan.heights:
                self.submit(number)
                number += 1
                waiting = True
                self.settle(None)
            else:
                break
        self.check_bounds()
        return self

    def check_bounds(self) -> None:
        """S8, S10: a core keeps nothing below its final view, and not much above; and few early
        messages wait."""
        for node in self.nodes:
            if not node.honest:
                continue
            if any(len(rows) > MAX_EARLY for rows in node.succession._early.values()):
                raise Stuck(f"node {node.name} keeps too many early messages")
            if node.validator is not None:
                self._check_core(node, node.core)

    def _check_core(self, node: Node, core: Simplex) -> None:
        views = [key[1] for key in core._tallies] + [key[1] for key in core._first]
        views += [*core._nullified, *core._blocks, *core._heard, *core._notarized]
        if min(views, default=0) < core.final_view or len(views) > TABLE_LIMIT:
            raise Stuck(f"node {node.name} keeps {len(views)} entries from {min(views)}")


def run_seed(seed: int, node: type[Node] = Node, validators: int | None = None) -> World:
    """One random schedule."""
    return World(random_plan(seed, validators), seed + 1_000_000, node).run()
