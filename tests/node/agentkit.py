"""An agent on a real ledger, with a machine that only remembers what it was told."""

from pathlib import Path
from typing import Any

import trio
import trio.testing

from tdmld.chain.codec import encode
from tdmld.chain.crypto import KeyPair, address
from tdmld.chain.records import JobStatus
from tdmld.node.agent import Agent
from tdmld.node.errors import ContentUnavailable
from tdmld.node.machine import GenesisRoots, SlotAssignment, SlotId, StateRoots
from tdmld.node.peers import PeerBook, PeerRecord, SignedRecord
from tdmld.p2p import PeerInfo
from tests.chain.world import World, node_key
from tests.node.fake_chain import FakeChain, FakeWitnesses, session_of


class FakeMachine:
    def __init__(self, index: int) -> None:
        self.session = address(session_of(index))
        self.send, self.events = trio.open_memory_channel[Any](100)
        self.members: dict[bytes, frozenset[str]] = {}
        self.peers: list[PeerInfo] = []
        self.closed: list[bytes] = []
        self.dropped: set[bytes] = set()
        self.audits = self.draws = 0
        self.calls: list[tuple[Any, ...]] = []
        """(method, arguments ...) of everything that concerns slots, states and contributions."""
        self.here: set[tuple[SlotId, int]] = set()
        """(slot, boundary) of own states that are whole."""
        self.lost: set[int] = set()
        """Boundaries of states that nobody has any more."""
        self.delivers = True
        """What a probe of somebody else's carrier finds."""
        self.heard = trio.Event()
        """Set by the first call: the agent has read its directory and looked."""
        self.broken: type[Exception] | None = None

    async def set_members(
        self,
        job: bytes,
        sessions: frozenset[str],
        sealed: bytes | None = None,
        *,
        private: bool = False,
        given: object = (),
    ) -> None:
        self.members[job] = sessions
        self.heard.set()

    async def rekey(
        self, job: bytes, remaining: frozenset[str], sealed: bytes, *, given: object = ()
    ) -> None:
        self.calls.append(("rekey", job, remaining))

    async def set_peers(self, peers: list[PeerInfo]) -> None:
        if self.broken is not None:
            raise self.broken("too large for a message")
        self.peers = peers

    async def fetch_data(self, job: bytes, spec: bytes, holders: object) -> None: ...

    def warm_up(self) -> None: ...

    async def fetch_given(self, *arguments: object) -> None: ...

    async def resume_point(
        self, job: bytes, slot: SlotId, epoch: int, incarnation: int, lowest: int
    ) -> int:
        return max([lowest, *(at for own, at in self.here if own == slot)])

    async def fetch_slot_state(
        self,
        job: bytes,
        spec: bytes,
        slot: SlotId,
        boundary: int,
        holders: list[str],
        expected: StateRoots,
    ) -> None:
        self.calls.append(("fetch_slot_state", slot, boundary))
        if boundary in self.lost:
            raise ContentUnavailable("nobody has it")

    async def open_slot(self, assignment: SlotAssignment) -> GenesisRoots:
        self.calls.append(("open_slot", assignment))
        if self.broken is not None:
            raise self.broken("it does not start")
        return GenesisRoots(bytes(32), bytes(32), bytes(32))

    async def close_slot(self, job: bytes, slot: SlotId, reason: str) -> None:
        self.calls.append(("close_slot", slot))

    async def set_link_peer(
        self, job: bytes, slot: SlotId, link: str, session: str, incarnation: int
    ) -> None:
        self.calls.append(("set_link_peer", slot, link, session, incarnation))

    async def probe_frame(self, *arguments: object) -> bool:
        self.calls.append(("probe_frame", *arguments[2:6]))
        return self.delivers

    async def hold_contributions(
        self, job: bytes, spec: bytes, slot: SlotId, number: int, sources: dict[int, Any]
    ) -> None:
        self.calls.append(("hold_contributions", slot, number, tuple(sources)))

    async def forget_segments(self, job: bytes, slot: SlotId, keep_from: int) -> None:
        self.calls.append(("forget_segments", slot, keep_from))

    async def genesis_roots(self, job: bytes, spec: bytes, slot: SlotId) -> GenesisRoots:
        self.draws += 1
        raise KeyError("a defect")

    async def grant(
        self, job: bytes, slot: SlotId, until: int, included: dict[int, Any] | None = None
    ) -> None:
        self.calls.append(("grant", slot, until))

    async def hold_state(self, *arguments: object) -> None:
        self.calls.append(("hold_state", *arguments[2:4]))

    async def keyed_hash(self, *arguments: object) -> bytes:
        return bytes(32)

    async def audit(self, task: object) -> None:
        self.audits += 1
        if self.broken is not None:
            raise self.broken("step 3: a frame has values not finite")
        await trio.sleep_forever()

    async def drop_data(self, contents: set[bytes]) -> None:
        self.dropped |= contents

    async def close_job(self, job: bytes, reason: str) -> None:
        if self.broken is not None:
            raise self.broken("the disk does not answer")
        self.closed.append(job)
        self.heard.set()


class Rig:
    """The agent of node `index` in a world where all others are played by the world itself."""

    def __init__(self, world: World, index: int, data_dir: Path) -> None:
        self.world, self.index = world, index
        self.chain, self.machine = FakeChain(world), FakeMachine(index)
        self.book = PeerBook(world.chain_id)
        self.agent = Agent(
            key=node_key(index),
            chain_id=world.chain_id,
            chain=self.chain,  # type: ignore[arg-type]
            machine=self.machine,  # type: ignore[arg-type]
            book=self.book,
            data_dir=data_dir,
            ask=None,
            ask_blocks=100,
            witnessed=FakeWitnesses(),
        )

    def record(self, key: KeyPair, session: bytes, *addresses: str) -> None:
        raw = encode(PeerRecord(key.public, 1, (), session, addresses, False))
        self.book.add(SignedRecord(raw, key.sign("peer", self.world.chain_id, raw)))

    async def block(self, *raws: bytes) -> None:
        self.world.block(*raws)
        await self.look()

    async def play(self, job: bytes, *statuses: JobStatus) -> None:
        self.world.play_until(job, *statuses)
        await self.look()

    async def look(self) -> None:
        self.chain.feed.put(object())  # type: ignore[arg-type]
        await trio.testing.wait_all_tasks_blocked()

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of a method of the machine."""
        return [rest for method, *rest in self.machine.calls if method == name]  # type: ignore[misc]

    def sent(self, kind: type[Any]) -> list[Any]:
        return [payload for payload in self.chain.sent if isinstance(payload, kind)]

    def remembers(self, job: bytes) -> list[str]:
        """What the agent still holds of a job."""
        found = []
        performer = self.agent._performer
        rooms = [performer._slots, performer._copies, performer._audits, performer._desk]
        held = [vars(room).items() for room in (self.agent, *rooms)]
        for name, value in (item for items in held for item in items):
            if name == "_served" or not isinstance(value, dict | set):
                continue
            if any(key == job or (isinstance(key, tuple) and job in key) for key in value):
                found.append(name)
        return found
