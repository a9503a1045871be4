"""EPOCH-1, EPOCH-6, N7, early messages and links: the edge of an epoch. Epoch 0 has two blocks."""

from msgspec.structs import replace

from tdmld.chain.blocks import (
    EPOCH_VIEWS,
    Block,
    Certificate,
    Kind,
    Vote,
    block_hash,
    sign_block,
    sign_vote,
)
from tdmld.chain.codec import ZERO_HASH
from tdmld.node.chainwire import Announcement, Blocks, Hello, Proposal
from tdmld.node.proposer import Position
from tdmld.node.succession import MAX_EARLY, MAX_EARLY_PROPOSALS
from tests.simulation.directed.base import (
    USUAL,
    NodeType,
    block_on,
    expect,
    heights,
    leave,
    quiet,
    restart,
    tell,
)
from tests.simulation.disk import Applied
from tests.simulation.facts import CHAIN_ID
from tests.simulation.node import Node
from tests.simulation.parts import is_kind
from tests.simulation.plan import Weights
from tests.simulation.world import World

LAST = 2
FIRST_VIEW = EPOCH_VIEWS + 1
"""The first view of epoch 1."""
ALL: Weights = ((0, 1), (1, 1), (2, 1), (3, 1))


def edge(node: NodeType, stakes: tuple[int, ...] = (1,) * 4, *sets: Weights) -> World:
    """A chain whose epochs have two blocks; of epoch 0 none is made yet."""
    return quiet(node, stakes, USUAL, (), LAST, sets or (ALL, ALL))


def last_of(one: Node) -> Block:
    """The last block of epoch 0, as a node holds it."""
    blocks = [b for _, b in one.part._bodies.tree.items() if b.header.height == LAST]
    return blocks[0]


def stops_short(world: World) -> None:
    """Run until the last block is notarized, without a vote that finalizes it."""
    watcher = world.watcher

    def interfere(_: Node, __: Node, message: object) -> float | None:
        late = isinstance(message, Announcement | Blocks) or is_kind(message, Kind.FINALIZE)
        return None if late and len(watcher.ids) == LAST - 1 else 0.0

    world.interfere = interfere
    tell(world, 0)
    while not watcher.later_views:
        world.step()
    expect("not final", len(watcher.ids) == LAST - 1)


def votes_again(node: NodeType) -> None:
    """N7, EPOCH-6: the last block is notarized in a view that can never be finalized, for one has
    nullified it, and another that notarized it is gone. Later views finalize it."""
    world = edge(node)
    tell(world, 0)
    while min(heights(world)) < LAST - 1:
        world.step()
    view = world.nodes[0].core.view
    first = world.leader(view)
    blind, gone = [n for n in world.nodes if n is not first][:2]

    def interfere(_: Node, target: Node, message: object) -> float | None:
        shown = isinstance(message, Proposal) and target is blind
        if shown or is_kind(message, Kind.FINALIZE):
            return None
        return 0.15 if is_kind(message, Kind.NOTARIZE) else 0.0

    world.interfere = interfere
    blind.part._act(blind.core.time_out(view))
    blind.after()
    while not all(n.core.view > view for n in world.nodes):
        world.step()
    leave(world, gone)

    def later(_: Node, __: Node, message: object) -> float | None:
        early = isinstance(message, Vote) and message.view < view + 3
        return None if early and is_kind(message, Kind.FINALIZE) else 0.0

    world.interfere = later
    world.run_until(world.now + 60.0)
    expect("final at the next", min(heights(world)) >= LAST)
    expect("by a later view", world.watcher.later_views >= 2)


def proposes_nothing_on_the_last(node: NodeType) -> None:
    """N7: a leader that is asked for a block on the last one makes none (the watcher looks)."""
    world = edge(node)
    stops_short(world)
    for one in world.nodes:
        made = world.blocks_made
        one.part._propose(one.core.view)
        expect("no block", world.blocks_made == made)


def votes_for_no_child(node: NodeType) -> None:
    """EPOCH-1, EPOCH-6: whoever leads after the last block shows a child of it, before that block
    is notarized; its header is right in all else. Nobody votes for it (the watcher looks)."""
    world = edge(node)
    world.interfere = lambda _, __, m: 0.3 if is_kind(m, Kind.NOTARIZE) else 0.0
    tell(world, 0)
    while not any(one.validator and held(one) for one in world.nodes):
        world.step()
    world.run_until(world.now + 0.1)
    holder = next(one for one in world.nodes if held(one))
    view = last_of(holder).header.view + 1
    liar = world.leader(view)
    child = child_of(liar, last_of(holder), view)
    world.blame(liar)
    world.watcher.seen(child)
    for one in world.nodes:
        one.on_message(liar, Proposal(child, ()))
        one.after()
    world.run_until(world.now + 30.0)
    expect("the chain goes on", min(heights(world)) >= LAST)


def held(one: Node) -> bool:
    return any(b.header.height == LAST for _, b in one.part._bodies.tree.items())


