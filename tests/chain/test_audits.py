"""Drawn segments are replayed by somebody else; equality of one hash is the verdict."""

from collections import Counter

import pytest
from msgspec.structs import replace

from tdmld.chain import audits, limits
from tdmld.chain.events import (
    AuditDrawn,
    AuditMismatch,
    AuditPassed,
    JobEnded,
    JobRolledBack,
    Unaudited,
)
from tdmld.chain.execution import Execution
from tdmld.chain.ledger import BlockContext
from tdmld.chain.records import (
    Audit,
    AuditStatus,
    Cause,
    CloseReason,
    Job,
    JobStatus,
    SegmentStatus,
)
from tdmld.chain.segments import audit_list_root
from tdmld.chain.transactions import AuditCommit, AuditFail, AuditOpen, Open
from tdmld.train import digest
from tests.chain.test_jobs import active, standby, worker
from tests.chain.world import Vice, World, make_genesis, mark, node_key, owner_key

ALL = {"audit_rate": 1_000_000}


def first_audit(world: World, job: bytes, status: AuditStatus = AuditStatus.DRAWN) -> Audit:
    """Play until the audit of segment 0 of slot 0 has `status`."""
    for _ in range(100):
        found = world.state.audit(job, 0, 0)
        if found is not None and found.status is status:
            return found
        world.play(job)
    raise AssertionError(f"the audit never was {status}")


def give(world: World, vice: Vice, *, to_workers: bool = False, job: bytes = b"") -> None:
    """All nodes (or all that work for `job`) have the vice."""
    nodes = [worker(world, job, 0), worker(world, job, 1)] if to_workers else list(world.keys)
    world.vices = {node: frozenset({vice}) for node in nodes}


def test_every_segment_is_drawn_at_rate_one_and_passes() -> None:
    world, job_id = active(**ALL)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    passed = [event for event in world.events if isinstance(event, AuditPassed)]
    assert {(e.slot, e.segment) for e in passed} == {(s, n) for s in range(2) for n in range(4)}
    assert job.audits_reserved == 0


def test_the_list_root_is_the_one_that_workers_and_auditors_compute() -> None:
    world, job_id = active(lanes=2)
    job = world.job(job_id)
    for slot in range(job.slots):
        world.play_until(job_id, JobStatus.ACTIVE)
        while world.state.segment(job_id, slot, 0) is None:
            world.play(job_id)
        segment = world.state.segment(job_id, slot, 0)
        assert segment is not None
        assert audit_list_root(job, slot, 0, segment, mark("steps")) == digest.list_root(
            job_id,
            slot // 2,
            slot % 2,
            0,
            start=(segment.start_shared, segment.start_lane),
            end=(segment.end_shared, segment.end_lane),
            links={link.link: (link.sent, link.received) for link in segment.links},
            steps=mark("steps"),
        )


def test_a_cheat_is_found_unpaid_and_replaced_and_the_job_ends_well() -> None:
    world, job_id = active(**ALL, rounds=8)
    world.bad_segment = 2
    cheat = worker(world, job_id, 1)
    world.vices[cheat] = frozenset({Vice.CHEATS})
    job = world.play_until(job_id)
    assert (job.status, job.reason) == (JobStatus.CLOSED, CloseReason.FETCHED)
    (found,) = [event for event in world.events if isinstance(event, AuditMismatch)]
    assert (found.slot, found.segment) == (1, 2)
    (back,) = [event for event in world.events if isinstance(event, JobRolledBack)]
    assert (back.epoch, back.boundary) == (1, 2)
    cheater, accuser = (world.state.owner_of(node) for node in (cheat, found.auditor))
    assert cheater is not None
    assert world.state.facts(cheater).mismatches == 1
    paid_before = sum(
        segment.worker == cheat
        for number in range(8)
        if (segment := world.state.segment(job_id, 1, number)) is not None
    )
    assert paid_before <= 2
    assert world.state.earnings(job_id, cheater).worker == paid_before * 10_000
    last = world.state.slot(job_id, 1)
    assert last is not None
    assert last.worker.owner not in (cheater, accuser)
    assert [former.cause for former in last.former] == [Cause.MISMATCH]
    assert job.excluded == (cheater,)
    assert accuser is not None
    assert world.state.earnings(job_id, accuser).auditor >= 7_000
    assert world.next_due() is None


