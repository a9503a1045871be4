"""N1 to N6, N8, N9: what the shell owes, in an epoch."""

from tdmld.chain.blocks import Block, Certificate, Kind
from tdmld.chain.pacing import Times
from tdmld.node.chainwire import Blocks, Hello, Proposal
from tdmld.node.proposer import Position
from tests.simulation.attackers.faces import TwoFaces
from tests.simulation.directed.base import (
    GREETED,
    NodeType,
    block_on,
    counts,
    expect,
    heights,
    quiet,
    restart,
    tell,
)
from tests.simulation.disk import Signed
from tests.simulation.node import Node
from tests.simulation.parts import is_kind
from tests.simulation.plan import Plan
from tests.simulation.world import World


def tells_what_it_stored(node: NodeType) -> None:
    """N2: all die after storing their votes and before sending them; the restart costs no view."""
    world = quiet(node)
    world.interfere = lambda _, __, message: None if is_kind(message, Kind.NOTARIZE) else 0.0
    tell(world, 0)
    world.run_until(1.0)
    expect("all have voted", all(n.core.cast(Kind.NOTARIZE, 1) for n in world.nodes))
    world.interfere = None
    restart(world, *world.nodes)
    world.run_until(2.0)
    expect("final", min(heights(world)) >= 1)
    expect("no view was lost", world.timeouts == 0)


def asks_for_a_lost_body(node: NodeType) -> None:
    """N3: three of four finish without the fourth; it asks for the body, and takes it though the
    view has passed."""
    world = quiet(node)
    first = world.leader(1)
    victim = next(n for n in world.nodes if n is not first)

    def interfere(source: Node, target: Node, message: object) -> float | None:
        pushed = isinstance(message, Proposal) and source is first and not victim.part._want
        if isinstance(message, Blocks):
            return None
        return None if pushed and target is victim and not victim.height else 0.0

    world.interfere = interfere
    tell(world, 0)
    world.run_until(1.5)
    expect("final everywhere", min(heights(world)) >= 1)
    expect("no view was lost", world.timeouts == 0)


def waits_for_its_execution(node: NodeType) -> None:
    """N4: the others name a state that one has not executed yet. It votes for their blocks no more
    (the watcher looks), until it has."""
    world = quiet(node)
    one = world.nodes[0]
    one.executing = True
    for number in range(2):
        tell(world, number)
        world.run_until(world.now + 3.0)
    expect("the others go on", max(heights(world)) > 1)
    one.executing = False
    one.after()
    world.run_until(world.now + 10.0)
    expect("all have all", not world.pending())


def waits_for_the_time(node: NodeType) -> None:
    """N4: the block of a leader whose clock is 12 s ahead waits two seconds, and is then taken."""
    slow = Times(0.5, 20.0, 0.3, 60.0)
    ahead = quiet(node, times=slow).leader(1).number
    skews = tuple(12.0 if i == ahead else 0.0 for i in range(4))
    world = quiet(node, times=slow, skews=skews)
    tell(world, 0)
    world.run_until(GREETED + 1.5)
    expect("not yet", max(heights(world)) == 0)
    world.run_until(GREETED + 4.0)
    expect("final everywhere", min(heights(world)) >= 1)
    expect("no view was lost", world.timeouts == 0)


def third(world: World) -> bytes:
    """What view 3 was about to notarize."""
    votes = world.leader(3).disk.votes()
    return next(v.hash for v in votes if v.kind is Kind.NOTARIZE and v.view == 3)


def abstains_after_a_wipe(node: NodeType) -> None:
    """N6: a validator nullifies view 3, loses its directory, and hears that view 3 is notarized."""
    world = quiet(node)
    one = next(n for n in world.nodes if n is not world.leader(3))

    def interfere(_: Node, target: Node, message: object) -> float | None:
        if isinstance(message, Proposal):
            block: Block = message.block
            return None if block.header.view < 3 or target is one else 0.0
        return None if is_kind(message, Kind.NOTARIZE) else 0.0

    world.interfere = interfere
    tell(world, 0)
    while not any(v.kind is Kind.NULLIFY and v.view == 3 for v in one.disk.votes()):
        world.step()
    chosen, block = world.committee(), third(world)
    votes = [v for n in world.nodes if n is not one for v in n.disk.votes()]
    found = [v for v in votes if (v.kind, v.view, v.hash) == (Kind.NOTARIZE, 3, block)]
    expect("notarized", chosen.weight({v.voter for v in found}) >= chosen.quorum)
    rows = tuple(sorted((v.voter, v.signature) for v in found))
    one.stop()
    one.disk.wipe()
    world.interfere = lambda _, __, message: 0.0 if isinstance(message, Hello) else None
    world.relink()
    world._start(one)
    world.run_until(world.now + GREETED)
    one.on_message(world.leader(3), Certificate(Kind.NOTARIZE, 3, block, rows))
    one.after()
    world.run_until(world.now + GREETED)


