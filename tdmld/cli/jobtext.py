"""Jobs as text."""

from collections import Counter

from tdmld.cli.common import table
from tdmld.cli.text import nats, share, short, units
from tdmld.rpc.types import JobDetail, JobEvent, JobSummary


def render_list(jobs: tuple[JobSummary, ...]) -> list[str]:
    """One line a job."""
    if not jobs:
        return ["no jobs; submit one with: tdmld job submit FILE"]
    return table(
        ("job", "name", "state", "segments", "loss", "spent", "escrow", "offered"),
        [
            (
                job.id[:12],
                job.name or "-",
                job.state + (f" ({job.reason})" if job.reason else ""),
                f"{job.segments_settled}/{job.rounds * job.stages * job.lanes}",
                nats(job.loss),
                units(job.spent),
                units(job.escrow),
                f"{job.offered:,}",
            )
            for job in jobs
        ],
    )


def render_job(job: JobDetail) -> list[str]:
    """One screen about a job."""
    brief = job.summary
    total = brief.rounds * brief.stages * brief.lanes
    repairs = f"; {job.epoch} times rolled back" if job.epoch else ""
    if job.lost_lanes:
        repairs += f"; lost lanes {', '.join(map(str, job.lost_lanes))}"
    lines = [
        f"job       {brief.id}",
        f"name      {brief.name or '-'}  ({brief.family}, {brief.stages} stages x "
        f"{brief.lanes} lanes, {brief.steps} steps)",
        f"state     {brief.state}" + (f": {brief.reason}" if brief.reason else "") + repairs,
        f"settled   {brief.segments_settled} of {total} segments "
        f"({share(brief.segments_settled, total)})",
        f"loss      {nats(brief.loss)} nats a token",
        f"spent     {units(brief.spent)} of {units(job.budget)} ({share(brief.spent, job.budget)})",
        f"audits    {audit_counts(job)}",
        f"deadline  height {job.deadline:,} (now {brief.height:,})",
    ]
    if job.result is not None:
        fetched = "fetched" if job.result.fetched else f"fetch it: tdmld job fetch {brief.id[:12]}"
        lines.append(
            f"result    {job.result.id[:16]} at {len(job.result.holders)} holders; {fetched}"
        )
    lines += ["", *_slots(job)]
    if any(slot.times is not None for slot in job.slots):
        lines += ["", "where a step's time goes (seconds, mean of the recent steps)", *_times(job)]
    if job.bottleneck is not None:
        lines.append(f"slowest   {job.bottleneck.text}")
    if job.former:
        lines += ["", "lost their place", *_former(job)]
    if job.payments:
        lines += ["", "paid"]
        for address, amount in sorted(job.payments.items(), key=lambda pair: -int(pair[1])):
            lines.append(f"  {address}{units(amount):>20}")
    return lines


def audit_counts(job: JobDetail) -> str:
    """Audits by state: 2 passed, 1 committed."""
    counts = Counter(audit.state for audit in job.audits)
    return ", ".join(f"{count} {state}" for state, count in counts.most_common()) or "none drawn"


def event_line(event: JobEvent) -> str:
    """One line of `tdmld job watch`."""
    return f"{event.time[11:19]}  {event.height:>8,}  {event.kind:<8} {event.text}"


def _slots(job: JobDetail) -> list[str]:
    if not job.slots:
        return ["no slots assigned yet"]
    rows = [
        (
            f"{slot.lane}.{slot.stage}",
            f"{slot.layers[0]}-{slot.layers[1] - 1}",
            short(slot.worker),
            f"{slot.segment}/{job.summary.rounds}",
            f"{slot.settled}",
            units(slot.price),
            units(slot.earned),
            slot.state,
        )
        for slot in job.slots
    ]
    rows += [
        (
            "standby",
            f"{len(one.slots)} slots",
            short(one.node),
            f"{one.proved}/{job.summary.rounds}",
            "-",
            "-",
            units(one.earned),
            "copy proved" if one.proved else "waiting",
        )
        for one in job.standbys
    ]
    return table(("slot", "layers", "node", "segment", "settled", "price", "earned", "state"), rows)


def _times(job: JobDetail) -> list[str]:
    kinds = ("compute", "waiting", "wire", "verifying", "saving", "chain")
    rows = []
    for slot in job.slots:
        if slot.times is None:
            continue
        seconds = [getattr(slot.times, kind) for kind in kinds]
        norm = "-" if slot.gradient_norm is None else f"{slot.gradient_norm:.3f}"
        shown = (f"{value:.3f}" for value in (*seconds, sum(seconds)))
        rows.append(
            (
                f"{slot.lane}.{slot.stage}",
                "-" if slot.step is None else f"{slot.step}/{job.summary.steps}",
                nats(slot.loss),
                norm,
                *shown,
                f"{slot.tokens_per_second:,.0f}",
                str(slot.restarts),
            )
        )
    heads = ("slot", "step", "loss", "norm", *kinds, "all", "tokens/s", "restarts")
    return table(heads, rows)


def _former(job: JobDetail) -> list[str]:
    rows = [
        (
            f"{former.lane}.{former.stage}",
            short(former.node),
            former.cause + (" (convicted)" if former.convicted else ""),
            f"{former.settled}",
            f"{former.height:,}",
        )
        for former in job.former
    ]
    return table(("slot", "node", "cause", "settled", "height"), rows)
