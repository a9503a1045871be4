"""Who is matched, at what price, and what happens to those who do not answer."""

import pytest
from msgspec.structs import replace

from tdmld.chain import limits
from tdmld.chain.accounts import (
    Facts,
)
from tdmld.chain.events import JobMatched, JobUnmatched
from tdmld.chain.market import slot_price
from tdmld.chain.offers import audits_expected, lock_of, suggested_audit_budget
from tdmld.chain.records import (
    CloseReason,
    Job,
    JobStatus,
)
from tdmld.chain.reputation import reputation
from tdmld.chain.state import State
from tdmld.chain.transactions import Accept, Ask, Decline, Register, Stage, sign_registration
from tests.chain.world import (
    BALANCE,
    FEE,
    GIB,
    STAKE,
    Vice,
    World,
    make_genesis,
    mark,
    node_key,
    owner_key,
)

PAUSE = 63
"""ASK-5: an eighth of 500 blocks, rounded up."""
MATCHING = 1000
"""MATCH-2: a tenth of the deposit."""


def matched(world: World, **offer: object) -> Job:
    job_id = world.submit(**offer)
    world.wait(world.parameters.match_delay)
    return world.job(job_id)


def cast(world: World, job: Job) -> list[int]:
    """Indices of the workers by slot, then of the standby."""
    assert job.standby is not None
    found = []
    for slot in range(job.slots):
        state = world.state.slot(job.id, slot)
        assert state is not None
        found.append(state.worker.node)
    names = {node_key(i).public: i for i in range(20)}
    return [names[node] for node in [*found, job.standby.node]]


def put(world: World, index: int, **facts: int) -> None:
    """Give an owner a past."""
    state = State(world.store.get)
    state.put_facts(owner_key(index).public, Facts(**facts))
    world.store.update({k: v for k, v in state.changes.items() if v is not None})


# -- asks


def test_an_ask_needs_a_registered_node_and_sane_numbers() -> None:
    world = World()
    good = Ask(mark(1), "cpu", GIB, 10, 1, 1, 500)
    assert "not registered" in world.refused(node_key(15), good)
    for changed, rule in [
        ({"class_id": "any"}, "names one class"),
        ({"class_id": ""}, "names one class"),
        ({"until_height": 1}, "until_height"),
        ({"until_height": 5000}, "until_height"),
        ({"price": limits.PRICE + 1}, "price"),
        ({"memory": limits.MEMORY_BYTES + 1}, "memory"),
        ({"audit_capacity": limits.AUDIT_CAPACITY + 1}, "audit_capacity"),
    ]:
        world.block()
        assert rule in world.refused(node_key(1), replace(good, **changed))
    world.do(node_key(1), good)


def test_an_ask_is_replaced_by_a_later_one_and_never_by_an_older() -> None:
    world = World()
    first = Ask(mark(1), "cpu", GIB, 10, 1, 1, 500)
    later = replace(first, until_height=501, price=99)
    world.do(node_key(1), first)
    world.wait(PAUSE - 1)
    world.do(node_key(1), later)
    assert "greater until_height" in world.refused(node_key(1), first)
    assert "greater until_height" in world.refused(node_key(1), later)
    standing = world.state.ask(node_key(1).public)
    assert standing is not None
    assert (standing.price, standing.until_height, standing.height) == (99, 501, 1 + PAUSE)
    assert [node for node, _ in world.state.asks()] == [node_key(1).public]


def test_asks_are_free_and_therefore_few() -> None:
    """ASK-5, also for one that puts short asks and lets matchings delete them (MATCH-2)."""
    world = World()
    node = node_key(1)
    asked = 0
    for until in range(world.parameters.epoch_blocks):
        ask = Ask(mark(1), "cpu", GIB, 10, 1, 1, world.height + 1)
        offer = [world.sign(owner_key(0), world.offer())] if until % 20 == 0 else []
        receipts = world.block(world.sign(node, ask), *offer).receipts
        asked += receipts[0].ok
        assert receipts[0].ok or "from height" in receipts[0].reason
    assert asked == limits.ASKS


