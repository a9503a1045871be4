"""Vectors of vacancies, rollbacks and accusations: section 12."""

from typing import Any

from msgspec.structs import replace

from scripts.lib.vectors_case import (
    ALL,
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
from tdmld.chain.codec import encode
from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
    Present,
    Stall,
    Witness,
)
from tdmld.chain.limits import INCARNATIONS, ROLLBACKS, STALLS, STANDBY_SLOT, STANDBY_TURNS
from tdmld.chain.records import JobStatus, SlotState
from tdmld.chain.state import u32
from tdmld.chain.transactions import (
    Accept,
    AuditOpen,
    Decline,
    LaneMode,
    Payload,
    Stage,
)
from tests.chain.world import GIB, Vice, World, make_genesis, mark

LINE: dict[str, Any] = {"stages": (Stage(1_000_000, GIB),) * 3, "rounds": 8, **NONE}


def ledger_repairs() -> dict[str, Any]:
    """Who loses a place, who gets it, what is begun anew."""
    return ledger_file(
        [*_vacancies(), *_standbys(), *_nobody(), *_rollbacks(), *_cases(), *_windows()]
    )


def _slot(world: World, job: bytes, slot: int) -> SlotState:
    found = world.state.slot(job, slot)
    assert found is not None
    return found


def _set(world: World, job: bytes, slot: int, **changes: Any) -> None:
    """A slot with other numbers: states that are far away in time."""
    changed = replace(_slot(world, job, slot), **changes)
    world.store[b"s" + job + u32(slot)] = encode(changed)


def _running(nodes: int = 8, **offer: Any) -> tuple[World, bytes]:
    """Three stages at work; some segments are settled."""
    world = fresh(nodes)
    job = active(world, **{**LINE, **offer})
    while _slot(world, job, 0).settled < 1 or _slot(world, job, 0).committed < 3:
        world.play(job)
    return world, job


def _leave(world: World, job: bytes, slot: int, turn: int = 0) -> Leave:
    return Leave(job, world.job(job).epoch, slot, turn, LeaveReason.DEVICE)


def _asked(world: World, job: bytes, slot: int, payload: Payload) -> bytes:
    """Signed by whom the chain asks for the slot."""
    return by_worker(world, job, slot, payload)


def _vacancies() -> list[Scene]:
    world, job = _running()
    running = Scene(world, "a job at work")
    leave = by_worker(world, job, 1, _leave(world, job, 1))
    running.case("a worker leaves", "VAC-17 VAC-2 VAC-3 VAC-4 VAC-5 VAC-7 CASE-7", leave)
    other = by_worker(world, job, 0, _leave(world, job, 1))
    running.case("another one says so", "CASE-1", other)
    running.case("it leaves twice", "CASE-1", leave, leave)
    wrong = by_worker(world, job, 1, _leave(world, job, 1, turn=1))
    running.case("of another incarnation", "CASE-1", wrong)
    both = by_worker(world, job, 2, _leave(world, job, 2))
    running.case("two leave", "VAC-2 VAC-5", leave, both)
    gone = worker(world, job, 1)
    world.block(leave)
    vacant = Scene(world, "a slot is vacant")
    accept = Accept(job, 1, 1, mark("session"))
    vacant.case("the standby takes it", "VAC-8 VAC-9 VAC-12 VAC-7", _asked(world, job, 1, accept))
    vacant.case("too late", "VAC-11 VAC-12 VAC-4", height=world.height + 20)
    stale = replace(accept, attempt=0)
    vacant.case("with an old turn", "VAC-8", _asked(world, job, 1, stale))
    zero = replace(accept, session=bytes(32))
    vacant.case("without a session", "VAC-9", _asked(world, job, 1, zero))
    vacant.case("by another", "VAC-8", world.sign(world.keys[gone], accept))
    decline = Decline(job, 1, 1)
    vacant.case("it declines", "VAC-10 VAC-4 VAC-5", _asked(world, job, 1, decline))
    number = _slot(world, job, 1).committed
    early = world.true_commit(world.job(job), 1, number, worker(world, job, 1))
    vacant.case("it works before it accepted", "SEG-1", _asked(world, job, 1, early))
    world.block(_asked(world, job, 1, accept))
    taken = Scene(world, "the standby has taken a slot")
    taken.case("it commits", "SEG-1 SEG-5", *moves(world, job)[:2])
    taken.case("the old worker commits", "SEG-1", world.sign(world.keys[gone], early))
    return [running, vacant, taken]


