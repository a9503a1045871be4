"""Vectors of validators: stake, nodes, evidence, elections (sections 6 and 9).

What ledger-money.json shows at genesis is shown here at its limits: windows, counts, a third.
"""

from typing import Any

from msgspec.structs import replace

from scripts.lib.vectors_case import START_MS, Scene, ledger_file
from tdmld.chain import limits
from tdmld.chain.blocks import Kind, first_header, sign_block, sign_vote
from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import genesis_document, genesis_from_document
from tdmld.chain.slashing import from_votes
from tdmld.chain.transactions import (
    Bond,
    Nominate,
    Payload,
    ProposalEvidence,
    Register,
    Revoke,
    Sworn,
    Unbond,
    VoteEvidence,
    Withdraw,
    sign_registration,
)
from tests.chain.world import World, make_genesis, mark, node_key, owner_key

ALICE, BOB, CAROL, DAVE = (owner_key(index) for index in range(4))
STRANGER = owner_key(19)
EPOCH = 1 << 32
NOTHING = bytes(32)


def ledger_stakes() -> dict[str, Any]:
    """Stake that comes back and when, who may be elected and is, who is convicted and of what."""
    return ledger_file(
        [
            *_windows(),
            _entries(),
            *_held_back(),
            _nodes(),
            _votes(),
            _proposals(),
            *_limits_of_evidence(),
            *_burned(),
            *_elections(),
            *_small_sets(),
        ]
    )


def _founded(nodes: int, validators: int, **parameters: Any) -> World:
    return World(make_genesis(nodes, validators, **parameters))


def _weighing(*weights: int, **parameters: Any) -> World:
    """One validator for each weight, with 10 units to pay fees from, and nobody else."""
    owners = [owner_key(index).address for index in range(len(weights))]
    nodes = [node_key(index).address for index in range(len(weights))]
    document = genesis_document(make_genesis(1, 1, **parameters))
    accounts = [[owner, 10] for owner in owners]
    rows = [list(row) for row in zip(owners, nodes, weights, strict=True)]
    changes = {"accounts": accounts, "validators": rows, "nodes": [], "work_stakes": []}
    return World(genesis_from_document({**document, **changes}))


def _to(world: World, height: int) -> None:
    world.wait(height - world.height)


def _signed(world: World, key: KeyPair, *payloads: Payload) -> list[bytes]:
    """One owner's transactions of one block."""
    first = world.state.account(key.public).nonce
    return [world.sign(key, payload, nonce=first + n) for n, payload in enumerate(payloads)]


def _registered(world: World, owner: KeyPair, node: KeyPair) -> Register:
    start = world.height + 2
    proof = sign_registration(node, world.chain_id, owner.public, start)
    return Register(node.public, start, proof)


def _twice(world: World, view: int = 1, by: int = 0) -> VoteEvidence:
    """Node `by` notarized two blocks in a view."""
    node = node_key(by)
    one, two = (
        sign_vote(node, world.chain_id, Kind.NOTARIZE, view, mark(block), 0) for block in (1, 2)
    )
    return from_votes(node.public, one, two)


# -- stake that comes back


def _windows() -> list[Scene]:
    """STAKE-2: epochs of 4 blocks of half a second; both 2 blocks and 9 seconds must pass."""
    world = _founded(3, 2, epoch_blocks=4, unbonding=[2, 9])
    world.do(ALICE, Unbond("work", 70))
    early = Scene(world, "stake is on its way back")
    early.case("before its epoch begins", "STAKE-2 FEE-2", world.sign(ALICE, Withdraw()))
    twice = _signed(world, ALICE, Unbond("work", 1), Unbond("vote", 5), Unbond("work", 2))
    early.case("entries of one bucket and epoch are one", "STAKE-1", *twice)
    _to(world, 5)
    world.do(ALICE, Unbond("work", 30))
    _to(world, 10)
    late = Scene(world, "the epoch of an entry has begun")
    withdrawal, over = world.sign(ALICE, Withdraw()), 8 * 500 + 9000
    for name, height, time_ms in (
        ("the blocks are over, the time is not", 11, over),
        ("the time is over, the blocks are not", 10, over + 1),
        ("both are over, the later entry's are not", 11, over + 1),
    ):
        late.case(name, "STAKE-2", withdrawal, height=height, time_ms=time_ms)
    return [early, late]


