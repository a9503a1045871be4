"""A job's life from offer to end, by what its members do."""

from tdmld.chain.accounts import (
    Facts,
)
from tdmld.chain.codec import NATURAL_MAX, encode
from tdmld.chain.events import (
    JobActive,
    JobEnded,
    JobFinishing,
    JobMatched,
    Paid,
    ResultKnown,
    SlotVacated,
)
from tdmld.chain.ledger import recount
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.offers import lock_of
from tdmld.chain.records import (
    CloseReason,
    JobStatus,
)
from tdmld.chain.transactions import (
    Accept,
    AttestGenesis,
    AttestResult,
    Fetched,
)
from tests.chain.world import BALANCE, FEE, Vice, World, make_genesis, mark, node_key, owner_key


def started(**offer: object) -> tuple[World, bytes]:
    world = World()
    world.all_ask()
    return world, world.submit(**offer)


def active(**offer: object) -> tuple[World, bytes]:
    world, job = started(**offer)
    world.play_until(job, JobStatus.ACTIVE)
    return world, job


def worker(world: World, job: bytes, slot: int) -> bytes:
    found = world.state.slot(job, slot)
    assert found is not None
    return found.worker.node


def standby(world: World, job: bytes) -> bytes:
    found = world.job(job).standby
    assert found is not None
    return found.node


def test_an_honest_job_is_trained_audited_paid_and_closed() -> None:
    world, job_id = started()
    offer = world.offer()
    lock = lock_of(offer, world.parameters)
    assert world.balance(0) == BALANCE - FEE - lock.total
    job = world.play_until(job_id)
    assert (job.status, job.reason) == (JobStatus.CLOSED, CloseReason.FETCHED)
    assert job.result == mark("result", job_id)
    kinds = [type(event) for event in world.events]
    order = [JobMatched, JobActive, JobFinishing, ResultKnown, JobEnded]
    assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
    payments = world.state.payments(job_id)
    for slot in range(2):
        segments = [world.state.segment(job_id, slot, number) for number in range(4)]
        assert all(segment is not None and segment.settled for segment in segments)
        state = world.state.slot(job_id, slot)
        assert state is not None
        assert payments[state.worker.owner].worker == 4 * state.worker.price == 4 * 10_000
    assert job.standby is not None
    assert payments[job.standby.owner].standby == 2 * 4 * 500
    audits = [
        audit
        for slot in range(2)
        for number in range(4)
        if (audit := world.state.audit(job_id, slot, number)) is not None
    ]
    assert sum(earned.auditor for earned in payments.values()) == 7_000 * len(audits) > 0
    burned = (
        lock.fees
        - (job_refund := _refund(world))
        + sum([lock.escrow, lock.audit_budget, lock.deposit, -_paid(world)])
    )
    assert world.balance(0) == BALANCE - 2 * FEE - _paid(world) - burned
    assert world.balance(0) == BALANCE - 2 * FEE - lock.total + job_refund
    assert job.locked == 0
    assert world.next_due() is None


def _paid(world: World) -> int:
    return sum(event.amount for event in world.events if isinstance(event, Paid))


def _refund(world: World) -> int:
    (ended,) = [event for event in world.events if isinstance(event, JobEnded)]
    return ended.refund


def test_a_submitter_pays_exactly_what_others_get_and_the_fees() -> None:
    world, job_id = started()
    world.play_until(job_id)
    supply = recount(world.store.items())
    everybody = sum(world.balance(index) for index in range(7))
    assert everybody == 7 * BALANCE - supply.burned
    node_transactions = sum(r.ok for r in world.receipts) - 7 - 2  # asks; Offer and Fetched
    matching = 1000  # MATCH-2
    assert supply.burned == 2 * FEE + 10 * node_transactions + matching


def test_capacity_is_taken_at_matching_and_given_back_at_the_end() -> None:
    world, job_id = started()
    world.play_until(job_id, JobStatus.ACTIVE)
    first = world.state.node(worker(world, job_id, 0))
    holder = world.state.node(standby(world, job_id))
    assert first is not None
    assert holder is not None
    assert first.memory_used == 1 << 30
    assert holder.standby_used == 2
    world.play_until(job_id)
    for index in range(7):
        node = world.state.node(node_key(index).public)
        assert node is not None
        assert (node.memory_used, node.standby_used, node.audits_open) == (0, 0, 0)


def test_several_lanes_and_one_stage_work_alike() -> None:
    world = World()
    world.all_ask()
    job_id = world.submit(stages=world.offer().stages[:1], lanes=2, rounds=3, audit_rate=1_000_000)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED


def test_a_job_of_one_round_and_an_odd_tail_pays_the_standby_for_the_tail() -> None:
    world, job_id = started(rounds=3)
    job = world.play_until(job_id)
    assert job.standby is not None
    assert world.state.payments(job_id)[job.standby.owner].standby == 2 * 3 * 500