def test_a_lying_auditor_ends_the_job_but_convicts_nobody() -> None:
    world, job_id = active(**ALL)
    give(world, Vice.LIES)
    stakes = [world.state.account(owner_key(i).public).work_stake for i in range(7)]
    assert world.play_until(job_id).reason is CloseReason.MISMATCH
    assert stakes == [world.state.account(owner_key(i).public).work_stake for i in range(7)]


def test_a_worker_that_keeps_its_seal_is_replaced_unpaid() -> None:
    world, job_id = active(**ALL)
    first = worker(world, job_id, 0)
    owner = world.state.owner_of(first)
    assert owner is not None
    world.vices[first] = frozenset({Vice.KEEPS_SEAL})
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert job.epoch == 1
    state = world.state.slot(job_id, 0)
    assert state is not None
    assert [former.cause for former in state.former] == [Cause.UNOPENED]
    assert world.state.facts(owner).mismatches == 1
    assert world.state.earnings(job_id, owner).total == 0
    assert job.audits_reserved == 0


def test_a_job_that_was_rolled_back_too_often_ends() -> None:
    world = World(make_genesis(20))
    world.all_ask(20)
    job_id = world.submit(**ALL, audit_budget=400_000)
    world.play_until(job_id, JobStatus.ACTIVE)
    give(world, Vice.CHEATS)
    job = world.play_until(job_id)
    assert (job.status, job.reason) == (JobStatus.REFUNDED, CloseReason.MISMATCH)
    assert job.epoch == limits.ROLLBACKS
    assert "replay differs" in job.detail


def first_of(world: World, job: bytes, status: AuditStatus) -> Audit:
    for slot in range(2):
        for number in range(4):
            audit = world.state.audit(job, slot, number)
            if audit is not None and audit.status is status:
                return audit
    raise AssertionError(f"no audit is {status}")


@pytest.mark.parametrize("vice", [Vice.NEVER_AUDITS, Vice.CANNOT_AUDIT])
def test_an_auditor_that_does_not_come_through_is_replaced_by_other_owners(vice: Vice) -> None:
    world, job_id = active(**ALL, rounds=2, segment_steps=1)
    give(world, vice)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    drawn = [e for e in world.events if isinstance(e, AuditDrawn) and (e.slot, e.segment) == (0, 0)]
    assert len({event.auditor for event in drawn}) == len(drawn) == 4
    assert [event.attempt for event in drawn] == [0, 1, 2, 3]
    segment = world.state.segment(job_id, 0, 0)
    assert segment is not None
    assert segment.status is SegmentStatus.UNAUDITED
    assert segment.note == "4 auditors did not come through"
    assert all(earned.auditor == 0 for earned in world.state.payments(job_id).values())
    faults = sum(world.state.facts(owner_key(i).public).faults for i in range(7))
    assert (faults > 0) == (vice is Vice.NEVER_AUDITS)


def test_an_auditor_that_hides_its_verdict_is_not_replaced_and_not_paid() -> None:
    world, job_id = active(**ALL, rounds=1)
    give(world, Vice.HIDES_VERDICT)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    audit = world.state.audit(job_id, 0, 0)
    assert audit is not None
    assert (audit.status, audit.attempt, audit.paid) == (AuditStatus.SILENT, 0, 0)
    assert world.state.facts(audit.owner).faults >= 1


def test_without_any_other_owner_the_segment_is_left_to_the_submitter() -> None:
    world = World(make_genesis(nodes=4))
    world.block(*(world.ask(index, audit_capacity=0) for index in range(4)))
    job_id = world.submit(**ALL)
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    segment = world.state.segment(job_id, 0, 0)
    assert segment is not None
    assert segment.status is SegmentStatus.BY_SUBMITTER
    assert any(isinstance(event, Unaudited) for event in world.events)


def test_a_spent_audit_budget_is_said_in_the_record() -> None:
    world = World()
    world.all_ask()
    job_id = world.submit(audit_rate=1, audit_budget=7_000)
    world.play_until(job_id, JobStatus.ACTIVE)
    while not world.job(job_id).final:
        world.play(job_id, tainted=True)
    notes = Counter(
        segment.note
        for slot in range(2)
        for number in range(4)
        if (segment := world.state.segment(job_id, slot, number)) is not None
    )
    assert notes == {"": 1, "the audit budget is spent": 7}


def test_on_a_tainted_height_everything_is_drawn() -> None:
    world, job_id = active(audit_rate=1, audit_budget=7_000 * 8)
    while not world.job(job_id).final:
        world.play(job_id, tainted=True)
    assert sum(isinstance(event, AuditPassed) for event in world.events) == 8


