"""Who is blamed when a job stands still: accusations, the witness, and windows."""

from msgspec.structs import replace

from tdmld.chain import limits
from tdmld.chain.codec import encode
from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
    Present,
    Stall,
    Witness,
)
from tdmld.chain.events import CaseClosed, CaseOpened, SlotVacated
from tdmld.chain.records import Case, Cause, CloseReason, JobStatus
from tdmld.chain.segments import links_of
from tdmld.chain.state import u32
from tdmld.chain.transactions import (
    Stage,
)
from tests.chain.test_jobs import active, standby, worker
from tests.chain.test_replacement import play_to, slot_of
from tests.chain.world import GIB, Vice, World, make_genesis, owner_key

QUIET = {"audit_rate": 0, "rounds": 8}
LINE = {**QUIET, "stages": (Stage(1_000_000, GIB),) * 4}


def line() -> tuple[World, bytes]:
    """Four stages at work."""
    world = World(make_genesis(9))
    world.all_ask(9)
    job_id = world.submit(**LINE)
    world.play_until(job_id, JobStatus.ACTIVE)
    play_to(world, job_id, 3, 1)
    return world, job_id


def complaint(world: World, job: bytes, slot: int, link: str, seq: int = 7) -> Stall:
    state = slot_of(world, job, slot)
    return Stall(job, world.job(job).epoch, slot, state.incarnation, state.stalls, link, seq)


def accuse(world: World, job: bytes, slot: int, link: str) -> Case:
    """The slot says that the other end of a link does not deliver; the case."""
    end = slot - 1 if link == "up" else slot + 1
    world.do(world.keys[worker(world, job, slot)], complaint(world, job, slot, link))
    case = slot_of(world, job, end).case
    assert case is not None
    assert (case.accuser, case.link) == (slot, link)
    return case


def here(world: World, job: bytes, slot: int) -> Present:
    state = slot_of(world, job, slot)
    opened = 0 if state.case is None else state.case.opened
    return Present(job, world.job(job).epoch, slot, state.incarnation, opened)


def word(world: World, job: bytes, slot: int, delivered: bool) -> Witness:
    state = slot_of(world, job, slot)
    opened = 0 if state.case is None else state.case.opened
    return Witness(job, world.job(job).epoch, slot, state.incarnation, opened, delivered)


def cause_of(world: World, job: bytes, slot: int) -> list[Cause]:
    return [former.cause for former in slot_of(world, job, slot).former]


def faults(world: World) -> int:
    return sum(world.state.facts(owner_key(i).public).faults for i in range(20))


def test_an_accused_worker_that_says_nothing_loses_its_slot() -> None:
    world, job_id = line()
    dead = worker(world, job_id, 2)
    case = accuse(world, job_id, 1, "down")
    assert case == Case(1, "down", 7, world.height, world.height + 20)
    world.wait(19)
    assert slot_of(world, job_id, 2).case is not None
    world.wait(1)
    assert cause_of(world, job_id, 2) == [Cause.ABSENT]
    assert slot_of(world, job_id, 2).case is None
    assert world.state.facts(world.state.owner_of(dead) or b"").faults == 1 == faults(world)
    assert world.play_until(job_id).reason is CloseReason.FETCHED
    opened = [event for event in world.events if isinstance(event, CaseOpened)]
    assert [(event.slot, event.accuser, event.seq) for event in opened] == [(2, 1, 7)]


def test_the_witness_decides_between_two_that_are_there() -> None:
    world, job_id = line()
    accuse(world, job_id, 1, "down")
    accused, keeper = worker(world, job_id, 2), standby(world, job_id)
    early = word(world, job_id, 2, delivered=True)
    assert "has not said yet" in world.refused(world.keys[keeper], early)
    world.do(world.keys[accused], here(world, job_id, 2))
    assert "has said so" in world.refused(world.keys[accused], here(world, job_id, 2))
    other = world.keys[worker(world, job_id, 1)]
    assert "the witness is" in world.refused(other, word(world, job_id, 2, delivered=False))
    world.do(world.keys[keeper], word(world, job_id, 2, delivered=False))
    state = slot_of(world, job_id, 2)
    assert cause_of(world, job_id, 2) == [Cause.UNDELIVERED]
    assert state.worker.node not in (accused, keeper)  # whoever witnessed it does not get the slot
    assert state.barred == world.state.owner_of(keeper)
    assert world.state.facts(world.state.owner_of(accused) or b"").faults == 1
    assert world.play_until(job_id).reason is CloseReason.FETCHED


