"""Asks, offers and matching: who works for whom, and for how much (ANNEX A2).

Matching is a reverse auction that the chain holds by itself, `match_delay` after the offer:

1. An ask is *eligible* for a slot when it is in force, of the job's class, its node has the stage's
   memory left, its owner is neither the submitter nor the source's, it did not decline this job,
   and its price is within the ceiling, `ceil(ask price x parameters x tokens / 10^9)`; the
   weight of the slot's lane multiplies both.
   Between the two ends of each link there is a *path*: one of them was dialled by `dial_receipts`
   other owners, or one has a receipt of the other that they are connected directly.
2. Slots choose in (lane, stage) order: lowest `price x (2,000,000 - reputation)`, then lowest
   SHA-256(beacon ‖ job ‖ slot ‖ node). A node serves one slot of a job; owners differ in a lane.
   In a split job slot 0 is the source's, for nothing, if its ask stands and fits.
3. Then one standby for all slots, in the same order by the ask's price, with `standby_slots` left
   for all of them, of an owner that works in no slot.

A job of class "any" is matched in each class by itself; the lowest sum of prices wins, then the
first class name. If some role stays empty the offer expires. When a member declines, or
`accept_window` ends, the job is offered again without it, MATCH_TRIES times in all.

A matching looks at every ask there is, whatever comes of it: so each one burns a part of the
deposit. Asks are free, so a node may put one in every ASKS-th part of an epoch only.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from msgspec.structs import replace

from tdmld.chain import due, limits
from tdmld.chain.closing import end, release, reserve
from tdmld.chain.crypto import sha256, verify
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.events import JobMatched, JobPreparing, JobUnmatched
from tdmld.chain.execution import Execution, known_job, known_slot, require
from tdmld.chain.genesis import Parameters
from tdmld.chain.records import (
    CloseReason,
    Due,
    Job,
    JobStatus,
    Member,
    SlotState,
    StandingAsk,
    Timer,
)
from tdmld.chain.reputation import reputation
from tdmld.chain.segments import neighbours
from tdmld.chain.settlement import count
from tdmld.chain.state import u32
from tdmld.chain.transactions import (
    DIAL_DOMAIN,
    DIAL_OPEN,
    DIAL_PAIR,
    Accept,
    Ask,
    Decline,
    receipt_bytes,
)

ANY_CLASS = "any"


def slot_price(ask_price: int, parameters: int, tokens: int) -> int:
    """Units per segment of a slot, from an ask per 10^6 parameters and 10^3 tokens, rounded up."""
    return -(-ask_price * parameters * tokens // 10**9)


def price_of(job: Job, slot: int, ask: StandingAsk) -> int:
    """Units per segment of the slot by this ask; a lane's weight multiplies it. The source's own
    slot is not paid."""
    if job.is_own(slot):
        return 0
    parameters = job.stages[job.stage_of(slot)].parameters
    return slot_price(ask.price, parameters, job.tokens) * job.weight_of(slot)


# -- asks


def ask(run: Execution, node: bytes, wanted: Ask, chain_id: bytes) -> None:
    """Put or replace a node's standing ask."""
    record = run.state.node(node)
    if record is None:
        raise InvalidTransaction("this node key is not registered: its owner must send Register")
    require(
        record.from_height <= run.height,
        f"this node key is registered from height {record.from_height} on",
    )
    old = run.state.ask(node)
    require(
        old is None or wanted.until_height > old.until_height,
        "an ask is replaced only by one with a greater until_height",
    )
    pause = ask_pause(run.parameters)
    require(
        old is None or run.height >= old.height + pause,
        f"this node asked less than {pause} blocks ago: it may replace its ask from height "
        f"{0 if old is None else old.height + pause} on",
    )
    furthest = run.height + 2 * run.parameters.epoch_blocks
    require(
        run.height <= wanted.until_height <= furthest,
        f"until_height must lie between {run.height} and {furthest}",
    )
    require(
        wanted.class_id not in ("", ANY_CLASS), 'an ask names one class: not "any", not nothing'
    )
    require(wanted.price <= limits.PRICE, f"price: at most {limits.PRICE}")
    require(wanted.memory <= limits.MEMORY_BYTES, f"memory: at most {limits.MEMORY_BYTES} bytes")
    require(
        wanted.audit_capacity <= limits.AUDIT_CAPACITY,
        f"audit_capacity: at most {limits.AUDIT_CAPACITY}",
    )
    opened, paths = _receipts(run, node, record.owner, wanted, chain_id)
    run.state.put_ask(
        node,
        StandingAsk(
            session=wanted.session,
            class_id=wanted.class_id,
            memory=wanted.memory,
            price=wanted.price,
            audit_capacity=wanted.audit_capacity,
            standby_slots=wanted.standby_slots,
            until_height=wanted.until_height,
            open=opened,
            paths=paths,
            height=run.height,
        ),
    )