def test_asks_that_are_over_are_not_matched_and_forgotten() -> None:
    world = World()
    world.block(*(world.ask(index, until_height=6) for index in range(7)))
    world.wait(3)
    assert matched(world).reason is CloseReason.NO_MATCH
    assert len(list(world.state.asks())) == 7, "they could come back as new ones"
    world.wait(PAUSE)
    assert matched(world).reason is CloseReason.NO_MATCH
    assert list(world.state.asks()) == []


# -- offers


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"spec_bytes": 0}, "spec_bytes"),
        ({"spec_bytes": 65_537}, "spec_bytes"),
        ({"lanes": 0}, "lanes"),
        ({"lanes": 16, "stages": (Stage(1, 1),) * 17}, "lanes x stages"),
        ({"rounds": 0}, "rounds"),
        ({"segment_steps": 0}, "segment_steps"),
        ({"unsettled": 0}, "unsettled"),
        ({"unsettled": 65}, "unsettled"),
        ({"state_every": 0}, "state_every"),
        ({"state_every": 3}, "2 R must not exceed D"),
        ({"tokens": 0}, "tokens"),
        ({"stages": (Stage(0, 1),)}, "parameters of a stage"),
        ({"stages": (Stage(1, 0),)}, "memory of a stage"),
        ({"class_id": ""}, "class"),
        ({"privacy": "secret"}, "privacy 'secret'"),
        ({"slot_price_max": limits.PRICE + 1}, "slot_price_max"),
        ({"standby_price": limits.PRICE + 1}, "standby_price"),
        ({"audit_rate": 1_000_001}, "audit_rate"),
        ({"audit_price": 0}, "audit_price"),
        ({"audit_price": 0, "audit_budget": 0}, "not for free"),
        ({"audit_budget": 27_999}, "4 audits on average, which cost 28000"),
        ({"deadline": 1}, "deadline"),
        ({"deadline": 1 << 30}, "deadline"),
        ({"source": mark("nobody")}, "source"),
    ],
)
def test_an_offer_that_breaks_a_rule_names_it_and_locks_nothing(
    changes: dict[str, object], rule: str
) -> None:
    world = World()
    assert rule in world.refused(owner_key(0), world.offer(**changes))
    assert world.balance(0) == BALANCE - FEE
    assert world.state.active_jobs() == ()


def test_an_offer_beyond_the_balance_says_how_much_is_missing() -> None:
    world = World()
    offer = world.offer(slot_price_max=10_000_000)
    missing = lock_of(offer, world.parameters).total - (BALANCE - FEE)
    assert f"; {missing} more than" in world.refused(owner_key(0), offer)


def test_an_offer_locks_what_it_can_cost_at_most() -> None:
    world = World()
    world.all_ask()
    lock = lock_of(world.offer(), world.parameters)
    assert lock.escrow == 4 * 2 * (20_000 + 500)
    assert lock.deposit == world.parameters.offer_deposit
    job = world.job(world.submit())
    assert job.locked == lock.total == BALANCE - FEE - world.balance(0)


def test_the_suggested_audit_budget_leaves_room_for_luck() -> None:
    assert audits_expected(250_000, 2, 20) == 10
    assert audits_expected(1, 2, 20) == 1
    assert suggested_audit_budget(250_000, 2, 20, 48_000) == 24 * 48_000
    assert suggested_audit_budget(1_000_000, 2, 20, 48_000) == 40 * 48_000
    assert suggested_audit_budget(0, 2, 20, 48_000) == 0


# -- matching


def test_a_price_is_rounded_up_per_slot_and_segment() -> None:
    assert slot_price(1000, 1_000_000, 10_000) == 10_000
    assert slot_price(1, 1, 1) == 1
    assert slot_price(0, 10**9, 10**9) == 0


def test_the_cheapest_are_matched_and_paid_their_own_price() -> None:
    world = World()
    prices = [1, 900, 700, 800, 1000, 600, 5000]  # node 0 is the submitter's
    world.block(*(world.ask(i, price=price) for i, price in enumerate(prices)))
    job = matched(world)
    assert cast(world, job) == [5, 2, 3]
    assert job.standby is not None
    assert job.standby.price == 500
    first = world.state.slot(job.id, 0)
    assert first is not None
    assert first.worker.price == 6_000