def _standbys() -> list[Scene]:
    world, job = _running()
    world.block(by_worker(world, job, 1, _leave(world, job, 1)))
    world.play(job)
    sought = Scene(world, "the standby's place is vacant")
    sought.case("one is found", "VAC-13 MATCH-4")
    world.block()
    asked = Scene(world, "a node is asked to be the standby")
    key, turn = world.keys[standby(world, job)], world.job(job).standby_turn
    accept = Accept(job, turn, STANDBY_SLOT, mark("session"))
    asked.case("it accepts", "VAC-8 VAC-9", world.sign(key, accept))
    asked.case("with an old turn", "VAC-8", world.sign(key, replace(accept, attempt=0)))
    asked.case("it declines", "VAC-10 VAC-12", world.sign(key, Decline(job, turn, STANDBY_SLOT)))
    asked.case("it says nothing", "VAC-13 VAC-12", height=world.height + 20)
    spent = replace(world.job(job), standby_turn=STANDBY_TURNS)
    world.store[b"j" + job] = encode(spent)
    last = Scene(world, "the last standby is asked")
    decline = Decline(job, STANDBY_TURNS, STANDBY_SLOT)
    last.case("it declines", "VAC-10", world.sign(key, decline))
    world.block(world.sign(key, decline))
    none = Scene(world, "no standby is looked for any more")
    none.case("nothing happens", "VAC-13")
    return [sought, asked, last, none, *_unproven()]


def _unproven() -> list[Scene]:
    scenes = []
    for name, vice, of_worker in (
        ("the standby is silent", Vice.LOSES_COPY, False),
        ("a worker does not confirm", Vice.LOSES_COPY, True),
        ("copies differ", Vice.FORGES_COPY, False),
    ):
        world = fresh(8)
        job = active(world, **LINE)
        node = worker(world, job, 0) if of_worker else standby(world, job)
        world.vices[node] = frozenset({vice})
        while _slot(world, job, 0).unproven < 1 or _slot(world, job, 0).settled < 3:
            world.play(job)
        while not world.job(job).repaired and world.job(job).standby is not None:
            before, height = dict(world.store), world.height
            view = world.view
            world.play(job)
        world.store, world.height, world.view = before, height, view
        scene = Scene(world, name)
        scene.case("the second time", "VAC-14 SETTLE-10 VAC-12", *moves(world, job))
        scenes.append(scene)
    return scenes


def _nobody() -> list[Scene]:
    world = World(make_genesis(5, validators=1))
    dear: dict[str, object] = {"price": 1_500}
    none: dict[str, object] = {"standby_slots": 0}
    world.block(*(world.ask(i, **(dear if i == 4 else none)) for i in range(5)))
    job = active(world, **LINE)
    world.play(job)
    world.block(by_worker(world, job, 1, _leave(world, job, 1)))
    alone = Scene(world, "nobody but the standby is left")
    decline = _asked(world, job, 1, Decline(job, 1, 1))
    alone.case("it declines", "VAC-10 VAC-4 VAC-5 END-1", decline)
    _set(world, job, 1, incarnation=INCARNATIONS)
    last = Scene(world, "the last incarnation")
    final = _asked(world, job, 1, Decline(job, INCARNATIONS, 1))
    last.case("it declines", "VAC-4 END-1", final)
    world = World(make_genesis(5, validators=1))
    world.block(*(world.ask(i, **(dear if i == 4 else none)) for i in range(5)))
    lanes = {**LINE, "stages": LINE["stages"][:1], "lanes": 3, "lane_mode": LaneMode.DILOCO}
    job = active(world, **lanes)
    world.play(job)
    world.block(by_worker(world, job, 1, _leave(world, job, 1)))
    lane = Scene(world, "a lane that nobody can take")
    decline = _asked(world, job, 1, Decline(job, 1, 1))
    lane.case("it is lost", "VAC-6 ROUND-3", decline)
    return [alone, last, lane]


def _rollbacks() -> list[Scene]:
    world = fresh(8)
    job = active(world, **{**LINE, **ALL, "audit_budget": 400_000})
    world.vices[worker(world, job, 1)] = frozenset({Vice.CHEATS})
    world.bad_segment = 1
    while not (verdicts := moves(world, job, AuditOpen)) or not any(
        isinstance(payload, AuditOpen) and payload.segment == 1 and payload.slot == 1
        for _, payload in world.moves(job)
    ):
        world.play(job)
    scene = Scene(world, "an auditor found something else")
    rules = "AUDIT-11 VAC-16 VAC-2 VAC-3 VAC-5 VAC-7 SETTLE-8"
    scene.case("it opens its verdict", rules, *verdicts)
    found = [
        (node, replace(said, epoch=ROLLBACKS))
        for node, said in world.moves(job)
        if isinstance(said, AuditOpen)
    ]
    world.store[b"j" + job] = encode(replace(world.job(job), epoch=ROLLBACKS))
    last = Scene(world, "the last epoch")
    signed = [world.sign(world.keys[node], said) for node, said in found]
    last.case("it opens its verdict", "VAC-16 END-1", *signed)
    world = fresh(8)
    job = active(world, **{**LINE, **ALL, "audit_budget": 400_000})
    world.vices[worker(world, job, 0)] = frozenset({Vice.KEEPS_SEAL})
    while (audit := world.state.audit(job, 0, 0)) is None or audit.status != "committed":
        world.play(job)
    sealed = Scene(world, "a worker keeps its seal")
    sealed.case("for too long", "AUDIT-13 VAC-16 VAC-2", height=audit.until)
    world.store[b"j" + job] = encode(replace(world.job(job), epoch=ROLLBACKS))
    spent = Scene(world, "a worker keeps its seal in the last epoch")
    spent.case("for too long", "AUDIT-13 VAC-16 END-1", height=audit.until)
    return [scene, last, sealed, spent]