def _receipts(
    run: Execution, node: bytes, owner: bytes, wanted: Ask, chain_id: bytes
) -> tuple[int, tuple[bytes, ...]]:
    """How many owners dialled the node, and the nodes that are connected with it (ASK-6, ASK-7)."""
    order = [(receipt.kind, receipt.witness) for receipt in wanted.receipts]
    require(
        all(a < b for a, b in pairwise(order)),
        "receipts: sorted by kind and witness, one of each",
    )
    owners = set()
    for receipt in wanted.receipts:
        witness = run.state.node(receipt.witness)
        require(
            witness is not None and not witness.revoked and witness.from_height <= run.height,
            "a receipt's witness is a registered node, and not revoked",
        )
        assert witness is not None
        require(witness.owner != owner, "a receipt's witness belongs to another owner")
        require(
            run.height - run.parameters.epoch_blocks <= receipt.height <= run.height,
            "a receipt is older than an epoch, or not of this chain's past",
        )
        message = receipt_bytes(node, wanted.session, receipt.kind, receipt.height)
        require(
            verify(receipt.witness, DIAL_DOMAIN, chain_id, message, receipt.signature),
            "a receipt that its witness did not sign for this node and session",
        )
        if receipt.kind == DIAL_OPEN:
            owners.add(witness.owner)
    return len(owners), tuple(r.witness for r in wanted.receipts if r.kind == DIAL_PAIR)


