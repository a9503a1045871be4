"""What every deed of this node needs: its key, the chain, the machine, the specs of its jobs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from tdmld.chain.crypto import KeyPair, address
from tdmld.chain.records import Job, Member, Segment, SlotState
from tdmld.chain.segments import other_end
from tdmld.chain.state import State
from tdmld.chain.transactions import Payload, sign_transaction
from tdmld.node.chainservice import ChainService
from tdmld.node.duties import assigned
from tdmld.node.machine import Machine, SlotId, StateRoots
from tdmld.train.spec import Spec, decode_spec


@dataclass
class Desk:
    """Shared by all who do duties. Nothing here is more than a cache."""

    key: KeyPair
    chain_id: bytes
    chain: ChainService
    machine: Machine
    data_dir: Path
    _specs: dict[bytes, tuple[bytes, Spec]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._salt_key = blake3(self.key.seed, derive_key_context="tdmld 1 salts").digest()

    @property
    def node(self) -> bytes:
        """This node's key."""
        return self.key.public

    async def submit(self, payload: Payload) -> None:
        """Sign a node transaction and hand it to the chain."""
        await self.chain.submit(sign_transaction(self.key, self.chain_id, payload))

    async def spec(self, job: Job) -> tuple[bytes, Spec]:
        """A job's spec, as bytes and as a value. SpecUnavailable, TrainError."""
        if job.id not in self._specs:
            raw = await self.chain.fetch_spec(job.spec_id)
            self._specs[job.id] = (raw, decode_spec(raw))
        return self._specs[job.id]

    def known_spec(self, job: bytes) -> Spec | None:
        """A job's spec when it was needed before."""
        known = self._specs.get(job)
        return None if known is None else known[1]

    def forget(self, job: bytes) -> None:
        """The job is over; its spec was used for the last time."""
        self._specs.pop(job, None)

    def holders_of_data(self, state: State, job: Job) -> list[str]:
        """Carriers that have the job's text, its source first."""
        workers = [slot.worker.session for slot in assigned(state, job)]
        return self.others([job.source_session, *workers])

    def holders_of_state(self, state: State, job: Job, index: int) -> list[str]:
        """Carriers that may have a slot's states: its worker, the standby."""
        members: list[Member | None] = [slot_of(state, job, index).worker, job.standby]
        return self.others(member.session for member in members if member is not None)

    def others(self, sessions: Iterable[bytes]) -> list[str]:
        """Addresses of those who have said their session, but this node's; each once, in order."""
        found = (address(session) for session in dict.fromkeys(sessions) if session)
        return [session for session in found if session != self.machine.session]

    def epoch(self, job: bytes) -> int:
        """The job's epoch as it is now: what is said of a segment that a rollback left standing
        names this one, not the one it was made under."""
        found = self.chain.state().job(job)
        return 0 if found is None else found.epoch

    def salt(self, what: bytes) -> bytes:
        """A salt of ours: the same after a restart, and nobody else's to guess."""
        return blake3(what, key=self._salt_key).digest()


def slot_of(state: State, job: Job, index: int) -> SlotState:
    """A slot of a job that is matched."""
    slot = state.slot(job.id, index)
    assert slot is not None, "duties speak of matched slots only"
    return slot


def segment_of(state: State, job: Job, index: int, number: int) -> Segment:
    """A segment that is committed."""
    segment = state.segment(job.id, index, number)
    assert segment is not None, "duties speak of committed segments only"
    return segment


def slot_id(job: Job, index: int) -> SlotId:
    """The machine's name of a slot."""
    return SlotId.of(index, len(job.stages))


def worker_at(state: State, job: Job, index: int, link: str) -> Member:
    """Who works in the slot at the other end of a slot's link."""
    return slot_of(state, job, other_end(job, index, link)[0]).worker


def sessions_at_stage(state: State, job: Job, index: int) -> list[bytes]:
    """Sessions of those who have the same stage as a slot: in other lanes, and as the standby."""
    stage = job.stage_of(index)
    slots = [slot_of(state, job, job.slot_at(lane, stage)) for lane in range(job.lanes)]
    standby = [] if job.standby is None else [job.standby.session]
    return [*(slot.worker.session for slot in slots), *standby]


def roots_at(state: State, job: Job, index: int, boundary: int) -> StateRoots | None:
    """The roots that a slot's state has at a boundary, as far as the chain knows them."""
    if boundary == 0:
        genesis = slot_of(state, job, index).genesis
        return None if genesis is None else StateRoots(genesis.shared, genesis.lane)
    segment = state.segment(job.id, index, boundary - 1)
    return None if segment is None else StateRoots(segment.end_shared, segment.end_lane)