def test_a_pair_that_cannot_work_together_is_separated_without_a_fault() -> None:
    world, job_id = line()
    accused, keeper = worker(world, job_id, 2), standby(world, job_id)
    for times in range(limits.STALLS_OF_PAIR):
        assert slot_of(world, job_id, 2).delivered == (1,) * times
        accuse(world, job_id, 1, "down")
        world.do(world.keys[accused], here(world, job_id, 2))
        world.do(world.keys[keeper], word(world, job_id, 2, delivered=True))
    assert cause_of(world, job_id, 2) == [Cause.SEPARATED]
    assert faults(world) == 0
    assert worker(world, job_id, 2) == keeper  # it delivered: the witness accused nobody
    assert world.play_until(job_id).reason is CloseReason.FETCHED


def test_blame_flows_on_to_the_one_that_does_not_wait() -> None:
    """Slot 3 is dead; 1 waits for 2, 2 for 3, and 0 for 1."""
    world, job_id = line()
    accuse(world, job_id, 1, "down")
    accuse(world, job_id, 2, "down")
    assert slot_of(world, job_id, 2).case is None
    (closed,) = [event for event in world.events if isinstance(event, CaseClosed)]
    assert (closed.slot, closed.accuser) == (2, 1)
    again = complaint(world, job_id, 1, "down")
    assert "waits itself" in world.refused(world.keys[worker(world, job_id, 1)], again)
    accuse(world, job_id, 0, "down")  # 1 has no case of its own any more
    world.do(world.keys[worker(world, job_id, 1)], here(world, job_id, 1))
    world.wait(20)
    assert cause_of(world, job_id, 3) == [Cause.ABSENT]
    assert [cause_of(world, job_id, slot) for slot in range(3)] == [[], [], []]
    assert faults(world) == 1


def test_two_that_accuse_each_other_on_one_link_are_both_heard() -> None:
    world, job_id = line()
    accuse(world, job_id, 1, "down")
    accuse(world, job_id, 2, "up")
    assert slot_of(world, job_id, 1).case is not None
    assert slot_of(world, job_id, 2).case is not None
    world.do(world.keys[worker(world, job_id, 1)], here(world, job_id, 1))
    world.wait(20)
    assert cause_of(world, job_id, 2) == [Cause.ABSENT]
    assert cause_of(world, job_id, 1) == []
    assert slot_of(world, job_id, 1).case is None  # its accuser's work begins anew


def test_a_silent_witness_closes_the_case() -> None:
    world, job_id = line()
    accuse(world, job_id, 1, "down")
    world.do(world.keys[worker(world, job_id, 2)], here(world, job_id, 2))
    world.wait(20)
    state = slot_of(world, job_id, 2)
    assert (state.case, state.former, state.delivered) == (None, (), ())


def test_without_a_witness_to_be_there_is_enough() -> None:
    world, job_id = line()
    world.vices[standby(world, job_id)] = frozenset({Vice.LOSES_COPY})
    while world.job(job_id).standby is not None:
        world.play(job_id)
    accuse(world, job_id, 1, "down")
    world.do(world.keys[worker(world, job_id, 2)], here(world, job_id, 2))
    assert slot_of(world, job_id, 2).case is None


def test_accusations_are_counted_and_said_once() -> None:
    world, job_id = line()
    key = world.keys[worker(world, job_id, 1)]
    first = complaint(world, job_id, 1, "down")
    accuse(world, job_id, 1, "down")
    assert "a case is open" in world.refused(key, complaint(world, job_id, 1, "down"))
    world.do(world.keys[worker(world, job_id, 2)], here(world, job_id, 2))
    world.wait(20)
    assert "accusation 0" in world.refused(key, first)
    assert "no link" in world.refused(key, complaint(world, job_id, 1, "lane1"))
    stranger = world.keys[worker(world, job_id, 0)]
    assert "does not work" in world.refused(stranger, complaint(world, job_id, 1, "down"))
    assert slot_of(world, job_id, 1).stalls == 1
    late = here(world, job_id, 2)
    assert "no case" in world.refused(world.keys[worker(world, job_id, 2)], late)
    spent = replace(slot_of(world, job_id, 1), stalls=limits.STALLS)
    world.store[b"s" + job_id + u32(1)] = encode(spent)
    assert "at most 32 times" in world.refused(key, complaint(world, job_id, 1, "down"))


