"""Time, network, faults, and the only source of randomness: one `Random`; a seed is a history.

Nothing happens by itself: a heap of (time, node, method, data) is worked off in order. A message
that arrives after its receiver died, or that crosses a partition, is lost.
"""

import heapq
import random
from collections.abc import Callable

from tests.simulation.attackers.named import ATTACKERS, TWINS
from tests.simulation.facts import Electorate
from tests.simulation.invariants import Stuck, Watcher
from tests.simulation.node import Node
from tests.simulation.plan import Plan, random_plan

POINTS = ("boot", "persist", "send", "sending", "count", "final", "apply", "applied")
"""Where a process may die, besides between two events."""
CRASH_CHANCE = 0.4
WIPED_FROM = 3
"""The first view in which a directory is lost. Before it N6 cannot help: nobody need know more than
genesis, and a lost directory looks like a new chain."""
MAX_EVENTS = 400_000
TABLE_LIMIT = 4000
"""Entries that a core may hold, however long it is attacked."""

Interference = Callable[[Node, Node, str, object], float | None]


class Crash(BaseException):
    """A process dies here."""


class World:
    """One schedule. `node` is the class of honest nodes: mutants replace it."""

    def __init__(self, plan: Plan, seed: int, node: type[Node] = Node) -> None:
        self.plan, self.rng = plan, random.Random(seed)
        self.now = 0.0
        self.calm = False
        self._electorate = Electorate(plan.stakes)
        self.watcher = Watcher(self)
        self.accused: set[int] = set()
        self.timeouts = self.blocks_made = self.events = self.restarts = 0
        self.crash_points: dict[str, int] = {}
        self.doomed: dict[int, str] = {}
        self.unwiped = plan.wiped
        self.told: list[bytes] = []
        self.interfere: Interference | None = None
        """A trace's own network: seconds to hold a message back, None to lose it."""
        self._queue: list[tuple[float, int, Node | None, int, str, object]] = []
        self._serial = 0
        self._groups: dict[int, int] | None = None
        self._indices: dict[int, frozenset[int]] = {}
        self._peers: dict[int, list[Node]] = {}
        self.nodes: list[Node] = []
        named = dict(plan.attackers)
        self._attackers = frozenset(named)
        for index in range(len(plan.stakes)):
            strategy = named.get(index)
            cls = node if strategy is None else ATTACKERS.get(strategy, node)
            self.nodes.append(cls(self, index, index, honest=strategy is None))
        for index, strategy in plan.attackers:
            if strategy == TWINS:
                self.nodes.append(node(self, len(self.nodes), index, honest=False))
        for one in self.nodes:
            self._start(one)

    # ---- who -------------------------------------------------------------------------------

    def committee(self, height: int = 0) -> Electorate:
        """Who votes on `height`. One set for the whole chain as yet: a world with epochs answers
        by height here, and nodes and watcher ask only here."""
        return self._electorate

    def is_honest(self, index: int) -> bool:
        return index not in self._attackers

    def token(self) -> int:
        self._serial += 1
        return self._serial

    # ---- links -----------------------------------------------------------------------------

    def connected(self, one: Node, other: Node) -> bool:
        return self._groups is None or self._groups[one.name] == self._groups[other.name]

    def peers(self, node: Node) -> list[Node]:
        """Everybody who is linked with `node`."""
        known = self._peers.get(node.name)
        if known is None:
            known = [n for n in self.nodes if n.up and n is not node and self.connected(node, n)]
            self._peers[node.name] = known
        return known

    def indices(self, node: Node) -> frozenset[int]:
        """Validators linked with `node`, itself included."""
        known = self._indices.get(node.name)
        if known is None:
            known = frozenset([node.index, *(peer.index for peer in self.peers(node))])
            self._indices[node.name] = known
        return known

    def weight(self, indices: frozenset[int]) -> int:
        stakes = self._electorate.stakes
        return sum(stakes[i] for i in indices)

    def linked(self, node: Node, index: int) -> list[Node]:
        return [peer for peer in self.peers(node) if peer.index == index]

    def relink(self) -> None:
        """Links changed: everybody looks again."""
        self._peers.clear()
        self._indices.clear()
        for node in self.nodes:
            if node.up:
                node.woken = True

    # ---- messages --------------------------------------------------------------------------

    def later(self, delay: float, node: Node, what: str, data: object) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (self.now + delay, self._serial, node, node.life, what, data))

    def transmit(
        self, source: Node, target: Node, what: str, data: object, hold: float = 0
    ) -> None:
        """One message on its way: lost, late, twice, overtaken. A hello is not lost: it begins
        a link, and links deliver or end."""
        rng, plan = self.rng, self.plan
        if self.interfere is not None:
            more = self.interfere(source, target, what, data)
            if more is None:
                return
            hold += more
        if self.calm:
            delay = 0.004 + 0.016 * rng.random()
        else:
            if plan.loss and rng.random() < plan.loss and what != "on_hello":
                return
            delay = plan.delay * (0.2 + 0.8 * rng.random())
            if plan.slow and rng.random() < plan.slow:
                delay += 4 * rng.random()
            if plan.duplicate and rng.random() < plan.duplicate:
                self._arrive(delay * 2 + hold, source, target, what, data)
        self._arrive(delay + hold, source, target, what, data)

    def _arrive(self, delay: float, source: Node, target: Node, what: str, data: object) -> None:
        self._serial += 1
        heapq.heappush(
            self._queue,
            (self.now + delay, self._serial, target, target.life, what, (source.name, data)),
        )

    def broadcast(self, source: Node, what: str, data: object) -> None:
        for target in self.peers(source):
            if self.doomed:
                self.point(source, "sending")
            self.transmit(source, target, what, data)

    def send(self, source: Node, name: int, what: str, data: object) -> None:
        target = self.nodes[name]
        if target.up and source.up and self.connected(source, target):
            self.transmit(source, target, what, data)

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
        if self.unwiped == node.index and node.core.view >= WIPED_FROM and self.rng.random() < 0.7:
            self.unwiped = None
            node.disk.wipe()
        self.relink()
        self.later(0.2 + 3.8 * self.rng.random(), node, "boot", None)

    def _start(self, node: Node) -> None:
        try:
            node.boot()
        except Crash:
            self.crash(node)
            return
        self.relink()
        for peer in list(self.peers(node)):
            node.linked(peer)
            peer.linked(node)

    def partition(self, on: bool) -> None:
        groups = {n.name: self.rng.randrange(2) for n in self.nodes} if on else None
        if self.calm and on:
            return
        before, self._groups = self._groups, groups
        self.relink()
        for i, one in enumerate(self.nodes):
            for other in self.nodes[i + 1 :]:
                cut = before is not None and before[one.name] != before[other.name]
                if cut and one.up and other.up and self.connected(one, other):
                    one.linked(other)
                    other.linked(one)

    # ---- the run ---------------------------------------------------------------------------

    def submit(self, number: int) -> None:
        """A transaction reaches one node, which spreads it."""
        raw = b"transaction %d" % number
        self.told.append(raw)
        origin = self.rng.choice([node for node in self.nodes if node.honest])
        if origin.up:
            self._guarded(origin, "receive", raw)

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

    def strike(self, _: object) -> None:
        """A third of the crashes fall between events, the others where the code says `point`."""
        victims = [node for node in self.nodes if node.up and node.name not in self.doomed]
        if self.unwiped is not None:
            victims = [node for node in victims if node.index == self.unwiped] or victims
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
            if not node.up:
                self._start(node)
        elif node.up and life == node.life:
            arguments = data if what.startswith("on_") else (data,)
            self._guarded(node, what, *arguments)  # type: ignore[misc]
        self.settle(node)

    def _guarded(self, node: Node, what: str, *arguments: object) -> None:
        """The process runs, and may die while it does."""
        try:
            getattr(node, what)(*arguments)
        except Crash:
            self.crash(node)

    def settle(self, touched: Node | None) -> None:
        """Run the clocks of all who were woken."""
        for node in self.nodes if touched is None or touched.woken else ():
            if node.up and node.woken:
                self._guarded(node, "run_clock")

    def run_until(self, end: float) -> None:
        while self._queue and self._queue[0][0] <= end:
            self.step()
        self.now = max(self.now, end)

    def heal(self) -> None:
        """The end of chaos: all up, all linked, prompt delivery, transactions told again."""
        self.calm = True
        self.doomed.clear()
        self._groups = None
        self.relink()
        for node in self.nodes:
            if not node.up:
                node.boot()
        self.relink()
        for node in self.nodes:
            for peer in self.peers(node):
                node.linked(peer)
            for raw in self.told:
                node.on_transaction(node.name, raw)
        self.settle(None)

    def pending(self) -> bool:
        """Whether something that must become final everywhere is not."""
        honest = [node for node in self.nodes if node.honest]
        top = len(self.watcher.ids)
        if any(node.executed < top for node in honest):
            return True
        return any(raw not in node.done for node in honest for raw in self.told)

    def run(self) -> "World":
        """Chaos, then calm; raises Violation or Stuck."""
        self._schedule()
        self.settle(None)
        self.run_until(self.plan.chaos)
        self.heal()
        number, end = len(self.told), self.now + self.plan.calm
        while True:
            if self.pending():
                if not self._queue or self._queue[0][0] > end or self.events > MAX_EVENTS:
                    views = [node.core.view for node in self.nodes]
                    heights = [node.height for node in self.nodes]
                    raise Stuck(f"views {views}, heights {heights} at {self.now:.1f} s")
                self.step()
            elif len(self.watcher.ids) < self.plan.heights:
                self.submit(number)
                number += 1
                self.settle(None)
            else:
                break
        self.check_bounds()
        return self

    def check_bounds(self) -> None:
        """S8, S10: a core keeps nothing below its final view, and not much above."""
        for node in self.nodes:
            core = node.core
            views = [key[1] for key in core._tallies] + [key[1] for key in core._first]
            views += [*core._nullified, *core._blocks, *core._heard, *core._notarized]
            if node.honest and (
                min(views, default=0) < core.final_view or len(views) > TABLE_LIMIT
            ):
                raise Stuck(f"node {node.name} keeps {len(views)} entries from {min(views)}")


def run_seed(seed: int, node: type[Node] = Node, validators: int | None = None) -> World:
    """One random schedule."""
    return World(random_plan(seed, validators), seed + 1_000_000, node).run()
