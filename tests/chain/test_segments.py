"""Commitments, links, copies and settlement of segments."""

import pytest
from msgspec.structs import replace

from tdmld.chain.events import Paid, ProofChecked, SegmentSettled
from tdmld.chain.records import CloseReason, JobStatus, ProofStatus, Segment, SegmentStatus
from tdmld.chain.transactions import Commit, StandbyProof
from tests.chain.test_jobs import active, standby, started, worker
from tests.chain.world import Vice, World, mark, node_key

QUIET = {"audit_rate": 0}


def sworn(world: World, job: bytes, slot: int, number: int) -> Commit:
    return world.true_commit(world.job(job), slot, number, worker(world, job, slot))


def segment(world: World, job: bytes, slot: int, number: int) -> Segment:
    found = world.state.segment(job, slot, number)
    assert found is not None
    return found


def test_a_commit_must_be_the_next_of_its_slot_by_its_worker() -> None:
    world, job = active(**QUIET)
    good = sworn(world, job, 0, 0)
    mine, other = world.keys[worker(world, job, 0)], world.keys[worker(world, job, 1)]
    assert "does not work in that slot" in world.refused(other, good)
    for changed, rule in [
        ({"segment": 1}, "not the next one: that is 0"),
        ({"slot": 9}, "no slot 9"),
        ({"epoch": 1}, "epoch 1"),
        ({"incarnation": 1}, "incarnation 1"),
        ({"start_shared": mark("x")}, "start state is not the end state"),
        ({"start_lane": mark("x")}, "start state is not the end state"),
        ({"links": ()}, "this slot has down"),
        ({"links": (replace(good.links[0], link="up"),)}, "this slot has down"),
        ({"links": good.links * 2}, "this slot has down"),
        ({"job": mark("none")}, "no job"),
    ]:
        assert rule in world.refused(mine, replace(good, **changed))
    world.do(mine, good)
    assert "not the next one: that is 1" in world.refused(mine, good)
    second = sworn(world, job, 0, 1)
    assert "start state" in world.refused(mine, replace(second, start_shared=good.start_shared))
    world.do(mine, second)


def test_nothing_is_committed_or_proven_before_the_activation_and_after_the_end() -> None:
    world, job = started(**QUIET)
    world.play_until(job, JobStatus.PREPARING)
    mine, holder = world.keys[worker(world, job, 0)], world.keys[standby(world, job)]
    proof = StandbyProof(job, 0, 0, 0, 1, mark("proof"))
    assert "preparing, not active" in world.refused(mine, sworn(world, job, 0, 0))
    assert "preparing, not active" in world.refused(holder, proof)
    world.play_until(job, JobStatus.FINISHING)
    assert "finishing, not active" in world.refused(holder, proof)


def test_a_failing_commit_costs_the_job_nothing() -> None:
    world, job = active(**QUIET)
    before = world.job(job).fee_budget
    bad = replace(sworn(world, job, 0, 0), segment=3)
    world.refused(world.keys[worker(world, job, 0)], bad)
    assert world.job(job).fee_budget == before
    world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, 0))
    assert world.job(job).fee_budget == before - world.parameters.tx_fee


def test_a_slot_stops_at_d_unsettled_segments() -> None:
    world, job = active(**QUIET, rounds=8)
    mine = world.keys[worker(world, job, 0)]
    for number in range(4):
        world.do(mine, sworn(world, job, 0, number))
    assert "wait for a settlement" in world.refused(mine, sworn(world, job, 0, 4))


def test_a_segment_is_linked_when_both_ends_agree() -> None:
    world, job = active(**QUIET)
    world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, 0))
    assert segment(world, job, 0, 0).status is SegmentStatus.COMMITTED
    world.do(world.keys[worker(world, job, 1)], sworn(world, job, 1, 0))
    for slot in range(2):
        assert segment(world, job, slot, 0).status is SegmentStatus.LINKED
        assert segment(world, job, slot, 0).linked == world.height
    world.wait(world.parameters.draw_delay)
    assert segment(world, job, 0, 0).status is SegmentStatus.UNDRAWN


def test_a_middle_stage_is_linked_by_both_neighbours() -> None:
    world = World()
    world.all_ask()
    job = world.submit(**QUIET, stages=world.offer().stages[:1] * 3)
    world.play_until(job, JobStatus.ACTIVE)
    for slot, linked in [(1, []), (0, [0]), (2, [0, 1, 2])]:
        world.do(world.keys[worker(world, job, slot)], sworn(world, job, slot, 0))
        found = [
            s
            for s in range(3)
            if (r := world.state.segment(job, s, 0)) and r.status is SegmentStatus.LINKED
        ]
        assert found == linked


def test_lanes_are_not_linked_to_each_other() -> None:
    world = World()
    world.all_ask()
    job = world.submit(**QUIET, lanes=2)
    world.play_until(job, JobStatus.ACTIVE)
    for slot in (1, 2):
        world.do(world.keys[worker(world, job, slot)], sworn(world, job, slot, 0))
        assert segment(world, job, slot, 0).status is SegmentStatus.COMMITTED


@pytest.mark.parametrize("which", ["sent", "received"])
@pytest.mark.parametrize("slot", [0, 1])
def test_different_frames_on_a_link_end_the_job(which: str, slot: int) -> None:
    world, job = active(**QUIET)
    good = sworn(world, job, slot, 0)
    bad = replace(good, links=(replace(good.links[0], **{which: mark("x")}),))
    world.do(world.keys[worker(world, job, slot)], bad)
    world.do(world.keys[worker(world, job, 1 - slot)], sworn(world, job, 1 - slot, 0))
    found = world.job(job)
    assert (found.status, found.reason) == (JobStatus.REFUNDED, CloseReason.MISMATCH)
    assert not any(isinstance(event, Paid) for event in world.events)
    for party in range(2):
        owner = world.state.owner_of(worker(world, job, party))
        assert owner is not None
        assert world.state.facts(owner).mismatches == 1


