"""Vectors of audits, settlement and ends: sections 14 and 15 of the specification."""

from typing import Any

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
from tdmld.chain.accounts import (
    Facts,
)
from tdmld.chain.codec import encode
from tdmld.chain.events import AuditPassed
from tdmld.chain.genesis import genesis_document, genesis_from_document
from tdmld.chain.records import (
    AuditStatus,
    JobStatus,
    ProofStatus,
)
from tdmld.chain.transactions import (
    AttestResult,
    AuditCommit,
    AuditFail,
    AuditOpen,
    Commit,
    Fetched,
    Offer,
    Open,
    Register,
    Stage,
    StandbyProof,
    sign_registration,
)
from tests.chain.world import GIB, STAKE, Vice, World, make_genesis, mark, node_key, owner_key


def ledger_audits() -> dict[str, Any]:
    """Drawn segments: three openings, silence, redraws, waiting."""
    return ledger_file([*_one_audit(), *_no_auditors()])


def _first(world: World, job: bytes, status: AuditStatus) -> None:
    """Play until the audit of slot 0, segment 0, has `status`."""
    for _ in range(100):
        found = world.state.audit(job, 0, 0)
        if found is not None and found.status is status:
            return
        world.play(job)
    raise AssertionError(f"the audit never was {status}")


def _one_audit() -> list[Scene]:
    world = fresh(NODES, segment_window=400)
    job = active(world, **ALL, stages=(Stage(1_000_000, GIB),), rounds=2)
    world.block(*moves(world, job))
    world.wait(2)
    scenes, at = [], (job, 0, 0, 0)
    audit = world.state.audit(job, 0, 0)
    assert audit is not None
    auditor, node = world.keys[audit.auditor], world.keys[worker(world, job, 0)]

    drawn = Scene(world, "an auditor is drawn")
    commits = moves(world, job, AuditCommit)
    drawn.case("it commits", "AUDIT-10", commits[0])
    failing = world.sign(auditor, AuditFail(*at, "frames of segment 0"))
    drawn.case("it gives up", "AUDIT-10", failing)
    drawn.case("it gives up without a word", "AUDIT-10", world.sign(auditor, AuditFail(*at, "")))
    drawn.case("it gives up after it committed", "AUDIT-10", commits[0], failing)
    drawn.case("another speaks for it", "AUDIT-10", world.sign(node, AuditCommit(*at, mark("x"))))
    two = mark("x"), mark("y")
    early = world.sign(node, Open(*at, *two)), world.sign(auditor, AuditOpen(*at, *two))
    drawn.case("the worker opens too early", "AUDIT-10", early[0])
    drawn.case("the auditor opens too early", "AUDIT-10", early[1])
    no_audit = AuditCommit(job, 0, 0, 1, mark("x"))
    drawn.case("a segment without an audit", "AUDIT-10", world.sign(auditor, no_audit))
    old = AuditCommit(job, 1, 0, 0, mark("x"))
    drawn.case("of another epoch", "AUDIT-10", world.sign(auditor, old))
    drawn.case("it stays silent", "AUDIT-14 AUDIT-15 AUDIT-8 REP-2", height=audit.until)
    late = "it commits in the block in which its window ends"
    drawn.case(late, "EXEC-1 AUDIT-14", commits[0], height=audit.until)
    scenes.append(drawn)

    world.block(failing)
    failed = Scene(world, "an auditor gave up")
    failed.case("another owner is drawn", "AUDIT-15 AUDIT-7", height=world.height + 2)
    scenes.append(failed)
    return scenes + _openings() + _last_redraw()


