"""A job on real machines, played without a chain: players open slots, and open them again."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tdmld.node.layout import Layout, list_file
from tdmld.node.machine import (
    CarrierDown,
    CarrierUp,
    ContributionSource,
    FailureCause,
    GenesisRoots,
    LinkPeer,
    LinkWaits,
    Machine,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotFinished,
    SlotId,
    StateRoots,
    StepDone,
    open_machine,
)
from tdmld.p2p import PeerInfo
from tdmld.train.segment import SegmentRecord, read_list
from tdmld.train.spec import decode_spec

JOB, CHAIN = b"j" * 32, b"c" * 32


@asynccontextmanager
async def open_machines(
    roots: list[Path], raw: bytes, text: Path, **options: Any
) -> AsyncIterator[list[Machine]]:
    """Machines that know each other, with the data of a job."""
    async with AsyncExitStack() as stack:
        made = []
        for root in roots:
            opening = open_machine(root, chain_id=CHAIN, **options)
            made.append(await stack.enter_async_context(opening))
        await introduce(made)
        await made[0].import_text(text)
        for machine in made:
            await machine.fetch_data(JOB, raw, [made[0].session])
        yield made


async def introduce(machines: list[Machine]) -> None:
    """Tell each machine where the others are, and that they are members."""
    everybody = frozenset(machine.session for machine in machines)
    for machine in machines:
        others = [PeerInfo(m.session, m.addresses) for m in machines if m is not machine]
        await machine.set_peers(others)
        await machine.set_members(JOB, everybody)


def kill_worker(player: "Player") -> None:
    """As a plan: the worker of a player's slot gets SIGKILL."""
    pid = player.machine.worker_pid(JOB, player.slot)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def kill_carrier(player: "Player") -> None:
    """As a plan: the carrier of a player's machine gets SIGKILL."""
    assert player.machine.carrier_pid is not None
    os.kill(player.machine.carrier_pid, signal.SIGKILL)


@dataclass
class Player:
    """Who has one slot, and where. `plans`: what happens once when a step is done."""

    raw: bytes
    machine: Machine
    root: Path
    slot: SlotId
    peers: Mapping[SlotId, Machine]
    everybody: list[Machine]
    epoch: int = 0
    incarnation: int = 0
    lowest: int = 0
    roots: StateRoots | None = None
    """Of the state at `lowest`."""
    plans: dict[int, Callable[["Player"], None]] = field(default_factory=dict)
    records: dict[int, SegmentRecord] = field(default_factory=dict)
    causes: list[FailureCause] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Where its worker began, each time."""
    until: int | None = None
    progress: trio.Event = field(default_factory=trio.Event)
    """Set, and made anew, with each segment."""

    def __post_init__(self) -> None:
        self.spec = decode_spec(self.raw)
        self.siblings: list[Player] = []

    @property
    def directory(self) -> Path:
        return Layout(self.root).slot(JOB, *self.slot)

    async def open(self) -> GenesisRoots:
        """Open the slot where it can go on, and let it run."""
        machine, spec, slot = self.machine, self.spec, self.slot
        start = await machine.resume_point(JOB, slot, self.epoch, self.incarnation, self.lowest)
        roots = self.roots
        if start > self.lowest:
            record = read_list(list_file(self.directory, start - 1)).record
            roots = StateRoots(record.end_shared, record.end_lane)
        links = []
        for link in spec.links(*slot):
            lane, stage, _ = spec.other_end(*slot, link)
            links.append(LinkPeer(link, self.peers[SlotId(lane, stage)].session))
        members = frozenset(m.session for m in self.everybody)
        found = await machine.open_slot(
            SlotAssignment(
                JOB,
                self.raw,
                slot,
                self.epoch,
                self.incarnation,
                tuple(links),
                members,
                start,
                roots,
            )
        )
        self.starts.append(start)
        await self.go_on(start)
        return found

    async def go_on(self, start: int) -> None:
        """Grant what may run: everything, or the next round of a diloco job."""
        until = self.spec.rounds if self.until is None else self.until
        if not self.spec.is_diloco:
            await self.machine.grant(JOB, self.slot, until)
            return
        for segment in range(start, until):
            included: dict[int, tuple[int, ...]] = {}
            if segment > 0:
                lanes = [self, *self.siblings]
                if any(segment - 1 not in lane.records for lane in lanes):
                    return
                sources = {
                    lane.slot.lane: ContributionSource(
                        lane.records[segment - 1].contribution, (lane.machine.session,)
                    )
                    for lane in lanes
                }
                await self.machine.hold_contributions(
                    JOB, self.raw, self.slot, segment - 1, sources
                )
                included[segment] = tuple(sorted(sources))
            await self.machine.grant(JOB, self.slot, segment + 1, included)

    async def play(self) -> None:
        """Follow the machine's events until the slot is finished, or has done `until`."""
        async for event in self.machine.events:
            match event:
                case StepDone(step=step) if (plan := self.plans.pop(step, None)) is not None:
                    plan(self)
                case SegmentDone(record=record):
                    number = record.segment
                    assert self.records.setdefault(number, record) == record
                    self.progress.set()
                    self.progress = trio.Event()
                    for player in (self, *self.siblings):
                        await player.go_on(number + 1)
                    if self.until is not None and number == self.until - 1:
                        return
                case SlotFailed(cause=cause):
                    self.causes.append(cause)
                    if cause is not FailureCause.CARRIER:
                        await self.open()
                case CarrierUp():
                    await self.open()
                case SlotFinished():
                    return
                case StepDone() | CarrierDown() | LinkWaits():
                    pass


async def play(players: list[Player]) -> None:
    """Open the slots and play them to their ends."""
    async with trio.open_nursery() as nursery:
        for player in players:
            nursery.start_soon(player.open)
    async with trio.open_nursery() as nursery:
        for player in players:
            nursery.start_soon(player.play)


def cast(raw: bytes, machines: list[Machine], roots: list[Path]) -> list[Player]:
    """A player for each slot of a job, in order, with the machine of the same number."""
    spec = decode_spec(raw)
    slots = [SlotId.of(index, spec.stages) for index in range(spec.slots)]
    peers = dict(zip(slots, machines, strict=False))
    players = [
        Player(raw, machine, root, slot, peers, machines)
        for slot, machine, root in zip(slots, machines, roots, strict=False)
    ]
    for player in players:
        same = [p for p in players if p.slot.stage == player.slot.stage and p is not player]
        player.siblings = same if spec.is_diloco else []
    return players