def test_reputation_weighs_against_price() -> None:
    world = World()
    world.block(*(world.ask(i, price=p) for i, p in enumerate([1, 1000, 600, 600, 600])))
    put(world, 1, segments=10_000)  # almost 1.0: its price counts about half as much
    job = matched(world)
    assert cast(world, job)[0] == 1


def test_equal_bids_are_ordered_by_the_beacon() -> None:
    casts = set()
    for seed in range(8):
        world = World(seed=seed)
        world.all_ask()
        casts.add(tuple(cast(world, matched(world))))
    assert len(casts) > 4


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": GIB - 1},
        {"price": 2001},
        {"class_id": "other"},
    ],
    ids=["memory", "price", "class"],
)
def test_who_does_not_fit_is_not_matched(changes: dict[str, object]) -> None:
    world = World()
    world.block(
        *(world.ask(i, price=1500) for i in range(1, 4)), world.ask(4, **{"price": 1, **changes})
    )
    job = matched(world, class_id="cpu")
    assert job.status is JobStatus.MATCHED
    assert 4 not in cast(world, job)[:2]


def test_memory_in_use_is_not_offered_twice() -> None:
    world = World()
    world.block(*(world.ask(i, memory=GIB, standby_slots=2) for i in range(1, 4)))
    assert matched(world).status is JobStatus.MATCHED
    again = matched(world, rounds=5)
    assert again.status is JobStatus.EXPIRED


def test_neither_submitter_nor_source_works_for_the_job() -> None:
    for seed in range(4):
        world = World()
        world.block(*(world.ask(i) for i in range(5)))
        job = matched(world, source=node_key(4).public, rounds=2 + seed)
        assert not {0, 4} & set(cast(world, job))


def second_node(world: World, owner: int, node: int) -> None:
    proof = sign_registration(
        node_key(node), world.chain_id, owner_key(owner).public, world.height + 2
    )
    world.do(owner_key(owner), Register(node_key(node).public, world.height + 2, proof))
    world.wait(1)


def test_owners_differ_within_a_lane_and_the_standby_is_somebody_else() -> None:
    world = World()
    second_node(world, 1, 10)
    world.block(
        *(world.ask(i, price=100) for i in (1, 10)),
        *(world.ask(i, standby_slots=8) for i in (2, 3, 4)),
    )
    job = matched(world)
    workers = cast(world, job)
    assert len({1, 10} & set(workers)) == 1
    lanes = matched(world, lanes=2, rounds=5)
    assert {1, 10} <= set(cast(world, lanes)[:4])
    assert not {1, 10} & {cast(world, lanes)[4]}


def test_a_standby_must_have_room_for_every_slot() -> None:
    world = World()
    world.block(
        *(world.ask(i, standby_slots=1) for i in range(6)),
        world.ask(6, standby_slots=2, price=1100),  # too dear to be drawn as a worker
    )
    assert cast(world, matched(world))[2] == 6


def test_a_job_of_any_class_stays_within_one_and_takes_the_cheapest() -> None:
    world = World()
    world.block(
        *(world.ask(i, class_id="a", price=900) for i in (1, 2, 3)),
        *(world.ask(i, class_id="b", price=800) for i in (4, 5, 6)),
    )
    job = matched(world)
    assert job.class_id == "b"
    assert set(cast(world, job)) == {4, 5, 6}


def test_without_a_full_cast_the_offer_expires_and_all_but_the_matching_goes_back() -> None:
    world = World()
    world.block(*(world.ask(i) for i in range(1, 3)))
    job = matched(world)
    assert (job.status, job.reason) == (JobStatus.EXPIRED, CloseReason.NO_MATCH)
    assert world.balance(0) == BALANCE - FEE - MATCHING
    assert world.next_due() is None


