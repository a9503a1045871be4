"""Vectors of money, nodes, asks and offers: sections 9 to 11 of the specification."""

from typing import Any

from msgspec.structs import replace

from scripts.lib.vectors_case import START_MS, Scene, ledger_file
from tdmld.chain import limits
from tdmld.chain.blocks import Kind, first_header, sign_block, sign_vote
from tdmld.chain.crypto import KeyPair
from tdmld.chain.slashing import from_votes
from tdmld.chain.transactions import (
    DIAL_OPEN,
    DIAL_PAIR,
    Accept,
    Ask,
    Bond,
    DialReceipt,
    Fetched,
    Nominate,
    Offer,
    ProposalEvidence,
    Register,
    Return,
    Revoke,
    Stage,
    Transfer,
    Unbond,
    VoteEvidence,
    Withdraw,
    sign_receipt,
    sign_registration,
)
from tests.chain.world import BALANCE, FEE, GIB, World, make_genesis, mark, node_key, owner_key

ALICE, BOB = owner_key(0), owner_key(1)


def ledger_money() -> dict[str, Any]:
    """Owner transactions, asks and offers over the state of genesis."""
    world = World(make_genesis(nodes=3, validators=1))
    scenes = [_money(world), _nodes(world), *_asked(), _offers(world), *_stakes(), *_jail()]
    return ledger_file(scenes)


def _money(world: World) -> Scene:
    scene = Scene(world, "money at genesis")

    def pay(amount: int, to: KeyPair = BOB, **header: int) -> bytes:
        return world.sign(ALICE, Transfer(to.public, amount), **header)

    scene.case("an empty block", "EXEC-1 STATE-1")
    scene.case("a transfer", "TX-6 FEE-1 FEE-4 STATE-5", pay(700))
    scene.case("a transfer to oneself", "TX-6", pay(700, ALICE))
    scene.case("a transfer to an owner without an account", "TX-6 STATE-1", pay(700, owner_key(9)))
    scene.case("all that the fee leaves", "TX-6", pay(BALANCE - FEE))
    scene.case("more than the fee leaves", "TX-6 FEE-2", pay(BALANCE - FEE + 1))
    scene.case("a transfer of nothing", "TX-6 FEE-2", pay(0))
    scene.case("a nonce ahead", "FEE-1", pay(1, nonce=1))
    scene.case("a fee below the floor", "FEE-1", pay(1, fee=FEE - 1))
    scene.case("a fee above the balance", "FEE-1", pay(1, fee=BALANCE + 1))
    scene.case("a fee of all the balance", "FEE-1 FEE-2", pay(1, fee=BALANCE))
    scene.case("expired", "TX-5 FEE-1", pay(1, expiry=7), height=8)
    scene.case("in the last block before it expires", "TX-5", pay(1, expiry=8), height=8)
    scene.case("the same twice", "EXEC-1 FEE-1", pay(1), pay(1))
    newcomer = owner_key(9)
    scene.case(
        "transactions see those before them",
        "EXEC-1",
        world.sign(newcomer, Transfer(BOB.public, 1)),
        pay(1000, newcomer),
        world.sign(newcomer, Transfer(BOB.public, 900)),
        pay(5, nonce=1),
    )
    scene.case("stake that votes", "TX-7", world.sign(ALICE, Bond("vote", 300)))
    scene.case("stake that works", "TX-7", world.sign(BOB, Bond("work", 300)))
    scene.case("another bucket", "TX-7 FEE-2", world.sign(ALICE, Bond("rest", 300)))
    scene.case("a stake of nothing", "TX-7 FEE-2", world.sign(ALICE, Bond("work", 0)))
    scene.case("more stake than money", "TX-7 FEE-2", world.sign(ALICE, Bond("work", BALANCE)))
    return scene


