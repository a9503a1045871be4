"""Directed traces: small worlds in which one rule decides. Each takes the class of the nodes,
passes with `Node`, and raises AssertionError with the mutant that breaks its rule."""

from tdmld.chain.blocks import Block, Certificate, Kind, Vote
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import AHEAD, MAX_DEPTH, MAX_VARIANTS, Certified, Proposed, Simplex
from tdmld.chain.pacing import Times
from tdmld.chain.pending import VARIANTS
from tdmld.node.validator import MAX_BACKLOG
from tests.simulation.facts import GENESIS, signature
from tests.simulation.node import Node
from tests.simulation.plan import Plan
from tests.simulation.world import World

NodeType = type[Node]
GREETED = 0.5
"""By then everybody has greeted everybody."""
USUAL = Times(0.5, 2.0, 0.3, 30.0)


def quiet(
    node: NodeType, count: int = 4, times: Times = USUAL, skews: tuple[float, ...] = ()
) -> World:
    """Equal stakes, a prompt network, nothing to do."""
    plan = Plan((1,) * count, transactions=0, times=times, skews=skews)
    world = World(plan, 1, node)
    world.calm = True
    world.settle(None)
    world.run_until(GREETED)
    return world


def tell(world: World, number: int, *nodes: Node) -> None:
    """A transaction reaches these nodes, or everybody."""
    raw = b"transaction %d" % number
    for node in nodes or world.nodes:
        if node.up:
            node.on_transaction(node.name, raw)
    world.settle(None)


def counts(world: World) -> tuple[int, int]:
    return world.blocks_made, world.timeouts


def expect(what: str, held: bool) -> None:
    if not held:
        raise AssertionError(what)


def heights(world: World) -> list[int]:
    return [node.height for node in world.nodes if node.up]


def leader(world: World, view: int) -> Node:
    return world.nodes[world.committee().rotation.leader(view)]


def is_vote(what: str, data: object, kind: Kind) -> bool:
    return what == "on_vote" and isinstance(data, Vote) and data.kind is kind


# ---- pacing --------------------------------------------------------------------------------


def rests(node: NodeType) -> None:
    """P1: a chain without demand rests."""
    world = quiet(node)
    world.run_until(25.0)
    expect("nothing happens", counts(world) == (0, 0))


def keeps_the_interval(node: NodeType) -> None:
    """P2: the block that commits the state comes an interval after the one that changed it."""
    world = quiet(node)
    tell(world, 0)
    world.run_until(5.0)
    times = [header.time_ms for header in world.watcher.agreed]
    expect("two blocks", len(times) == 2)
    expect("half a second apart", times[1] - times[0] >= 490)


def costs_two_blocks(node: NodeType) -> None:
    """P2, P4: after a rest longer than the time-out a transaction costs its block and the one that
    commits its state, and no nullification."""
    world = quiet(node)
    for number, start in enumerate((1.0, 6.0, 11.0, 24.0)):
        world.run_until(start)
        tell(world, number)
        world.run_until(start + 2.0)
        made = 2 * number + 2
        expect("two blocks each", counts(world) == (made, 0))
        expect("final everywhere", set(heights(world)) == {made})


def forgets_old_demand(node: NodeType) -> None:
    """P4: demand that vanished, and comes back later, has its whole time before it."""
    world = quiet(node)
    one = next(n for n in world.nodes if leader(world, 1) is not n)
    world.interfere = lambda *_: None
    tell(world, 0, one)
    world.run_until(1.5)
    one.pool.clear()
    one.woken = True
    world.settle(None)
    world.run_until(6.0)
    tell(world, 0, one)
    world.run_until(7.0)
    expect("no time-out yet", world.timeouts == 0)


def beats(node: NodeType) -> None:
    """P3: without demand a heartbeat makes one block."""
    world = quiet(node)
    world.run_until(40.0)
    expect("one block", counts(world) == (1, 0))


def follows_the_demand_of_others(node: NodeType) -> None:
    """P3: what one validator alone knows becomes final long before a heartbeat."""
    world = quiet(node)
    one = leader(world, 3)
    tell(world, 0, one)
    world.run_until(15.0)
    expect("final everywhere", min(heights(world)) >= 1)


def is_patient(node: NodeType) -> None:
    """P3: a finalization in flight is no reason for a block."""
    world = quiet(node)
    world.interfere = lambda _, __, what, data: 0.6 * is_vote(what, data, Kind.FINALIZE)
    world.run_until(33.0)
    expect("one block", counts(world) == (1, 0))
    expect("final everywhere", set(heights(world)) == {1})