def _openings() -> list[Scene]:
    world = fresh(NODES, segment_window=400)
    job = active(world, **ALL, stages=(Stage(1_000_000, GIB),), rounds=2)
    _first(world, job, AuditStatus.COMMITTED)
    at = (job, 0, 0, 0)
    audit = world.state.audit(job, 0, 0)
    assert audit is not None
    committed = Scene(world, "an auditor has committed")
    committed.case("the worker opens", "AUDIT-10 SEG-3", *moves(world, job, Open))
    wrong = Open(*at, mark("x"), world.steps(world.job(job), 0, 0))
    committed.case("with another salt", "AUDIT-10", by_worker(world, job, 0, wrong))
    stranger = world.sign(world.keys[audit.auditor], wrong)
    committed.case("somebody else opens", "AUDIT-10", stranger)
    committed.case("the worker keeps its seal", "AUDIT-13 END-1 END-2", height=audit.until)
    world.block(*moves(world, job, Open))
    audit = world.state.audit(job, 0, 0)
    assert audit is not None
    opened = Scene(world, "the worker has opened")
    (verdict,) = moves(world, job, AuditOpen)[:1]
    opened.case("the auditor found the same", "AUDIT-11 SETTLE-2", verdict)
    other = AuditOpen(*at, mark("lie"), mark("salt"))
    auditor = world.keys[audit.auditor]
    opened.case("it opens something else", "AUDIT-10", world.sign(auditor, other))
    opened.case("it stays silent", "AUDIT-14 AUDIT-16 REP-2", height=audit.until)
    scenes = [committed, opened, *_verdicts()]
    return scenes


def _verdicts() -> list[Scene]:
    world = fresh(NODES, segment_window=400)
    job = active(world, **ALL, rounds=2)
    world.bad_segment = 1
    world.vices = {worker(world, job, 0): frozenset({Vice.CHEATS})}
    for _ in range(100):
        found = world.state.audit(job, 0, 1)
        if found is not None and found.status is AuditStatus.OPENED:
            break
        world.play(job)
    scene = Scene(world, "the worker has opened a false list")
    mine = [
        world.sign(world.keys[node], payload)
        for node, payload in world.moves(job)
        if isinstance(payload, AuditOpen) and (payload.slot, payload.segment) == (0, 1)
    ]
    rules = "AUDIT-11 AUDIT-12 SETTLE-8 END-1 END-2 END-3 REP-2"
    scene.case("the auditor found another", rules, *mine)
    return [scene]


def _last_redraw() -> list[Scene]:
    world = fresh(NODES, segment_window=400)
    job = active(world, **ALL, stages=(Stage(1_000_000, GIB),), rounds=2)
    world.vices = {key: frozenset({Vice.CANNOT_AUDIT}) for key in world.keys}
    scenes = []
    for attempt, name, outcome in (
        (2, "the third auditor gave up", "a fourth is drawn"),
        (3, "the fourth auditor gave up", "nobody else is drawn"),
    ):
        for _ in range(200):
            found = world.state.audit(job, 0, 0)
            if found is not None and (found.attempt, found.status) == (attempt, AuditStatus.FAILED):
                break
            world.play(job)
        assert found is not None
        scenes.append(Scene(world, name))
        scenes[-1].case(outcome, "AUDIT-15 AUDIT-16", height=found.until)
    return scenes


def _one_auditor(capacity: int = 1, *, named: bool = False, **parameters: int) -> World:
    """A world in which node 5 alone audits, and does nothing else. `named`: it has no stake, but
    genesis names its owner."""
    genesis = make_genesis(NODES, validators=1, segment_window=400, **parameters)
    if named:
        document = genesis_document(genesis)
        stakes = document["work_stakes"]
        assert isinstance(stakes, list)
        stakes.remove([owner_key(5).address, STAKE])
        genesis = genesis_from_document({**document, "auditors": [owner_key(5).address]})
    world = World(genesis)
    audits = {"audit_capacity": capacity, "memory": 0, "standby_slots": 0}
    others = [world.ask(index, audit_capacity=0) for index in range(NODES - 1)]
    world.block(*others, world.ask(NODES - 1, **audits))
    return world