def _stakes() -> list[Scene]:
    """Validators: stake that comes back, nodes that vote, evidence, the end of an epoch."""
    world = World(make_genesis(nodes=3, validators=1, epoch_blocks=4, unbonding=[2, 1]))
    scene = Scene(world, "validators at genesis")
    for name, rules, payload in (
        ("stake that votes comes back", "STAKE-1", Unbond("vote", 400)),
        ("stake that works comes back", "STAKE-1", Unbond("work", 400)),
        ("more than is bound", "STAKE-1 FEE-2", Unbond("vote", 1001)),
        ("nothing comes back", "STAKE-1 FEE-2", Unbond("vote", 0)),
        ("another bucket comes back", "STAKE-1 FEE-2", Unbond("rest", 1)),
        ("nothing is unbound", "STAKE-2 FEE-2", Withdraw()),
        ("a node votes", "STAKE-4", Nominate(node_key(0).public)),
        ("another owner's node votes", "STAKE-4 FEE-2", Nominate(node_key(1).public)),
        ("a node is revoked", "STAKE-5", Revoke(node_key(0).public)),
        ("another owner's node is revoked", "STAKE-5 FEE-2", Revoke(node_key(1).public)),
    ):
        scene.case(name, rules, world.sign(ALICE, payload))
    unstaked = world.sign(BOB, Nominate(node_key(1).public))
    scene.case("a node without vote stake votes", "STAKE-4 FEE-2", unstaked)
    ask = Ask(mark("session"), "cpu", GIB, 1000, 1, 4, 8)
    scene.case(
        "a revoked node asks",
        "STAKE-5",
        world.sign(BOB, Revoke(node_key(1).public)),
        world.sign(node_key(1), ask),
    )
    node, chain = node_key(0), world.chain_id

    def votes(view: int, *kinds: Kind) -> VoteEvidence:
        first, second = (
            sign_vote(node, chain, kind, view, bytes(32) if kind is Kind.NULLIFY else mark(n), 0)
            for n, kind in enumerate(kinds)
        )
        return from_votes(node.public, first, second)

    base = first_header(chain, 1, START_MS, mark("root"))
    rows = [
        sign_block(node, chain, replace(base, view=5, proposer=node.public, time_ms=n), ())
        for n in (1, 2)
    ]
    one, two = rows
    proposals = ProposalEvidence(one.header, one.signature, two.header, two.signature)
    twice = votes(5, Kind.NOTARIZE, Kind.NOTARIZE)
    stranger = owner_key(9)
    for name, rules, found in (
        ("two votes of a kind", "SLASH-1 SLASH-3", [twice]),
        ("nullify and finalize", "SLASH-1", [votes(5, Kind.NULLIFY, Kind.FINALIZE)]),
        ("notarize and finalize", "SLASH-1", [votes(5, Kind.NOTARIZE, Kind.FINALIZE)]),
        ("two blocks", "SLASH-1", [proposals]),
        ("a block and itself", "SLASH-1", [replace(proposals, second=proposals.first)]),
        ("of another view", "SLASH-1", [replace(twice, view=6)]),
        ("of an epoch to come", "SLASH-2", [votes(9 << 32, Kind.NOTARIZE, Kind.NOTARIZE)]),
        ("twice in an epoch", "SLASH-2", [twice, proposals]),
    ):
        raws = [world.sign(stranger, evidence) for evidence in found]
        scene.case(f"evidence: {name}", rules, *raws)
    world.do(ALICE, Unbond("vote", 200))
    world.wait(2)
    edge = Scene(world, "the last block of an epoch")
    edge.case("the set after the next is fixed", "EPOCH-2 EPOCH-3")
    edge.case(
        "a newcomer",
        "EPOCH-3 EPOCH-4",
        world.sign(BOB, Bond("vote", 5000)),
        world.sign(BOB, Nominate(node_key(1).public), nonce=1),
    )
    slashed = world.sign(stranger, twice)
    edge.case("evidence reaches what unbinds", "SLASH-3", slashed)
    world.wait(6)
    over = Scene(world, "an unbonding period is over")
    withdrawal = world.sign(ALICE, Withdraw())
    over.case("one block too early", "STAKE-2", withdrawal, height=10)
    over.case("what is over comes back", "STAKE-2", withdrawal, height=11)
    return [scene, edge, over]