def finishes_a_late_finalization(node: NodeType) -> None:
    """P3: when all votes that finalize are lost, the next block makes up before a heartbeat."""
    world = quiet(node)
    lost: list[bool] = []

    def lossy(_: Node, __: Node, what: str, data: object) -> float | None:
        if is_vote(what, data, Kind.FINALIZE) and data.view == 1:  # type: ignore[attr-defined]
            lost.append(True)
            return None
        return 0.0

    world.interfere = lossy
    tell(world, 0)
    world.run_until(12.0)
    expect("the votes were lost", bool(lost))
    expect("final everywhere", min(heights(world)) >= 1)


def grows_patient(node: NodeType) -> None:
    """P5: on a network slower than the time-out the time-out grows until views succeed."""
    world = quiet(node)
    world.interfere = lambda *_: 2.5
    tell(world, 0)
    world.run_until(100.0)
    expect("final everywhere", min(heights(world)) >= 1)


def recovers_its_pace(node: NodeType) -> None:
    """P5: after a success a mute leader costs the first time-out again, not a grown one."""
    world = quiet(node)
    mute = lambda _, __, what, ___: None if what == "on_proposal" else 0.0  # noqa: E731
    world.interfere = mute
    tell(world, 0)
    world.run_until(40.0)
    world.interfere = None
    world.run_until(100.0)
    expect("it went on", min(heights(world)) >= 2)
    world.interfere = mute
    tell(world, 1)
    world.run_until(100.0 + 2.0 + 0.5)
    mute_views = {n.pacing.failed for n in world.nodes}
    expect("one time-out after two seconds", mute_views == {1})


def skips_the_absent(node: NodeType) -> None:
    """P5: a leader that is not connected costs a third of a second."""
    world = quiet(node)
    leader(world, 1).up = False
    world.relink()
    world.settle(None)
    world.run_until(1.0)
    tell(world, 0)
    world.run_until(1.0 + 0.3 + 0.3)
    expect("final", min(heights(world)) == 1)


def is_silent_alone(node: NodeType) -> None:
    """P6: below a quorum nobody proposes and nobody times out."""
    world = quiet(node)
    for gone in world.nodes[:2]:
        gone.up = False
    world.relink()
    tell(world, 0)
    world.run_until(100.0)
    expect("nothing happens", counts(world) == (0, 0))


def says_it_again(node: NodeType) -> None:
    """P7: votes that were lost are repeated."""
    world = quiet(node)
    world.interfere = lambda *_: None
    tell(world, 0)
    world.run_until(4.0)
    world.interfere = None
    world.run_until(15.0)
    expect("final everywhere", min(heights(world)) >= 1)


def proposes_what_it_executed(node: NodeType) -> None:
    """N5, P8: while execution stands still everywhere nothing is proposed above the allowed
    backlog (the watcher looks); when it goes on, so does the chain."""
    world = quiet(node)
    for one in world.nodes:
        one.executing = True
    for number in range(12):
        tell(world, number)
        world.run_until(world.now + 0.8)
    expect("it stands", max(heights(world)) <= MAX_BACKLOG + 1)
    for one in world.nodes:
        one.executing = False
        one.run_queue()
    world.run_until(world.now + 60.0)
    expect("it goes on", not world.pending() and min(heights(world)) > MAX_BACKLOG + 1)


# ---- the core ------------------------------------------------------------------------------


def core_of(node: NodeType) -> Simplex:
    return node.simplex((1, 1, 1, 1), 0, 0, GENESIS)


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def vote(kind: Kind, view: int, block: bytes, voter: int) -> Vote:
    return Vote(kind, view, block, voter, signature(voter))


def certificate(kind: Kind, view: int, block: bytes = ZERO_HASH) -> Certificate:
    return Certificate(kind, view, block, tuple((i, signature(i)) for i in (1, 2, 3)))


def wants_a_notarized_parent(node: NodeType) -> None:
    """S3: the parent's view was nullified, and the block stands on a body without notarization."""
    core = core_of(node)
    core.add_certificate(certificate(Kind.NULLIFY, 1))
    core.add_certificate(certificate(Kind.NULLIFY, 2))
    out = core.add_block(3, name(9), Proposed(1, name(5), True))
    expect("no vote", not core.cast(Kind.NOTARIZE, 3) and not out)
    core.add_block(3, name(10), Proposed(0, GENESIS, True))
    expect("a vote for the good one", core.cast(Kind.NOTARIZE, 3))


def bounds_the_depth(node: NodeType) -> None:
    """S7: while nothing is finalized, blocks get empty and go on; then all is finalized."""
    world = quiet(node)
    world.interfere = lambda _, __, what, data: None if is_vote(what, data, Kind.FINALIZE) else 0.0
    for number in range(16):
        tell(world, number)
        world.run_until(world.now + 1.5)
    one = world.nodes[0]
    path = one.tree.path(one.core.tip[1]) or []
    expect("deeper than the bound", len(path) > MAX_DEPTH)
    expect("empty above it", not any(block.transactions for block in path[MAX_DEPTH:]))
    world.interfere = None
    world.run_until(world.now + 20.0)
    expect("final everywhere", min(heights(world)) > MAX_DEPTH)