def test_every_matching_burns_a_part_of_the_deposit_whatever_comes_of_it() -> None:
    world = World()
    world.all_ask()
    for index in range(1, 7):
        world.vices[node_key(index).public] = frozenset({Vice.IGNORES_PLACE})
    before = world.state.supply.burned
    job = world.submit()
    world.play_until(job)
    assert world.job(job).status is JobStatus.EXPIRED
    matchings = world.job(job).attempt + 1
    assert matchings > 1
    assert world.state.supply.burned == before + FEE + matchings * MATCHING


@pytest.mark.parametrize("deposit", [0, 1, 2, 9])
def test_no_more_burns_than_the_deposit(deposit: int) -> None:
    world = World(make_genesis(offer_deposit=deposit))
    world.all_ask()
    for index in range(1, 7):
        world.vices[node_key(index).public] = frozenset({Vice.IGNORES_PLACE})
    job = world.submit()
    world.play_until(job)
    burned = min(deposit, world.job(job).attempt + 1)
    assert world.state.supply.burned == FEE + burned


# -- answers


def test_who_declines_is_replaced_without_a_fault() -> None:
    world = World()
    world.all_ask()
    job = matched(world)
    decliner = cast(world, job)[0]
    world.vices[node_key(decliner).public] = frozenset({Vice.DECLINES})
    found = world.play_until(job.id, JobStatus.ACTIVE)
    assert found.attempt == 1
    assert found.declined == (node_key(decliner).public,)
    assert decliner not in cast(world, found)
    assert world.state.facts(owner_key(decliner).public).faults == 0
    assert sum(isinstance(event, JobMatched) for event in world.events) == 2


def test_who_does_not_answer_is_replaced_and_that_is_a_fault() -> None:
    world = World()
    world.all_ask()
    job = matched(world)
    silent = cast(world, job)[2]
    world.vices[node_key(silent).public] = frozenset({Vice.IGNORES_PLACE})
    found = world.play_until(job.id, JobStatus.ACTIVE)
    assert silent not in cast(world, found)
    assert world.state.facts(owner_key(silent).public).faults == 1
    (event,) = [event for event in world.events if isinstance(event, JobUnmatched)]
    assert event.without == (node_key(silent).public,)


def test_after_four_matchings_the_offer_expires() -> None:
    world = World()
    world.block(*(world.ask(index) for index in range(7)))
    job = matched(world)
    world.vices = {key: frozenset({Vice.DECLINES}) for key in world.keys}
    found = world.play_until(job.id)
    assert found.status is JobStatus.EXPIRED
    assert found.reason is CloseReason.DECLINED
    assert found.attempt == limits.MATCH_TRIES - 1
    for index in range(7):
        node = world.state.node(node_key(index).public)
        assert node is not None
        assert (node.memory_used, node.standby_used) == (0, 0)


def test_answers_come_from_the_matched_node_once_and_for_the_present_matching() -> None:
    world = World()
    world.all_ask()
    job = matched(world)
    first, second, _ = cast(world, job)
    answer = Accept(job.id, 0, 0, mark("session"))
    assert "not matched to that place" in world.refused(node_key(second), answer)
    assert "present one is 0" in world.refused(node_key(first), replace(answer, attempt=1))
    assert "no slot 7" in world.refused(node_key(first), replace(answer, slot=7))
    assert "not a key" in world.refused(node_key(first), replace(answer, session=bytes(32)))
    world.do(node_key(first), answer)
    assert "accepted already" in world.refused(node_key(first), answer)
    assert "accepted already" in world.refused(node_key(first), Decline(job.id, 0, 0))
    world.do(node_key(second), Decline(job.id, 0, 1))
    assert "it asks nobody" in world.refused(node_key(first), answer)
    assert "no job" in world.refused(node_key(first), replace(answer, job=mark("none")))


# -- reputation


def test_reputation_grows_with_work_and_falls_with_faults() -> None:
    assert reputation(Facts()) == 100_000
    assert reputation(Facts(segments=50, audits=30, proofs=20)) == 550_000
    assert reputation(Facts(segments=100, faults=10)) == 275_000
    assert reputation(Facts(segments=100, mismatches=1)) == 275_000
    assert reputation(Facts(segments=10**15)) <= 1_000_000


def test_every_owner_in_the_world_has_work_stake() -> None:
    assert World().state.account(owner_key(6).public).work_stake == STAKE
