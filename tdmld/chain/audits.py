"""Audits of drawn segments by one auditor each (V4, ANNEX A6).

    drawn --AuditCommit--> committed --Open (worker)--> opened --AuditOpen--> passed | mismatch
      |  \\--AuditFail--> failed --(draw_delay)--+
      +--(audit_window)--------------------------+--> drawn again, other owner, audit_redraws times
    committed --(open_window)---> unopened: as a mismatch
    opened    --(reveal_window)-> silent: the segment is `unaudited`, the auditor not paid

The auditor commits before the worker opens, so it could copy nothing; once the worker has opened,
nobody else is drawn, for that one could copy. Passed if and only if the auditor's list root equals
the one that follows from the worker's Commit and opening. A mismatch takes the worker's place and
rolls the job back to the segment's start (replacement.py). The auditor is paid for its verdict
whichever it is: a false one gains it nothing more.

**Draw.** SHA-256(beacon ‖ job ‖ slot u32 ‖ segment u64), its first 8 bytes as a number, below
rate x 2^64 / 10^6; the beacon is that of the height linked + draw_delay. When that height or one
since `linked` is tainted the segment is drawn in any case (unless the offer asked for no audits at
all): whoever leads several views on end knows the beacon before it withholds the first of them.

A segment after which lanes differ (`Segment.forced`, segments.py) is drawn in any case; without a
verdict on it the job ends. The source's own slot in a split job is never drawn.

**Who audits.** Owners other than the submitter, the source's and the workers' of this job, by work
stake (an owner that genesis names as auditor counts one unit more; each has a lot of its own, so
that nobody's stake or absence moves the choice among others), with an ask in force of the job's
class and audit capacity left. The standby's owner, who is first in line for the slot of whoever it
finds wrong, audits only where nobody else could, busy or not. Then one node of the owner.

**When all are busy**, the audit waits, and is drawn again every `draw_delay` blocks with the beacon
of that height; after `audit_window` x D blocks it goes on as `unaudited`. The slot stalls at D
meanwhile: a job that wants many audits runs at the speed of its auditors.

**When there is nobody**, the segment is flagged `audited_by_submitter` and goes on as if it had
passed. When the offer's audit budget is spent, it goes on as `unaudited`. Both are in the record.
"""

from blake3 import blake3
from msgspec.structs import replace

from tdmld.chain import due, limits, segments
from tdmld.chain.closing import count_open_audit, refund
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.events import AuditDrawn, AuditMismatch, AuditPassed, AuditStep, Unaudited
from tdmld.chain.execution import Execution, known_job, known_slot, require
from tdmld.chain.records import (
    Audit,
    AuditStatus,
    Cause,
    CloseReason,
    Due,
    Job,
    JobStatus,
    Segment,
    SegmentStatus,
    StandingAsk,
    Timer,
)
from tdmld.chain.replacement import rollback, vacate
from tdmld.chain.settlement import arm_settlement, count, pay_auditor
from tdmld.chain.state import u32, u64
from tdmld.chain.transactions import AuditCommit, AuditFail, AuditOpen, Open


def auditor_commitment(list_root: bytes, salt: bytes, auditor: bytes) -> bytes:
    """The `hash` of an AuditCommit; the node key in it makes copies worthless."""
    return blake3(list_root + salt + auditor).digest()


# -- drawing


def is_drawn(beacon: bytes, tainted: bool, job: Job, slot: int, number: int) -> bool:
    """Whether a linked segment is audited. `tainted`: any height since it was linked (AUDIT-1)."""
    if job.audit_rate == 0 or job.is_own(slot):
        return False
    lot = int.from_bytes(sha256(beacon, job.id, u32(slot), u64(number))[:8], "big")
    return tainted or lot * limits.RATE_ONE < job.audit_rate << 64


def draw(run: Execution, entry: Due) -> None:
    """Due: the beacon decides whether a linked segment is audited, and by whom."""
    job = run.job(entry.job)
    segment = run.segment(job.id, entry.slot, entry.segment)
    tainted = run.state.last_tainted > segment.linked
    drawn = is_drawn(run.context.beacon, tainted, job, entry.slot, entry.segment)
    if drawn or segment.forced:
        start(run, job, entry.slot, entry.segment)
    else:
        undrawn = replace(segment, status=SegmentStatus.UNDRAWN)
        run.state.put_segment(job.id, entry.slot, entry.segment, undrawn)
        arm_settlement(run, job)