def _entries() -> Scene:
    """STAKE-1: as many entries as there may be."""
    world = _founded(2, 2, epoch_blocks=2)
    for _ in range(limits.UNBONDINGS - 1):
        world.do(ALICE, Unbond("vote", 1))
        world.wait(1)
    world.do(ALICE, Unbond("vote", 1))
    scene = Scene(world, "as many entries as there may be")
    for name, rules, payload in (
        ("more of an entry that is there", "STAKE-1", Unbond("vote", 2)),
        ("an entry too many", "STAKE-1 FEE-2", Unbond("work", 2)),
    ):
        scene.case(name, rules, world.sign(ALICE, payload))
    return scene


def _held_back() -> list[Scene]:
    """STAKE-3: two validators of about 1000 each, so 666 units move in an epoch."""
    world = _founded(2, 2, epoch_blocks=4)
    _to(world, 3)
    first = Scene(world, "the last block of an epoch of two validators")
    for name, amount in (("all that unbinds leaves the set", 666), ("a unit of it stays", 667)):
        unbond = _signed(world, ALICE, Unbond("vote", amount), Unbond("work", 10))
        first.case(name, "STAKE-3 EPOCH-4", *unbond)
    world.block(world.sign(ALICE, Unbond("vote", 1000)))
    world.do(ALICE, Unbond("work", 10))
    _to(world, 7)
    second = Scene(world, "the last block of the next epoch")
    second.case("what has left the set waits no longer", "STAKE-3 EPOCH-4")
    more = world.sign(BOB, Unbond("vote", 700))
    second.case("another's stake would leave too, after the first", "STAKE-3 EPOCH-4", more)
    return [first, second]


# -- nodes that vote


def _nodes() -> Scene:
    world = _founded(3, 2, epoch_blocks=4, vote_stake_min=1000)
    scene = Scene(world, "who may vote for an owner")
    new = node_key(9)
    registered = _registered(world, BOB, new)
    for name, rules, payloads in (
        ("a new node before its first height", "STAKE-4 TX-8", (registered, Nominate(new.public))),
        ("a node that is not registered", "STAKE-4 FEE-2", (Nominate(new.public),)),
        ("with the least stake", "STAKE-4", (Unbond("vote", 1), Nominate(node_key(1).public))),
        ("with less", "STAKE-4 FEE-2", (Unbond("vote", 2), Nominate(node_key(1).public))),
        ("a revoked node", "STAKE-4", (Revoke(node_key(1).public), Nominate(node_key(1).public))),
        ("revoked twice", "STAKE-5", (Revoke(node_key(1).public), Revoke(node_key(1).public))),
        ("revoked, and not registered", "STAKE-5 FEE-2", (Revoke(new.public),)),
        ("revoked, and not the nominee", "STAKE-5", (registered, Revoke(new.public))),
        (
            "replaced by a new node",
            "STAKE-4 STAKE-5",
            (registered, Nominate(new.public), Revoke(node_key(1).public)),
        ),
    ):
        scene.case(name, rules, *_signed(world, BOB, *payloads))
    convicted = world.sign(STRANGER, _twice(world, by=1))
    nominated = world.sign(BOB, Nominate(node_key(1).public))
    scene.case("a convicted node", "STAKE-4 SLASH-3", convicted, nominated)
    return scene


# -- evidence