def _jail() -> list[Scene]:
    """Leaders that miss their turns, and one that comes back."""
    world = World(make_genesis(nodes=5, validators=4, epoch_blocks=30))
    one, other = node_key(3), node_key(2)
    start = Scene(world, "nobody was passed over yet")
    for name, passed in (
        ("no view", 0),
        ("a view", 1),
        ("three views", 3),
        ("as many views as are counted", limits.ABSENCES),
        ("more views than are counted", limits.ABSENCES + 9),
    ):
        start.case(f"{name} was passed over", "JAIL-1 LEAD-3", passed=passed)
    scenes = [start]
    for turns in (limits.JAIL_MISSES - 1, limits.JAIL_MISSES):
        world = World(make_genesis(nodes=5, validators=4, epoch_blocks=30))
        world.away = frozenset({one.public})
        while _missed(world) < turns:
            world.block()
        world.away = frozenset()
        world.wait(29 - world.height)
        scene = Scene(world, f"the last block of an epoch: {turns} turns were missed")
        for passed in (0, 1, 3, 4, 5):
            scene.case(f"{passed} views were passed over", "JAIL-1 JAIL-2 JAIL-3", passed=passed)
        scenes.append(scene)

    many = World(make_genesis(nodes=5, validators=4, epoch_blocks=30))
    many.away = frozenset({one.public, other.public})
    many.wait(29)
    outage = Scene(many, "the last block of an epoch: a third was absent")
    outage.case("nobody is jailed", "JAIL-2 JAIL-3")
    scenes.append(outage)

    world = World(make_genesis(nodes=5, validators=4, epoch_blocks=30))
    world.away = frozenset({one.public})
    world.wait(29)
    end = Scene(world, "the last block of an epoch: one was absent")
    end.case("it is jailed", "JAIL-2 JAIL-3 EPOCH-2")
    scenes.append(end)
    world.wait(1)
    jailed = Scene(world, "a node is jailed")
    back = world.sign(one, Return(30))
    jailed.case("it returns", "JAIL-4 FEE-3", back)
    jailed.case("it returns twice", "JAIL-4", back, world.sign(one, Return(30), expiry=99))
    jailed.case("it answers another jailing", "JAIL-4", world.sign(one, Return(29)))
    jailed.case("another node returns", "JAIL-4", world.sign(other, Return(30)))
    jailed.case("another node returns from nothing", "JAIL-4", world.sign(other, Return(0)))
    jailed.case("nobody's key returns", "JAIL-4", world.sign(node_key(9), Return(0)))
    jailed.case("its owner returns", "JAIL-4", world.sign(owner_key(3), Return(30)))
    jailed.case("it returns with a fee", "FEE-3", world.sign(one, Return(30), fee=FEE))
    jailed.case("it returns with a nonce", "FEE-3", world.sign(one, Return(30), nonce=1))
    jailed.case("it returns too late", "TX-5", world.sign(one, Return(30), expiry=30))
    revoked = world.sign(owner_key(3), Revoke(one.public))
    jailed.case("it is revoked and returns", "STAKE-5 FEE-3", revoked, back)
    votes = [sign_vote(one, world.chain_id, Kind.NOTARIZE, 5, mark(n), 0) for n in (1, 2)]
    accused = world.sign(ALICE, from_votes(one.public, *votes))
    jailed.case("it is convicted and returns", "SLASH-3 JAIL-4", accused, back)
    jailed.case("views of an epoch are passed over before its first block", "JAIL-1", passed=4)
    world.wait(29)
    still = Scene(world, "the last block of the epoch after")
    still.case("it was absent again, and is jailed already", "JAIL-2 JAIL-3")
    still.case("it returned just before", "JAIL-2 JAIL-3 JAIL-4", back)
    scenes += [jailed, still]
    world.away = frozenset()
    world.block()
    world.away = frozenset({other.public})
    world.wait(29)
    third = Scene(world, "the last block of an epoch: a third would not lead")
    third.case("all of the next set lead", "JAIL-2 JAIL-3")
    third.case("it returned just before, so the others lead", "JAIL-3 JAIL-4", back)
    return [*scenes, third]


def _missed(world: World) -> int:
    found = world.state.absences(0)
    return 0 if found is None else max(found.missed)


