"""Vectors of matching, preparation and segments: sections 11 to 13 of the specification."""

from typing import Any

from msgspec.structs import replace

from scripts.lib.vectors_case import (
    ALL,
    NODES,
    NONE,
    Scene,
    active,
    by_worker,
    fresh,
    ledger_file,
    moves,
    standby,
    worker,
)
from tdmld.chain.audits import is_drawn
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import (
    Accept,
    Ask,
    AttestGenesis,
    AttestResult,
    Commit,
    Decline,
    Fetched,
    LinkRoots,
    Payload,
    Register,
    Stage,
    StandbyProof,
    sign_registration,
)
from tests.chain.world import GIB, Vice, World, make_genesis, mark, node_key, owner_key


def ledger_match() -> dict[str, Any]:
    """Offers are matched, accepted, declined, given up; boundary 0 is attested."""
    scenes = [_offered(), *_many_offers(), *_two_nodes(), _known_owners(), _matched()]
    scenes += [_again(), _short_deadline(), _last_matching()]
    return ledger_file([*scenes, *_preparing()])


def _offered() -> Scene:
    world = fresh()
    world.submit(**ALL)
    scene, at = Scene(world, "an offer is final"), world.height + 4
    scene.case("a block before the matching", "EXEC-1", height=at - 1)
    scene.case("the matching", "MATCH-1 MATCH-2 MATCH-3 MATCH-4 MATCH-6 DUE-3", height=at)
    scene.case("another beacon", "MATCH-3 MATCH-4", height=at, beacon=mark("other"))
    scene.case("a tainted height matches like any", "MATCH-3 BEACON-5", height=at, tainted=True)
    scene.case("all asks are over", "MATCH-2 MATCH-5 END-2 END-3 STATE-2 STATE-3", height=901)
    late = world.sign(node_key(1), Ask(mark("s"), "cpu", GIB, 1, 1, 4, 950))
    scene.case("a better ask in that block is too late", "EXEC-1 MATCH-2", late, height=at)
    return scene


def _many_offers() -> list[Scene]:
    """Six jobs are due at one height, of which a block executes four."""
    world = World(make_genesis(NODES, validators=1, due_per_block=4))
    asks = [
        world.ask(0),
        world.ask(1, price=900),
        world.ask(2, class_id="gpu", price=10),
        world.ask(3, memory=8 * GIB, standby_slots=9),
        world.ask(4, price=1100),
        world.ask(5, class_id="gpu", price=20),
    ]
    world.block(*asks)
    one = (Stage(1_000_000, GIB),)
    wanted: list[dict[str, Any]] = [
        {"stages": one},  # any: only cpu has a worker and a standby besides
        {"stages": one, "class_id": "gpu"},  # one to work, one to stand by
        {"lanes": 2, "stages": one, **NONE},  # an owner once in each lane
        {"slot_price_max": 8_999},  # too cheap
        {"stages": (Stage(1_000_000, 8 * GIB),)},  # one node alone is large enough
        {"class_id": "tpu"},
    ]
    raws = [
        world.sign(owner_key(0), world.offer(**{**ALL, **changes}), nonce=nonce)
        for nonce, changes in enumerate(wanted)
    ]
    assert all(receipt.ok for receipt in world.block(*raws).receipts)
    scene = Scene(world, "six offers in one block")
    scene.case("four are executed", "DUE-3 MATCH-3 MATCH-4 MATCH-5", height=world.height + 4)
    world.wait(world.parameters.match_delay)
    later = Scene(world, "two of six matchings are left")
    later.case("they are executed", "DUE-3 MATCH-5 END-2")
    return [scene, later]


