"""What members of a job tell each other's daemons about their slots: `/tdmld/<n>/report/1`.

One AskReport and one Report a stream. Only who has to do with the job is answered; what is said is
for people (progress, losses, where the time goes) and nothing rests on it.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated

import msgspec
import trio

from tdmld.chain.codec import Hash, Natural, Record, decode, encode
from tdmld.chain.crypto import address, public_key
from tdmld.chain.errors import DecodeError
from tdmld.chain.limits import SLOTS
from tdmld.chain.state import State
from tdmld.node.duties import assigned, party
from tdmld.node.progress import KINDS, Progress
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import P2PError

log = logging.getLogger(__name__)

ASK_BYTES = 64
REPORT_BYTES = 64 << 10
ANSWER_SECONDS = 5.0
FRESH_SECONDS = 3.0
"""A report is not asked for again before."""
STALE_SECONDS = 60.0
"""A report that is not renewed is shown so long."""
PATIENCE_SECONDS = 1.0
"""Whoever looks at a job waits so long for reports that are not here yet."""
MICRO = 1e6
PHASE_CHARACTERS = 96

_Phase = Annotated[str, msgspec.Meta(max_length=PHASE_CHARACTERS)]
_Micro = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class AskReport(Record, tag="ask_report", frozen=True):
    """How do your slots of this job get on?"""

    job: Hash


class SlotReport(Record, tag="slot_report", frozen=True):
    """One slot, as its worker's daemon sees it. Times in microseconds a step, by progress.KINDS;
    `loss` and `norm` in millionths, None where there is none."""

    slot: Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)]
    step: Natural
    loss: _Micro | None
    norm: _Micro | None
    restarts: Natural
    phase: _Phase
    times: Annotated[tuple[_Micro, ...], msgspec.Meta(max_length=len(KINDS))]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Mean seconds a step by kind; empty before the first one, and when some are missing."""
        if len(self.times) != len(KINDS):
            return {}
        return {kind: micro / MICRO for kind, micro in zip(KINDS, self.times, strict=True)}


class Report(Record, tag="report", frozen=True):
    slots: Annotated[tuple[SlotReport, ...], msgspec.Meta(max_length=SLOTS)]


def protocol(chain_id: bytes) -> str:
    """The protocol of a chain."""
    return f"/tdmld/{chain_id.hex()[:8]}/report/1"


def slot_report(slot: int, progress: Progress) -> SlotReport:
    """What a node says of a slot that it runs."""
    return SlotReport(
        slot=slot,
        step=progress.step,
        loss=None if progress.loss is None else _micro(progress.loss),
        norm=_micro(progress.gradient_norm) if progress.step else None,
        restarts=progress.restarts,
        phase=(progress.failed or progress.phase)[:PHASE_CHARACTERS],
        times=tuple(_micro(seconds) for seconds in progress.times.values()),
    )


