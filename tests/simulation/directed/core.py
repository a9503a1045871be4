"""S3 to S11: the core alone, or a world in which one of its rules decides."""

from tdmld.chain.blocks import Certificate, Kind
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import AHEAD, MAX_DEPTH, MAX_VARIANTS, Certified, Finalized, Proposed
from tdmld.chain.pending import VARIANTS
from tdmld.node.bodies import MAX_TRIES
from tdmld.node.chainwire import Proposal
from tdmld.node.proposer import Position
from tests.simulation.directed.base import (
    GENESIS,
    GREETED,
    NodeType,
    block_on,
    certificate,
    core_of,
    expect,
    heights,
    leave,
    name,
    quiet,
    restart,
    tell,
    vote,
)
from tests.simulation.node import Node
from tests.simulation.parts import is_kind


def wants_a_notarized_parent(node: NodeType) -> None:
    """S3: the parent's view was nullified, and the block stands on a body without notarization."""
    core = core_of(node)
    core.add_certificate(certificate(Kind.NULLIFY, 1))
    core.add_certificate(certificate(Kind.NULLIFY, 2))
    out = core.add_block(3, name(9), Proposed(1, name(5), True))
    expect("no vote", not core.cast(Kind.NOTARIZE, 3) and not out)
    core.add_block(3, name(10), Proposed(0, GENESIS, True))
    expect("a vote for the good one", core.cast(Kind.NOTARIZE, 3))


def wants_no_gap(node: NodeType) -> None:
    """S3: between a block and its parent lies a view of which nothing is known."""
    core = core_of(node)
    core.add_certificate(certificate(Kind.NOTARIZE, 1, name(5)))
    core.add_certificate(certificate(Kind.NULLIFY, 3))
    core.add_block(4, name(9), Proposed(1, name(5), True))
    expect("no vote", core.view == 4 and not core.cast(Kind.NOTARIZE, 4))
    core.add_certificate(certificate(Kind.NULLIFY, 2))
    expect("a vote, once it is nullified", core.cast(Kind.NOTARIZE, 4))


def bounds_the_depth(node: NodeType) -> None:
    """S7: while nothing is finalized, blocks get empty and go on; then all is finalized."""
    world = quiet(node)
    world.interfere = lambda _, __, message: None if is_kind(message, Kind.FINALIZE) else 0.0
    for number in range(16):
        tell(world, number)
        world.run_until(world.now + 1.5)
    one = world.nodes[0]
    path = one.part._bodies.tree.path(one.core.tip[1]) or []
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
    first, other = world.leader(1), world.leader(2)
    head = first.store.head
    for number in range(50):
        place = Position(1, head.header, head.hash, head.mix)
        block = block_on(first, place, (b"variant %d" % number,))
        other.on_message(first, Proposal(block, ()))
    expect("bounded", len(other.part._bodies.tree) <= VARIANTS < MAX_TRIES)


def takes_far_certificates(node: NodeType) -> None:
    """S6, S8: certificates are not limited in view, and what lies between is skipped."""
    core = core_of(node)
    far = certificate(Kind.NULLIFY, 4 * AHEAD)
    if core.wants_certificate(far):
        core.add_certificate(far)
    expect("entered", core.view == 4 * AHEAD + 1)


def survives_a_common_restart(node: NodeType) -> None:
    """S9: three of four restart at once, the fourth never: its vote was needed for a notarization
    that two have voted to finalize and one has nullified. Only the certificate frees them."""
    world = quiet(node)
    first = world.leader(1)
    blind, gone = [n for n in world.nodes if n is not first][:2]

    def interfere(_: Node, target: Node, message: object) -> float | None:
        shown = isinstance(message, Proposal) and target is blind
        if shown or is_kind(message, Kind.FINALIZE):
            return None
        return 0.15 if is_kind(message, Kind.NOTARIZE) else 0.0

    world.interfere = interfere
    tell(world, 0)
    blind.part._act(blind.core.time_out(1))
    blind.after()
    world.run_until(GREETED + 0.4)
    others = [n for n in world.nodes if n is not gone]
    expect("all have left", {n.core.view for n in world.nodes} == {2})
    finalizing = [n for n in others if n.core.cast(Kind.FINALIZE, 1)]
    expect("two finalize", len(finalizing) == 2 and blind not in finalizing)
    leave(world, gone)
    world.interfere = None
    restart(world, *others)
    tell(world, 0)
    world.run_until(world.now + 60.0)
    expect("final", min(heights(world)) >= 1)


def says_what_is_final(node: NodeType) -> None:
    """S10: a quorum of FINALIZE is an effect of its own, not one more certificate."""
    core = core_of(node)
    core.add_certificate(certificate(Kind.NOTARIZE, 1, name(5)))
    out = [core.add_vote(vote(Kind.FINALIZE, 1, name(5), voter)) for voter in (1, 2, 3)]
    expect("final", [e.hash for e in out[2] if isinstance(e, Finalized)] == [name(5)])


def forwards_nullifications(node: NodeType) -> None:
    """S11: who hears no votes leaves a nullified view with the others."""
    world = quiet(node)
    deaf = next(n for n in world.nodes if n is not world.leader(1))

    def interfere(_: Node, target: Node, message: object) -> float | None:
        votes = any(is_kind(message, kind) for kind in Kind)
        return None if isinstance(message, Proposal) or (votes and target is deaf) else 0.0

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
    lost = next(n for n in world.nodes if n is not world.leader(1))
    mute, answering = True, False

    def interfere(_: Node, target: Node, message: object) -> float | None:
        deaf = mute and (isinstance(message, Proposal) or target is lost)
        repeated = isinstance(message, Certificate) and target is lost and not answering
        return None if deaf or repeated else 0.0

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
