"""A slot is taken up again, whatever ended it, and gives the bits of an undisturbed one."""

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tdmld.node.errors import (
    AuditImpossible,
    ContentMismatch,
    ContentUnavailable,
    WorkerFailed,
)
from tdmld.node.jobfiles import boundaries
from tdmld.node.layout import Layout, list_file, state
from tdmld.node.machine import AuditTask, ContributionSource, FailureCause, SlotId, StateRoots
from tdmld.train.errors import FileError
from tdmld.train.numerics import check_torch
from tdmld.train.segment import SegmentRecord, read_list
from tdmld.train.spec import decode_spec
from tdmld.train.statefile import part_file
from tests.node.playkit import (
    JOB,
    Player,
    cast,
    introduce,
    kill_carrier,
    kill_worker,
    open_machines,
    play,
)
from tests.train.support import TEXT, encode_document, run_job, spec_document, tokens_of

PATIENCE_SECONDS = 900
LONG: dict[str, Any] = {"train__steps": 12, "train__schedule__decay_from": 8}
TWO_STAGES = encode_document(spec_document(**LONG))
OUTER = {
    "lr": "0.7",
    "momentum": "0.9",
    "nesterov": True,
    "density": 64,
    "bits": 8,
    "feedback": "0.95",
}
TWO_LANES = {
    mode: encode_document(
        spec_document(**LONG, pipeline__cuts=[0, 4], pipeline__lanes={"count": 2, "mode": mode} | m)
    )
    for mode, m in (("sync", {}), ("diloco", {"outer": OUTER}))
}


@pytest.fixture(autouse=True)
async def patience() -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE_SECONDS):
        yield


async def undisturbed(raw: bytes, root: Path) -> dict[SlotId, list[SegmentRecord]]:
    """The records of the same job in one process."""
    spec = decode_spec(raw)
    check_torch()
    found = await trio.to_thread.run_sync(run_job, spec, tokens_of(spec), root / "alone")
    return {SlotId(*slot): records for slot, records in found.items()}


def stations(root: Path, count: int) -> tuple[list[Path], Path]:
    """Directories of machines, and the text."""
    text = root / "text"
    text.write_bytes(TEXT)
    return [root / str(number) for number in range(count)], text


async def check(players: list[Player], raw: bytes, root: Path) -> None:
    """Every player has the records of the undisturbed job."""
    expected = await undisturbed(raw, root)
    for player in players:
        records = expected[player.slot]
        assert [player.records[number] for number in sorted(player.records)] == records[
            min(player.records) :
        ]


@pytest.mark.parametrize("raw", [TWO_STAGES, *TWO_LANES.values()], ids=["stages", "sync", "diloco"])
async def test_workers_that_are_killed_go_on_with_the_same_bits(raw: bytes, tmp_path: Path) -> None:
    roots, text = stations(tmp_path, 2)
    async with open_machines(roots, raw, text) as machines:
        first, second = players = cast(raw, machines, roots)
        first.plans = {0: kill_worker, 7: kill_worker}
        second.plans = {4: kill_worker, 7: kill_worker}
        await play(players)
        assert first.causes == second.causes == [FailureCause.KILLED] * 2
        for player in players:
            assert len(player.starts) == 3
            assert player.starts == sorted(player.starts)
        if decode_spec(raw).is_diloco:
            await audit(first, second)
            await replace(first, second)
    await check(players, raw, tmp_path)


async def audit(first: Player, second: Player) -> None:
    """The machine of the second lane replays segments of the first one: with an outer step and
    inner ones, and the closing one, which has no inner ones."""
    for segment in (2, first.spec.rounds - 1):
        record = first.records[segment]
        sources = {
            player.slot.lane: ContributionSource(
                player.records[segment - 1].contribution, (player.machine.session,)
            )
            for player in (first, second)
        }
        task = AuditTask(
            job=JOB,
            spec=first.raw,
            slot=first.slot,
            segment=segment,
            start=StateRoots(record.start_shared, record.start_lane),
            links={},
            state_holders=(first.machine.session,),
            included=(0, 1),
            contributions=sources,
        )
        assert await second.machine.audit(task) == record
        sources[0] = ContributionSource(bytes(32), (first.machine.session,))
        with pytest.raises(AuditImpossible, match=r"contributions to round \d+: lane 0"):
            await second.machine.audit(task)


async def replace(first: Player, second: Player) -> None:
    """The machine of the second lane stands by for the first one and goes on in its place."""
    machine, before = second.machine, first.records[1]
    roots = StateRoots(before.end_shared, before.end_lane)
    own = ContributionSource(before.contribution, (first.machine.session,))
    holders = [first.machine.session]
    await machine.hold_state(JOB, first.raw, first.slot, 2, holders, roots, own)
    await first.machine.close_job(JOB, "vacated")
    await machine.fetch_slot_state(JOB, first.raw, first.slot, 2, [], roots)
    again = dataclasses.replace(
        first,
        machine=machine,
        root=second.root,
        incarnation=1,
        lowest=2,
        roots=roots,
        records={1: before},
        starts=[],
    )
    # Of round 1 it has its own contribution from the copy, of the others what it is shown.
    later = Player(
        first.raw, machine, second.root, second.slot, {}, [machine], records=second.records
    )
    again.siblings = [later]
    await again.open()
    await again.play()
    assert again.starts == [2]
    del again.records[1]
    for number, record in again.records.items():
        assert record == first.records[number]
    assert sorted(again.records) == list(range(2, first.spec.rounds))