class JobReports:
    """Answers others, and asks them on behalf of whoever looks at a job here. Run `run`.

    state     the finalized state now
    progress  (job, slot index) -> what this node knows of its own slots
    """

    def __init__(
        self,
        host: Host,
        node: bytes,
        chain_id: bytes,
        state: Callable[[], State],
        progress: Mapping[tuple[bytes, int], Progress],
    ) -> None:
        self._host = host
        self._node = node
        self._protocol = protocol(chain_id)
        self._state = state
        self._progress = progress
        self._asked: dict[tuple[bytes, bytes], float] = {}
        """(job, node) -> when it was asked last."""
        self._known: dict[tuple[bytes, bytes], tuple[float, tuple[SlotReport, ...]]] = {}
        """(job, node) -> when it answered last, and what it said then."""
        self._members: dict[bytes, tuple[float, frozenset[bytes]]] = {}
        """Job that we work for -> when we looked, and the nodes that had to do with it."""
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Serve until cancelled."""
        self._host.set_handler(self._protocol, self._answer)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    async def of(self, job_id: bytes) -> dict[int, SlotReport]:
        """The newest report of each slot that somebody speaks of, after a short wait for those that
        are missing. A node is believed about its own slots only."""
        state = self._state()
        job = state.job(job_id)
        if job is None or job.final:
            self._forget(job_id)
            return {}
        workers = {i: slot.worker.node for i, slot in enumerate(assigned(state, job))}
        done = self._ask(job_id, set(workers.values()) - {self._node})
        with trio.move_on_after(PATIENCE_SECONDS):
            await done.wait()
        found = {r.slot: r for r in self._own(job_id)}
        oldest = trio.current_time() - STALE_SECONDS
        for node in set(workers.values()) - {self._node}:
            at, said = self._known.get((job_id, node), (oldest, ()))
            if at > oldest:
                found |= {r.slot: r for r in said if workers.get(r.slot) == node}
        return {slot: report for slot, report in found.items() if slot in workers}

    def _own(self, job: bytes) -> Iterable[SlotReport]:
        return [slot_report(at[1], found) for at, found in self._progress.items() if at[0] == job]

    def _forget(self, job: bytes) -> None:
        for key in [key for key in self._asked if key[0] == job]:
            del self._asked[key]
            self._known.pop(key, None)

    def _ask(self, job: bytes, nodes: set[bytes]) -> trio.Event:
        """Ask those whose word is not fresh, in the background; set when nobody is unknown."""
        now, done = trio.current_time(), trio.Event()
        due = [
            node
            for node in nodes
            if (job, node) not in self._asked or self._asked[job, node] <= now - FRESH_SECONDS
        ]
        unknown = {node for node in due if (job, node) not in self._asked}

        async def ask(node: bytes) -> None:
            try:
                said = await self._exchange(job, node)
                if said is not None:
                    self._known[job, node] = (trio.current_time(), said)
            finally:
                unknown.discard(node)
                if not unknown:
                    done.set()

        if self._nursery is not None:
            for node in due:
                self._asked[job, node] = now
                self._nursery.start_soon(ask, node)
        if not unknown or self._nursery is None:
            done.set()
        return done

    async def _exchange(self, job: bytes, node: bytes) -> tuple[SlotReport, ...] | None:
        """What a node says; None when it does not answer."""
        try:
            with trio.fail_after(ANSWER_SECONDS):
                async with await self._host.open_stream(address(node), self._protocol) as stream:
                    await stream.send(encode(AskReport(job)))
                    raw = await stream.receive(REPORT_BYTES)
            return decode(Report, raw, REPORT_BYTES).slots
        except (P2PError, DecodeError, trio.TooSlowError) as error:
            log.debug("no report from %s: %s", address(node), error)
            return None

    async def _answer(self, stream: Stream) -> None:
        try:
            with trio.fail_after(ANSWER_SECONDS):
                raw = await stream.receive(ASK_BYTES)
            asked = decode(AskReport, raw, ASK_BYTES).job
        except (P2PError, trio.TooSlowError):
            return await stream.reset()
        except DecodeError as error:
            stream.blame(str(error))
            return await stream.reset()
        slots = tuple(self._own(asked))
        if not slots or not self._is_member(stream.peer_id, asked):
            slots = ()
        await stream.send(encode(Report(slots)))

    def _is_member(self, peer_id: str, job_id: bytes) -> bool:
        """Whether a node has to do with a job that we work for. Strangers ask too, and to look at a
        job takes long: once in a while is enough."""
        now = trio.current_time()
        at, members = self._members.get(job_id, (-math.inf, frozenset[bytes]()))
        if at <= now - FRESH_SECONDS:
            state = self._state()
            job = state.job(job_id)
            found = () if job is None else party(state, job)
            members = frozenset(node for node, _ in found)
            working = {job for job, _ in self._progress}
            self._members = {job: seen for job, seen in self._members.items() if job in working}
            self._members[job_id] = now, members
        try:
            return public_key(peer_id) in members
        except DecodeError:
            return False


def _micro(value: float) -> int:
    """In millionths; what is not finite or negative says nothing."""
    return round(value * MICRO) if 0 <= value < 2**53 / MICRO else 0