def _nodes(world: World) -> Scene:
    scene = Scene(world, "nodes and asks at genesis")

    def registration(
        node: KeyPair, height: int, *, signer: KeyPair | None = None, owner: KeyPair = ALICE
    ) -> bytes:
        proof = sign_registration(signer or node, world.chain_id, ALICE.public, height)
        return world.sign(owner, Register(node.public, height, proof))

    new, most = node_key(9), limits.DEADLINE_BLOCKS
    scene.case("a node from the next height on", "TX-8", registration(new, 2))
    scene.case("a node from the latest height on", "TX-8", registration(new, 1 + most))
    scene.case("a node from this height on", "TX-8 FEE-2", registration(new, 1))
    scene.case("a node from too late on", "TX-8 FEE-2", registration(new, 2 + most))
    scene.case("a proof of another node", "TX-8", registration(new, 5, signer=node_key(8)))
    scene.case("a proof for another owner", "TX-8", registration(new, 5, owner=BOB))
    scene.case("the owner's own key", "TX-8", registration(ALICE, 5))
    scene.case("a node that is bound", "TX-8", registration(node_key(1), 5))

    def ask(**changes: object) -> bytes:
        fields: dict[str, Any] = {
            "session": mark("session"),
            "class_id": "cpu",
            "memory": GIB,
            "price": 1000,
            "audit_capacity": 1,
            "standby_slots": 4,
            "until_height": 900,
        }
        header = {"fee": changes.pop("fee", 0), "nonce": changes.pop("nonce", 0)}
        return world.sign(node_key(1), Ask(**{**fields, **changes}), **header)

    scene.case("an ask", "ASK-1 ASK-4 STATE-2 FEE-3", ask())
    scene.case("an ask for this height alone", "ASK-2", ask(until_height=1))
    scene.case("an ask for as long as may be", "ASK-2", ask(until_height=1001))
    scene.case("an ask for longer", "ASK-2", ask(until_height=1002))
    scene.case("an ask that is over", "ASK-2", ask(until_height=4), height=5)
    scene.case("an ask replaced in its block", "ASK-5", ask(), ask(until_height=901, price=1))
    scene.case("an ask repeated", "ASK-2", ask(), ask())
    scene.case("an ask of any class", "ASK-3", ask(class_id="any"))
    scene.case("an ask of no class", "ASK-3", ask(class_id=""))
    scene.case("the dearest ask", "ASK-3", ask(price=limits.PRICE))
    scene.case("too dear an ask", "ASK-3", ask(price=limits.PRICE + 1))
    scene.case("too much memory", "ASK-3", ask(memory=limits.MEMORY_BYTES + 1))
    scene.case("too many audits", "ASK-3", ask(audit_capacity=limits.AUDIT_CAPACITY + 1))
    scene.case("an ask with a fee", "FEE-3", ask(fee=FEE))
    scene.case("an ask with a nonce", "FEE-3", ask(nonce=1))
    stranger = world.sign(node_key(9), Ask(mark(1), "cpu", 1, 1, 1, 1, 9))
    scene.case("an ask of a key that is not registered", "ASK-1", stranger)
    scene.case(
        "an ask before the node's first height",
        "ASK-1 EXEC-1",
        registration(new, 9),
        world.sign(new, Ask(mark(1), "cpu", 1, 1, 1, 1, 9)),
    )
    nobody = world.sign(node_key(1), Accept(mark("no job"), 0, 0, mark("session")))
    scene.case("a node speaks of no job", "FEE-3", nobody)
    scene.case("an owner speaks of no job", "JOB-8", world.sign(ALICE, Fetched(mark("no job"))))
    return scene


