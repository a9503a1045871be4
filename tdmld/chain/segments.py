"""Commitments: what a worker swears about a segment, and what the chain itself can compare.

    committed --(every neighbour's roots of the shared link are equal)--> linked
    linked    --(draw_delay later)--> undrawn, or drawn (audits.py)

Byte layouts (BLAKE3-256 throughout; integers big-endian), the same in `tdmld.train`:

    list root = H(job 32 ‖ lane u32 ‖ stage u32 ‖ segment u64 ‖ start shared ‖ start lane ‖
                  end shared ‖ end lane ‖ for each link of the slot, in order: sent root ‖
                  received root ‖ contribution (32 bytes, or none) ‖ steps root)
    seal      = H(salt ‖ steps root)
    commit of an auditor = H(list root ‖ salt ‖ auditor's node key)

**Links.** Stage s and stage s + 1 of a lane share a link, in a ring also the last stage and the
first; in lane mode sync each two lanes share one at every stage. What one end sent is what the
other received, both ways. Unequal roots are a mismatch: nobody can yet say whose, so the job is
refunded and neither slot is paid from that segment on. A count of mismatches goes to both.

**Lanes.** After every segment the shared state of a stage is equal in all lanes. Where Commits say
otherwise all of them are audited for certain (`forced`), and a job that cannot have these audits
ends.

**Copies.** After every R segments, and after the last, the standby proves that it holds the state:
keyed hash with the beacon of commit height + draw_delay. The standby speaks first, then the worker;
what is compared is only whether they are equal.
"""

from blake3 import blake3
from msgspec.structs import replace

from tdmld.chain import due, rounds
from tdmld.chain.closing import refund
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.events import (
    ProofChecked,
    ProofKeyKnown,
    SegmentCommitted,
    SegmentLinked,
    StatesDiffer,
)
from tdmld.chain.execution import Execution, known_job, known_slot, require
from tdmld.chain.records import (
    CloseReason,
    Due,
    Job,
    JobStatus,
    ProofStatus,
    Segment,
    SegmentStatus,
    SlotState,
    Timer,
)
from tdmld.chain.settlement import arm_settlement, arm_stall, copy_due_after, count
from tdmld.chain.state import u32, u64
from tdmld.chain.transactions import Commit, LaneMode, LinkRoots, StandbyProof


def links_of(job: Job, slot: int) -> tuple[str, ...]:
    """The links of a slot, in the order in which they stand in a Commit: "up", "down", and in lane
    mode sync "lane<k>" for every other lane k."""
    stage, lane = job.stage_of(slot), job.lane_of(slot)
    up = ("up",) if job.ring or stage > 0 else ()
    down = ("down",) if job.ring or stage + 1 < len(job.stages) else ()
    lanes = range(job.lanes) if job.lane_mode is LaneMode.SYNC else ()
    return (*up, *down, *(f"lane{other}" for other in lanes if other != lane))


def other_end(job: Job, slot: int, link: str) -> tuple[int, str]:
    """(slot, link) at the other end of a link that the slot has."""
    stage, lane = job.stage_of(slot), job.lane_of(slot)
    if link == "up":
        return job.slot_at(lane, (stage - 1) % len(job.stages)), "down"
    if link == "down":
        return job.slot_at(lane, (stage + 1) % len(job.stages)), "up"
    return job.slot_at(int(link.removeprefix("lane")), stage), f"lane{lane}"


def neighbours(job: Job, slot: int) -> tuple[int, ...]:
    """The slots that a slot has a link with, each once, in the order of its links."""
    return tuple(dict.fromkeys(other_end(job, slot, link)[0] for link in links_of(job, slot)))


def audit_list_root(job: Job, slot: int, number: int, segment: Segment, steps: bytes) -> bytes:
    """The list root that follows from a worker's Commit and its opened steps root."""
    hasher = blake3(job.id + u32(job.lane_of(slot)) + u32(job.stage_of(slot)) + u64(number))
    hasher.update(segment.start_shared + segment.start_lane)
    hasher.update(segment.end_shared + segment.end_lane)
    for link in segment.links:
        hasher.update(link.sent + link.received)
    hasher.update(segment.contribution + steps)
    return hasher.digest()


def seal(salt: bytes, steps: bytes) -> bytes:
    """What a Commit says about the steps before they are opened."""
    return blake3(salt + steps).digest()


