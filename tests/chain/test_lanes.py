"""Rings, lanes that meet at every step, their weights, and jobs whose source works itself."""

import pytest
from blake3 import blake3
from msgspec.structs import replace

from tdmld.chain.events import StatesDiffer
from tdmld.chain.records import CloseReason, Job, JobStatus, ProofStatus, SegmentStatus
from tdmld.chain.segments import audit_list_root, links_of, neighbours, other_end
from tdmld.chain.transactions import (
    DIAL_OPEN,
    AttestGenesis,
    AttestResult,
    LaneMode,
    Stage,
    StandbyProof,
    sign_receipt,
)
from tests.chain.test_jobs import standby, worker
from tests.chain.test_segments import segment, sworn
from tests.chain.world import GIB, Vice, World, make_genesis, mark, node_key, owner_key

QUIET: dict[str, object] = {"audit_rate": 0}
ONE = Stage(1_000_000, GIB)
SPLIT: dict[str, object] = {"privacy": "split", "ring": True, "stages": (ONE,) * 3}


def world_of() -> World:
    world = World(make_genesis(9))
    world.all_ask(9)
    return world


def active(**changes: object) -> tuple[World, bytes]:
    world = world_of()
    job = world.submit(**changes)
    world.play_until(job, JobStatus.ACTIVE)
    return world, job


def job_with(**changes: object) -> Job:
    world = World()
    return world.job(world.submit(**changes))


# -- links


def test_every_link_has_one_other_end_that_leads_back() -> None:
    for changes in (
        {"stages": (ONE,) * 4},
        {"stages": (ONE,) * 2, "ring": True},
        {"stages": (ONE,) * 3, "ring": True, "lanes": 3},
        {"stages": (ONE,), "lanes": 16},
        {"stages": (ONE,) * 2, "lanes": 2, "lane_mode": LaneMode.DILOCO, "lane_weights": (1, 1)},
    ):
        job = job_with(**QUIET, **changes)
        for slot in range(job.slots):
            for link in links_of(job, slot):
                end, name = other_end(job, slot, link)
                assert name in links_of(job, end)
                assert other_end(job, end, name) == (slot, link)
                assert end in neighbours(job, slot)


def test_links_stand_in_the_order_up_down_lanes() -> None:
    job = job_with(**QUIET, lanes=3, stages=(ONE,) * 3, ring=True)
    assert links_of(job, 0) == ("up", "down", "lane1", "lane2")
    assert links_of(job, 4) == ("up", "down", "lane0", "lane2")
    assert neighbours(job, 4) == (3, 5, 1, 7)
    assert other_end(job, 3, "up") == (5, "down")
    line = job_with(**QUIET, stages=(ONE,) * 2)
    assert [links_of(line, slot) for slot in range(2)] == [("down",), ("up",)]


def test_in_a_ring_of_two_both_links_of_the_pair_are_compared() -> None:
    world, job = active(**QUIET, ring=True)
    world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, 0))
    good = sworn(world, job, 1, 0)
    assert [link.link for link in good.links] == ["up", "down"]
    up, down = good.links
    bad = replace(good, links=(up, replace(down, sent=mark("x"))))
    world.do(world.keys[worker(world, job, 1)], bad)
    assert world.job(job).reason is CloseReason.MISMATCH
    assert "slots 0 and 1" in world.job(job).detail


def test_a_segment_is_linked_when_all_lanes_of_its_stage_have_committed_it() -> None:
    world, job = active(**QUIET, lanes=2)
    for slot, linked in [(0, []), (1, []), (2, [0]), (3, [0, 1, 2, 3])]:
        world.do(world.keys[worker(world, job, slot)], sworn(world, job, slot, 0))
        found = [
            s
            for s in range(4)
            if (r := world.state.segment(job, s, 0)) and r.status is SegmentStatus.LINKED
        ]
        assert found == linked


def test_different_frames_between_lanes_end_the_job() -> None:
    world, job = active(**QUIET, lanes=2)
    good = sworn(world, job, 0, 0)
    assert [link.link for link in good.links] == ["down", "lane1"]
    bad = replace(good, links=(good.links[0], replace(good.links[1], sent=mark("x"))))
    world.do(world.keys[worker(world, job, 0)], bad)
    world.do(world.keys[worker(world, job, 2)], sworn(world, job, 2, 0))
    assert world.job(job).reason is CloseReason.MISMATCH


def test_the_whole_job_runs_in_lanes_and_in_a_ring() -> None:
    for changes in ({"lanes": 2}, {"ring": True}, {"lanes": 2, "ring": True}):
        world, job = active(**changes)
        assert world.play_until(job).reason is CloseReason.FETCHED


# -- lanes that disagree about the shared state


def differ(world: World, job: bytes, slot: int, number: int = 0) -> None:
    """The slot's worker cheats, and comes to another shared state than its siblings."""
    node = worker(world, job, slot)
    world.vices[node] = frozenset({Vice.CHEATS})
    steps = world.sworn_steps(world.job(job), slot, number, node)
    seal = blake3(world.salt(node, slot, number) + steps).digest()
    bad = replace(sworn(world, job, slot, number), end_shared=mark("other"), seal=seal)
    world.do(world.keys[worker(world, job, slot)], bad)