def speaks_when_needed(node: NodeType) -> None:
    """N6: of three equal validators one lost its directory: the chain stands still for a while."""
    world = quiet(node, (1,) * 3)
    tell(world, 0)
    world.run_until(5.0)
    one = world.nodes[0]
    one.stop()
    one.disk.wipe()
    world.relink()
    world._start(one)
    tell(world, 1)
    world.run_until(120.0)
    expect("it went on", not [n for n in world.nodes if not n.knows(b"transaction 1")])


def leads_when_greeted(node: NodeType) -> None:
    """N6: who leads the first view, and is greeted when there is work, proposes at once (the first
    version slept until its time was up)."""
    world = World(Plan((1,) * 4, transactions=0), 1, node)
    world.calm = True
    tell(world, 0)
    world.run_until(1.5)
    expect("final everywhere", min(heights(world)) >= 1)
    expect("no view was lost", world.timeouts == 0)


def makes_up_for_time_outs(node: NodeType) -> None:
    """N6: the greetings come after the first time-out; the first view ends nevertheless."""
    world = World(Plan((1,) * 4, transactions=0), 1, node)
    world.calm = True
    world._queue = [row for row in world._queue if not is_hello(row[5])]
    tell(world, 0)
    world.run_until(3.0)
    expect("all timed out in silence", world.timeouts == 4 and counts(world)[0] == 0)
    for one in world.nodes:
        for peer in world.connected(one):
            one.greet(peer)
    world.run_until(30.0)
    expect("final everywhere", min(heights(world)) >= 1)


def is_hello(data: object) -> bool:
    return isinstance(data, tuple) and isinstance(data[1], Hello)


def accuses_who_votes_twice(node: NodeType) -> None:
    """N8: a validator says two things to all; by two heights later it is accused on the chain."""
    world = World(Plan((1,) * 4, ((3, "nuller"),), transactions=0), 1, node)
    world.calm = True
    world.run_until(GREETED)
    for number in range(4):
        tell(world, number)
        world.run_until(world.now + 4.0)
    said = [n for n in world.nodes if n.honest and n.pool.convicted(world.nodes[3].key.public)]
    expect("accused on the chain", len(said) == 3)


class Splits(TwoFaces):
    """Of three others one is shown what it votes for itself, two the other block: no quorum, so
    nobody asks for a body that is missing."""

    def some(self) -> list[Node]:
        return self.targets()[:1]


def accuses_who_proposes_twice(node: NodeType) -> None:
    """N8: a leader shows two blocks, nobody both, and votes for one of them alone."""
    world = quiet(node)
    liar = world.leader(1)
    world.blame(liar)
    liar.validator_type = Splits
    restart(world, liar)
    world.run_until(2 * GREETED)
    tell(world, 0)
    world.run_until(world.now + 20.0)
    said = [n for n in world.nodes if n.honest and n.pool.convicted(liar.key.public)]
    expect("accused on the chain", len(said) == 3)


def proposes_once(node: NodeType) -> None:
    """N2: what a leader has stored as its proposal, and not voted for, it does not make anew. (A
    batch holds both, so only an altered directory shows one without the other.)"""
    world = quiet(node)
    first = world.leader(1)
    head = first.store.head
    block = block_on(first, Position(1, head.header, head.hash, head.mix), (b"transaction 9",))
    first.disk.record(Signed((), (block,), (), ()))
    world.watcher.proposed(first, block)
    restart(world, first)
    tell(world, 0)
    world.run_until(world.now + 20.0)
    expect("the chain goes on", min(heights(world)) >= 1)


def returns_from_jail(node: NodeType) -> None:
    """N9: a jailed validator that votes to finalize says Return, once while nothing changes."""
    world = quiet(node)
    world.jailed = {2: 1}
    for number in range(4):
        tell(world, number)
        world.run_until(world.now + 4.0)
    expect("it returns, and says so once", world.watcher.returns == [2])