def _stall(world: World, job: bytes, slot: int, link: str, **changes: Any) -> bytes:
    state = _slot(world, job, slot)
    said = Stall(job, world.job(job).epoch, slot, state.incarnation, state.stalls, link, 9)
    return by_worker(world, job, slot, replace(said, **changes))


def _here(world: World, job: bytes, slot: int) -> bytes:
    state = _slot(world, job, slot)
    opened = 0 if state.case is None else state.case.opened
    return by_worker(world, job, slot, Present(job, 0, slot, state.incarnation, opened))


def _word(world: World, job: bytes, slot: int, delivered: bool, **changes: Any) -> bytes:
    state = _slot(world, job, slot)
    opened = 0 if state.case is None else state.case.opened
    said = Witness(job, 0, slot, state.incarnation, opened, delivered)
    return world.sign(world.keys[standby(world, job)], replace(said, **changes))


def _cases() -> list[Scene]:
    world, job = _running()
    quiet = Scene(world, "nobody is accused")
    quiet.case("a slot waits for the next one", "CASE-2 CASE-3", _stall(world, job, 0, "down"))
    quiet.case("on no link of it", "CASE-2", _stall(world, job, 0, "up"))
    quiet.case("with another number", "CASE-2", _stall(world, job, 0, "down", number=1))
    quiet.case("nobody asked", "CASE-4", _here(world, job, 1))
    quiet.case("no case to witness", "CASE-5", _word(world, job, 1, delivered=True))
    behind = _stall(world, job, 0, "down"), _stall(world, job, 1, "down")
    quiet.case("blame flows on", "CASE-3", *behind)
    first = behind[::-1]
    quiet.case("who waits itself is not accused", "CASE-2", *first)
    mutual = _stall(world, job, 0, "down"), _stall(world, job, 1, "up")
    quiet.case("two accuse each other", "CASE-2 CASE-3", *mutual)
    _set(world, job, 0, stalls=STALLS)
    spent = Scene(world, "a slot has accused too often")
    spent.case("once more", "CASE-2", _stall(world, job, 0, "down"))
    _set(world, job, 0, stalls=0)
    world.block(_stall(world, job, 0, "down"))
    accused = Scene(world, "a slot is accused")
    accused.case("it is there", "CASE-4", _here(world, job, 1))
    accused.case("it is not", "CASE-6 VAC-1 VAC-2", height=world.height + 20)
    accused.case("again", "CASE-2", _stall(world, job, 2, "up"))
    accused.case("too early to witness", "CASE-5", _word(world, job, 1, delivered=True))
    world.block(_here(world, job, 1))
    heard = Scene(world, "the accused is there")
    heard.case("delivered", "CASE-5", _word(world, job, 1, delivered=True))
    heard.case("not delivered", "CASE-5 VAC-2 VAC-5", _word(world, job, 1, delivered=False))
    heard.case("of another case", "CASE-5", _word(world, job, 1, delivered=False, opened=1))
    stranger = by_worker(world, job, 0, Witness(job, 0, 1, 0, world.height - 1, True))
    heard.case("by another", "CASE-5", stranger)
    heard.case("said twice", "CASE-4", _here(world, job, 1))
    heard.case("silence", "CASE-6", height=world.height + 20)
    _set(world, job, 1, delivered=(0, 2, 0))
    third = Scene(world, "the third time of a pair")
    third.case("delivered", "CASE-5 VAC-1 VAC-2", _word(world, job, 1, delivered=True))
    return [quiet, spent, accused, heard, third]


def _windows() -> list[Scene]:
    world, job = _running()
    last = max(_slot(world, job, slot).last_commit for slot in range(3))
    for slot in range(3):
        world.stop_before[worker(world, job, slot)] = _slot(world, job, slot).committed
    while any(_slot(world, job, slot).settled < 3 for slot in range(3)):
        world.play(job)
    even = Scene(world, "everybody stops")
    even.case("a window", "JOB-5", height=last + 60)
    even.case("two windows", "JOB-5 END-1", height=max(last + 120, world.height + 61))
    world, job = _running()
    slow = worker(world, job, 1)
    world.stop_before[slow] = _slot(world, job, 1).committed
    while world.job(job).status is JobStatus.ACTIVE and _slot(world, job, 0).committed < 5:
        world.play(job)
    behind = Scene(world, "one is behind")
    behind.case("its window", "JOB-5 VAC-1 VAC-2", height=_slot(world, job, 1).last_commit + 60)
    return [even, behind]