def test_where_lanes_differ_all_of_them_are_audited() -> None:
    world, job = active(lanes=2, audit_rate=1, audit_budget=500_000)
    for slot in (0, 1, 3):
        world.do(world.keys[worker(world, job, slot)], sworn(world, job, slot, 0))
    assert not segment(world, job, 0, 0).forced
    differ(world, job, 2)
    assert any(isinstance(event, StatesDiffer) for event in world.events)
    assert [segment(world, job, slot, 0).forced for slot in range(4)] == [True, False] * 2
    world.wait(world.parameters.draw_delay)
    statuses = [segment(world, job, slot, 0).status for slot in range(4)]
    assert statuses == ["drawn", "undrawn"] * 2
    before = world.job(job).epoch
    for _ in range(12):
        world.play(job)
    assert world.job(job).epoch == before + 1, "the audit of the wrong one rolls the job back"
    assert world.job(job).status is JobStatus.ACTIVE


def test_a_segment_that_was_not_drawn_is_drawn_when_a_late_lane_differs() -> None:
    world, job = active(lanes=3, audit_rate=1, audit_budget=500_000, stages=(ONE,))
    # All three need each other's links; so they are linked at once and forced before any draw.
    for slot in (0, 1):
        world.do(world.keys[worker(world, job, slot)], sworn(world, job, slot, 0))
    differ(world, job, 2)
    assert all(segment(world, job, slot, 0).forced for slot in range(3))


def test_without_audits_lanes_that_differ_end_the_job() -> None:
    world, job = active(**QUIET, lanes=2)
    world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, 0))
    differ(world, job, 2)
    found = world.job(job)
    assert found.reason is CloseReason.MISMATCH
    assert found.detail == "segment 0: lanes differ in stage 0, and the offer wants no audits"


def test_without_a_budget_left_lanes_that_differ_end_the_job() -> None:
    world, job = active(lanes=2, audit_rate=1, audit_budget=7_000, audit_price=7_000)
    world.do(world.keys[worker(world, job, 1)], sworn(world, job, 1, 0))
    world.do(world.keys[worker(world, job, 3)], sworn(world, job, 3, 0))
    world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, 0))
    differ(world, job, 2)
    world.wait(world.parameters.draw_delay)
    found = world.job(job)
    assert found.reason is CloseReason.MISMATCH
    assert "lanes differ in stage 0" in found.detail
    assert "was not audited" in found.detail


# -- weights


def test_a_heavier_lane_is_paid_and_audited_for_more() -> None:
    world = world_of()
    before = world.balance(0)
    weighted = {"lanes": 2, "lane_weights": (1, 3), "stages": (ONE,)}
    job = world.submit(**weighted, audit_rate=1_000_000, audit_budget=200_000)
    locked = world.job(job)
    assert locked.escrow == 4 * ((1 + 3) * 20_000 + 2 * 500)
    assert before - world.balance(0) == locked.locked + 10
    world.play_until(job, JobStatus.ACTIVE)
    prices = [world.state.slot(job, slot).worker.price for slot in range(2)]  # type: ignore[union-attr]
    assert prices == [10_000, 30_000]
    world.play_until(job)
    paid = [world.state.audit(job, slot, 0).paid for slot in range(2)]  # type: ignore[union-attr]
    assert paid == [7_000, 21_000]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"lane_mode": LaneMode.SYNC}, "lane_mode"),
        ({"lanes": 2, "lane_mode": LaneMode.SINGLE}, "lane_mode"),
        ({"lanes": 2, "lane_weights": (1,)}, "lane_weights"),
        ({"lane_weights": (0,)}, "weight of a lane"),
        ({"lane_weights": (65,)}, "weight of a lane"),
        ({"ring": True, "stages": (ONE,)}, "ring"),
        ({"privacy": "split"}, "split"),
        ({**SPLIT, "lanes": 2}, "split"),
        ({"lanes": 2, "lane_mode": LaneMode.DILOCO, "rounds": 1}, "rounds"),
        ({"lanes": 2, "lane_weights": (1, 9), "audit_budget": 50_000}, "audit_budget"),
    ],
)
def test_an_offer_says_what_fits_together(changes: dict[str, object], rule: str) -> None:
    world = World()
    assert rule in world.refused(owner_key(0), world.offer(**changes))


# -- paths