def child_of(one: Node, parent: Block, view: int) -> Block:
    """A block that nobody honest makes: signed, and right in all but its epoch."""
    bodies, key = one.part._bodies, block_hash(parent.header)
    place = Position(view, parent.header, key, bodies.mix(key) or ZERO_HASH)
    return block_on(one, place, ())


def waits_for_the_final_block(node: NodeType) -> None:
    """EPOCH-6: while the last block is notarized and not final, nobody is in the next epoch."""
    world = edge(node)
    stops_short(world)
    for _ in range(400):
        world.step()
        world.nodes[0].wake()
    expect("nobody", {one.succession.committee.epoch for one in world.nodes} == {0})
    world.interfere = None
    tell(world, 1)
    world.run_until(world.now + 30.0)
    expect("then all", min(heights(world)) > LAST)


def takes_nothing_of_another_epoch(node: NodeType) -> None:
    """EPOCH-1: a certificate of the next epoch's views, by the same validators, moves nobody."""
    world = edge(node)
    one = world.nodes[0]
    view = FIRST_VIEW + 5
    votes = [
        sign_vote(other.part.key, CHAIN_ID, Kind.NULLIFY, view, ZERO_HASH, other.part.me)
        for other in world.nodes
    ]
    for vote in votes:
        world.watcher.voted(vote)
    rows = tuple((vote.voter, vote.signature) for vote in votes)
    one.on_message(world.nodes[1], Certificate(Kind.NULLIFY, view, ZERO_HASH, rows))
    expect("it stays where it was", one.core.view == 1)


def computes_the_sets(node: NodeType) -> None:
    """EPOCH-2: a block that names other validators than everybody computed gets no vote."""
    world = edge(node)
    first = world.leader(1)
    world.blame(first)
    head = first.store.head
    good = block_on(first, Position(1, head.header, head.hash, head.mix), ())
    lie = replace(good.header, next_validators=bytes(32))
    block = sign_block(first.part.key, CHAIN_ID, lie, ())
    for one in world.nodes:
        one.on_message(first, Proposal(block, ()))
    honest = [one for one in world.nodes if one is not first]
    expect("no vote", not any(one.core.cast(Kind.NOTARIZE, 1) for one in honest))


def knows_who_was_passed_over(node: NodeType) -> None:
    """EPOCH-5: the first view of an epoch follows whatever view the last block had; the second does
    not. (In schedules the watcher compares every final block.)"""
    views = ((5, 6), (5, 7), (7, FIRST_VIEW), (7, FIRST_VIEW + 1), (FIRST_VIEW, FIRST_VIEW + 1))
    found = [node.follows(parent, view) for parent, view in views]
    expect("tainted where a view was", found == [True, False, True, False, True])


def slow(world: World, one: Node) -> None:
    """Everybody but this one, which does not execute, is in the next epoch; its first block is
    final there. From then on nothing reaches it."""
    one.executing = True
    tell(world, 0)
    for number in (1, 2):
        world.run_until(world.now + 4.0)
        tell(world, number)
    while not all(other.height > LAST for other in world.nodes if other is not one):
        world.step()
    world.interfere = lambda _, target, __: None if target is one else 0.0
    expect("it waits", one.height == LAST and one.succession.committee.epoch == 0)


def hears_what_came_early(node: NodeType) -> None:
    """Messages of the next epoch are kept: they alone bring it to what the others have."""
    world = edge(node)
    one = world.nodes[1]

    def interfere(_: Node, target: Node, message: object) -> float | None:
        return None if target is one and isinstance(message, Blocks | Announcement) else 0.0

    world.interfere = interfere
    slow(world, one)
    one.executing = False
    one.after()
    world.run_until(world.now + 1.0)
    expect("it has the block", one.height > LAST)


def links_an_epoch_early(node: NodeType) -> None:
    """Who validates from the next epoch on is linked before, and hears what comes too soon."""
    after: Weights = ((0, 1), (1, 1), (2, 1), (4, 1))
    world = edge(node, (1, 1, 1, 1, 0), after, after)
    one = world.nodes[4]

    def interfere(_: Node, target: Node, message: object) -> float | None:
        late = isinstance(message, Blocks) or (
            isinstance(message, Announcement) and message.header.height > LAST
        )
        return None if target is one and late else 0.0

    world.interfere = interfere
    slow(world, one)
    one.executing = False
    one.after()
    world.run_until(world.now + 1.0)
    expect("it has the block", one.height > LAST)


def keeps_little_of_what_came_early(node: NodeType) -> None:
    """Of one link only so much is kept."""
    world = edge(node)
    one, other = world.nodes[:2]
    for number in range(3 * MAX_EARLY):
        view = FIRST_VIEW + number
        vote = sign_vote(other.part.key, CHAIN_ID, Kind.NULLIFY, view, ZERO_HASH, 1)
        one.on_message(other, vote)
    rows = one.succession._early[other.peer]
    expect("bounded", len(rows) <= MAX_EARLY)
    other = world.nodes[2]
    tell(world, 0)
    while not held(other):
        world.step()
    last = last_of(other)
    for number in range(3 * MAX_EARLY_PROPOSALS):
        one.on_message(other, Proposal(child_of(other, last, FIRST_VIEW + number), ()))
    kept = [m for _, m in one.succession._early.get(other.peer, ()) if isinstance(m, Proposal)]
    expect("few blocks", len(kept) <= MAX_EARLY_PROPOSALS)


