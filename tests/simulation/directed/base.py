"""Small worlds for directed traces. A trace takes the class of the nodes, passes with `Node`, and
raises AssertionError with the mutant that breaks its rule."""

from collections.abc import Callable, Sequence

from tdmld.chain.blocks import Block, Certificate, Kind, Vote, block_hash
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import Simplex
from tdmld.chain.pacing import Times
from tdmld.node.proposer import Position, build_block
from tests.simulation.facts import CHAIN_ID, FIRST
from tests.simulation.node import Node
from tests.simulation.plan import NO_EPOCHS, Plan, Weights
from tests.simulation.world import World

NodeType = type[Node]
Trace = Callable[[NodeType], None]
GREETED = 0.5
"""By then everybody has greeted everybody."""
USUAL = Times(0.5, 2.0, 0.3, 30.0)
GENESIS = block_hash(FIRST)


def quiet(
    node: NodeType,
    stakes: tuple[int, ...] = (1,) * 4,
    times: Times = USUAL,
    skews: tuple[float, ...] = (),
    epoch_blocks: int = NO_EPOCHS,
    sets: tuple[Weights, ...] = (),
) -> World:
    """A prompt network, nothing to do."""
    plan = Plan(
        stakes, transactions=0, times=times, skews=skews, epoch_blocks=epoch_blocks, sets=sets
    )
    world = World(plan, 1, node)
    world.calm = True
    world.run_until(GREETED)
    return world


def raw(number: int) -> bytes:
    return b"transaction %d" % number


def tell(world: World, number: int, *nodes: Node) -> None:
    """A transaction reaches these nodes, or everybody."""
    for node in nodes or world.nodes:
        if node.up:
            node.pool.enqueue((raw(number),), "")
            node.after()
    world.settle(None)


def restart(world: World, *nodes: Node) -> None:
    """These processes die, all at once, and come back, one after another."""
    for node in nodes:
        node.stop()
    world.relink()
    for node in nodes:
        world._start(node)
    world.settle(None)


def leave(world: World, *nodes: Node) -> None:
    """These processes are gone."""
    for node in nodes:
        node.up = False
    world.relink()
    world.settle(None)


def counts(world: World) -> tuple[int, int]:
    return world.blocks_made, world.timeouts


def expect(what: str, held: bool) -> None:
    if not held:
        raise AssertionError(what)


def heights(world: World) -> list[int]:
    return [node.height for node in world.nodes if node.up]


def block_on(one: Node, place: Position, body: tuple[bytes, ...]) -> Block:
    """A block that is right in all that does not follow from its place, signed by this node."""
    store = one.store
    return build_block(
        one.part.key,
        CHAIN_ID,
        place,
        body,
        protocol=1,
        now_ms=one.now_ms(),
        state_height=store.height,
        history_root=store.history_root(store.height) or ZERO_HASH,
        state_root=store.head.state_root,
        sets=store.set_ids(one.part.epoch),
    )


# ---- a core alone ----------------------------------------------------------------------------


def core_of(node: NodeType) -> Simplex:
    return node.simplex((1, 1, 1, 1), 0, 0, GENESIS)


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def vote(kind: Kind, view: int, block: bytes, voter: int) -> Vote:
    return Vote(kind, view, block, voter, bytes(64))


def certificate(
    kind: Kind, view: int, block: bytes = ZERO_HASH, voters: Sequence[int] = (1, 2, 3)
) -> Certificate:
    return Certificate(kind, view, block, tuple((i, bytes(64)) for i in voters))