def _no_auditors() -> list[Scene]:
    """Nobody may audit, the only one is busy, gives up, or cannot be paid twice."""
    one: dict[str, Any] = {**ALL, "stages": (Stage(1_000_000, GIB),), "rounds": 1}
    two = {**one, "lanes": 2}

    def linked(world: World, **offer: Any) -> bytes:
        job = active(world, **offer)
        world.block(*moves(world, job))
        return job

    world = _one_auditor(capacity=0)
    linked(world, **one)
    nobody = Scene(world, "nobody audits")
    nobody.case("the draw", "AUDIT-4 SETTLE-2", height=world.height + 2)
    world = _one_auditor(named=True)
    linked(world, **one)
    named = Scene(world, "genesis names the only auditor")
    named.case("the draw", "AUDIT-6 AUDIT-8", height=world.height + 2)
    world = _one_auditor(capacity=2)
    linked(world, **{**two, "audit_rate": 500_000, "audit_budget": 7_000})
    spent = Scene(world, "money for one audit of two")
    spent.case("both are drawn", "AUDIT-3 AUDIT-5", height=world.height + 2, tainted=True)
    world = _one_auditor()
    job = linked(world, **one)
    world.wait(2)
    failing = AuditFail(job, 0, 0, 0, "state")
    world.block(world.sign(node_key(NODES - 1), failing))
    alone = Scene(world, "the only auditor gave up")
    alone.case("nobody is left", "AUDIT-15 AUDIT-16", height=world.height + 2)
    return [nobody, named, spent, alone, _two_nodes(one), *_busy(two)]


def _two_nodes(offer: dict[str, Any]) -> Scene:
    """The only owner that audits has two nodes for it."""
    world = _one_auditor()
    second, start = node_key(9), world.height + 2
    proof = sign_registration(second, world.chain_id, owner_key(5).public, start)
    world.do(owner_key(5), Register(second.public, start, proof))
    world.block(world.ask(9, memory=0, standby_slots=0))
    job = active(world, **offer)
    world.block(*moves(world, job))
    scene = Scene(world, "one owner audits with two nodes")
    for number in range(3):
        beacon = mark("beacon of two nodes", number)
        scene.case(f"draw {number}", "AUDIT-7 AUDIT-8", height=world.height + 2, beacon=beacon)
    return scene


def _busy(two: dict[str, Any]) -> list[Scene]:
    """One auditor at a time for two segments."""
    world = _one_auditor(audit_window=8, open_window=60)
    job = active(world, **two)
    world.block(*moves(world, job))
    linked = Scene(world, "one auditor for two segments")
    linked.case("the draws", "AUDIT-5 AUDIT-9", height=world.height + 2)
    world.wait(2)
    waits = Scene(world, "an audit waits")
    waits.case("the auditor is still busy", "AUDIT-15 AUDIT-9", height=world.height + 2)
    world.block(*moves(world, job, AuditCommit))
    while world.height < linked.height + 8 * 4:
        world.wait(2)
    patient = Scene(world, "an audit has waited for audit_window x D blocks")
    (until,) = {
        audit.until
        for slot in (0, 1)
        if (audit := world.state.audit(job, slot, 0)) and audit.status is AuditStatus.WAITING
    }
    patient.case("it waits on", "AUDIT-15 AUDIT-9", height=until)
    world.wait(2)
    late = Scene(world, "an audit has waited for long")
    late.case("too long", "AUDIT-15 AUDIT-16", height=world.height + 2)
    world = _one_auditor(audit_window=8, open_window=60)
    job = active(world, **two)
    world.block(*moves(world, job))
    world.wait(2)
    for kind in (AuditCommit, Open, AuditOpen):
        world.block(*moves(world, job, kind))
    free = Scene(world, "an audit waits, its auditor is free")
    free.case("it is assigned", "AUDIT-15 AUDIT-8", height=world.height + 2)
    return [linked, waits, patient, late, free]


# -- settlement


def ledger_settle() -> dict[str, Any]:
    """Payment, the end of the work, results, the end of the job."""
    return ledger_file([*_paying(), *_finishing()])