def _asked() -> list[Scene]:
    """What is free is rare (ASK-5), and a matching, which is not, does not change that."""
    world = World(make_genesis(nodes=3, validators=1))
    world.wait(1)
    world.block(world.ask(1, until_height=7))
    pause = -(-world.parameters.epoch_blocks // limits.ASKS)
    scene = Scene(world, "a node has asked")
    again = world.ask(1, until_height=150)
    scene.case("it asks again too soon", "ASK-5", again, height=2 + pause - 1)
    scene.case("it asks again", "ASK-4 ASK-5", again, height=2 + pause)
    job = world.submit()
    offered = Scene(world, "a node has asked, and a job is offered")
    offered.case("a matching burns a part of the deposit", "MATCH-2 MATCH-5 END-3", height=7)
    offered.case("an ask that is over, and young", "MATCH-2 ASK-5", height=8)
    offered.case("an ask that is over for long", "MATCH-2 ASK-5", height=2 + pause)
    assert not world.job(job).final
    poor = World(make_genesis(nodes=3, validators=1, offer_deposit=9))
    poor.submit()
    small = Scene(poor, "a job with a small deposit is offered")
    small.case("the part is rounded up", "MATCH-2", height=5)
    return [scene, offered, small, *_dialled()]


def _dialled() -> list[Scene]:
    """What an ask may say of how its node was reached, and what a matching makes of it."""
    world = _behind_routers()
    scene = Scene(world, "nodes that dial each other")
    chain = world.chain_id

    def told(witness: int, kind: int = DIAL_OPEN, height: int = 3, session: int = 1) -> DialReceipt:
        node, carrier = node_key(1).public, mark("session", session)
        return sign_receipt(node_key(witness), chain, node, carrier, kind, height)

    open_ = sorted((told(2), told(3)), key=lambda receipt: receipt.witness)
    pair = told(4, DIAL_PAIR)
    for name, rules, receipts in (
        ("dialled by two", "ASK-6 ASK-7", open_),
        ("dialled by two, connected with one", "ASK-6 ASK-7", [*open_, pair]),
        ("another order", "ASK-6", [pair, *open_]),
        ("one receipt twice", "ASK-6", [told(2), told(2)]),
        ("one witness, both kinds", "ASK-6 ASK-7", [told(2), told(2, DIAL_PAIR)]),
        ("a receipt of its own", "ASK-6", [told(1)]),
        ("a receipt of nobody", "ASK-6", [told(9)]),
        ("a receipt of a height to come", "ASK-6", [told(2, height=5)]),
        ("a receipt of this height", "ASK-6", [told(2, height=4)]),
        ("a receipt for another session", "ASK-6", [told(2, session=2)]),
        ("a forged receipt", "ASK-6", [replace(told(2), signature=told(3).signature)]),
    ):
        scene.case(name, rules, world.ask(1, receipts=tuple(receipts)), height=4)
    aged = world.ask(1, receipts=(told(2),), until_height=1000)
    last = 3 + world.parameters.epoch_blocks
    scene.case("a receipt of an epoch ago", "ASK-6", aged, height=last)
    scene.case("an older one", "ASK-6", aged, height=last + 1)
    made = [scene]
    for name, known in (("nobody is open", []), ("one is open", open_), ("a pair", [pair])):
        world = _behind_routers()
        asks = (world.ask(n) for n in range(2, 6))
        world.block(world.ask(1, price=1, receipts=tuple(known)), *asks)
        world.submit()
        scene = Scene(world, f"a job is offered, {name}")
        scene.case("the slots are cast", "MATCH-3", height=world.height + 4)
        made.append(scene)
    return made


def _behind_routers() -> World:
    world = World(make_genesis(nodes=6, validators=1, dial_receipts=2))
    world.wait(3)
    return world


_BAD_OFFERS: dict[str, tuple[str, dict[str, object]]] = {
    "no spec": ("OFFER-1", {"spec_bytes": 0}),
    "too large a spec": ("OFFER-1", {"spec_bytes": limits.SPEC_BYTES + 1}),
    "no lanes": ("OFFER-1", {"lanes": 0}),
    "too many slots": ("OFFER-1", {"lanes": 64, "stages": (Stage(1, 1),) * 5}),
    "no rounds": ("OFFER-1", {"rounds": 0}),
    "no steps": ("OFFER-1", {"segment_steps": 0}),
    "copies too rare": ("OFFER-1", {"unsettled": 3, "state_every": 2}),
    "D too large": ("OFFER-1", {"unsettled": limits.UNSETTLED + 1}),
    "no tokens": ("OFFER-1", {"tokens": 0}),
    "a stage without parameters": ("OFFER-1", {"stages": (Stage(0, 1),)}),
    "a stage without memory": ("OFFER-1", {"stages": (Stage(1, 0),)}),
    "no class": ("OFFER-1", {"class_id": ""}),
    "a privacy mode of another version": ("OFFER-1", {"privacy": "split"}),
    "too high a price": ("OFFER-1", {"slot_price_max": limits.PRICE + 1}),
    "too high a rate": ("OFFER-1", {"audit_rate": limits.RATE_ONE + 1}),
    "audits for nothing": ("OFFER-2", {"audit_price": 0}),
    "too small an audit budget": ("OFFER-2", {"audit_budget": 4 * 7_000 - 1}),
    "a deadline that is here": ("OFFER-3", {"deadline": 1}),
    "a deadline too far away": ("OFFER-3", {"deadline": 2 + limits.DEADLINE_BLOCKS}),
    "an unknown source": ("OFFER-3", {"source": node_key(9).public}),
    "more than the balance": ("OFFER-4", {"slot_price_max": 2_000_000}),
}


def _offers(world: World) -> Scene:
    scene = Scene(world, "offers at genesis")

    def offer(**changes: object) -> bytes:
        wanted: Offer = world.offer(**changes)
        return world.sign(ALICE, wanted)

    scene.case("an offer", "OFFER-4 OFFER-5 STATE-3 STATE-4 DUE-1 DUE-4", offer())
    scene.case("an offer without audits", "OFFER-2 OFFER-4", offer(audit_rate=0, audit_budget=0))
    free = offer(audit_rate=0, audit_budget=0, audit_price=0, slot_price_max=0, standby_price=0)
    scene.case("a sealed job", "OFFER-1 OFFER-5", offer(privacy="sealed"))
    scene.case("an offer that pays nothing", "OFFER-1 OFFER-2", free)
    scene.case("the smallest audit budget", "OFFER-2", offer(audit_budget=4 * 7_000))
    scene.case("two lanes, the last copy short", "OFFER-4", offer(lanes=2, rounds=5))
    last = offer(deadline=1 + limits.DEADLINE_BLOCKS)
    scene.case("the latest deadline", "OFFER-3 DUE-4", last)
    for name, (rule, changes) in _BAD_OFFERS.items():
        scene.case(name, f"{rule} FEE-2", offer(**changes))
    return scene
