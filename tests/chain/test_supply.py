"""Whatever people do: money is conserved, nobody is paid twice, and every job ends.

Each example is a schedule: who has which vice, when somebody dies or comes back, which heights are
tainted, what strangers throw in between. `World.block` counts all money after every block.
"""

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
    Present,
    Stall,
    Witness,
)
from tdmld.chain.events import JobEnded, Paid, SegmentSettled
from tdmld.chain.offers import lock_of
from tdmld.chain.records import FINAL, Job, JobStatus, Member, SegmentStatus
from tdmld.chain.transactions import (
    Accept,
    AttestResult,
    AuditOpen,
    Commit,
    Fetched,
    LaneMode,
    Open,
    StandbyProof,
    Transfer,
)
from tests.chain.world import STAKE, Vice, World, make_genesis, mark, node_key, owner_key

NODES = 7
vices = st.dictionaries(
    st.integers(1, NODES - 1), st.frozensets(st.sampled_from(list(Vice)), max_size=2), max_size=3
)
shapes = st.fixed_dictionaries(
    {
        "rounds": st.integers(1, 5),
        "lanes": st.integers(1, 2),
        "ring": st.booleans(),
        "state_every": st.integers(1, 2),
        "unsettled": st.integers(4, 5),
        "audit_rate": st.sampled_from([0, 200_000, 1_000_000]),
        "audit_budget": st.sampled_from([140_000, 300_000]),
    }
)
PARAMETERS = {
    "accept_window": 6,
    "activate_window": 10,
    "segment_window": 12,
    "standby_window": 8,
    "audit_window": 8,
    "open_window": 5,
    "reveal_window": 5,
    "settle_window": 3,
    "result_window": 20,
    "answer_window": 4,
}


def shaped(shape: dict[str, Any]) -> dict[str, Any]:
    """Two lanes, of two rounds or more, may meet once a segment and differ in weight."""
    if shape["lanes"] == 1 or shape["rounds"] == 1 or shape["ring"]:
        return shape
    budget = max(shape["audit_budget"], 210_000)
    weights = {"lane_mode": LaneMode.DILOCO, "lane_weights": (1, 2)}
    return {**shape, **weights, "audit_budget": budget}


def check_ended(world: World, job: Job, offer: Any) -> None:
    """What must hold for every job that is over."""
    assert job.final
    assert job.locked == 0
    (ended,) = [e for e in world.events if isinstance(e, JobEnded) and e.job == job.id]
    paid = sum(e.amount for e in world.events if isinstance(e, Paid) and e.job == job.id)
    lock = lock_of(offer, world.parameters).total
    burned = lock - ended.refund - paid
    assert burned >= 0
    assert burned % world.parameters.tx_fee == 0
    settled = Counter(
        (e.slot, e.segment)
        for e in world.events
        if isinstance(e, SegmentSettled) and e.job == job.id
    )
    assert all(times == 1 for times in settled.values())
    for slot, number in settled:
        segment = world.state.segment(job.id, slot, number)
        assert segment is not None
        assert segment.status is not SegmentStatus.MISMATCH
    assert sum(earned.total for earned in world.state.payments(job.id).values()) == paid
    workers = sum(earned.worker for earned in world.state.payments(job.id).values())
    assert workers <= sum(job.slot_price_max * job.weight_of(slot) for slot, _ in settled)
    if job.status is JobStatus.CLOSED:
        assert {(s, n) for s in job.living for n in range(job.rounds)} <= settled.keys()
    check_earned(world, job)


def check_earned(world: World, job: Job) -> None:
    """Each owner was paid for the settled segments that stand with its node's name, and no others:
    nothing for what is void."""
    wages: Counter[bytes] = Counter()
    for slot in range(job.slots if job.matched else 0):
        state = world.state.slot(job.id, slot)
        if state is None:
            continue
        prices = {member.node: member.price for member in taken(world, job.id, slot)}
        for number in range(job.rounds):
            segment = world.state.segment(job.id, slot, number)
            if segment is not None and segment.settled:
                owner = world.state.owner_of(segment.worker)
                assert owner is not None
                wages[owner] += prices[segment.worker]
        assert len({former.incarnation for former in state.former}) == len(state.former)
    assert wages == Counter(
        {o: e.worker for o, e in world.state.payments(job.id).items() if e.worker}
    )


def taken(world: World, job: bytes, slot: int) -> list[Member]:
    """Everybody who ever worked in the slot."""
    return [member for where, member in world.workers if where == (job, slot)]


def check_idle(world: World) -> None:
    """Nothing of ended jobs is left: no timers, no capacity in use, stakes untouched."""
    assert world.next_due() is None
    for index in range(NODES):
        node = world.state.node(node_key(index).public)
        assert node is not None
        assert (node.memory_used, node.standby_used, node.audits_open) == (0, 0, 0)
        assert world.state.account(owner_key(index).public).work_stake == STAKE