def test_a_slot_that_may_not_go_on_is_not_accused() -> None:
    world, job_id = active(**QUIET, unsettled=4)
    world.vices = {standby(world, job_id): frozenset({Vice.MUTE})}
    play_to(world, job_id, 1, 4)
    assert slot_of(world, job_id, 1).settled == 0
    mine = world.keys[worker(world, job_id, 0)]
    assert "may not go on" in world.refused(mine, complaint(world, job_id, 0, "down"))


def test_a_slot_at_its_limit_owes_its_frames_to_one_that_is_behind() -> None:
    """A replacement that replays is not served: the neighbour is ahead, and may be accused."""
    world, job_id = active(**QUIET, unsettled=4)
    world.stop_before[worker(world, job_id, 1)] = 1
    play_to(world, job_id, 0, 4)
    mine = world.keys[worker(world, job_id, 1)]
    world.do(mine, complaint(world, job_id, 1, "up"))
    assert slot_of(world, job_id, 0).case is not None


def test_a_case_ends_when_either_end_gets_another_worker() -> None:
    world, job_id = line()
    accuse(world, job_id, 1, "down")
    gone = slot_of(world, job_id, 1)
    said = Leave(job_id, 0, 1, gone.incarnation, LeaveReason.STOPPED)
    world.do(world.keys[gone.worker.node], said)
    assert slot_of(world, job_id, 2).case is None
    assert "vacant" in world.refused(
        world.keys[worker(world, job_id, 2)], complaint(world, job_id, 2, "up")
    )
    assert world.play_until(job_id).reason is CloseReason.FETCHED


def test_the_window_takes_the_place_of_a_slot_that_is_behind() -> None:
    world, job_id = line()
    slow = worker(world, job_id, 2)
    world.stop_before[slow] = 2
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert cause_of(world, job_id, 2) == [Cause.STALL]
    assert faults(world) == 1


def test_a_replacement_that_does_not_come_to_work_is_replaced() -> None:
    world, job_id = line()
    for node in (worker(world, job_id, 2), standby(world, job_id)):
        world.stop_before[node] = 2 if node == worker(world, job_id, 2) else 0
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert cause_of(world, job_id, 2) == [Cause.STALL, Cause.STALL]
    assert faults(world) == 2


def test_where_all_are_equal_the_chain_waits_a_window_more() -> None:
    world, job_id = line()
    for slot in range(4):
        world.stop_before[worker(world, job_id, slot)] = 2
    while any(slot_of(world, job_id, slot).committed < 2 for slot in range(4)):
        world.play(job_id)
    last = max(slot_of(world, job_id, slot).last_commit for slot in range(4))
    job = world.play_until(job_id)
    assert (job.reason, faults(world)) == (CloseReason.FAULT, 0)
    assert "did not commit segment 2 within 60 blocks" in job.detail
    assert job.closed >= last + 2 * world.parameters.segment_window


def test_accusers_and_those_who_withhold_end_no_job_of_many_nodes() -> None:
    world = World(make_genesis(12))
    world.all_ask(12)
    job_id = world.submit(**LINE)
    world.play_until(job_id, JobStatus.ACTIVE)
    world.vices = {
        worker(world, job_id, 1): frozenset({Vice.ACCUSES}),
        worker(world, job_id, 0): frozenset({Vice.WITHHOLDS}),
        worker(world, job_id, 3): frozenset({Vice.ACCUSES}),
    }
    job = world.play_until(job_id)
    assert job.reason is CloseReason.FETCHED
    assert any(isinstance(event, SlotVacated) for event in world.events)
    assert links_of(job, 1) == ("up", "down")