async def test_carriers_that_are_killed_and_daemons_that_begin_again_change_no_bit(
    tmp_path: Path,
) -> None:
    roots, text = stations(tmp_path, 2)
    async with open_machines(roots[1:], TWO_STAGES, text) as (lower,):
        records: dict[int, SegmentRecord] = {}
        for life in range(2):
            async with open_machines(roots[:1], TWO_STAGES, text) as (upper,):
                await introduce([upper, lower])
                above, below = cast(TWO_STAGES, [upper, lower], roots)
                if life == 0:
                    above.plans, below.plans = {1: kill_carrier}, {4: kill_carrier}
                    await play_until_step(above, below, 7)
                    assert above.causes == below.causes == [FailureCause.CARRIER]
                    second = below
                else:
                    below.records = second.records
                    await play([above, below])
                    assert above.starts == below.starts == [2]
                for number, record in above.records.items():
                    assert records.setdefault(number, record) == record
        above.records = records
        await check([above, below], TWO_STAGES, tmp_path)


async def play_until_step(above: Player, below: Player, step: int) -> None:
    """Play, and stop everything when `above` has done a step; below closes its slot."""
    with trio.CancelScope() as scope:
        above.plans[step] = lambda player: scope.cancel()
        await play([above, below])
    await below.machine.close_slot(JOB, below.slot, "the test goes on with both")


async def test_a_replacement_goes_on_from_a_copy_and_the_logs_of_its_neighbours(
    tmp_path: Path,
) -> None:
    roots, text = stations(tmp_path, 3)
    async with open_machines(roots, TWO_STAGES, text) as machines:
        upper, lower, third = machines
        above, below = cast(TWO_STAGES, machines, roots)
        above.until = 3
        held: list[StateRoots] = []

        async def leave() -> None:
            """The third machine copies boundary 2; the first one is gone after segment 2."""
            await above.play()
            record = above.records[1]
            held.append(StateRoots(record.end_shared, record.end_lane))
            slot = above.slot
            await third.hold_state(JOB, TWO_STAGES, slot, 2, [upper.session], held[0])
            await upper.close_job(JOB, "vacated")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(above.open)
            nursery.start_soon(below.open)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(below.play)
            await leave()
            again = Player(
                TWO_STAGES,
                third,
                roots[2],
                above.slot,
                {below.slot: lower},
                machines,
                incarnation=1,
                lowest=2,
                roots=held[0],
            )
            await third.fetch_slot_state(JOB, TWO_STAGES, above.slot, 2, [], held[0])
            # As a witness it gets what the lower slot sent, and nothing that was not sent.
            for seq, sent in ((0, True), (10_000, False)):
                assert sent is await third.probe_frame(
                    JOB, TWO_STAGES, below.slot, 0, "up", seq, lower.session
                )
            await again.open()
            await lower.set_link_peer(JOB, below.slot, "up", third.session, 1)
            await again.play()
        assert again.starts == [2]
        assert below.causes == []
    above.records.update(again.records)
    await check([above, below], TWO_STAGES, tmp_path)
    assert sorted(again.records) == [2, 3]


async def test_a_rollback_removes_what_came_after_and_is_done_again(tmp_path: Path) -> None:
    roots, text = stations(tmp_path, 2)
    async with open_machines(roots, TWO_STAGES, text) as machines:
        players = cast(TWO_STAGES, machines, roots)
        for player in players:
            player.until = 3
        await play(players)
        for player in players:
            assert boundaries(player.directory) == [0, 1, 2, 3]
            await player.machine.close_slot(JOB, player.slot, "rolled back")
            record = player.records[0]
            player.epoch, player.lowest, player.until = 1, 1, None
            player.roots = StateRoots(record.end_shared, record.end_lane)
            player.records = {0: record}
        salts = [read_list(list_file(player.directory, 1)).salt for player in players]
        await play(players)
        assert [player.starts for player in players] == [[0, 1], [0, 1]]
        # Made again and not kept: the salts of seals are new.
        assert salts != [read_list(list_file(player.directory, 1)).salt for player in players]
    await check(players, TWO_STAGES, tmp_path)


async def test_given_weights_come_from_their_source_and_a_wrong_state_is_not_begun_with(
    tmp_path: Path,
) -> None:
    drawn = encode_document(spec_document(**LONG, pipeline__cuts=[0, 4]))
    roots, text = stations(tmp_path, 2)
    async with open_machines(roots, drawn, text) as machines:
        source, worker = machines
        slot = SlotId(0, 0)
        first = await source.genesis_roots(JOB, drawn, slot)
        weights = state(Layout(roots[0]).standby(JOB, 0, 0), 0) / part_file("shared")
        with pytest.raises(FileError, match="cut the weights again"):
            await source.publish_given({bytes(32): weights})
        await source.publish_given({first.shared: weights})
        init = {"kind": "given", "roots": [first.shared.hex()]}
        raw = encode_document(spec_document(**LONG, pipeline__cuts=[0, 4], init=init))
        (player,) = cast(raw, [worker], roots[1:])
        with pytest.raises(WorkerFailed, match="given"):
            await player.open()
        with pytest.raises(ContentUnavailable):
            await worker.fetch_given(JOB, raw, slot, [source.session])
        members = frozenset(machine.session for machine in machines)
        await source.set_members(JOB, members, given=[first.shared])
        await worker.fetch_given(JOB, raw, slot, [source.session])
        await worker.fetch_given(JOB, raw, slot, [])
        player.until = 1
        assert await player.open() == first
        await player.play()

        record = player.records[0]
        await worker.close_slot(JOB, slot, "to begin with another state")
        await worker.forget_segments(JOB, slot, 1)
        player.epoch, player.lowest, player.roots = 1, 1, StateRoots(bytes(32), bytes(32))
        with pytest.raises(ContentMismatch, match="fetch it again"):
            await player.open()
        player.roots = StateRoots(record.end_shared, record.end_lane)
        with pytest.raises(ContentUnavailable, match="fetch_slot_state"):
            await player.open()