def _two_nodes() -> list[Scene]:
    """Owner 1 has a second, cheaper node; both may work for one job, but not in one lane."""
    world = World(make_genesis(NODES, validators=1))
    second, start = node_key(9), world.height + 2
    proof = sign_registration(second, world.chain_id, owner_key(1).public, start)
    world.do(owner_key(1), Register(second.public, start, proof))
    cheap = [world.ask(index, price=10, memory=2 * GIB) for index in (1, 9)]
    world.block(*cheap, *(world.ask(index, memory=2 * GIB) for index in range(2, NODES)))
    one = (Stage(1_000_000, GIB),)
    lanes = world.offer(**NONE, lanes=2, stages=one)
    stages = world.offer(**NONE, stages=one * 2)
    raws = [world.sign(owner_key(0), offer, nonce=n) for n, offer in enumerate((lanes, stages))]
    world.block(*raws)
    scene = Scene(world, "an owner has two nodes")
    scene.case("two lanes, two stages", "MATCH-3 MATCH-4 MATCH-6", height=world.height + 4)
    full = World(make_genesis(4, validators=1))
    helper = full.ask(3, standby_slots=3, memory=0)
    full.block(*(full.ask(index, standby_slots=0) for index in (1, 2)), helper)
    two = [full.offer(**NONE, stages=one * count, spec_bytes=count) for count in (2, 2, 1)]
    full.block(*(full.sign(owner_key(0), offer, nonce=n) for n, offer in enumerate(two)))
    used = Scene(full, "one standby for two jobs of two slots and one of one")
    used.case("its slots run out", "MATCH-2 MATCH-4", height=full.height + 4)
    return [scene, used]


def _known_owners() -> Scene:
    """Some have worked well, one has not answered: equal prices, different weights."""
    world = fresh(NODES)
    first = world.submit(**NONE, rounds=1, state_every=1, unsettled=2)
    world.play_until(first)
    job = world.submit(**NONE)
    world.play_until(job, JobStatus.MATCHED)
    world.vices = {worker(world, job, 0): frozenset({Vice.IGNORES_PLACE})}
    while world.job(job).attempt == 0:
        world.play(job)
    world.submit(**NONE, spec_bytes=1)
    world.wait(1)
    scene = Scene(world, "owners have a past")
    for number in range(3):
        beacon = mark("beacon of a past", number)
        rules = "MATCH-2 MATCH-3 MATCH-4 REP-1"
        scene.case(f"matching {number}", rules, height=world.height + 4, beacon=beacon)
    return scene


def _again() -> Scene:
    world = fresh()
    job = world.submit(**ALL)
    world.play_until(job, JobStatus.MATCHED)
    world.block(by_worker(world, job, 0, Decline(job, 0, 0)))
    scene = Scene(world, "a worker has declined")
    scene.case("others are matched", "MATCH-2 MATCH-9", height=world.height + 4)
    return scene


def _matched() -> Scene:
    world = fresh()
    job = world.submit(**ALL)
    world.play_until(job, JobStatus.MATCHED)
    scene, at = Scene(world, "a job is matched"), world.height + 20
    accepts = moves(world, job)
    first, other = worker(world, job, 0), worker(world, job, 1)

    def by(node: bytes, payload: Payload) -> bytes:
        return world.sign(world.keys[node], payload)

    scene.case("one accepts", "MATCH-7 FEE-3", accepts[0])
    scene.case("all accept", "MATCH-7 DUE-1 DUE-2", *accepts)
    scene.case("one accepts twice", "MATCH-7", accepts[0], accepts[0])
    session = mark("session")
    wrong = by(first, Accept(job, 1, 0, session))
    scene.case("an answer to another matching", "MATCH-7", wrong)
    scene.case("another's place", "MATCH-7", by(other, Accept(job, 0, 0, session)))
    scene.case("no such slot", "MATCH-7", by(first, Accept(job, 0, 2, session)))
    scene.case("no session", "MATCH-7", by(first, Accept(job, 0, 0, bytes(32))))
    scene.case("a worker declines", "MATCH-7 MATCH-9", by(first, Decline(job, 0, 0)))
    decline = by(standby(world, job), Decline(job, 0, STANDBY_SLOT))
    scene.case("the standby declines after the others came", "MATCH-9", *accepts[:2], decline)
    scene.case("a decline after one's yes", "MATCH-7", accepts[0], by(first, Decline(job, 0, 0)))
    scene.case("nobody answers", "MATCH-8 MATCH-9 REP-2", height=at)
    scene.case("an answer in the block of the deadline", "EXEC-1 MATCH-8", accepts[0], height=at)
    early = world.sign(owner_key(0), Fetched(job))
    scene.case("fetched before anything is there", "JOB-8", early)
    return scene