def commit(run: Execution, node: bytes, sworn: Commit) -> None:
    """A worker's next segment is done."""
    job = known_job(run, sworn.job)
    require(job.status is JobStatus.ACTIVE, f"the job is {job.status}, not active")
    slot = known_slot(run, job, sworn.slot)
    require(
        slot.worker.node == node and slot.worker.accepted and sworn.slot in job.living,
        "this node does not work in that slot",
    )
    require_current(job, sworn.epoch, slot.incarnation, sworn.incarnation)
    require(
        sworn.segment == slot.committed and sworn.segment < job.rounds,
        f"segment {sworn.segment} is not the next one: that is {slot.committed} of {job.rounds}",
    )
    require(
        slot.committed - slot.settled < job.unsettled,
        f"{slot.committed - slot.settled} segments are unsettled, the most this job allows (D): "
        "wait for a settlement",
    )
    require(
        (sworn.start_shared, sworn.start_lane) == start_roots(run, job, sworn.slot, slot),
        "the start state is not the end state of the segment before",
    )
    require(
        not rounds.is_open(run, job, sworn.segment),
        f"round {sworn.segment - 1} is not decided: segment {sworn.segment} begins with it",
    )
    require(
        len(sworn.contribution) == (32 if job.contributes(sworn.segment) else 0),
        "contribution: 32 bytes from each segment of lane mode diloco but the last, no others",
    )
    wanted = links_of(job, sworn.slot)
    require(
        tuple(link.link for link in sworn.links) == wanted,
        f"links: this slot has {' and '.join(wanted) or 'none'}, in that order",
    )
    needs_copy = job.copied and copy_due_after(job, sworn.slot, sworn.segment)
    key_at = run.height + run.parameters.draw_delay
    segment = Segment(
        worker=node,
        epoch=sworn.epoch,
        incarnation=sworn.incarnation,
        start_shared=sworn.start_shared,
        start_lane=sworn.start_lane,
        end_shared=sworn.end_shared,
        end_lane=sworn.end_lane,
        links=sworn.links,
        seal=sworn.seal,
        loss=sworn.loss,
        contribution=sworn.contribution,
        committed=run.height,
        proof=ProofStatus.WAITING if needs_copy else ProofStatus.NONE,
        proof_until=key_at + run.parameters.standby_window if needs_copy else 0,
    )
    run.state.put_segment(job.id, sworn.slot, sworn.segment, segment)
    run.state.put_slot(
        job.id, sworn.slot, replace(slot, committed=slot.committed + 1, last_commit=run.height)
    )
    if needs_copy:
        due.put(run.state, Due(Timer.KEY, job.id, sworn.slot, sworn.segment), key_at)
    arm_stall(run, job, sworn.slot)
    run.emit(SegmentCommitted(job.id, sworn.slot, sworn.segment))
    wrong = (
        _unequal_links(run, job, sworn.slot, sworn.segment)
        or _unequal_contribution(run, job, sworn.slot, sworn)
        or _unequal_states(run, job, sworn.slot, sworn.segment)
    )
    if wrong:
        refund(run, job.id, CloseReason.MISMATCH, wrong)
        return
    for slot_or_neighbour in (sworn.slot, *neighbours(job, sworn.slot)):
        _link(run, job, slot_or_neighbour, sworn.segment)
    rounds.committed(run, job, sworn.segment)


def require_current(job: Job, epoch: int, expected: int, incarnation: int) -> None:
    """Transactions of before a rollback or a replacement are void (S7)."""
    require(
        (epoch, incarnation) == (job.epoch, expected),
        f"this speaks of epoch {epoch}, incarnation {incarnation}; "
        f"in force are {job.epoch} and {expected}",
    )


def start_roots(run: Execution, job: Job, number: int, slot: SlotState) -> tuple[bytes, bytes]:
    """(shared, lane) roots from which the slot's next segment must start."""
    if slot.committed == 0:
        if slot.genesis is None:
            raise InvalidTransaction("boundary 0 of this slot is not attested")
        return slot.genesis.shared, slot.genesis.lane
    before = run.segment(job.id, number, slot.committed - 1)
    return before.end_shared, before.end_lane


def _unequal_links(run: Execution, job: Job, slot: int, number: int) -> str:
    """After a Commit: what is wrong between it and its neighbours', if anything is."""
    for link in run.segment(job.id, slot, number).links:
        other_slot, name = other_end(job, slot, link.link)
        other = run.state.segment(job.id, other_slot, number)
        if other is not None and not _agree(link, _end(other, name)):
            for party in (slot, other_slot):
                count(run, run.slot(job.id, party).worker.owner, mismatches=1)
            detail = (
                f"segment {number}: slots {min(slot, other_slot)} and {max(slot, other_slot)} "
                "committed to different frames on their link"
            )
            return detail
    return ""


def _unequal_contribution(run: Execution, job: Job, slot: int, sworn: Commit) -> str:
    """What is wrong when a segment is committed again and the others began with its first one."""
    if not rounds.contradicts(run, job, slot, sworn.segment, sworn.contribution):
        return ""
    detail = (
        f"segment {sworn.segment}: slot {slot} contributes something else than the others began "
        "with"
    )
    return detail