def _votes() -> Scene:
    world = _founded(3, 2, epoch_blocks=4)
    scene = Scene(world, "two votes of a validator")
    node, block, view = node_key(1), mark("block"), 2

    def sworn(kind: Kind, name: bytes, key: KeyPair = node, at: int = view) -> Sworn:
        vote = sign_vote(key, world.chain_id, kind, at, name, 1)
        return Sworn(vote.kind, vote.hash, vote.signature)

    two = sworn(Kind.NOTARIZE, mark("other"))
    for name, rules, first, second in (
        ("finalize and nullify", "SLASH-1", (Kind.FINALIZE, block), (Kind.NULLIFY, NOTHING)),
        ("notarize and nullify", "SLASH-1", (Kind.NOTARIZE, block), (Kind.NULLIFY, NOTHING)),
        ("notarize twice the same", "SLASH-1", (Kind.NOTARIZE, block), (Kind.NOTARIZE, block)),
        ("finalize two blocks", "SLASH-1", (Kind.FINALIZE, block), (Kind.FINALIZE, mark("other"))),
        ("nullify a block", "SLASH-1", (Kind.NULLIFY, block), (Kind.NULLIFY, NOTHING)),
        ("notarize nothing", "SLASH-1", (Kind.NOTARIZE, block), (Kind.NOTARIZE, NOTHING)),
    ):
        evidence = VoteEvidence(node.public, view, sworn(*first), sworn(*second))
        scene.case(name, rules, world.sign(STRANGER, evidence))
    for name, rules, evidence in (
        ("one of another's", "SLASH-1", sworn(Kind.NOTARIZE, block, node_key(0))),
        ("one of another view", "SLASH-1", sworn(Kind.NOTARIZE, block, at=view + 1)),
    ):
        found = VoteEvidence(node.public, view, evidence, two)
        scene.case(name, rules, world.sign(STRANGER, found))
    scene.case("of no validator", "SLASH-1", world.sign(STRANGER, _twice(world, by=2)))
    ahead = world.sign(STRANGER, _twice(world, EPOCH + 1, by=1))
    scene.case("of the next epoch, whose set is known", "SLASH-1 SLASH-2", ahead)
    itself = world.sign(node, _twice(world, by=1))
    scene.case("shown by the validator itself", "SLASH-1", itself)
    scene.case("with a fee", "FEE-3", world.sign(BOB, _twice(world, by=1), fee=10))
    scene.case("with a nonce", "FEE-3", world.sign(BOB, _twice(world, by=1), nonce=1))
    return scene


def _proposals() -> Scene:
    world = _founded(3, 2, epoch_blocks=4)
    scene = Scene(world, "two blocks of a leader")
    base = first_header(world.chain_id, 1, START_MS, mark("root"))

    def shown(
        view: int = 2, other_view: int = 0, second_by: int = 1, key: int = 1, **changes: Any
    ) -> bytes:
        one = replace(base, proposer=node_key(1).public, view=view)
        other = {"proposer": node_key(second_by).public, "view": other_view or view}
        two = replace(one, **{"time_ms": 5, **other, **changes})
        first, second = (
            sign_block(node_key(by), world.chain_id, header, ())
            for by, header in ((1, one), (key, two))
        )
        evidence = ProposalEvidence(first.header, first.signature, second.header, second.signature)
        return world.sign(STRANGER, evidence)

    scene.case("of one view", "SLASH-1 SLASH-3", shown())
    scene.case("of one view and two heights", "SLASH-1", shown(height=9))
    scene.case("of two views", "SLASH-1", shown(other_view=3))
    scene.case("of two leaders", "SLASH-1", shown(second_by=0, key=0))
    scene.case("one signed by another", "SLASH-1", shown(key=0))
    scene.case("of an epoch that has no set yet", "SLASH-1", shown(view=9 * EPOCH))
    return scene


def _limits_of_evidence() -> list[Scene]:
    """SLASH-2: epoch 1 begins after height 4, at 2 s; 2 blocks and 1 s later epoch 0 is past."""
    world = _founded(3, 2, epoch_blocks=4, unbonding=[2, 1])
    _to(world, 5)
    scene = Scene(world, "evidence of the epoch before")
    found = world.sign(STRANGER, _twice(world, by=1))
    over = 4 * 500 + 1000
    for name, height, time_ms in (
        ("in the last block", 6, over + 1),
        ("one block later", 7, over + 1),
        ("one block later, at the last time", 7, over),
    ):
        scene.case(name, "SLASH-2 STAKE-2", found, height=height, time_ms=time_ms)
    world.do(STRANGER, _twice(world, by=1))
    again = Scene(world, "a validator is convicted")
    for name, view in (("in the same epoch", 3), ("in another epoch", EPOCH + 1)):
        evidence = world.sign(STRANGER, _twice(world, view, by=1))
        again.case(name, "SLASH-2 SLASH-3", evidence)
    return [scene, again]


