"""Members of a job ask each other how their slots get on; strangers are told nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import KeyPair, public_key
from tdmld.chain.records import JobStatus, Member, SlotState
from tdmld.node.jobreports import REPORT_BYTES, JobReports, Report, SlotReport
from tdmld.node.progress import KINDS, Progress
from tdmld.p2p import Host
from tests.p2p.support import connected_pair

JOB = bytes(range(32))
CHAIN = bytes(32)
NOBODY = KeyPair(bytes(32)).public


class Two:
    """A state of one job with a slot for each of two nodes."""

    def __init__(self, *workers: bytes, status: JobStatus = JobStatus.ACTIVE) -> None:
        self.slots = [SlotState(Member(node, NOBODY, 1, node)) for node in workers]
        self.found = SimpleNamespace(
            id=JOB,
            slots=len(workers),
            final=False,
            status=status,
            source=NOBODY,
            source_session=NOBODY,
            standby=None,
        )

    def job(self, job: bytes) -> Any:
        return self.found if job == JOB else None

    def slot(self, job: bytes, index: int) -> SlotState:
        return self.slots[index]

    def audit(self, *_: object) -> None:
        return None


def progressed(step: int) -> Progress:
    progress = Progress()
    progress.step = step
    return progress


def reports(host: Host, state: Two, progress: dict[tuple[bytes, int], Progress]) -> JobReports:
    return JobReports(host, public_key(host.peer_id), CHAIN, lambda: state, progress)  # type: ignore[arg-type,return-value]


async def test_a_member_is_told_of_the_others_slots_and_believes_each_about_its_own() -> None:
    async with connected_pair() as (a, b), trio.open_nursery() as nursery:
        state = Two(public_key(a.peer_id), public_key(b.peer_id))
        here = reports(a, state, {(JOB, 0): progressed(3)})
        there = reports(b, state, {(JOB, 1): progressed(4), (JOB, 0): progressed(99)})
        nursery.start_soon(here.run)
        nursery.start_soon(there.run)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            found = await here.of(JOB)
            while 1 not in found:
                found = await here.of(JOB)
        assert {slot: report.step for slot, report in found.items()} == {0: 3, 1: 4}
        nursery.cancel_scope.cancel()


async def test_a_stranger_is_told_nothing() -> None:
    async with connected_pair() as (a, b), trio.open_nursery() as nursery:
        own = public_key(b.peer_id)
        asks = reports(a, Two(own, own), {})
        answers = reports(b, Two(own, own), {(JOB, 0): progressed(4)})
        nursery.start_soon(asks.run)
        nursery.start_soon(answers.run)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            assert await asks._exchange(JOB, own) == ()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("works", [True, False])
async def test_who_asks_again_and_again_costs_no_look_at_the_whole_job(works: bool) -> None:
    """A job has hundreds of slots with dozens of segments each, and strangers may ask as well."""
    async with connected_pair() as (a, b), trio.open_nursery() as nursery:
        state, looks = Two(NOBODY, NOBODY), 0
        slot = state.slot

        def counted(job: bytes, index: int) -> SlotState:
            nonlocal looks
            looks += 1
            return slot(job, index)

        state.slot = counted  # type: ignore[method-assign]
        asks = reports(a, Two(NOBODY, NOBODY), {})
        answers = reports(b, state, {(JOB, 0): progressed(4)} if works else {})
        nursery.start_soon(answers.run)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            for _ in range(10):
                assert await asks._exchange(JOB, public_key(b.peer_id)) == ()
        assert looks <= (4 if works else 0)
        nursery.cancel_scope.cancel()


async def test_a_job_that_is_over_has_no_reports() -> None:
    async with connected_pair() as (a, b):
        state = Two(public_key(a.peer_id), public_key(b.peer_id))
        here = reports(a, state, {(JOB, 0): progressed(3)})
        assert set(await here.of(JOB)) == {0}
        state.found.final = True
        assert await here.of(JOB) == {}


@pytest.mark.parametrize("count", range(len(KINDS) + 1))
def test_a_report_has_all_times_or_none(count: int) -> None:
    """Views are made of what others say: half a report must not break them."""
    said = encode(Report((SlotReport(0, 1, None, None, 0, "", (1,) * count),)))
    heard = decode(Report, said, REPORT_BYTES).slots[0]
    assert set(heard.seconds) == (set(KINDS) if count == len(KINDS) else set())