def _short_deadline() -> Scene:
    world = fresh()
    job = world.submit(**ALL, deadline=world.height + 8)
    world.play_until(job, JobStatus.MATCHED)
    scene = Scene(world, "a matched job with a near deadline")
    scene.case("the deadline", "JOB-6 END-2 END-3", height=world.job(job).deadline)
    return scene


def _last_matching() -> Scene:
    world = fresh(NODES)
    job = world.submit(**NONE, stages=(Stage(1_000_000, GIB),))
    while world.job(job).attempt < 3 or world.job(job).status is not JobStatus.MATCHED:
        world.vices = (
            {worker(world, job, 0): frozenset({Vice.DECLINES})}
            if (world.job(job).status is JobStatus.MATCHED)
            else {}
        )
        world.play(job)
    scene, node = Scene(world, "the fourth matching"), worker(world, job, 0)
    refusal = world.sign(world.keys[node], Decline(job, 3, 0))
    scene.case("is declined", "MATCH-9 END-2 END-3", refusal)
    scene.case("is not answered", "MATCH-8 MATCH-9", height=world.height + 20)
    return scene


def _preparing() -> list[Scene]:
    world = fresh()
    job = world.submit(**ALL)
    world.play_until(job, JobStatus.PREPARING)
    scene, at = Scene(world, "a job is prepared"), world.height + 120
    raws = moves(world, job)
    scene.case("one attests", "JOB-1", raws[0])
    scene.case("worker and standby agree", "JOB-2", *raws[:2])
    scene.case("the standby comes first", "JOB-2", raws[1], raws[0])
    scene.case("all agree", "JOB-2 JOB-3 SEG-6 DUE-1", *raws)
    shared, lane = world.state_roots(world.job(job), 0, 0)
    for name, roots in (
        ("another shared root", (mark("x"), lane, mark("data"))),
        ("another lane root", (shared, mark("x"), mark("data"))),
        ("other data", (shared, lane, mark("x"))),
    ):
        lie = AttestGenesis(job, 0, *roots)
        other = world.sign(world.keys[standby(world, job)], lie)
        scene.case(name, "JOB-2 END-1", raws[0], other)
    scene.case("one attests twice", "JOB-1", raws[0], raws[0])
    strange = AttestGenesis(job, 1, shared, lane, mark("data"))
    scene.case("of another slot", "JOB-1", world.sign(world.keys[worker(world, job, 0)], strange))
    scene.case("nobody attests", "JOB-4 END-1 REP-2", height=at)
    world.block(*raws[:3])
    half = Scene(world, "a job is prepared by half")
    half.case("a worker and the standby are late", "JOB-4", height=at)
    half.case("the last one", "JOB-3", raws[3])
    return [scene, half]


# -- segments


def ledger_segments() -> dict[str, Any]:
    """Commitments, links, draws, copies, stalls."""
    scenes = [_committing(), *_linking(), _draws(), _drawn_by_taint()]
    scenes += [_no_draw(), *_copies(), *_stalls()]
    return ledger_file(scenes)


