"""Events of jobs for those who follow them: from blocks, and steps from this node's workers."""

import math
from collections.abc import AsyncGenerator

import trio

from tdmld.chain.state import State
from tdmld.node import jobevents
from tdmld.node.machine import StepDone
from tdmld.node.store import AppliedBlock
from tdmld.rpc.types import JobEvent, time_text

EVENTS_BUFFERED = 256
"""Events that a subscriber may have waiting before steps are left out."""


class JobFeed:
    """Who follows which job. Nothing that stands on the chain is left out for them."""

    def __init__(self) -> None:
        self.subscribers: set[tuple[bytes, trio.MemorySendChannel[JobEvent]]] = set()

    async def follow(self, job: bytes) -> AsyncGenerator[JobEvent]:
        """What happens in a job from now on; ends after its final state."""
        # Filled without waiting: the server takes at once what is in it, and steps are left out.
        queue, events = trio.open_memory_channel[JobEvent](math.inf)
        subscriber = (job, queue)
        self.subscribers.add(subscriber)
        try:
            async for event in events:
                yield event
        finally:
            self.subscribers.discard(subscriber)

    def tell(self, state: State, applied: AppliedBlock) -> None:
        """Pass on what a block did."""
        time = time_text(applied.block.header.time_ms)
        for subscriber in list(self.subscribers):
            job_id, queue = subscriber
            for entry in applied.events:
                event = jobevents.event(state, entry, job_id, applied.height, time)
                if event is not None:
                    queue.send_nowait(event)
            job = state.job(job_id)
            if job is not None and job.final:
                self.subscribers.discard(subscriber)
                queue.close()

    def step(self, step: StepDone, height: int, now_ms: int) -> None:
        """Tell a step of a slot that this node runs."""
        loss = None if step.loss is None else round(step.loss * 1e6)
        told = "" if step.loss is None else f", loss {step.loss:.4f}"
        event = JobEvent(
            job=step.job.hex(),
            height=height,
            time=time_text(now_ms),
            kind="step",
            text=f"Step {step.step + 1} of stage {step.slot.stage}{told}.",
            lane=step.slot.lane,
            stage=step.slot.stage,
            step=step.step,
            loss=loss,
        )
        for job_id, queue in self.subscribers:
            waiting = queue.statistics().current_buffer_used
            if job_id == step.job and waiting < EVENTS_BUFFERED:
                queue.send_nowait(event)