def ask_pause(parameters: Parameters) -> int:
    """Blocks from one ask of a node to the next."""
    return -(-parameters.epoch_blocks // limits.ASKS)


# -- matching


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be matched. `weight`: 2,000,000 less its owner's reputation."""

    node: bytes
    owner: bytes
    ask: StandingAsk
    weight: int
    memory: int
    standby_slots: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """A full cast for a job, in one class."""

    class_id: str
    workers: tuple[Member, ...]
    standby: Member

    @property
    def cost(self) -> int:
        return sum(worker.price for worker in self.workers)


def match(run: Execution, entry: Due) -> None:
    """Due: cast the job, or end it."""
    job = _pay(run, run.job(entry.job))
    found = cast(job, candidates_for(run, job), run.context.beacon, run.parameters.dial_receipts)
    if found is None:
        detail = "no set of asks in force fits the offer's class, memory and prices"
        end(run, job.id, JobStatus.EXPIRED, CloseReason.NO_MATCH, detail)
        return
    for slot, worker in enumerate(found.workers):
        run.state.put_slot(job.id, slot, SlotState(worker, job.attempt))
    job = replace(
        job,
        status=JobStatus.MATCHED,
        class_id=found.class_id,
        standby=found.standby,
        standby_turn=job.attempt,
        matched=run.height,
    )
    run.state.put_job(job)
    reserve(run, job)
    due.put(run.state, Due(Timer.ACCEPT, job.id), run.height + run.parameters.accept_window)
    nodes = tuple(worker.node for worker in found.workers)
    run.emit(JobMatched(job.id, job.attempt, nodes, found.standby.node))


def _pay(run: Execution, job: Job) -> Job:
    """Burn what a matching costs."""
    cost = min(job.deposit, -(-run.parameters.offer_deposit // limits.MATCH_COST))
    paid = replace(job, deposit=job.deposit - cost)
    run.state.put_job(paid)
    run.state.burn(cost)
    return paid


def cast(
    job: Job, candidates: Sequence[Candidate], beacon: bytes, dial_receipts: int = 0
) -> Assignment | None:
    """The rule at the head of this module: the cheapest class's assignment."""
    if job.class_wanted == ANY_CLASS:
        classes = sorted({candidate.ask.class_id for candidate in candidates})
    else:
        classes = [job.class_wanted]
    found = [
        assignment
        for class_id in classes
        if (
            assignment := _cast_class(
                job,
                class_id,
                [c for c in candidates if c.ask.class_id == class_id],
                beacon,
                dial_receipts,
            )
        )
        is not None
    ]
    return min(found, key=lambda a: (a.cost, a.class_id), default=None)


def _cast_class(
    job: Job, class_id: str, candidates: Sequence[Candidate], beacon: bytes, dial_receipts: int
) -> Assignment | None:
    chosen: list[Candidate] = []
    for slot in range(job.slots):
        stage = job.stages[job.stage_of(slot)]
        busy_nodes = {c.node for c in chosen}
        busy_owners = {c.owner for c in chosen[job.slot_at(job.lane_of(slot), 0) :]}
        ends = [chosen[other] for other in neighbours(job, slot) if other < slot]

        def order(c: Candidate, slot: int = slot) -> tuple[int, bytes]:
            return price_of(job, slot, c.ask) * c.weight, lot(beacon, job, slot, c)

        eligible = [
            c
            for c in candidates
            if c.node not in busy_nodes
            and c.owner not in busy_owners
            and (c.node == job.source) == job.is_own(slot)
            and c.memory >= stage.memory
            and price_of(job, slot, c.ask) <= job.slot_price_max * job.weight_of(slot)
            and all(has_path(c, end.node, end.ask, dial_receipts) for end in ends)
        ]
        if not eligible:
            return None
        best = min(eligible, key=order)
        chosen.append(best)
    workers = [Member(c.node, c.owner, price_of(job, slot, c.ask)) for slot, c in enumerate(chosen)]
    owners = {worker.owner for worker in workers}
    standby = cast_standby(job, candidates, owners, beacon)
    return None if standby is None else Assignment(class_id, tuple(workers), standby)


def cast_standby(
    job: Job, candidates: Sequence[Candidate], workers: Collection[bytes], beacon: bytes
) -> Member | None:
    """The cheapest node that can hold copies of all slots; `workers`: owners that work in them."""
    holders = [c for c in candidates if c.owner not in workers and c.standby_slots >= job.slots]
    best = min(
        holders,
        key=lambda c: (c.ask.price * c.weight, lot(beacon, job, limits.STANDBY_SLOT, c)),
        default=None,
    )
    return None if best is None else Member(best.node, best.owner, job.standby_price)


def has_path(a: Candidate, node: bytes, ask: StandingAsk | None, dial_receipts: int) -> bool:
    """Whether tensors can go from `a` to `node`, whose ask this is, without a relay (MATCH-3)."""
    dialled = max(a.ask.open, 0 if ask is None else ask.open) >= dial_receipts
    return dialled or node in a.ask.paths or (ask is not None and a.node in ask.paths)


def lot(beacon: bytes, job: Job, slot: int, candidate: Candidate) -> bytes:
    return sha256(beacon, job.id, u32(slot), candidate.node)


def candidates_for(run: Execution, job: Job) -> list[Candidate]:
    """Nodes whose asks are in force and that may work for this job. Asks that are over go, once
    their nodes could ask again."""
    found, over, pause = [], [], ask_pause(run.parameters)
    party = {job.submitter, run.state.owner_of(job.source)}
    for node, standing in run.state.asks():
        record = run.state.node(node)
        if standing.until_height < run.height or record is None:
            if run.height >= standing.height + pause:
                over.append(node)
            continue
        if node in job.declined or record.from_height > run.height:
            continue
        if record.owner in party and not (job.is_own(0) and node == job.source):
            continue
        if record.owner in job.excluded:
            continue
        weight = 2 * limits.RATE_ONE - reputation(run.state.facts(record.owner))
        found.append(
            Candidate(
                node=node,
                owner=record.owner,
                ask=standing,
                weight=weight,
                memory=standing.memory - record.memory_used,
                standby_slots=standing.standby_slots - record.standby_used,
            )
        )
    for node in over:
        run.state.put_ask(node, None)
    return found


# -- answers


def accept(run: Execution, node: bytes, answer: Accept) -> None:
    """A member takes its place; the last one to do so starts the preparation."""
    job = known_job(run, answer.job)
    member = _asked_member(run, job, node, answer)
    require(len(answer.session) == 32 and any(answer.session), "session: not a key")
    member = replace(member, session=answer.session)
    if answer.slot == limits.STANDBY_SLOT:
        job = replace(job, standby=member)
        run.state.put_job(job)
    else:
        state = run.slot(job.id, answer.slot)
        taken = replace(state, worker=member, since=run.height)
        run.state.put_slot(job.id, answer.slot, taken)
    if _missing_answers(run, job):
        return
    run.state.put_job(replace(job, status=JobStatus.PREPARING))
    due.cancel(run.state, Due(Timer.ACCEPT, job.id))
    due.put(run.state, Due(Timer.ACTIVATE, job.id), run.height + run.parameters.activate_window)
    run.emit(JobPreparing(job.id))


def decline(run: Execution, node: bytes, answer: Decline) -> None:
    """A member gives its place back: costs it nothing but its turn."""
    job = known_job(run, answer.job)
    _asked_member(run, job, node, answer)
    _offer_again(run, job, (node,))


def accept_over(run: Execution, entry: Due) -> None:
    """Due: who did not answer in time is passed over, and that is a fault."""
    job = run.job(entry.job)
    silent = _missing_answers(run, job)
    for member in silent:
        count(run, member.owner, faults=1)
    _offer_again(run, job, tuple(member.node for member in silent))


def _asked_member(run: Execution, job: Job, node: bytes, answer: Accept | Decline) -> Member:
    require(job.status is JobStatus.MATCHED, f"the job is {job.status}: it asks nobody")
    require(
        answer.attempt == job.attempt,
        f"this answers matching {answer.attempt}; the present one is {job.attempt}",
    )
    if answer.slot == limits.STANDBY_SLOT:
        member = job.standby
    else:
        member = known_slot(run, job, answer.slot).worker
    if member is None or member.node != node:
        raise InvalidTransaction("this node was not matched to that place")
    require(not member.accepted, "this node has accepted already")
    return member


def _missing_answers(run: Execution, job: Job) -> list[Member]:
    members = [run.slot(job.id, slot).worker for slot in range(job.slots)]
    if job.standby is not None:
        members.append(job.standby)
    return [member for member in members if not member.accepted]


def _offer_again(run: Execution, job: Job, without: tuple[bytes, ...]) -> None:
    if job.attempt + 1 == limits.MATCH_TRIES:
        detail = f"matched {limits.MATCH_TRIES} times, and never accepted by all"
        end(run, job.id, JobStatus.EXPIRED, CloseReason.DECLINED, detail)
        return
    release(run, job)
    for slot in range(job.slots):
        run.state.put_slot(job.id, slot, None)
    run.state.put_job(
        replace(
            job,
            status=JobStatus.OFFERED,
            standby=None,
            class_id="",
            attempt=job.attempt + 1,
            declined=tuple(sorted({*job.declined, *without})),
        )
    )
    due.cancel(run.state, Due(Timer.ACCEPT, job.id))
    due.put(run.state, Due(Timer.MATCH, job.id), run.height + run.parameters.match_delay)
    run.emit(JobUnmatched(job.id, without))