def test_a_job_without_audits_has_none_even_on_tainted_heights() -> None:
    world, job_id = active(audit_rate=0, audit_budget=0, audit_price=0)
    while not world.job(job_id).final:
        world.play(job_id, tainted=True)
    assert not any(isinstance(event, AuditDrawn) for event in world.events)
    assert world.job(job_id).reason is CloseReason.FETCHED


def test_no_member_audits_what_it_worked_on_and_capacity_is_respected() -> None:
    world = World()
    world.block(*(world.ask(index, audit_capacity=1) for index in range(7)))
    job_id = world.submit(**ALL, rounds=8, unsettled=8)
    world.play_until(job_id, JobStatus.ACTIVE)
    party = {worker(world, job_id, 0), worker(world, job_id, 1), node_key(0).public}
    while not world.job(job_id).final:
        world.play(job_id)
        for key in world.keys:
            node = world.state.node(key)
            assert node is None or node.audits_open <= 1
    drawn = {event.auditor for event in world.events if isinstance(event, AuditDrawn)}
    assert drawn
    assert not drawn & party


def test_an_audit_waits_for_a_busy_auditor_and_every_drawn_segment_gets_a_verdict() -> None:
    world = World()
    world.block(*(world.ask(index, audit_capacity=1) for index in range(7)))
    job_id = world.submit(**ALL, rounds=8, unsettled=8)
    world.play_until(job_id, JobStatus.ACTIVE)
    waited = False
    while not world.job(job_id).final:
        world.play(job_id)
        audits_now = [world.state.audit(job_id, slot, n) for slot in (0, 1) for n in range(8)]
        waiting = [a for a in audits_now if a is not None and a.status is AuditStatus.WAITING]
        waited = waited or bool(waiting)
        assert all(audit.auditor == b"" and audit.open and not audit.held for audit in waiting)
    assert waited
    assert sum(isinstance(event, AuditPassed) for event in world.events) == 16


def _run_of(world: World, beacon: bytes) -> Execution:
    context = BlockContext(world.height, 1, 0, 0, bytes(32), beacon)
    return Execution(world.state, world.genesis, context)


def test_the_standby_audits_only_where_nobody_else_could() -> None:
    world, job_id = active()
    job, holder = world.job(job_id), standby(world, job_id)
    state = world.state

    def drawn() -> Counter[bytes]:
        found = []
        for number in range(400):
            context = BlockContext(world.height, 1, 0, 0, bytes(32), mark(number))
            run = Execution(state, world.genesis, context)
            found.append(audits.choose(run, job, 0, 0, 0, ()))
        return Counter(auditor[0] for auditor in found if auditor is not None)

    others = drawn()
    assert len(others) == 3  # seven less the submitter's, two workers' and the standby's
    assert holder not in others
    assert all(80 < count < 190 for count in others.values())
    for node in others:
        record = state.node(node)
        assert record is not None
        state.put_node(node, replace(record, audits_open=100))
    assert not drawn()  # all are busy: they are waited for
    for node in others:
        state.put_ask(node, None)
    assert drawn() == {holder: 400}


def test_auditors_are_drawn_by_work_stake_and_unstaked_ones_never() -> None:
    world, job_id = active()
    job = world.job(job_id)
    party = {worker(world, job_id, 0), worker(world, job_id, 1), node_key(0).public}
    others = [i for i in range(7) if node_key(i).public not in {*party, standby(world, job_id)}]
    run = _run_of(world, mark(0))
    for index, stake in zip(others, (0, 10, 30), strict=True):
        account = run.state.account(owner_key(index).public)
        run.state.put_account(
            owner_key(index).public,
            type(account)(account.balance, account.nonce, account.vote_stake, stake),
        )
    counts: Counter[int] = Counter()
    for number in range(800):
        context = BlockContext(world.height, 1, 0, 0, bytes(32), mark(number))
        found = audits.choose(Execution(run.state, world.genesis, context), job, 0, 0, 0, ())
        assert found is not None
        counts.update(i for i in others if node_key(i).public == found[0])
    assert counts[others[0]] == 0
    assert 2.2 < counts[others[2]] / counts[others[1]] < 4


def test_the_rate_is_the_share_of_segments_that_is_drawn() -> None:
    job = _job_with_rate(250_000)
    drawn = sum(audits.is_drawn(mark(n), False, job, 0, n) for n in range(4000))
    assert 900 < drawn < 1100
    always, never = _job_with_rate(1_000_000), _job_with_rate(0)
    assert all(audits.is_drawn(mark(n), False, always, 0, n) for n in range(99))
    assert not any(audits.is_drawn(mark(n), True, never, 0, n) for n in range(99))


