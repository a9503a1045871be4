"""What this node works on, what its owner earns with it, and why it may earn nothing."""

from collections import deque

from tdmld.chain import events as happened
from tdmld.chain.records import Job
from tdmld.chain.state import State
from tdmld.node.agent import Agent
from tdmld.node.chainservice import ChainService
from tdmld.node.duties import assigned
from tdmld.node.jobbook import JobBook
from tdmld.node.store import AppliedBlock
from tdmld.p2p import Host
from tdmld.rpc.types import (
    Earnings,
    EarningsBucket,
    JobEarnings,
    Role,
    SlotRun,
    time_text,
)

BUCKET_SECONDS = 60
BUCKETS = 60


class Work:
    """One node's part in jobs, as of the finalized state."""

    def __init__(
        self, node: bytes, chain: ChainService, agent: Agent, host: Host, book: JobBook
    ) -> None:
        self._node, self._chain, self._agent = node, chain, agent
        self._host, self._book = host, book
        self._buckets: deque[list[int]] = deque(maxlen=BUCKETS)

    def count_income(self, applied: AppliedBlock, owner: bytes) -> None:
        """Minute by minute."""
        earned = sum(
            entry.amount
            for entry in applied.events
            if isinstance(entry, happened.Paid) and entry.owner == owner
        )
        minute = applied.block.header.time_ms // 1000 // BUCKET_SECONDS
        while not self._buckets or self._buckets[-1][0] < minute:
            last = self._buckets[-1][0] if self._buckets else minute - 1
            start = max(last + 1, minute - BUCKETS + 1)
            self._buckets.append([start, 0])
        self._buckets[-1][1] += earned

    def earnings(self, state: State, jobs: list[Job], owner: bytes) -> Earnings:
        """All of these jobs that paid the owner or will."""
        rows = []
        for job in jobs:
            paid = state.earnings(job.id, owner)
            pending = 0 if job.final else self.pending(state, job, owner)
            if paid.total or pending:
                rows.append(
                    JobEarnings(
                        job=job.id.hex(),
                        worker=str(paid.worker),
                        standby=str(paid.standby),
                        audit=str(paid.auditor),
                        pending=str(pending),
                    )
                )
        return Earnings(
            height=self._chain.height,
            total=str(state.facts(owner).earned),
            pending=str(sum(int(row.pending) for row in rows)),
            jobs=tuple(rows),
            buckets=tuple(
                EarningsBucket(start=time_text(minute * BUCKET_SECONDS * 1000), amount=str(amount))
                for minute, amount in self._buckets
            ),
            bucket_seconds=BUCKET_SECONDS,
        )

    def pending(self, state: State, job: Job, owner: bytes) -> int:
        """Work done in a job and not settled yet, at its price."""
        return sum(
            (slot.committed - slot.settled) * slot.worker.price
            for slot in assigned(state, job)
            if slot.worker.owner == owner
        )

    def why_not_earning(self, state: State, jobs: list[Job]) -> str:
        """One line with cause and remedy, for a node without tasks."""
        if not self._host.connected() and len(self._chain.committee.nodes) > 1:
            return "no peer is connected: check `peers` in tdmld.toml and this node's network"
        if self._chain.syncing:
            return "still fetching the chain; work starts when it has caught up"
        if state.node(self._node) is None:
            return "this node key is not registered to an owner: tdmld keys register"
        if self._agent.ask is None:
            return "this node does not ask for work: set enabled = true in [ask] of tdmld.toml"
        ask = state.ask(self._node)
        if ask is None:
            return "the ask is on its way to the chain"
        needed = self._chain.genesis.parameters.dial_receipts
        if ask.open < needed and not ask.paths:
            return (
                f"only {ask.open} of {needed} others could dial this node: it may stand by and"
                " audit, and work beside an open one; tdmld doctor says why"
            )
        if not jobs:
            return "nobody offers a job at the moment; the node is ready"
        return "the jobs that run were matched to other nodes: lower [ask] price, or wait"

    def tasks(self, state: State, job: Job, owner: bytes) -> list[SlotRun]:
        """What this node does in a job."""
        slots, spec = assigned(state, job), self._book.spec(job)
        earned = state.earnings(job.id, owner)

        def line(role: Role, index: int, phase: str, segment: int, paid: int) -> SlotRun:
            stage, slot = job.stage_of(index), slots[index]
            progress = self._agent.progress.get((job.id, index)) if role == "worker" else None
            per_second = 0.0
            if progress is not None and progress.seconds > 0:
                tokens = job.tokens * job.weight_of(index) / job.segment_steps
                per_second = tokens / progress.seconds
            return SlotRun(
                job=job.id.hex(),
                role=role,
                lane=job.lane_of(index),
                stage=stage,
                layers=spec.layers(stage) if spec is not None else (0, 0),
                state=phase,
                segment=segment,
                segments=job.rounds,
                step=progress.step if progress is not None else segment * job.segment_steps,
                steps=job.rounds * job.segment_steps,
                settled=slot.settled,
                earned=str(paid),
                tokens_per_second=per_second,
            )

        found = []
        for index, slot in enumerate(slots):
            if slot.worker.node == self._node:
                progress = self._agent.progress.get((job.id, index))
                phase = "waiting" if progress is None else progress.failed or progress.phase
                found.append(line("worker", index, phase, slot.committed, earned.worker))
            if job.standby is not None and job.standby.node == self._node:
                each = earned.standby // len(slots)
                found.append(line("standby", index, "holding copies", slot.committed, each))
        for job_id, index, number in list(self._agent.auditing):
            if job_id == job.id and index < len(slots):
                found.append(line("auditor", index, "replaying", number, earned.auditor))
        return found