def _unequal_states(run: Execution, job: Job, slot: int, number: int) -> str:
    """After a Commit: where lanes differ in the stage's shared state all are audited for certain.
    Says what is wrong when that cannot be."""
    stage, mine = job.stage_of(slot), run.segment(job.id, slot, number)
    others = [
        (other, segment)
        for lane in rounds.living(job)
        if (other := job.slot_at(lane, stage)) != slot
        if (segment := run.state.segment(job.id, other, number)) is not None
    ]
    known = any(segment.forced for _, segment in others)
    if not known and all(segment.end_shared == mine.end_shared for _, segment in others):
        return ""
    if not known:
        run.emit(StatesDiffer(job.id, stage, number))
    if job.audit_rate == 0:
        detail = f"segment {number}: lanes differ in stage {stage}, and the offer wants no audits"
        return detail
    for party, segment in (*others, (slot, mine)):
        if segment.forced:
            continue
        if segment.status in (SegmentStatus.UNAUDITED, SegmentStatus.BY_SUBMITTER):
            detail = (
                f"segment {number}: lanes differ in stage {stage}, and slot {party} was not audited"
            )
            return detail
        if segment.status is SegmentStatus.UNDRAWN:
            segment = replace(segment, status=SegmentStatus.LINKED)
            entry = Due(Timer.DRAW, job.id, party, number)
            due.put(run.state, entry, run.height + run.parameters.draw_delay)
        run.state.put_segment(job.id, party, number, replace(segment, forced=True))
    return ""


def _link(run: Execution, job: Job, slot: int, number: int) -> None:
    segment = run.state.segment(job.id, slot, number)
    if segment is None or segment.status is not SegmentStatus.COMMITTED:
        return
    others = neighbours(job, slot)
    if any(run.state.segment(job.id, other, number) is None for other in others):
        return
    linked = replace(segment, status=SegmentStatus.LINKED, linked=run.height)
    run.state.put_segment(job.id, slot, number, linked)
    entry = Due(Timer.DRAW, job.id, slot, number)
    due.put(run.state, entry, run.height + run.parameters.draw_delay)
    run.emit(SegmentLinked(job.id, slot, number))


def _end(segment: Segment, link: str) -> LinkRoots:
    return next(roots for roots in segment.links if roots.link == link)


def _agree(one: LinkRoots, other: LinkRoots) -> bool:
    return (one.sent, one.received) == (other.received, other.sent)


# -- copies of the state


def proof_key(run: Execution, entry: Due) -> None:
    """Due: the beacon that keys the proofs of a copy is known."""
    segment = run.segment(entry.job, entry.slot, entry.segment)
    key = run.context.beacon
    changed = replace(segment, proof_key=key)
    run.state.put_segment(entry.job, entry.slot, entry.segment, changed)
    run.emit(ProofKeyKnown(entry.job, entry.slot, entry.segment, key))


def standby_proof(run: Execution, node: bytes, proof: StandbyProof) -> None:
    """Standby, then worker, say the keyed hash of the state after a segment."""
    job = known_job(run, proof.job)
    require(job.status is JobStatus.ACTIVE, f"the job is {job.status}, not active")
    slot = known_slot(run, job, proof.slot)
    segment = run.state.segment(job.id, proof.slot, proof.segment)
    if segment is None:
        raise InvalidTransaction("that segment is not committed")
    require_current(job, proof.epoch, segment.incarnation, proof.incarnation)
    require(
        segment.proof is ProofStatus.WAITING,
        f"the copy after segment {proof.segment} waits for no proof: {segment.proof}",
    )
    require(segment.proof_key != b"", "the key of this proof is not known yet")
    require(run.height < segment.proof_until, "the standby window of this boundary is over")
    if job.standby is not None and node == job.standby.node and job.standby.accepted:
        require(segment.standby_hash == b"", "the standby has given its proof")
        changed = replace(
            segment,
            standby_hash=proof.keyed_hash,
            holder=job.standby.owner,
            # Who speaks last must not be short of time because the other was late.
            proof_until=max(segment.proof_until, run.height + run.parameters.answer_window),
        )
        run.state.put_segment(job.id, proof.slot, proof.segment, changed)
        return
    require(node == slot.worker.node, "proofs come from the standby and from the slot's worker")
    require(segment.standby_hash != b"", "the standby speaks first")
    equal = proof.keyed_hash == segment.standby_hash
    verdict = ProofStatus.EQUAL if equal else ProofStatus.UNEQUAL
    changed = replace(segment, worker_hash=proof.keyed_hash, proof=verdict)
    run.state.put_segment(job.id, proof.slot, proof.segment, changed)
    run.emit(ProofChecked(job.id, proof.slot, proof.segment, equal))
    arm_settlement(run, job)