def outlives_who_leaves(node: NodeType) -> None:
    """One of four is away. Another's last vote makes the epoch's last block final for itself alone,
    and its epochs are over: the other two, who cannot finish without it, hear of it (the first
    version forgot its links at once, and the chain stood still)."""
    for leaver in range(4):
        for absent in {0, 1, 2, 3} - {leaver}:
            _leaves(node, leaver, absent)


def _leaves(node: NodeType, leaver: int, absent: int) -> None:
    after: Weights = tuple((n, 1 if n == absent else 2) for n in range(4) if n != leaver)
    world = edge(node, (1,) * 4, after, after)
    leave(world, world.nodes[absent])

    def interfere(source: Node, _: Node, message: object) -> float | None:
        unsaid = source.number == leaver and source.height >= LAST - 1
        return None if unsaid and is_kind(message, Kind.FINALIZE) else 0.0

    world.interfere = interfere
    tell(world, 0)
    world.run_until(20.0)
    tell(world, 1)
    world.run_until(60.0)
    expect(f"it goes on without {leaver}", min(heights(world)) > LAST)


def tells_who_is_late(node: NodeType) -> None:
    """Who still votes in an epoch that is over is told so, and catches up."""
    world = edge(node)
    one = world.nodes[2]

    def interfere(_: Node, target: Node, message: object) -> float | None:
        return None if target is one and not isinstance(message, Hello) else 0.0

    world.interfere = interfere
    tell(world, 0)
    while not all(other.height >= LAST for other in world.nodes if other is not one):
        world.step()
    world.run_until(world.now + 1.0)
    one.hints.clear()
    one.rounds = 0
    world.interfere = None
    world.run_until(world.now + 8.0)
    expect("it has what the others have", one.height >= LAST)


def catches_up_over_a_later_view(node: NodeType) -> None:
    """EPOCH-6: the last block was made final by a later view than its own. One that heard nothing
    takes it by catch-up."""
    world = edge(node)
    one = world.nodes[2]
    view = 0

    def interfere(_: Node, target: Node, message: object) -> float | None:
        if target is one and not isinstance(message, Hello | Blocks):
            return None
        lost = isinstance(message, Vote) and message.view <= view
        return None if lost and is_kind(message, Kind.FINALIZE) else 0.0

    world.interfere = interfere
    tell(world, 0)
    while not len(world.watcher.ids) >= LAST - 1:
        world.step()
    view = world.nodes[0].core.view + 1
    others = [other for other in world.nodes if other is not one]
    while not all(other.height >= LAST for other in others):
        world.step()
    expect("by a later view", world.watcher.later_views >= 1)
    tell(world, 1)
    world.run_until(world.now + 20.0)
    expect("it has what the others have", one.height >= LAST)


def joins_at_once(node: NodeType) -> None:
    """N6: one of four is away, and another joins, whose directory never voted: no view of the new
    epoch passes without it (the first version stood still for half a minute)."""
    after: Weights = ((0, 1), (1, 1), (2, 1), (4, 1))
    world = edge(node, (1, 1, 1, 1, 0), after, after)
    leave(world, world.nodes[2])
    world.run_until(world.now + 1.0)
    tell(world, 0)
    while min(heights(world)) < LAST:
        world.step()
    tell(world, 1)
    world.run_until(world.now + 8.0)
    expect("the new epoch goes on", min(heights(world)) > LAST)


def abstains_at_the_edge(node: NodeType) -> None:
    """N6: a validator of both epochs has nullified the first view of the new one, and loses its
    directory before anybody hears of it; then the block of that view comes. It does not vote."""
    world = edge(node)
    tell(world, 0)
    while not all(one.succession.committee.epoch == 1 for one in world.nodes):
        world.step()
    one = next(n for n in world.nodes if n is not world.leader(FIRST_VIEW))
    expect("none has begun it", {n.core.view for n in world.nodes} == {FIRST_VIEW})
    world.interfere = lambda source, *_: None if source is one else 0.0
    one.part._act(one.core.time_out(FIRST_VIEW))
    one.after()
    world.run_until(world.now + 0.1)
    expect("it has voted", one.core.cast(Kind.NULLIFY, FIRST_VIEW))
    one.stop()
    applied = [row for row in one.disk.rows if isinstance(row, Applied)]
    one.disk.wipe()
    one.disk.rows += applied
    world.interfere = None
    world.relink()
    world._start(one)
    tell(world, 1)
    world.run_until(world.now + 2.0)
    expect("the others went on", max(heights(world)) > LAST)


def restarts_in_a_later_view(node: NodeType) -> None:
    """N2, N7: all die between two votes on the last block, and contradict nothing afterwards."""
    world = edge(node)
    stops_short(world)
    restart(world, *world.nodes)
    world.interfere = None
    tell(world, 1)
    world.run_until(world.now + 30.0)
    expect("the next epoch has begun", min(heights(world)) > LAST)