def _committing() -> Scene:
    world = fresh()
    job = active(world, **ALL)
    scene = Scene(world, "nothing is committed")
    raws = moves(world, job)
    node = worker(world, job, 0)
    true = world.true_commit(world.job(job), 0, 0, node)

    def sworn(**changes: Any) -> bytes:
        return world.sign(world.keys[node], replace(true, **changes))

    scene.case("one end commits", "SEG-1 SEG-2 SEG-6", raws[0])
    scene.case("both ends commit", "SEG-2 SEG-5 DUE-1", *raws)
    scene.case("the other end first", "SEG-5", raws[1], raws[0])
    scene.case("twice", "SEG-1", raws[0], raws[0])
    scene.case("the second segment first", "SEG-1", sworn(segment=1))
    scene.case("of another epoch", "SEG-1", sworn(epoch=1))
    scene.case("of another incarnation", "SEG-1", sworn(incarnation=1))
    scene.case("from another shared state", "SEG-1", sworn(start_shared=mark("x")))
    scene.case("from another lane state", "SEG-1", sworn(start_lane=mark("x")))
    scene.case("of another's slot", "SEG-1", sworn(slot=1))
    scene.case("without its link", "SEG-1", sworn(links=()))
    up = (LinkRoots("up", mark("a"), mark("b")),)
    scene.case("with a link that it has not", "SEG-1", sworn(links=up))
    scene.case("without a loss", "SEG-2", sworn(loss=None))
    down = true.links[0]
    for name, link in (
        ("other frames sent", LinkRoots("down", mark("x"), down.received)),
        ("other frames received", LinkRoots("down", down.sent, mark("x"))),
    ):
        scene.case(name, "SEG-4 END-1 REP-2", sworn(links=(link,)), raws[1])
    result = world.sign(world.keys[node], AttestResult(job, mark("x")))
    scene.case("a result before the end", "JOB-7", result)
    genesis = AttestGenesis(job, 0, true.start_shared, true.start_lane, mark("data"))
    again = world.sign(world.keys[node], genesis)
    scene.case("boundary 0 again", "JOB-1", again)
    return scene


def _linking() -> list[Scene]:
    """Three stages: the middle one has two links."""
    world = fresh()
    job = active(world, **NONE, stages=(Stage(1_000_000, GIB),) * 3)
    raws = moves(world, job)
    scene = Scene(world, "three stages")
    scene.case("the middle commits last", "SEG-5 SEG-2", raws[0], raws[2], raws[1])
    scene.case("the middle commits first", "SEG-5", raws[1], raws[0], raws[2])
    node = worker(world, job, 1)
    true = world.true_commit(world.job(job), 1, 0, node)
    swapped = world.sign(world.keys[node], replace(true, links=true.links[::-1]))
    scene.case("links in another order", "SEG-1", swapped)
    up, down = true.links
    lie = replace(true, links=(up, LinkRoots("down", mark("x"), down.received)))
    scene.case(
        "the later link differs", "SEG-4", raws[0], world.sign(world.keys[node], lie), raws[2]
    )
    return [scene]


def _draws() -> Scene:
    world = fresh()
    job = active(world, audit_rate=500_000)
    world.block(*moves(world, job))
    scene, at = Scene(world, "both slots are linked"), world.height + 2

    def draws(beacon: bytes) -> list[bool]:
        return [is_drawn(beacon, False, world.job(job), slot, 0) for slot in (0, 1)]

    rules = "AUDIT-1 AUDIT-2 AUDIT-5 AUDIT-6 AUDIT-7 AUDIT-8"
    for name, wanted in (
        ("none is drawn", [False, False]),
        ("the first is drawn", [True, False]),
        ("both are drawn", [True, True]),
    ):
        beacon = next(b for n in range(1000) if draws(b := mark("beacon", n)) == wanted)
        scene.case(name, rules, height=at, beacon=beacon)
        if not any(wanted):
            tainted = "the same beacon at a tainted height"
            scene.case(tainted, f"{rules} BEACON-5", height=at, beacon=beacon, tainted=True)
    return scene