def start(run: Execution, job: Job, slot: int, number: int) -> None:
    """A linked segment was drawn: reserve the auditor's pay and draw the auditor."""
    if job.audit_budget - job.audits_reserved < job.audit_price_of(slot):
        _go_on(run, job, slot, number, SegmentStatus.UNAUDITED, "the audit budget is spent")
        return
    auditor = choose(run, job, slot, number, attempt=0, tried=())
    if auditor is None and not _eligible(run, job, (), busy=True):
        _go_on(run, job, slot, number, SegmentStatus.BY_SUBMITTER, "no other owner can audit it")
        return
    reserved = job.audits_reserved + job.audit_price_of(slot)
    run.state.put_job(replace(job, audits_reserved=reserved))
    segment = run.segment(job.id, slot, number)
    drawn = replace(segment, status=SegmentStatus.DRAWN)
    run.state.put_segment(job.id, slot, number, drawn)
    if auditor is None:
        _wait(run, job, slot, number, Audit(b"", b"", b"", run.height, run.height))
    else:
        _assign(run, job, slot, number, auditor, attempt=0, tried=())


def choose(
    run: Execution, job: Job, slot: int, number: int, attempt: int, tried: tuple[bytes, ...]
) -> tuple[bytes, bytes, StandingAsk] | None:
    """(node, owner, ask) of the auditor that the beacon names, or None where nobody is eligible."""
    lots = sha256(b"auditor", run.context.beacon, job.id, u32(slot), u64(number), u32(attempt))
    pool = dict(sorted(_eligible(run, job, tried).items()))
    holder = b"" if job.standby is None else job.standby.owner
    if _eligible(run, job, tried, busy=True).keys() - {holder}:
        pool.pop(holder, None)
    if not pool:
        return None
    owner = min(pool, key=lambda owner: (_wait_of(lots, owner) << 128) // _weight(run, owner))
    node, ask = pool[owner][int.from_bytes(lots[24:32], "big") % len(pool[owner])]
    return node, owner, ask


def _wait_of(lots: bytes, owner: bytes) -> int:
    """-log2 of an owner's lot in (0, 1], in units of 2^-32: how long it waits for its turn, were
    its weight one. The shortest wait by weight wins with the weight's share (AUDIT-7), and nobody
    can make another owner win: who knows the beacon early has only its own weight to move."""
    lot = int.from_bytes(sha256(lots, owner)[:8], "big") + 1
    log = lot.bit_length() - 1
    rest = lot << (64 - log)
    for _ in range(32):
        rest = rest * rest >> 64
        log = 2 * log + (rest >> 65)
        rest >>= rest >> 65
    return (64 << 32) - log


def _eligible(
    run: Execution, job: Job, tried: tuple[bytes, ...], *, busy: bool = False
) -> dict[bytes, list[tuple[bytes, StandingAsk]]]:
    """Nodes that may audit the job now, by owner; with `busy` also those without capacity left."""
    party = {job.submitter, run.state.owner_of(job.source), *tried}
    party |= {run.slot(job.id, slot).worker.owner for slot in job.living}
    party |= {*job.excluded}
    found: dict[bytes, list[tuple[bytes, StandingAsk]]] = {}
    for node, ask in run.state.asks():
        record = run.state.node(node)
        if (
            record is None
            or record.owner in party
            or ask.class_id != job.class_id
            or ask.until_height < run.height
            or ask.audit_capacity == 0
            or (record.audits_open >= ask.audit_capacity and not busy)
            or _weight(run, record.owner) == 0
        ):
            continue
        found.setdefault(record.owner, []).append((node, ask))
    return found


def _weight(run: Execution, owner: bytes) -> int:
    return run.state.account(owner).work_stake + (owner in run.genesis.auditors)


def _assign(
    run: Execution,
    job: Job,
    slot: int,
    number: int,
    auditor: tuple[bytes, bytes, StandingAsk],
    attempt: int,
    tried: tuple[bytes, ...],
) -> None:
    node, owner, ask = auditor
    until = run.height + run.parameters.audit_window
    audit = Audit(
        auditor=node,
        owner=owner,
        session=ask.session,
        drawn=run.height,
        until=until,
        attempt=attempt,
        tried=tried,
    )
    run.state.put_audit(job.id, slot, number, audit)
    count_open_audit(run, node, 1)
    due.put(run.state, Due(Timer.AUDIT, job.id, slot, number), until)
    run.emit(AuditDrawn(job.id, slot, number, node, attempt))


def _wait(run: Execution, job: Job, slot: int, number: int, audit: Audit) -> None:
    """Nobody has capacity left: look again `draw_delay` blocks later."""
    until = run.height + run.parameters.draw_delay
    waiting = replace(
        audit, auditor=b"", owner=b"", session=b"", status=AuditStatus.WAITING, until=until
    )
    run.state.put_audit(job.id, slot, number, waiting)
    due.put(run.state, Due(Timer.AUDIT, job.id, slot, number), until)


# -- the three openings, in order


def audit_commit(run: Execution, node: bytes, sworn: AuditCommit) -> None:
    """The auditor has a result of its own, and is bound to it."""
    job, _, audit = _spoken_of(run, sworn)
    require(audit.auditor == node, "this node was not drawn for this audit")
    require(audit.status is AuditStatus.DRAWN, f"the audit is {audit.status}, not drawn")
    changed = replace(audit, hash=sworn.hash)
    _step(run, job, sworn, changed, AuditStatus.COMMITTED, run.parameters.open_window)


def audit_fail(run: Execution, node: bytes, failed: AuditFail) -> None:
    """The auditor could not replay: another owner is drawn, nobody is blamed yet."""
    job, _, audit = _spoken_of(run, failed)
    require(audit.auditor == node, "this node was not drawn for this audit")
    require(audit.status is AuditStatus.DRAWN, f"the audit is {audit.status}, not drawn")
    count_open_audit(run, node, -1)
    changed = replace(audit, missing=failed.missing)
    _step(run, job, failed, changed, AuditStatus.FAILED, run.parameters.draw_delay)


def open_seal(run: Execution, node: bytes, opening: Open) -> None:
    """The worker opens what it sealed at its Commit."""
    job, segment, audit = _spoken_of(run, opening)
    require(segment.worker == node, "only the audited worker opens its seal")
    require(
        audit.status is AuditStatus.COMMITTED, f"the audit is {audit.status}: nothing to open yet"
    )
    require(
        segments.seal(opening.salt, opening.steps) == segment.seal,
        "salt and steps do not give the seal of the Commit",
    )
    root = segments.audit_list_root(job, opening.slot, opening.segment, segment, opening.steps)
    changed = replace(audit, salt=opening.salt, steps=opening.steps, worker_list=root)
    _step(run, job, opening, changed, AuditStatus.OPENED, run.parameters.reveal_window)


def audit_open(run: Execution, node: bytes, opening: AuditOpen) -> None:
    """The auditor opens its commitment: the verdict."""
    job, segment, audit = _spoken_of(run, opening)
    require(audit.auditor == node, "this node was not drawn for this audit")
    require(audit.status is AuditStatus.OPENED, f"the audit is {audit.status}, not opened")
    require(
        auditor_commitment(opening.list_root, opening.salt, node) == audit.hash,
        "list root and salt do not give the hash of the AuditCommit",
    )
    slot, number = opening.slot, opening.segment
    due.cancel(run.state, Due(Timer.AUDIT, job.id, slot, number))
    count_open_audit(run, node, -1)
    audit = replace(audit, auditor_list=opening.list_root)
    if opening.list_root == audit.worker_list:
        run.state.put_audit(job.id, slot, number, replace(audit, status=AuditStatus.PASSED))
        passed = replace(segment, status=SegmentStatus.PASSED)
        run.state.put_segment(job.id, slot, number, passed)
        run.emit(AuditPassed(job.id, slot, number, node))
        arm_settlement(run, job)
        return
    audit = replace(audit, status=AuditStatus.MISMATCH)
    run.state.put_audit(job.id, slot, number, audit)
    bad = replace(segment, status=SegmentStatus.MISMATCH)
    run.state.put_segment(job.id, slot, number, bad)
    run.emit(AuditMismatch(job.id, slot, number, node))
    pay_auditor(run, job.id, slot, number, audit)
    detail = f"slot {slot}, segment {number}: the auditor's replay differs from the commitment"
    if rollback(run, job.id, number, detail):
        vacate(run, job.id, slot, Cause.MISMATCH, audit.owner)


# -- silence


def audit_over(run: Execution, entry: Due) -> None:
    """Due: the present step of an audit has taken too long (or a failed one is drawn again)."""
    job = run.job(entry.job)
    slot, number = entry.slot, entry.segment
    audit = run.state.audit(job.id, slot, number)
    if audit is None or not audit.open:
        return
    if audit.status is AuditStatus.COMMITTED:
        unopened = replace(audit, status=AuditStatus.UNOPENED)
        run.state.put_audit(job.id, slot, number, unopened)
        count_open_audit(run, audit.auditor, -1)
        reserved = job.audits_reserved - job.audit_price_of(slot)
        run.state.put_job(replace(job, audits_reserved=reserved))
        detail = f"slot {slot}, segment {number}: the worker did not open its seal"
        if rollback(run, job.id, number, detail):
            vacate(run, job.id, slot, Cause.UNOPENED, audit.owner)
        return
    if audit.held:
        count_open_audit(run, audit.auditor, -1)
        count(run, audit.owner, faults=1)
    if audit.status is AuditStatus.OPENED:
        _no_verdict(run, job, entry, audit, "the auditor did not open its commitment")
        return
    if audit.status is not AuditStatus.WAITING:
        tried, attempt = (*audit.tried, audit.owner), audit.attempt + 1
        audit = replace(audit, tried=tried, attempt=attempt, drawn=run.height)
    if audit.attempt > run.parameters.audit_redraws:
        _no_verdict(run, job, entry, audit, f"{audit.attempt} auditors did not come through")
        return
    auditor = choose(run, job, slot, number, audit.attempt, audit.tried)
    if auditor is not None:
        _assign(run, job, slot, number, auditor, audit.attempt, audit.tried)
    elif not _eligible(run, job, audit.tried, busy=True):
        _no_verdict(run, job, entry, audit, "no other auditor is left")
    elif run.height - audit.drawn > run.parameters.audit_window * job.unsettled:
        _no_verdict(run, job, entry, audit, "every auditor was busy for too long")
    else:
        _wait(run, job, slot, number, audit)


def _no_verdict(run: Execution, job: Job, entry: Due, audit: Audit, reason: str) -> None:
    silent = replace(audit, status=AuditStatus.SILENT)
    run.state.put_audit(job.id, entry.slot, entry.segment, silent)
    reserved = job.audits_reserved - job.audit_price_of(entry.slot)
    run.state.put_job(replace(job, audits_reserved=reserved))
    _go_on(run, job, entry.slot, entry.segment, SegmentStatus.UNAUDITED, reason)


def _go_on(
    run: Execution, job: Job, slot: int, number: int, status: SegmentStatus, reason: str
) -> None:
    segment = run.segment(job.id, slot, number)
    run.state.put_segment(job.id, slot, number, replace(segment, status=status, note=reason))
    run.emit(Unaudited(job.id, slot, number, reason))
    if segment.forced:
        stage = job.stage_of(slot)
        detail = f"segment {number}: lanes differ in stage {stage}, and slot {slot} was not audited"
        refund(run, job.id, CloseReason.MISMATCH, detail)
        return
    arm_settlement(run, job)


def _spoken_of(
    run: Execution, spoken: AuditCommit | AuditFail | AuditOpen | Open
) -> tuple[Job, Segment, Audit]:
    job = known_job(run, spoken.job)
    require(job.status is JobStatus.ACTIVE, f"the job is {job.status}, not active")
    known_slot(run, job, spoken.slot)
    require(
        spoken.epoch == job.epoch, f"this speaks of epoch {spoken.epoch}; in force is {job.epoch}"
    )
    segment = run.state.segment(job.id, spoken.slot, spoken.segment)
    audit = run.state.audit(job.id, spoken.slot, spoken.segment)
    if segment is None or audit is None:
        raise InvalidTransaction("that segment was not drawn for an audit")
    return job, segment, audit


def _step(
    run: Execution,
    job: Job,
    spoken: AuditCommit | AuditFail | Open,
    audit: Audit,
    status: AuditStatus,
    window: int,
) -> None:
    until = run.height + window
    moved = replace(audit, status=status, until=until)
    run.state.put_audit(job.id, spoken.slot, spoken.segment, moved)
    due.put(run.state, Due(Timer.AUDIT, job.id, spoken.slot, spoken.segment), until)
    run.emit(AuditStep(job.id, spoken.slot, spoken.segment, status))