def _job_with_rate(rate: int) -> Job:
    world = World()
    offer = world.offer(audit_rate=rate)
    return world.job(world.do(owner_key(0), offer))


# -- the order of the openings


def test_each_opening_comes_from_the_right_party_in_the_right_order() -> None:
    world, job_id = active(**ALL)
    audit = first_audit(world, job_id)
    job, at = world.job(job_id), (job_id, 0, 0, 0)
    auditor, mine = world.keys[audit.auditor], world.keys[worker(world, job_id, 0)]
    salt, steps = world.salt(mine.public, 0, 0), world.steps(job, 0, 0)
    segment = world.state.segment(job_id, 0, 0)
    assert segment is not None
    root = audit_list_root(job, 0, 0, segment, steps)
    sworn = audits.auditor_commitment(root, mark("s"), auditor.public)

    assert "not drawn for this" in world.refused(mine, AuditCommit(*at, sworn))
    assert "nothing to open" in world.refused(mine, Open(*at, salt, steps))
    assert "not opened" in world.refused(auditor, AuditOpen(*at, root, mark("s")))
    assert "epoch 1" in world.refused(auditor, AuditCommit(job_id, 1, 0, 0, sworn))
    assert "not drawn for this" in world.refused(mine, AuditFail(*at, "nothing"))
    world.do(auditor, AuditCommit(*at, sworn))
    assert "not drawn" in world.refused(auditor, AuditCommit(*at, sworn))
    assert "not drawn" in world.refused(auditor, AuditFail(*at, "nothing"))
    assert "only the audited" in world.refused(auditor, Open(*at, salt, steps))
    assert "do not give the seal" in world.refused(mine, Open(*at, salt, mark("x")))
    world.do(mine, Open(*at, salt, steps))
    assert "do not give the hash" in world.refused(auditor, AuditOpen(*at, root, mark("t")))
    assert "do not give the hash" in world.refused(auditor, AuditOpen(*at, mark("x"), mark("s")))
    assert "not drawn for this" in world.refused(mine, AuditOpen(*at, root, mark("s")))
    world.do(auditor, AuditOpen(*at, root, mark("s")))
    found = world.state.audit(job_id, 0, 0)
    assert found is not None
    assert found.status is AuditStatus.PASSED


def test_a_copied_commitment_is_worthless() -> None:
    root, salt = mark("root"), mark("salt")
    one = audits.auditor_commitment(root, salt, node_key(1).public)
    assert one != audits.auditor_commitment(root, salt, node_key(2).public)


def test_a_segment_that_was_not_drawn_has_no_audit() -> None:
    world, job_id = active(audit_rate=0)
    world.play(job_id)
    assert "was not drawn" in world.refused(node_key(3), AuditCommit(job_id, 0, 0, 0, mark(1)))


def test_audits_end_with_the_training() -> None:
    world, job_id = active(**ALL)
    world.play_until(job_id, JobStatus.FINISHING)
    audit = world.state.audit(job_id, 0, 0)
    assert audit is not None
    late = AuditCommit(job_id, 0, 0, 0, mark("late"))
    assert "finishing, not active" in world.refused(world.keys[audit.auditor], late)


def test_an_opening_in_the_block_of_its_deadline_is_too_late() -> None:
    world = World(make_genesis(audit_window=10))
    world.all_ask()
    job_id = world.submit(**ALL)
    audit = first_audit(world, job_id)
    while world.height + 1 < audit.until:
        world.block()
    commit = AuditCommit(job_id, 0, 0, 0, mark("late"))
    assert "not drawn for this" in world.refused(world.keys[audit.auditor], commit)


def test_at_a_refund_open_audits_are_dropped_and_their_segments_not_paid() -> None:
    world, job_id = active(**ALL, rounds=8)
    give(world, Vice.NEVER_AUDITS)
    for slot in range(2):
        world.stop_before[worker(world, job_id, slot)] = 1
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FAULT
    ended = next(event for event in world.events if isinstance(event, JobEnded))
    assert ended.refund > 0
    segment = world.state.segment(job_id, 0, 0)
    assert segment is not None
    if segment.status is SegmentStatus.DRAWN:
        assert not segment.settled
    for key in world.keys:
        node = world.state.node(key)
        assert node is None or node.audits_open == 0