def counts_every_variant(node: NodeType) -> None:
    """S8: the second vote of an equivocator completes the quorum."""
    core = core_of(node)
    core.add_vote(vote(Kind.NOTARIZE, 1, name(5), 3))
    for voter in (3, 1, 2):
        core.add_vote(vote(Kind.NOTARIZE, 1, name(6), voter))
    expect("a notarization", core.tip == (1, name(6)))


def bounds_its_tables(node: NodeType) -> None:
    """S8: one attacker's votes take bounded memory."""
    core = core_of(node)
    for number in range(1000):
        core.add_vote(vote(Kind.NOTARIZE, 1, name(number + 5), 3))
        core.add_vote(vote(Kind.NULLIFY, 1 + number, ZERO_HASH, 3))
        core.add_vote(vote(Kind.FINALIZE, 1 + number, name(number + 5), 3))
    expect("bounded", len(core._tallies) <= MAX_VARIANTS + 2 * (AHEAD + 2))


def bounds_its_bodies(node: NodeType) -> None:
    """S8: an equivocating leader's blocks take bounded memory."""
    world = quiet(node)
    first, other = leader(world, 1), leader(world, 2)
    for number in range(50):
        block = first.make(1, first.header, first.head, (b"variant %d" % number,))
        other.on_proposal(first.name, (block, ()))
    expect("bounded", len(other.tree) <= VARIANTS)


def takes_far_certificates(node: NodeType) -> None:
    """S8: certificates are not limited in view."""
    core = core_of(node)
    far = certificate(Kind.NULLIFY, 4 * AHEAD)
    if core.wants_certificate(far):
        core.add_certificate(far)
    expect("entered", core.view == 4 * AHEAD + 1)


def survives_a_common_restart(node: NodeType) -> None:
    """S9: three of four restart at once, the fourth never: its vote was needed for a notarization
    that two have voted to finalize and one has nullified. Only the certificate frees them."""
    world = quiet(node)
    first = leader(world, 1)
    blind, gone = [n for n in world.nodes if n is not first][:2]

    def interfere(_: Node, target: Node, what: str, data: object) -> float | None:
        if (what == "on_proposal" and target is blind) or is_vote(what, data, Kind.FINALIZE):
            return None
        return 0.15 if is_vote(what, data, Kind.NOTARIZE) else 0.0

    world.interfere = interfere
    tell(world, 0)
    blind.act(blind.core.time_out(1))
    world.run_until(GREETED + 0.4)
    others = [n for n in world.nodes if n is not gone]
    expect("all have left", {n.core.view for n in world.nodes} == {2})
    finalizing = [n for n in others if n.core.cast(Kind.FINALIZE, 1)]
    expect("two finalize", len(finalizing) == 2 and blind not in finalizing)
    gone.up = False
    for one in others:
        one.stop()
    world.interfere = None
    for one in others:
        world._start(one)
    tell(world, 0)
    world.run_until(world.now + 60.0)
    expect("final", min(heights(world)) >= 1)


def forwards_nullifications(node: NodeType) -> None:
    """S11: who hears no votes leaves a nullified view with the others."""
    world = quiet(node)
    deaf = next(n for n in world.nodes if n is not leader(world, 1))

    def interfere(_: Node, target: Node, what: str, __: object) -> float | None:
        lost = what == "on_proposal" or (what == "on_vote" and target is deaf)
        return None if lost else 0.0

    world.interfere = interfere
    tell(world, 0)
    world.run_until(GREETED + 2.3)
    expect("all have left", {n.core.view for n in world.nodes} == {2})


def forwards_contradictions(node: NodeType) -> None:
    """S11: a notarization of a view in which somebody contradicted itself is forwarded."""
    core = core_of(node)
    core.add_vote(vote(Kind.NOTARIZE, 1, name(5), 3))
    core.add_vote(vote(Kind.NOTARIZE, 1, name(6), 3))
    core.add_vote(vote(Kind.NOTARIZE, 1, name(6), 1))
    out = core.add_vote(vote(Kind.NOTARIZE, 1, name(6), 2))
    expect("forwarded", [e.forward for e in out if isinstance(e, Certified)] == [True])


