"""What the members of a job do: honest ones, and those with a vice (`world.World`)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import StrEnum

from blake3 import blake3

from tdmld.chain.complaints import (
    Leave,
    LeaveReason,
    Present,
    Stall,
    Witness,
)
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.genesis import (
    Genesis,
)
from tdmld.chain.ledger import (
    BlockResult,
    check_transaction,
)
from tdmld.chain.limits import STANDBY_SLOT
from tdmld.chain.records import AuditStatus, Job, JobStatus, ProofStatus, SlotState
from tdmld.chain.segments import audit_list_root, links_of, other_end
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    Accept,
    AttestContributions,
    AttestGenesis,
    AttestResult,
    AuditCommit,
    AuditFail,
    AuditOpen,
    Commit,
    Decline,
    Fetched,
    LinkRoots,
    Open,
    Payload,
    StandbyProof,
    decode_transaction,
)


class Vice(StrEnum):
    """What a node does wrong. Several at once are possible."""

    MUTE = "sends nothing any more"
    DECLINES = "declines every place"
    IGNORES_PLACE = "does not answer a matching"
    OTHER_GENESIS = "attests another boundary 0"
    FLIPS_FRAME = "commits to other frames than it sent"
    CHEATS = "commits to steps that it did not compute"
    KEEPS_SEAL = "does not open its seal"
    NEVER_AUDITS = "is drawn and does nothing"
    CANNOT_AUDIT = "is drawn and gives up"
    HIDES_VERDICT = "commits to a verdict and does not open it"
    LIES = "commits to another list than it found"
    FORGES_COPY = "proves another state than the true one"
    LOSES_COPY = "never proves its copy"
    OTHER_RESULT = "attests another result"
    LEAVES = "gives its slot up after a segment"
    ACCUSES = "says that its neighbours do not deliver"
    WITHHOLDS = "does not deliver frames, also not to the witness"


def mark(*parts: object) -> bytes:
    """The hash of something that all honest actors compute alike."""
    return sha256(repr(parts).encode())


def owner_key(index: int) -> KeyPair:
    return KeyPair(sha256(b"owner", bytes([index])))


def node_key(index: int) -> KeyPair:
    return KeyPair(sha256(b"node", bytes([index])))


class Actors(ABC):
    """The part of a world that decides who sends what."""

    genesis: Genesis
    chain_id: bytes
    height: int
    keys: dict[bytes, KeyPair]
    vices: dict[bytes, frozenset[Vice]]
    stop_before: dict[bytes, int]
    bad_segment: int
    hasty: set[bytes]

    @property
    @abstractmethod
    def state(self) -> State: ...

    @abstractmethod
    def job(self, job: bytes) -> Job: ...

    @abstractmethod
    def has(self, node: bytes, vice: Vice) -> bool: ...

    @abstractmethod
    def sign(self, key: KeyPair, payload: Payload, **header: int) -> bytes: ...

    @abstractmethod
    def block(self, *raws: bytes, tainted: bool = False, passed: int = 0) -> BlockResult: ...

    # -- actors

    def moves(self, job_id: bytes) -> Iterator[tuple[bytes, Payload]]:
        """Everything that the members of a job want to send now: (node, payload)."""
        for node, payload in self._duties(self.job(job_id)):
            if not self.has(node, Vice.MUTE):
                yield node, payload

    def play(self, job_id: bytes, *, tainted: bool = False, fetch: bool = True) -> BlockResult:
        """One block with everybody's moves."""
        moves = list(self.moves(job_id))
        raws = [self.sign(self.keys[node], payload) for node, payload in moves]
        self.hasty = {
            sha256(raw)
            for raw, (_, payload) in zip(raws, moves, strict=True)
            if isinstance(payload, Stall | AttestContributions)
        }
        job = self.job(job_id)
        if fetch and job.status is JobStatus.FINISHING and job.result:
            raws.append(self.sign(owner_key(0), Fetched(job_id)))
        return self.block(*raws, tainted=tainted)

    def play_until(self, job_id: bytes, *statuses: JobStatus, blocks: int = 1500) -> Job:
        """Play until the job has one of the statuses (a final one when none is named)."""
        for _ in range(blocks):
            job = self.job(job_id)
            if job.status in statuses or (not statuses and job.final):
                return job
            result = self.play(job_id)
            failed = [
                receipt.reason
                for receipt in result.receipts
                if not receipt.ok and receipt.id not in self.hasty
            ]
            after = self.job(job_id)
            assert not failed or after.final or after.repaired == self.height, failed
        raise AssertionError(f"still {self.job(job_id).status} after {blocks} blocks")

    def state_roots(self, job: Job, slot: int, boundary: int) -> tuple[bytes, bytes]:
        """Lanes have the shared state of a stage in common."""
        stage = job.stage_of(slot)
        return mark("shared", job.id, stage, boundary), mark("lane", job.id, slot, boundary)

    def true_commit(self, job: Job, slot: int, number: int, node: bytes) -> Commit:
        """What an honest worker commits to."""
        start, end = self.state_roots(job, slot, number), self.state_roots(job, slot, number + 1)
        links = []
        for link in links_of(job, slot):
            mine, other = (slot, link), other_end(job, slot, link)
            first = min(mine, other)
            sent, received = (
                mark("frames", first, forward, number) for forward in (mine == first, mine != first)
            )
            links.append(LinkRoots(link, sent, received))
        salt, steps = self.salt(node, slot, number), self.steps(job, slot, number)
        return Commit(
            job=job.id,
            epoch=job.epoch,
            slot=slot,
            incarnation=self._slot(job, slot).incarnation,
            segment=number,
            start_shared=start[0],
            start_lane=start[1],
            end_shared=end[0],
            end_lane=end[1],
            links=tuple(links),
            seal=blake3(salt + steps).digest(),
            loss=2_500_000 - number,
            contribution=mark("delta", slot, number) if job.contributes(number) else b"",
        )

    def salt(self, node: bytes, slot: int, number: int) -> bytes:
        return mark("salt", node, slot, number)

    def steps(self, job: Job, slot: int, number: int) -> bytes:
        return mark("steps", job.id, slot, number)

    def sworn_steps(self, job: Job, slot: int, number: int, node: bytes) -> bytes:
        if self.has(node, Vice.CHEATS) and number >= self.bad_segment:
            return mark("false steps", number)
        return self.steps(job, slot, number)

    def _duties(self, job: Job) -> Iterator[tuple[bytes, Payload]]:
        if job.status is JobStatus.MATCHED:
            yield from self._answers(job)
        elif job.status is JobStatus.PREPARING:
            yield from self._attestations(job)
        elif job.status is JobStatus.ACTIVE:
            yield from self._places(job)
            for slot in job.living:
                yield from self._commits(job, slot)
                yield from self._contributions(job, slot)
                yield from self._audits(job, slot)
                yield from self._cases(job, slot)
        elif job.status is JobStatus.FINISHING:
            yield from self._results(job)

    def _places(self, job: Job) -> Iterator[tuple[bytes, Payload]]:
        """Answers of nodes that are asked for a vacant place."""
        asked = [(slot, self._slot(job, slot)) for slot in job.living]
        places = [(slot, state.worker, state.incarnation) for slot, state in asked]
        if job.standby is not None:
            places.append((STANDBY_SLOT, job.standby, job.standby_turn))
        for slot, member, turn in places:
            if member.accepted or self.has(member.node, Vice.IGNORES_PLACE):
                continue
            if self.has(member.node, Vice.DECLINES):
                yield member.node, Decline(job.id, turn, slot)
            else:
                yield member.node, Accept(job.id, turn, slot, mark("session of", member.node))

    def _contributions(self, job: Job, slot: int) -> Iterator[tuple[bytes, Payload]]:
        state = self._slot(job, slot)
        number = state.committed - 1
        if number < 0 or not job.contributes(number) or not state.worker.accepted:
            return
        record = self.state.round(job.id, number)
        stage, lanes = job.stage_of(slot), {job.lane_of(other) for other in job.living}
        held = tuple(
            lane
            for lane in sorted(lanes - {job.lane_of(slot)})
            if self._slot(job, job.slot_at(lane, stage)).committed > number
        )
        said = 0 if record is None else record.attested[slot]
        if held and (record is None or not record.decided) and said != sum(1 << k for k in held):
            yield state.worker.node, AttestContributions(job.id, job.epoch, slot, number, held)

    def _cases(self, job: Job, slot: int) -> Iterator[tuple[bytes, Payload]]:
        """Accusations, and what is said to them; the witness finds who withholds."""
        state = self._slot(job, slot)
        node, of = state.worker.node, (job.id, job.epoch, slot, state.incarnation)
        if not state.worker.accepted:
            return
        if self.has(node, Vice.LEAVES) and state.committed > state.settled:
            yield node, Leave(*of, LeaveReason.DEVICE)
            return
        case = state.case
        if case is not None and not case.present:
            yield node, Present(*of, case.opened)
        elif case is not None and job.standby is not None and job.standby.accepted:
            delivered = not self.has(node, Vice.WITHHOLDS) and not self.has(node, Vice.MUTE)
            yield job.standby.node, Witness(*of, case.opened, delivered)
        elif self.has(node, Vice.ACCUSES) and links_of(job, slot):
            payload = Stall(*of, state.stalls, links_of(job, slot)[0], state.committed)
            if self._may(node, payload):
                yield node, payload

    def _may(self, node: bytes, payload: Payload) -> bool:
        """Whether it would succeed in a block by itself."""
        raw = decode_transaction(self.sign(self.keys[node], payload), self.chain_id)
        try:
            check_transaction(self.state, self.genesis, self.height + 1, raw)
        except InvalidTransaction:
            return False
        return True

    def _answers(self, job: Job) -> Iterator[tuple[bytes, Payload]]:
        places = [(slot, self._slot(job, slot).worker) for slot in range(job.slots)]
        assert job.standby is not None
        for slot, member in [*places, (STANDBY_SLOT, job.standby)]:
            if self.has(member.node, Vice.DECLINES):
                # One decline ends the matching: nobody else's answer stands in that block.
                yield member.node, Decline(job.id, job.attempt, slot)
                return
        for slot, member in [*places, (STANDBY_SLOT, job.standby)]:
            if not member.accepted and not self.has(member.node, Vice.IGNORES_PLACE):
                session = mark("session of", member.node)
                yield member.node, Accept(job.id, job.attempt, slot, session)

    def _attestations(self, job: Job) -> Iterator[tuple[bytes, Payload]]:
        assert job.standby is not None
        for slot in range(job.slots):
            state = self._slot(job, slot)
            members = [state.worker.node, job.standby.node]
            if job.is_own(slot):
                members = members[:1]
            if any(self.has(node, Vice.OTHER_GENESIS) for node in members) and slot > 0:
                continue  # the job ends with slot 0; later answers would fail
            for node in members:
                if all(roots.node != node for roots in state.attested):
                    shared, lane = self.state_roots(job, slot, 0)
                    if self.has(node, Vice.OTHER_GENESIS):
                        shared = mark("other")
                    yield node, AttestGenesis(job.id, slot, shared, lane, mark("data"))

    def _commits(self, job: Job, slot: int) -> Iterator[tuple[bytes, Payload]]:
        state = self._slot(job, slot)
        node, number = state.worker.node, state.committed
        if (
            number < job.rounds
            and state.worker.accepted
            and not self._waits_for_round(job, number)
            and number - state.settled < job.unsettled
            and number < self.stop_before.get(node, job.rounds)
        ):
            sworn = self.true_commit(job, slot, number, node)
            steps = self.sworn_steps(job, slot, number, node)
            seal = blake3(self.salt(node, slot, number) + steps).digest()
            links = sworn.links
            if self.has(node, Vice.FLIPS_FRAME) and number >= self.bad_segment:
                links = tuple(LinkRoots(r.link, mark("flipped"), r.received) for r in links)
            yield (
                node,
                Commit(
                    *(
                        {"seal": seal, "links": links}.get(name, getattr(sworn, name))
                        for name in Commit.__struct_fields__
                    )
                ),
            )

    def _waits_for_round(self, job: Job, number: int) -> bool:
        if number == 0 or not job.contributes(number - 1):
            return False
        record = self.state.round(job.id, number - 1)
        return record is None or not record.decided

    def _audits(self, job: Job, slot: int) -> Iterator[tuple[bytes, Payload]]:
        state = self._slot(job, slot)
        for number in range(state.settled, state.committed):
            yield from self._proof(job, slot, number)
            audit = self.state.audit(job.id, slot, number)
            if audit is None:
                continue
            node, worker = audit.auditor, state.worker.node
            at = (job.id, job.epoch, slot, number)
            salt, found = mark("auditor salt", node, *at), self._found(job, slot, number, node)
            if audit.status is AuditStatus.DRAWN:
                if self.has(node, Vice.CANNOT_AUDIT):
                    yield node, AuditFail(*at, "frames of segment 0")
                elif not self.has(node, Vice.NEVER_AUDITS):
                    yield node, AuditCommit(*at, blake3(found + salt + node).digest())
            elif audit.status is AuditStatus.COMMITTED:
                if not self.has(worker, Vice.KEEPS_SEAL):
                    steps = self.sworn_steps(job, slot, number, worker)
                    yield worker, Open(*at, self.salt(worker, slot, number), steps)
            elif audit.status is AuditStatus.OPENED and not self.has(node, Vice.HIDES_VERDICT):
                yield node, AuditOpen(*at, found, salt)

    def _found(self, job: Job, slot: int, number: int, auditor: bytes) -> bytes:
        """The list root that an auditor's replay gives."""
        if self.has(auditor, Vice.LIES):
            return mark("lie")
        segment = self.state.segment(job.id, slot, number)
        assert segment is not None
        return audit_list_root(job, slot, number, segment, self.steps(job, slot, number))

    def _proof(self, job: Job, slot: int, number: int) -> Iterator[tuple[bytes, Payload]]:
        segment = self.state.segment(job.id, slot, number)
        assert segment is not None
        if (
            segment.proof is not ProofStatus.WAITING
            or not segment.proof_key
            or self.height + 1 >= segment.proof_until
        ):
            return
        true = mark("keyed", segment.proof_key, slot, number)
        standby = job.standby.node if job.standby is not None and job.standby.accepted else b""
        node = self._slot(job, slot).worker.node if segment.standby_hash else standby
        if not node or self.has(node, Vice.LOSES_COPY):
            return
        value = mark("forged") if self.has(node, Vice.FORGES_COPY) else true
        at = (job.id, job.epoch, slot, segment.incarnation, number)
        yield node, StandbyProof(*at, value)

    def _results(self, job: Job) -> Iterator[tuple[bytes, Payload]]:
        last = self._slot(job, job.living[len(job.stages) - 1]).worker.node
        holders = (last,) if job.standby is None else (job.standby.node, last)
        for node in (job.source,) if job.is_own(0) else holders:
            if all(node != other for other, _ in job.results):
                other = self.has(node, Vice.OTHER_RESULT)
                yield node, AttestResult(job.id, mark("other" if other else "result", job.id))

    def _slot(self, job: Job, slot: int) -> SlotState:
        found = self.state.slot(job.id, slot)
        assert found is not None
        return found