def _burned() -> list[Scene]:
    """SLASH-3: of Bob's entries of epochs 2 and 3 an offence of epoch 2 reaches the second."""
    scenes = []
    for name, ppm in (("nothing", 0), ("a part", 50_000), ("all", limits.RATE_ONE)):
        world = _founded(4, 4, epoch_blocks=4, slash_ppm=ppm)
        world.block(*_signed(world, BOB, Unbond("vote", 11), Unbond("work", 7)))
        _to(world, 5)
        world.do(BOB, Unbond("vote", 21))
        _to(world, 9)
        scene = Scene(world, f"a double vote costs {name}")
        for epoch in (0, 1, 2):
            evidence = world.sign(STRANGER, _twice(world, epoch * EPOCH + 1, by=1))
            scene.case(f"of epoch {epoch}", "SLASH-3", evidence)
        scenes.append(scene)
    return scenes


# -- elections


def _elections() -> list[Scene]:
    """EPOCH-2 to EPOCH-4: three of six owners validate, no more than three may; 1000 units move."""
    world = _founded(6, 3, epoch_blocks=4, validators_max=3, vote_stake_min=900)
    _to(world, 2)
    before = Scene(world, "the last block but one of an epoch")
    before.case("no set is made", "EPOCH-2")
    joined = _signed(world, DAVE, Bond("vote", 2000), Nominate(node_key(3).public))
    less = _signed(world, DAVE, Bond("vote", 1001), Nominate(node_key(3).public))
    _to(world, 3)
    scene = Scene(world, "the last block of an epoch of three seats")
    rules = "EPOCH-2 EPOCH-3 EPOCH-4"
    scene.case("nothing has changed", rules)
    scene.case("a newcomer of the greatest weight: the least leaves first", rules, *joined)
    scene.case("a newcomer with the weight of another", rules, *less)
    weak = _signed(world, DAVE, Bond("vote", 900), Nominate(node_key(3).public))
    scene.case("a newcomer who weighs less than all", rules, *weak)
    scene.case("stake without a nomination", rules, world.sign(DAVE, Bond("vote", 2000)))
    for name, amount in (("the least that may be", 100), ("less than may be", 101)):
        unbond = world.sign(ALICE, Unbond("vote", amount))
        scene.case(f"stake shrinks to {name}", rules, unbond)
    scene.case("stake grows", rules, world.sign(CAROL, Bond("vote", 5000)))
    revoked = world.sign(ALICE, Revoke(node_key(0).public))
    scene.case("a validator is revoked", f"{rules} STAKE-5", revoked)
    scene.case("a validator is convicted", f"{rules} SLASH-3", world.sign(STRANGER, _twice(world)))
    moved = _signed(
        world,
        BOB,
        _registered(world, BOB, node_key(9)),
        Nominate(node_key(9).public),
        Revoke(node_key(1).public),
    )
    scene.case("an owner's other node", f"{rules} STAKE-4", *moved)
    world.block(*joined)
    _to(world, 7)
    after = Scene(world, "the last block of an epoch of two seats")
    after.case("the newcomer has its seat", rules)
    return [before, scene, after]


def _small_sets() -> list[Scene]:
    """EPOCH-4 where a third is hardly anything."""
    scenes = []
    for weights in ((2, 1), (2, 2), (3, 3, 1)):
        world = _weighing(*weights, epoch_blocks=2)
        world.wait(1)
        scene = Scene(world, f"validators of {' and '.join(map(str, weights))} units")
        leaves = [
            world.sign(owner_key(index), Revoke(node_key(index).public))
            for index in range(len(weights))
        ]
        scene.case("the first leaves", "EPOCH-4", leaves[0])
        scene.case("all leave", "EPOCH-4", *leaves)
        scenes.append(scene)
    return scenes