def answers_the_lost(node: NodeType) -> None:
    """S11: who was deaf while the view ended, and says NULLIFY in it, is helped out."""
    world = quiet(node)
    lost = next(n for n in world.nodes if n is not leader(world, 1))
    mute = True

    def interfere(_: Node, target: Node, what: str, data: object) -> float | None:
        deaf = mute and (what == "on_proposal" or target is lost)
        repeated = what == "on_certificate" and target is lost and not answering
        return None if deaf or repeated else 0.0

    answering = False
    world.interfere = interfere
    tell(world, 0)
    world.run_until(GREETED + 2.3)
    expect("the others have left", sorted(n.core.view for n in world.nodes) == [1, 2, 2, 2])
    mute, answering = False, True
    for other in world.nodes:
        if other is not lost:
            other.pool.clear()
    world.run_until(GREETED + 4.5)
    expect("helped", lost.core.view >= 2)


# ---- the shell -----------------------------------------------------------------------------


def tells_what_it_stored(node: NodeType) -> None:
    """N2: all die after storing their votes and before sending them; the restart costs no view."""
    world = quiet(node)
    world.interfere = lambda _, __, what, data: None if what == "on_vote" else 0.0
    tell(world, 0)
    world.run_until(1.0)
    expect("all have voted", all(n.core.cast(Kind.NOTARIZE, 1) for n in world.nodes))
    for one in world.nodes:
        one.stop()
    world.interfere = None
    for one in world.nodes:
        world._start(one)
    world.settle(None)
    world.run_until(2.0)
    expect("final", min(heights(world)) >= 1)
    expect("no view was lost", world.timeouts == 0)


def asks_for_a_lost_body(node: NodeType) -> None:
    """N3: three of four finish without the fourth; it asks for the body, and takes it though the
    view has passed."""
    world = quiet(node)
    first = leader(world, 1)
    victim = next(n for n in world.nodes if n is not first)

    def interfere(source: Node, target: Node, what: str, _: object) -> float | None:
        pushed = what == "on_proposal" and source is first and not victim.want
        if what == "on_blocks":
            return None
        return None if pushed and target is victim and not victim.height else 0.0

    world.interfere = interfere
    tell(world, 0)
    world.run_until(1.5)
    expect("final everywhere", min(heights(world)) >= 1)
    expect("no view was lost", world.timeouts == 0)


def waits_for_the_time(node: NodeType) -> None:
    """N4: the block of a leader whose clock is 12 s ahead waits two seconds, and is then taken."""
    slow = Times(0.5, 20.0, 0.3, 60.0)
    ahead = quiet(node, times=slow).committee().rotation.leader(1)
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
    votes = leader(world, 3).disk.votes()
    return next(v.hash for v in votes if v.kind is Kind.NOTARIZE and v.view == 3)


def abstains_after_a_wipe(node: NodeType) -> None:
    """N6: a validator nullifies view 3, loses its directory, and hears that view 3 is notarized."""
    world = quiet(node)
    one = next(n for n in world.nodes if n is not leader(world, 3))

    def interfere(_: Node, target: Node, what: str, data: object) -> float | None:
        if what == "on_proposal":
            block: Block = data[0]  # type: ignore[index]
            return None if block.header.view < 3 or target is one else 0.0
        return None if is_vote(what, data, Kind.NOTARIZE) else 0.0

    world.interfere = interfere
    tell(world, 0)
    while not any(v.kind is Kind.NULLIFY and v.view == 3 for v in one.disk.votes()):
        world.step()
    certificate = Certificate(
        Kind.NOTARIZE,
        3,
        third(world),
        tuple((n.index, signature(n.index)) for n in world.nodes if n is not one),
    )
    one.stop()
    one.disk.wipe()
    world.relink()
    world.interfere = lambda _, __, what, ___: 0.0 if what == "on_hello" else None
    world._start(one)
    world.settle(None)
    world.run_until(world.now + GREETED)
    one.on_certificate(0, certificate)
    world.settle(None)
    world.run_until(world.now + GREETED)


def speaks_when_needed(node: NodeType) -> None:
    """N6: of three equal validators one lost its directory: the chain stands still for a while."""
    world = quiet(node, 3)
    tell(world, 0)
    world.run_until(5.0)
    one = world.nodes[0]
    one.stop()
    one.disk.wipe()
    world.relink()
    world._start(one)
    tell(world, 1)
    world.run_until(120.0)
    expect("it went on", all(b"transaction 1" in n.done for n in world.nodes))


def makes_up_for_time_outs(node: NodeType) -> None:
    """N6: the greetings come after the first time-out; the first view ends nevertheless."""
    plan = Plan((1,) * 4, transactions=0)
    world = World(plan, 1, node)
    world.calm = True
    world._queue = [row for row in world._queue if row[4] != "on_hello"]
    tell(world, 0)
    world.run_until(3.0)
    expect("all timed out in silence", world.timeouts == 4 and counts(world)[0] == 0)
    for one in world.nodes:
        for peer in world.peers(one):
            one.linked(peer)
    world.settle(None)
    world.run_until(30.0)
    expect("final everywhere", min(heights(world)) >= 1)