def test_a_flipped_frame_later_pays_what_was_clear_before() -> None:
    world, job = active(**QUIET, rounds=8)
    world.bad_segment = 5
    world.vices[worker(world, job, 0)] = frozenset({Vice.FLIPS_FRAME})
    found = world.play_until(job)
    assert found.reason is CloseReason.MISMATCH
    settled = {(e.slot, e.segment) for e in world.events if isinstance(e, SegmentSettled)}
    assert {(s, n) for s in range(2) for n in range(4)} <= settled
    assert all(number < 5 for _, number in settled)
    assert len(settled) == sum(isinstance(e, SegmentSettled) for e in world.events)


# -- copies


def test_the_key_of_a_proof_is_the_beacon_after_the_commit() -> None:
    world, job = active(**QUIET)
    for number in range(2):
        world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, number))
    assert segment(world, job, 0, 0).proof is ProofStatus.NONE
    assert segment(world, job, 0, 1).proof is ProofStatus.WAITING
    assert segment(world, job, 0, 1).proof_key == b""
    proof = StandbyProof(job, 0, 0, 0, 1, mark("proof"))
    assert "not known yet" in world.refused(world.keys[standby(world, job)], proof)
    world.wait(1)
    assert segment(world, job, 0, 1).proof_key == world.beacon


def ready_for_proof(world: World, job: bytes) -> StandbyProof:
    for number in range(2):
        world.do(world.keys[worker(world, job, 0)], sworn(world, job, 0, number))
    world.wait(world.parameters.draw_delay)
    return StandbyProof(job, 0, 0, 0, 1, mark("proof"))


def test_the_standby_proves_first_and_then_the_worker() -> None:
    world, job = active(**QUIET)
    proof = ready_for_proof(world, job)
    mine, holder = world.keys[worker(world, job, 0)], world.keys[standby(world, job)]
    assert "speaks first" in world.refused(mine, proof)
    assert "come from the standby" in world.refused(node_key(0), proof)
    assert "waits for no proof" in world.refused(holder, replace(proof, segment=0))
    assert "not committed" in world.refused(holder, replace(proof, segment=3))
    assert "incarnation 2" in world.refused(holder, replace(proof, incarnation=2))
    world.do(holder, proof)
    assert "has given its proof" in world.refused(holder, proof)
    world.do(mine, proof)
    assert segment(world, job, 0, 1).proof is ProofStatus.EQUAL
    assert "waits for no proof" in world.refused(mine, proof)


def test_a_proof_after_its_window_is_refused() -> None:
    world, job = active(**QUIET)
    proof = ready_for_proof(world, job)
    while world.height + 1 < segment(world, job, 0, 1).proof_until:
        world.block()
    assert "window" in world.refused(world.keys[standby(world, job)], proof)


@pytest.mark.parametrize(
    ("vice", "status", "by_worker"),
    [
        (Vice.FORGES_COPY, ProofStatus.UNEQUAL, False),
        (Vice.LOSES_COPY, ProofStatus.MISSING, False),
        (Vice.LOSES_COPY, ProofStatus.MISSING, True),
    ],
)
def test_a_standby_without_equal_proofs_is_not_paid(
    vice: Vice, status: ProofStatus, by_worker: bool
) -> None:
    world, job = active(**QUIET)
    culprits = [worker(world, job, s) for s in range(2)] if by_worker else [standby(world, job)]
    world.vices = {node: frozenset({vice}) for node in culprits}
    found = world.play_until(job)
    assert found.reason is CloseReason.FETCHED
    assert all(segment(world, job, slot, 1).proof is status for slot in range(2))
    payments = world.state.payments(job)
    assert sum(earned.standby for earned in payments.values()) == 0
    assert sum(earned.worker for earned in payments.values()) == 2 * 4 * 10_000
    checked = [event.equal for event in world.events if isinstance(event, ProofChecked)]
    assert checked == ([False] * 4 if vice is Vice.FORGES_COPY else [])


# -- settlement


def test_segments_settle_after_the_window_in_order_and_once() -> None:
    world, job = active(**QUIET, rounds=8)
    world.play_until(job)
    settled = [(e.slot, e.segment) for e in world.events if isinstance(e, SegmentSettled)]
    for slot in range(2):
        assert [number for s, number in settled if s == slot] == list(range(8))
        for number in range(8):
            found = segment(world, job, slot, number)
            assert found.settled >= found.linked + world.parameters.settle_window


def test_a_segment_is_paid_only_when_its_copy_is_proven_or_its_window_over() -> None:
    world, job = active(**QUIET)
    world.vices[standby(world, job)] = frozenset({Vice.LOSES_COPY})
    world.play_until(job)
    for number in (1, 3):
        found = segment(world, job, 0, number)
        assert found.settled >= found.proof_until
    assert segment(world, job, 0, 0).settled < segment(world, job, 0, 1).proof_until


def test_workers_are_paid_while_nobody_is_there() -> None:
    """Settlement needs no transaction: the chain alone, block after block, pays."""
    world, job = active(**QUIET)
    for number in range(2):
        for slot in range(2):
            world.do(world.keys[worker(world, job, slot)], sworn(world, job, slot, number))
    world.wait(150)
    assert sum(isinstance(event, SegmentSettled) for event in world.events) == 4