def test_unequal_genesis_roots_refund_the_job() -> None:
    world, job_id = started()
    world.play_until(job_id, JobStatus.PREPARING)
    world.vices[standby(world, job_id)] = frozenset({Vice.OTHER_GENESIS})
    job = world.play_until(job_id)
    assert (job.status, job.reason) == (JobStatus.REFUNDED, CloseReason.GENESIS)
    assert _paid(world) == 0


def test_silence_in_preparation_refunds_and_is_a_fault_of_the_silent() -> None:
    world, job_id = started()
    world.play_until(job_id, JobStatus.PREPARING)
    silent = worker(world, job_id, 1)
    world.vices[silent] = frozenset({Vice.MUTE})
    job = world.play_until(job_id)
    assert (job.status, job.reason) == (JobStatus.REFUNDED, CloseReason.GENESIS)
    owner = world.state.owner_of(silent)
    assert owner is not None
    assert world.state.facts(owner).faults == 1
    assert sum(world.state.facts(owner_key(i).public).faults for i in range(7)) == 1


def test_genesis_is_attested_once_and_by_members_only() -> None:
    world, job_id = started()
    world.play_until(job_id, JobStatus.PREPARING)
    other = next(
        node_key(i)
        for i in range(7)
        if node_key(i).public
        not in {worker(world, job_id, 0), worker(world, job_id, 1), standby(world, job_id)}
    )
    attested = AttestGenesis(job_id, 0, mark(1), mark(2), mark(3))
    assert "worker and by the standby" in world.refused(other, attested)
    mine = world.keys[worker(world, job_id, 0)]
    assert "no slot 5" in world.refused(mine, AttestGenesis(job_id, 5, mark(1), mark(2), mark(3)))
    world.do(mine, attested)
    assert "has attested" in world.refused(mine, attested)
    other_slot = AttestGenesis(job_id, 1, mark(1), mark(2), mark(3))
    assert "worker and by the standby" in world.refused(mine, other_slot)
    trained, done = active()
    again = AttestGenesis(done, 0, mark(1), mark(2), mark(3))
    assert "not preparing" in trained.refused(trained.keys[worker(trained, done, 0)], again)
    early = AttestResult(done, mark(1))
    assert "not finishing" in trained.refused(trained.keys[standby(trained, done)], early)
    assert "not finishing" in trained.refused(owner_key(0), Fetched(done))


def test_a_worker_that_stops_with_nobody_to_replace_it_ends_the_job_in_a_refund() -> None:
    world = World(make_genesis(4))
    world.block(
        *(world.ask(i, **({"price": 1500} if i == 3 else {"standby_slots": 0})) for i in range(4))
    )
    job_id = world.submit(rounds=8, audit_rate=0)
    world.play_until(job_id, JobStatus.ACTIVE)
    stopped = worker(world, job_id, 1)
    world.vices = {standby(world, job_id): frozenset({Vice.DECLINES})}
    for node in {worker(world, job_id, 0), stopped}:
        # the other one gets one segment further before it starves
        world.stop_before[node] = 2 if node == stopped else 3
    job = world.play_until(job_id)
    assert (job.status, job.reason) == (JobStatus.REFUNDED, CloseReason.FAULT)
    assert job.detail == "slot 1 became vacant, and nobody is left to take it: declined"
    owner = world.state.owner_of(stopped)
    faulty = [key for i in range(4) if world.state.facts(key := owner_key(i).public).faults]
    assert faulty == [owner]
    for number in range(2):
        segment = world.state.segment(job_id, 1, number)
        assert segment is not None
        assert segment.settled
    assert world.next_due() is None


def test_nobody_is_blamed_when_all_slots_stop_at_once() -> None:
    world, job_id = active()
    for slot in range(2):
        world.stop_before[worker(world, job_id, slot)] = 1
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FAULT
    assert all(world.state.facts(owner_key(i).public).faults == 0 for i in range(7))


def test_waiting_for_a_settlement_is_no_stall() -> None:
    """An auditor that keeps everybody waiting longer than segment_window ends no job."""
    world = World()
    world.all_ask()
    job_id = world.submit(audit_rate=1_000_000, unsettled=2, state_every=1, rounds=3)
    world.play_until(job_id, JobStatus.ACTIVE)
    lazy = [node for node in world.keys if node not in _members(world, job_id)]
    world.vices = {node: frozenset({Vice.NEVER_AUDITS}) for node in lazy}
    assert world.parameters.audit_window >= world.parameters.segment_window
    job = world.play_until(job_id, blocks=4000)
    assert job.reason is CloseReason.FETCHED