@settings(max_examples=80, deadline=None)
@given(shape=shapes, who=vices, taints=st.sets(st.integers(0, 60)), data=st.data())
def test_a_job_with_any_actors_ends_and_conserves_money(
    shape: dict[str, int], who: dict[int, frozenset[Vice]], taints: set[int], data: st.DataObject
) -> None:
    world = World(make_genesis(NODES, **PARAMETERS), seed=data.draw(st.integers(0, 999)))
    world.all_ask(NODES)
    world.bad_segment = data.draw(st.integers(0, 3))
    if data.draw(st.booleans()):
        shape = {**shape, "deadline": world.height + data.draw(st.integers(2, 80))}
    offer = world.offer(**shaped(shape))
    job_id = world.do(owner_key(0), offer)
    world.vices = {node_key(index).public: found for index, found in who.items()}
    changes = {
        data.draw(st.integers(0, 80)): data.draw(st.integers(1, NODES - 1)) for _ in range(2)
    }
    for turn in range(1200):
        if world.job(job_id).final:
            break
        if turn in changes:  # a node dies, or comes back honest
            key = node_key(changes[turn]).public
            dead = Vice.MUTE in world.vices.get(key, frozenset())
            world.vices[key] = frozenset() if dead else frozenset({Vice.MUTE})
        world.play(job_id, tainted=turn in taints)
    job = world.job(job_id)
    assert job.status in FINAL, f"{job.status} after 1200 blocks"
    check_ended(world, job, offer)
    check_idle(world)
    if not who and not changes and "deadline" not in shape:
        assert job.status is JobStatus.CLOSED


def noise(world: World, job: bytes, data: st.DataObject) -> bytes:
    """A transaction by anybody about anything."""
    index, slot = data.draw(st.integers(0, NODES - 1)), data.draw(st.integers(0, 4))
    number = data.draw(st.integers(0, 4))
    node, owner = node_key(index), owner_key(index)
    at = (job, 0, slot, number)
    choice = data.draw(st.integers(0, 13))
    if choice == 0:
        amount = data.draw(st.sampled_from([1, 1000, 10**8]))
        return world.sign(owner, Transfer(owner_key(index + 1).public, amount))
    if choice == 1:
        return world.sign(owner, Fetched(job))
    payload = (
        Accept(job, 0, slot, mark("x")),
        AttestResult(job, mark("x")),
        Open(*at, mark("x"), mark("y")),
        AuditOpen(*at, mark("x"), mark("y")),
        StandbyProof(job, 0, slot, 0, number, mark("z")),
        Commit(job, 0, slot, 0, number, *[mark("x")] * 4, (), mark("x")),
        AttestResult(mark("no job"), mark("x")),
        Leave(job, 0, slot, data.draw(st.integers(0, 1)), LeaveReason.DISK),
        Stall(job, 0, slot, 0, 0, "down", number),
        Present(job, 0, slot, 0, number),
        Witness(job, 0, slot, 0, number, delivered=False),
        Accept(job, 1, slot, mark("x")),
    )[choice - 2]
    return world.sign(node, payload)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, data=st.data())
def test_strangers_and_repetitions_change_nobodys_money(
    shape: dict[str, int], data: st.DataObject
) -> None:
    """Every transaction is thrown in again in later blocks, among noise by anybody."""
    world = World(make_genesis(NODES, **PARAMETERS))
    world.all_ask(NODES)
    offer = world.offer(**shaped(shape))
    job_id = world.do(owner_key(0), offer)
    past: list[bytes] = []
    for _ in range(600):
        if world.job(job_id).final:
            break
        raws = [world.sign(world.keys[node], payload) for node, payload in world.moves(job_id)]
        job = world.job(job_id)
        if job.status is JobStatus.FINISHING and job.result:
            raws.append(world.sign(owner_key(0), Fetched(job_id)))
        wild = [noise(world, job_id, data)] if data.draw(st.booleans()) else []
        again = [data.draw(st.sampled_from(past))] if past and data.draw(st.booleans()) else []
        before = len(world.receipts)
        world.block(*again, *raws, *wild, *raws)
        doubled = world.receipts[before + len(again) + len(raws) + len(wild) :]
        assert not any(receipt.ok for receipt in doubled)
        assert not any(receipt.ok for receipt in world.receipts[before : before + len(again)])
        past.extend(raws)
    check_ended(world, world.job(job_id), offer)
    check_idle(world)


def test_many_jobs_at_once_end_and_share_the_same_nodes() -> None:
    world = World(make_genesis(NODES, **PARAMETERS))
    world.block(*(world.ask(i, memory=1 << 33, standby_slots=64) for i in range(NODES)))
    offers = [world.offer(rounds=2 + n, audit_rate=1_000_000) for n in range(4)]
    jobs = [world.do(owner_key(0), offer) for offer in offers]
    for _ in range(400):
        raws = [
            world.sign(world.keys[node], payload)
            for job in jobs
            for node, payload in world.moves(job)
        ]
        ready = [job for job in jobs if world.job(job).result and not world.job(job).final]
        if ready:
            raws.append(world.sign(owner_key(0), Fetched(ready[0])))
        world.block(*raws)
    for job, offer in zip(jobs, offers, strict=True):
        assert world.job(job).status is JobStatus.CLOSED
        check_ended(world, world.job(job), offer)
    check_idle(world)
