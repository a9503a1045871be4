"""Vectors of rings, lanes, rounds, weights and split jobs: sections 11 to 13."""

from typing import Any

from msgspec.structs import replace

from scripts.lib.vectors_case import (
    NONE,
    Scene,
    active,
    by_worker,
    ledger_file,
    standby,
    worker,
)
from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
)
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import (
    AttestContributions,
    AttestGenesis,
    AttestResult,
    Commit,
    LaneMode,
    Stage,
)
from tests.chain.world import GIB, World, make_genesis, mark, node_key, owner_key

ONE = (Stage(1_000_000, GIB),)
DILOCO: dict[str, Any] = {"lane_mode": LaneMode.DILOCO, "stages": ONE, **NONE}
SPLIT: dict[str, Any] = {"privacy": "split", "ring": True, **NONE}


def ledger_lanes() -> dict[str, Any]:
    """What fits together, who is cast, whose contributions are in."""
    return ledger_file([*_offers(), _ring(), *_lanes(), *_rounds(), *_split()])


def _world(nodes: int = 8) -> World:
    world = World(make_genesis(nodes, validators=1))
    world.block(*(world.ask(index, standby_slots=9) for index in range(nodes)))
    return world


def _sworn(world: World, job: bytes, slot: int, number: int = 0) -> Commit:
    return world.true_commit(world.job(job), slot, number, worker(world, job, slot))


def _commit(world: World, job: bytes, slot: int, number: int = 0, **changes: Any) -> bytes:
    return by_worker(world, job, slot, replace(_sworn(world, job, slot, number), **changes))


def _hold(world: World, job: bytes, slot: int, *lanes: int, number: int = 0) -> bytes:
    said = AttestContributions(job, 0, slot, number, lanes)
    return by_worker(world, job, slot, said)


def _offers() -> list[Scene]:
    world = _world()
    scene = Scene(world, "offers with lanes")

    def offer(name: str, rules: str, **changes: Any) -> None:
        scene.case(name, rules, world.sign(owner_key(0), world.offer(**changes)))

    offer("a ring", "OFFER-5 OFFER-7", ring=True)
    offer("a ring of one stage", "OFFER-7", ring=True, stages=ONE)
    offer("weights", "OFFER-2 OFFER-4", lanes=2, lane_weights=(1, 3), audit_budget=112_000)
    offer("weights, too few audits", "OFFER-2", lanes=2, lane_weights=(1, 3), audit_budget=111_999)
    offer("a weight of 0", "OFFER-1", lane_weights=(0,))
    offer("a weight of 65", "OFFER-1", lane_weights=(65,))
    offer("two weights of one lane", "OFFER-7", lane_weights=(1, 1))
    offer("17 lanes", "OFFER-1", lanes=17, lane_weights=(1,) * 16)
    offer("one lane that meets others", "OFFER-7", lane_mode=LaneMode.SYNC)
    offer("two single lanes", "OFFER-7", lanes=2, lane_mode=LaneMode.SINGLE)
    offer("diloco", "OFFER-4 OFFER-5", **DILOCO, lanes=3)
    offer("diloco of one round", "OFFER-7", **DILOCO, lanes=3, rounds=1)
    offer("split", "OFFER-4 OFFER-5 OFFER-7", **SPLIT)
    offer("split without a ring", "OFFER-7", **{**SPLIT, "ring": False})
    offer("split in two lanes", "OFFER-7", **SPLIT, lanes=2)
    weighted = {"lanes": 2, "lane_weights": (1, 2), "stages": ONE, **NONE}
    world.submit(**weighted, slot_price_max=10_000)
    cast = Scene(world, "weights are cast")
    cast.case("twice the work for twice the price", "MATCH-1 MATCH-3", height=world.height + 4)
    return [scene, cast]


def _ring() -> Scene:
    world = _world()
    job = active(world, **NONE, ring=True)
    world.block(_commit(world, job, 0))
    scene = Scene(world, "a ring of two stages")
    scene.case("both links agree", "SEG-1 SEG-4 SEG-5", _commit(world, job, 1))
    up, down = _sworn(world, job, 1).links
    for name, links in {
        "the link up differs": (replace(up, sent=mark("x")), down),
        "the link down differs": (up, replace(down, sent=mark("x"))),
        "in another order": (down, up),
        "one link only": (up,),
    }.items():
        scene.case(name, "SEG-1 SEG-4", _commit(world, job, 1, links=links))
    return scene


def _lanes() -> list[Scene]:
    world = _world()
    one = active(world, audit_rate=1, audit_budget=500_000, lanes=2, stages=ONE)
    two = active(world, **NONE, lanes=2, stages=ONE)
    poor = active(world, audit_rate=1, audit_budget=7_000, lanes=2, stages=ONE)
    world.block(*(_commit(world, job, 0) for job in (one, two, poor)))
    scene = Scene(world, "lanes that meet at every step")
    other = {"end_shared": mark("other")}
    scene.case("both agree", "SEG-4 SEG-5 SEG-11", _commit(world, one, 1))
    scene.case("other states", "SEG-11", _commit(world, one, 1, **other))
    scene.case("other states, no audits", "SEG-11", _commit(world, two, 1, **other))
    (link,) = _sworn(world, one, 1).links
    wrong = (replace(link, received=mark("x")),)
    scene.case("other frames", "SEG-4", _commit(world, one, 1, links=wrong))
    given = {"contribution": mark("x")}
    scene.case("a contribution", "ROUND-1", _commit(world, one, 1, **given))
    world.block(*(_commit(world, job, 1, **other) for job in (one, poor)))
    drawn, at = Scene(world, "lanes differ"), world.height + 2
    drawn.case("both are drawn, or one cannot be", "AUDIT-1 AUDIT-3 AUDIT-16", height=at)
    return [scene, drawn]