def test_a_slot_at_its_limit_beside_a_dead_one_does_not_keep_the_job_alive() -> None:
    """It waits for its neighbour and not for a settlement, which cannot come."""
    world, job_id = active(rounds=8, audit_rate=0)
    dead = worker(world, job_id, 1)
    world.stop_before[dead] = 0
    while not any(isinstance(event, SlotVacated) for event in world.events):
        world.play(job_id)
    ahead = world.state.slot(job_id, 0)
    assert ahead is not None
    assert (ahead.committed, ahead.settled) == (world.job(job_id).unsettled, 0)
    (faulty,) = [i for i in range(7) if world.state.facts(owner_key(i).public).faults]
    assert node_key(faulty).public == dead
    assert world.play_until(job_id).reason is CloseReason.FETCHED


def _members(world: World, job: bytes) -> set[bytes]:
    return {worker(world, job, 0), worker(world, job, 1), standby(world, job)}


def test_the_deadline_ends_a_job() -> None:
    world = World()
    world.all_ask()
    job_id = world.submit(deadline=world.height + 12)
    world.play_until(job_id, JobStatus.ACTIVE)
    job = world.play_until(job_id)
    assert (job.status, job.reason) == (JobStatus.REFUNDED, CloseReason.DEADLINE)
    assert world.next_due() is None


def test_a_deadline_before_the_preparation_expires_the_offer() -> None:
    world = World()
    world.all_ask()
    job_id = world.submit(deadline=world.height + 2)
    world.wait(2)
    assert world.job(job_id).status is JobStatus.EXPIRED
    assert world.job(job_id).reason is CloseReason.DEADLINE
    assert world.balance(0) == BALANCE - FEE


def test_an_unfetched_result_closes_the_job_by_itself() -> None:
    world, job_id = started()
    world.play_until(job_id, JobStatus.FINISHING)
    for _ in range(world.parameters.result_window + 1):
        world.play(job_id, fetch=False) if world.job(job_id).status is JobStatus.FINISHING else None
    job = world.job(job_id)
    assert (job.status, job.reason) == (JobStatus.CLOSED, CloseReason.NOT_FETCHED)


def test_different_results_leave_the_result_unknown() -> None:
    world, job_id = started()
    world.play_until(job_id, JobStatus.FINISHING)
    world.vices[standby(world, job_id)] = frozenset({Vice.OTHER_RESULT})
    world.play(job_id)
    job = world.job(job_id)
    assert len(job.results) == 2
    assert job.result == b""
    assert "no result is known" in world.refused(owner_key(0), Fetched(job_id))


def test_results_come_once_from_holders_and_are_fetched_by_the_submitter() -> None:
    world, job_id = started()
    world.play_until(job_id, JobStatus.FINISHING)
    first = world.keys[worker(world, job_id, 0)]
    last = world.keys[worker(world, job_id, 1)]
    assert "no holder" in world.refused(first, AttestResult(job_id, mark("result", job_id)))
    world.do(last, AttestResult(job_id, mark("result", job_id)))
    assert "has attested" in world.refused(last, AttestResult(job_id, mark("result", job_id)))
    world.do(world.keys[standby(world, job_id)], AttestResult(job_id, mark("result", job_id)))
    assert "only the submitter" in world.refused(owner_key(3), Fetched(job_id))
    world.do(owner_key(0), Fetched(job_id))
    assert "closed" in world.refused(owner_key(0), Fetched(job_id))


def test_nothing_can_be_done_in_a_job_that_is_over() -> None:
    world, job_id = started()
    world.play_until(job_id)
    before = world.store.copy()
    answer = Accept(job_id, 0, STANDBY_SLOT, mark("session"))
    assert "over" in world.refused(node_key(3), answer)
    assert world.store == before


def test_final_jobs_are_listed_newest_first() -> None:
    world = World()
    first = world.submit()
    world.wait(1)
    second = world.submit(rounds=5)
    assert world.state.active_jobs() == tuple(sorted([first, second]))
    world.wait(6)
    assert world.state.active_jobs() == ()
    assert [job.id for job in world.state.final_jobs()] == [second, first]


def test_counts_of_what_was_earned_stop_where_a_record_ends() -> None:
    """One number too large, and no node could ever read the record again."""
    world = World()
    world.all_ask()
    for index in range(7):
        key = b"f" + owner_key(index).public
        world.store[key] = encode(Facts(segments=NATURAL_MAX, earned=NATURAL_MAX - 1))
    job = world.submit()
    assert world.play_until(job).status is JobStatus.CLOSED
    facts = [world.state.facts(owner_key(index).public) for index in range(7)]
    assert {found.earned for found in facts} == {NATURAL_MAX - 1, NATURAL_MAX}
    assert {found.segments for found in facts} == {NATURAL_MAX}