def _drawn_by_taint() -> Scene:
    """The height between is tainted, that of the draw is not."""
    world = fresh()
    job = active(world, audit_rate=1, audit_budget=7_000 * 8)
    world.block(*moves(world, job))
    world.block(tainted=True)
    scene = Scene(world, "linked, then a tainted height")
    scene.case("an untainted height draws both", "AUDIT-1 AUDIT-5 BEACON-6")
    return scene


def _no_draw() -> Scene:
    world = fresh()
    job = active(world, **NONE)
    world.block(*moves(world, job))
    scene = Scene(world, "a job without audits is linked")
    scene.case("a tainted height", "AUDIT-1 BEACON-5", height=world.height + 2, tainted=True)
    return scene


def _copies() -> list[Scene]:
    world = fresh()
    job = active(world, **NONE, state_every=1, unsettled=2, rounds=2)
    world.block(*moves(world, job))
    linked = Scene(world, "copies are due")
    linked.case("the keys and the draws", "SEG-8 AUDIT-1", height=world.height + 2)
    early = StandbyProof(job, 0, 0, 0, 0, mark("x"))
    helper, node = standby(world, job), worker(world, job, 0)
    linked.case("a proof before its key", "SEG-9", world.sign(world.keys[helper], early))
    short = fresh()
    last = active(short, **NONE, rounds=1)
    late = Scene(short, "a copy is due after the last segment")
    late.case("it is committed", "SEG-2", moves(short, last)[0])
    world.wait(2)
    proofs = moves(world, job, StandbyProof)
    keyed = Scene(world, "the keys are known")
    keyed.case("the standby proves", "SEG-9", proofs[0])
    keyed.case("the worker speaks first", "SEG-9", world.sign(world.keys[node], early))
    keyed.case("twice", "SEG-9", proofs[0], proofs[0])
    other = replace(early, incarnation=1)
    keyed.case("of another incarnation", "SEG-9", world.sign(world.keys[helper], other))
    bystander = next(k for k in world.keys if k not in (helper, node))
    keyed.case("by a stranger", "SEG-9", world.sign(world.keys[bystander], early))
    segment = world.state.segment(job, 0, 0)
    assert segment is not None
    keyed.case("at the end of the window", "SEG-9", proofs[0], height=segment.proof_until)
    true = replace(early, keyed_hash=mark("keyed", segment.proof_key, 0, 0))
    keyed.case(
        "both prove the same",
        "SEG-9 SETTLE-2",
        proofs[0],
        world.sign(world.keys[node], true),
    )
    lie = world.sign(world.keys[node], early)
    keyed.case("both prove different states", "SEG-9 SETTLE-2", proofs[0], lie)
    return [linked, keyed, late]


def _stalls() -> list[Scene]:
    world = fresh()
    job = active(world, **NONE)
    world.block(moves(world, job)[0])
    behind = Scene(world, "one slot is behind")
    behind.case("the one that is ahead", "JOB-5", height=world.height + 60)
    behind.case("it never commits", "JOB-5 VAC-2 VAC-4 REP-2", height=world.height + 120)
    behind.case("the deadline of the job", "JOB-5", height=world.job(job).deadline)
    world = fresh()
    job = active(world, **NONE)
    even = Scene(world, "no slot is ahead")
    even.case("both stop", "JOB-3 JOB-5 END-1", height=world.height + 120)
    world = fresh(settle_window=200)
    job = active(world, **NONE, rounds=6)
    node = worker(world, job, 1)
    for _ in range(4):
        world.block(*moves(world, job, Commit)[:1])
    limit = Scene(world, "a slot is at its limit, its neighbour is silent")
    more = replace(world.true_commit(world.job(job), 0, 3, worker(world, job, 0)), segment=4)
    limit.case("the window of the silent one", "SEG-7 JOB-5", height=world.height + 120)
    limit.case("it commits beyond its limit", "SEG-1", by_worker(world, job, 0, more))
    late = world.true_commit(world.job(job), 1, 0, node)
    limit.case("the neighbour comes", "SEG-5 SEG-6", by_worker(world, job, 1, late))
    return [behind, even, limit]