def _rounds() -> list[Scene]:
    world = _world()
    job = active(world, **DILOCO, lanes=3, rounds=3)
    two = active(world, **DILOCO, lanes=2, rounds=3)
    scene = Scene(world, "nothing is committed")
    scene.case("without a contribution", "ROUND-1", _commit(world, job, 0, contribution=b""))
    scene.case("a commitment", "ROUND-1 ROUND-3", _commit(world, job, 0))
    scene.case("nothing to hold", "ROUND-2", _hold(world, job, 0, 1))
    world.block(*(_commit(world, job, slot) for slot in (0, 1)))
    world.block(*(_commit(world, two, slot) for slot in (0, 1)))
    some = Scene(world, "two of three have committed")
    some.case("one is held", "ROUND-2 ROUND-3", _hold(world, job, 0, 1))
    some.case("two are ready", "ROUND-3 ROUND-4", _hold(world, job, 0, 1), _hold(world, job, 1, 0))
    some.case("its own", "ROUND-2", _hold(world, job, 0, 0))
    some.case("one that has not committed", "ROUND-2", _hold(world, job, 0, 1, 2))
    some.case("out of order", "ROUND-2", _hold(world, job, 2, 1, 0))
    some.case("twice", "ROUND-2", _hold(world, job, 0, 1), _hold(world, job, 0, 1))
    some.case("no round", "ROUND-2", _hold(world, job, 0, 1, number=2))
    wrong = AttestContributions(job, 0, 0, 0, (1,))
    some.case("by another", "ROUND-2", by_worker(world, job, 1, wrong))
    late = replace(wrong, epoch=1)
    some.case("of another epoch", "ROUND-2", by_worker(world, job, 0, late))
    some.case("the next segment", "ROUND-5", _commit(world, job, 0, 1))
    some.case("both of two", "ROUND-3 ROUND-4", _hold(world, two, 0, 1), _hold(world, two, 1, 0))
    gone = Leave(job, 0, 1, world.state.slot(job, 1).incarnation, LeaveReason.DISK)  # type: ignore[union-attr]
    world.block(_hold(world, job, 0, 1), _hold(world, job, 1, 0))
    ready = Scene(world, "two of three are ready")
    ready.case("the third one comes", "ROUND-3", _commit(world, job, 2))
    ready.case("and is in", "ROUND-4", _commit(world, job, 2), _hold(world, job, 0, 1, 2))
    ready.case("one gives up", "ROUND-7", by_worker(world, job, 1, gone))
    ready.case("time is up", "ROUND-4", height=world.height + 15)
    world.wait(15)
    decided = Scene(world, "two of three are in")
    decided.case("too late", "ROUND-2", _hold(world, job, 0, 1, 2))
    decided.case("the late one commits", "ROUND-3", _commit(world, job, 2))
    decided.case("the next segment", "ROUND-5", _commit(world, job, 0, 1))
    decided.case("one gives up", "ROUND-7", by_worker(world, job, 1, gone))
    return [scene, some, ready, decided]


def _split() -> list[Scene]:
    world = _world()
    world.submit(**SPLIT)
    at = world.height + 4
    cast = Scene(world, "a split job is offered")
    cast.case("slot 0 is the source's", "MATCH-1 MATCH-2 MATCH-3 OFFER-7", height=at)
    job = world.submit(**SPLIT)
    world.play_until(job, JobStatus.PREPARING)
    prepared = Scene(world, "a split job is prepared")
    roots = (mark("shared"), mark("lane"), mark("data"))
    own = AttestGenesis(job, 0, *roots)
    prepared.case("the source alone", "JOB-1 JOB-2", by_worker(world, job, 0, own))
    holder = world.keys[standby(world, job)]
    prepared.case("not the standby", "JOB-1", world.sign(holder, own))
    world.play_until(job, JobStatus.ACTIVE)
    world.play(job, tainted=True)
    going = Scene(world, "a split job is active")
    going.case("no copy of its own", "SEG-2 AUDIT-1", height=world.height + 2)
    leave = Leave(job, 0, 0, world.state.slot(job, 0).incarnation, LeaveReason.DISK)  # type: ignore[union-attr]
    going.case("the source gives up", "OFFER-7 END-1", by_worker(world, job, 0, leave))
    world.play_until(job, JobStatus.FINISHING)
    done = Scene(world, "a split job is done")
    said = AttestResult(job, mark("result"))
    done.case("one word is enough", "JOB-7", world.sign(node_key(0), said))
    done.case("nobody else's", "JOB-7", by_worker(world, job, 1, said))
    return [cast, prepared, going, done]