def _paying() -> list[Scene]:
    world = fresh()
    job = active(world, **ALL, rounds=3, state_every=2, unsettled=4)
    for _ in range(60):
        first, second = world.state.slot(job, 0), world.state.segment(job, 0, 1)
        assert first is not None
        if second is not None and second.proof is ProofStatus.EQUAL and first.settled == 0:
            break
        world.play(job)
    scene = Scene(world, "segments are cleared")
    height = world.next_due()
    assert height is not None
    scene.case("the settlements that are due next", "SETTLE-4 SETTLE-5 SETTLE-6", height=height)
    rules = "SETTLE-1 SETTLE-3 SETTLE-7 SETTLE-8 SETTLE-9 JOB-5"
    scene.case("everything up to the stall", rules, height=world.height + 70)
    world = fresh()
    job = active(world, **ALL, rounds=2, state_every=1, unsettled=2)
    world.vices = {standby(world, job): frozenset({Vice.LOSES_COPY})}
    for _ in range(14):
        world.play(job)
    lost = Scene(world, "a standby lost its copies")
    late = "the copy's window ends: the standby is not paid"
    lost.case(late, "SETTLE-1 SETTLE-4 SETTLE-7", height=world.height + 45)
    world = fresh()
    job = active(world, **ALL, rounds=2, state_every=1, unsettled=2, deadline=world.height + 26)
    while not any(isinstance(event, AuditPassed) for event in world.events):
        world.play(job)
    near = Scene(world, "the deadline of a job is near")
    rules = "END-1 END-2 END-3 SETTLE-6 JOB-6"
    near.case("it passes", rules, height=world.job(job).deadline)
    return [scene, lost, near, _at_the_limit(), _rich()]


def _at_the_limit() -> Scene:
    """All slots have D unsettled segments; their stall clocks stand still."""
    world = fresh()
    job = active(world, **NONE, rounds=6, state_every=1, unsettled=2)
    for _ in range(2):
        world.block(*moves(world, job, Commit))
    for _ in range(3):
        world.block(*moves(world, job, StandbyProof))
    height = world.next_due()
    assert height is not None
    scene = Scene(world, "every slot is at its limit")
    rules = "SETTLE-4 SEG-6"
    scene.case("the first settlement starts the stall clocks", rules, height=height)
    return scene


def _rich() -> Scene:
    """A worker's owner whose count of earnings is full."""
    world = fresh()
    job = active(world, **NONE, rounds=1, state_every=1, unsettled=2)
    owner = world.state.owner_of(worker(world, job, 0))
    assert owner is not None
    world.store[b"f" + owner] = encode(Facts(earned=2**63 - 1))
    before = Scene(world, "an owner has earned all that can be counted")
    while world.job(job).status is JobStatus.ACTIVE:
        before = Scene(world, before.name)
        world.play(job)
    before.case("it earns more", "REP-2 SETTLE-9")
    return before


def _finishing() -> list[Scene]:
    world = fresh()
    job = active(world, **NONE, rounds=1, state_every=1, unsettled=2)
    while world.job(job).status is JobStatus.ACTIVE:
        before = Scene(world, "the last settlement is near")
        world.play(job)
    before.case("it comes", "JOB-9 SETTLE-4 SETTLE-6 SETTLE-7")
    finishing = Scene(world, "all is settled")
    results = moves(world, job, AttestResult)
    fetched = world.sign(owner_key(0), Fetched(job))
    helper, last = standby(world, job), worker(world, job, 1)
    finishing.case("one holder attests", "JOB-7", results[0])
    finishing.case("both attest the same", "JOB-7", *results)
    other = world.sign(world.keys[last], AttestResult(job, mark("other")))
    finishing.case("they differ", "JOB-7", results[0], other)
    finishing.case("one attests twice", "JOB-7", results[0], results[0])
    stranger = world.sign(world.keys[worker(world, job, 0)], AttestResult(job, mark("result", job)))
    finishing.case("one who holds nothing", "JOB-7", stranger)
    finishing.case("fetched before it is known", "JOB-8 FEE-2", results[0], fetched)
    finishing.case("known and fetched", "JOB-8 END-2 END-3 STATE-3", *results, fetched)
    finishing.case("fetched twice", "JOB-8", *results, fetched, fetched)
    by_other = world.sign(owner_key(1), Fetched(job))
    finishing.case("fetched by somebody else", "JOB-8", *results, by_other)
    finishing.case("nobody fetches it", "JOB-10 END-2", height=world.height + 2000)
    assert world.keys[helper]
    world.block(*results, fetched)
    closed = Scene(world, "a job is closed")
    closed.case("its nodes speak of it", "FEE-3", results[0])
    more = world.sign(owner_key(0), Fetched(job))
    closed.case("it is fetched again", "JOB-8 FEE-2", more)
    offer: Offer = world.offer(**NONE)
    closed.case("another job", "OFFER-5 STATE-2", world.sign(owner_key(0), offer))
    return [before, finishing, closed]
