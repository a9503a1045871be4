"""P1 to P8: when a view begins, and when it has lasted too long."""

from tdmld.chain.blocks import Kind, Vote
from tdmld.node.chainwire import Proposal
from tdmld.node.validator import MAX_BACKLOG
from tests.simulation.directed.base import NodeType, counts, expect, heights, leave, quiet, tell
from tests.simulation.node import Node
from tests.simulation.parts import is_kind


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
    one = next(n for n in world.nodes if world.leader(1) is not n)
    world.interfere = lambda *_: None
    tell(world, 0, one)
    world.run_until(1.5)
    one.pool.clear()
    one.wake()
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
    one = world.leader(3)
    tell(world, 0, one)
    world.run_until(15.0)
    expect("final everywhere", min(heights(world)) >= 1)


def is_patient(node: NodeType) -> None:
    """P3: a finalization in flight is no reason for a block."""
    world = quiet(node)
    world.interfere = lambda _, __, message: 0.6 * is_kind(message, Kind.FINALIZE)
    world.run_until(33.0)
    expect("one block", counts(world) == (1, 0))
    expect("final everywhere", set(heights(world)) == {1})


def finishes_a_late_finalization(node: NodeType) -> None:
    """P3: when all votes that finalize are lost, the next block makes up before a heartbeat."""
    world = quiet(node)
    lost: list[bool] = []

    def lossy(_: Node, __: Node, message: object) -> float | None:
        if isinstance(message, Vote) and message.kind is Kind.FINALIZE and message.view == 1:
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
    mute = lambda _, __, message: None if isinstance(message, Proposal) else 0.0  # noqa: E731
    world.interfere = mute
    tell(world, 0)
    world.run_until(40.0)
    world.interfere = None
    world.run_until(100.0)
    expect("it went on", min(heights(world)) >= 2)
    world.interfere = mute
    tell(world, 1)
    world.run_until(100.0 + 2.0 + 0.5)
    expect("one time-out after two seconds", {n.part._pacing.failed for n in world.nodes} == {1})


def skips_the_absent(node: NodeType) -> None:
    """P5: a leader that is not connected costs a third of a second."""
    world = quiet(node)
    leave(world, world.leader(1))
    world.run_until(1.0)
    tell(world, 0)
    world.run_until(1.0 + 0.3 + 0.3)
    expect("final", min(heights(world)) == 1)


def is_silent_alone(node: NodeType) -> None:
    """P6: below a quorum nobody proposes and nobody times out."""
    world = quiet(node)
    leave(world, *world.nodes[:2])
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
        one.after()
    world.run_until(world.now + 60.0)
    expect("it goes on", not world.pending() and min(heights(world)) > MAX_BACKLOG + 1)