def test_both_ends_of_every_link_need_a_path() -> None:
    """Node 4 is open to everybody, the others are closed; the cheapest ones come first."""
    world = World(make_genesis(10, dial_receipts=1))
    node, session = node_key(4).public, mark("session", 4)
    receipt = sign_receipt(node_key(9), world.chain_id, node, session, DIAL_OPEN, world.height)
    raws = [world.ask(index, price=100 * index, memory=64 * GIB) for index in (1, 2, 3, 5, 6)]
    raws.append(world.ask(4, price=400, memory=64 * GIB, receipts=(receipt,)))
    assert all(found.ok for found in world.block(*raws).receipts)

    def cast(**changes: object) -> list[int]:
        job = world.submit(**QUIET, **changes)
        world.wait(world.parameters.match_delay)
        found = world.job(job)
        if found.status is not JobStatus.MATCHED:
            assert found.reason is CloseReason.NO_MATCH
            return []
        nodes = {node_key(index).public: index for index in range(10)}
        return [nodes[worker(world, job, slot)] for slot in range(found.slots)]

    three, diloco = (ONE,) * 3, {"lane_mode": LaneMode.DILOCO, "lane_weights": (1, 1)}
    assert cast(stages=three) == [1, 4, 2]
    assert cast(stages=three, ring=True) == [], "the third one has no path to the first"
    assert cast(stages=(ONE,) * 2, ring=True) == [1, 4]
    assert cast(stages=(ONE,), lanes=2) == [1, 4], "lanes that meet at every step need a path"
    assert cast(stages=(ONE,), lanes=3) == []
    assert cast(stages=(ONE,), lanes=2, **diloco) == [1, 2], "those that meet rarely need none"


# -- split


def test_in_a_split_job_the_source_works_in_slot_0_for_nothing() -> None:
    world, job = active(**SPLIT)
    assert worker(world, job, 0) == node_key(0).public
    assert world.state.slot(job, 0).worker.price == 0  # type: ignore[union-attr]
    facts = world.state.facts(owner_key(0).public)
    done = world.play_until(job)
    assert done.reason is CloseReason.FETCHED
    assert world.state.facts(owner_key(0).public) == facts, "nothing is counted for it"
    assert world.state.earnings(job, owner_key(0).public).total == 0
    for number in range(4):
        own = segment(world, job, 0, number)
        assert own.proof is ProofStatus.NONE
        assert own.status is SegmentStatus.UNDRAWN
        assert segment(world, job, 1, number).settled


def test_nobody_else_is_the_source_and_the_source_is_nobody_else() -> None:
    world, job = active(**SPLIT)
    nodes = [worker(world, job, slot) for slot in range(3)]
    assert nodes.count(node_key(0).public) == 1
    assert standby(world, job) != node_key(0).public


def test_a_split_job_needs_an_ask_of_its_source() -> None:
    world = World(make_genesis(9))
    world.block(*(world.ask(index) for index in range(1, 9)))
    job = world.submit(**SPLIT)
    world.play_until(job)
    assert world.job(job).reason is CloseReason.NO_MATCH


def test_boundary_0_of_the_own_slot_is_attested_by_the_source_alone() -> None:
    world = world_of()
    job = world.submit(**SPLIT)
    world.play_until(job, JobStatus.PREPARING)
    roots = mark("shared"), mark("lane"), mark("data")
    holder = world.keys[standby(world, job)]
    assert "attested by" in world.refused(holder, AttestGenesis(job, 0, *roots))
    world.do(node_key(0), AttestGenesis(job, 0, *roots))
    state = world.state.slot(job, 0)
    assert state is not None
    assert state.genesis is not None


def test_even_tainted_heights_draw_no_audit_of_the_own_slot_and_nobody_copies_it() -> None:
    world, job = active(**SPLIT, audit_rate=1_000_000, audit_budget=400_000)
    for _ in range(6):
        world.play(job, tainted=True)
    assert world.state.audit(job, 0, 0) is None
    assert world.state.audit(job, 1, 0) is not None
    proof = StandbyProof(job, 0, 0, 0, 1, mark("proof"))
    assert "waits for no proof" in world.refused(world.keys[standby(world, job)], proof)


def test_the_result_of_a_split_job_is_what_the_source_says() -> None:
    world, job = active(**SPLIT)
    world.play_until(job, JobStatus.FINISHING)
    other = worker(world, job, 2)
    assert "no holder" in world.refused(world.keys[other], AttestResult(job, mark("r")))
    world.do(node_key(0), AttestResult(job, mark("r")))
    assert world.job(job).result == mark("r")


def test_a_split_job_whose_source_is_silent_is_refunded_and_what_is_cleared_is_paid() -> None:
    world, job = active(**SPLIT, **QUIET, rounds=8)
    world.play_until(job, JobStatus.ACTIVE)
    world.stop_before[node_key(0).public] = 2
    found = world.play_until(job)
    assert (found.status, found.reason) == (JobStatus.REFUNDED, CloseReason.FAULT)
    owner = world.state.owner_of(worker(world, job, 1))
    assert owner is not None
    assert world.state.earnings(job, owner).worker > 0


def test_a_list_root_covers_the_contribution() -> None:
    world, job = active(
        **QUIET, lanes=2, lane_mode=LaneMode.DILOCO, lane_weights=(1, 1), stages=(ONE,)
    )
    world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, 0))
    one = segment(world, job, 0, 0)
    assert len(one.contribution) == 32
    other = replace(one, contribution=mark("other"))
    record, steps = world.job(job), mark("steps")
    assert audit_list_root(record, 0, 0, one, steps) != audit_list_root(record, 0, 0, other, steps)
