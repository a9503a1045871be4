"""`tdmld job estimate`: what a job will take, before it is offered."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter

from tdmld.chain.market import slot_price
from tdmld.chain.offers import suggested_audit_budget
from tdmld.cli.common import AsJson, DataDir, emit, table
from tdmld.cli.exits import Exit
from tdmld.cli.reference import read_job, training_errors
from tdmld.cli.text import size, span, units
from tdmld.errors import UserError
from tdmld.rpc.staketypes import AskRow

if TYPE_CHECKING:
    from tdmld.train.estimate import Line, Seconds
    from tdmld.train.jobfile import JobFile
    from tdmld.train.spec import Spec

_Value = TypeVar("_Value", int, float)
_MEGABIT = 1e6 / 8
_MIB = 1 << 20


async def estimate(
    file: Path,
    /,
    *,
    mbps: Annotated[
        list[float] | None,
        Parameter(help="Upload of the nodes in megabits a second, one value or one a stage."),
    ] = None,
    latency: Annotated[float, Parameter(help="Milliseconds from node to node.")] = 20.0,
    speed: Annotated[
        list[float] | None,
        Parameter(help="How fast the nodes are, 1 as this machine; one value or one a stage."),
    ] = None,
    gflops: Annotated[
        float | None, Parameter(help="Do not measure: 10^9 operations a second of the nodes.")
    ] = None,
    memory: Annotated[
        list[int] | None,
        Parameter(help="MiB that the nodes have for a slot; limits the cuts that are suggested."),
    ] = None,
    asks: Annotated[
        bool, Parameter(negative="", help="Ask the node what others ask for work now.")
    ] = False,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> int:
    """Tell what a job will take: bytes, disk, memory, hours, bubble and price.

    Runs each kind of layer for a moment on this machine (--gflops: does not), then plays a step of
    the job's schedule over lines of the given speed. Suggests cuts with the least time in the
    slowest stage. Overheads of the network beside bytes and latency are not in it.
    """
    with training_errors():
        found = read_job(file)
        spec = found.spec
        given = mbps or [100.0]
        _positive("--mbps", given)
        _positive("--speed", speed or [1.0])
        _positive("--gflops", [gflops or 1.0])
        _positive("--memory", list(memory or [1]))
        if not 0 <= latency < 60_000:
            raise UserError("--latency is out of range", next="0 to 60000", exit_code=Exit.USAGE)
        from tdmld.train.estimate import Line, seconds_of_speed

        lines = [Line(n * _MEGABIT, latency / 1000) for n in _each("--mbps", given, spec.stages)]
        speeds = _each("--speed", speed or [1.0], spec.stages)
        room: list[int | None] = [None] * spec.stages
        if memory:
            room = [n * _MIB for n in _each("--memory", memory, spec.stages)]
        seconds = seconds_of_speed(spec, gflops * 1e9) if gflops else _measured(spec)
        document = _document(found, seconds, lines, speeds, room)
    document["asks"] = await _asks(data_dir, spec) if asks else None
    document["measured"] = gflops is None
    emit(document, _text(document), as_json=json)
    return Exit.OK


def _positive(name: str, values: list[float] | list[int]) -> None:
    if not all(0 < value < 1e12 for value in values):
        raise UserError(f"{name} is out of range", next="a positive number", exit_code=Exit.USAGE)


def _each(name: str, values: list[_Value], stages: int) -> list[_Value]:
    if len(values) not in (1, stages):
        raise UserError(
            f"{name} has {len(values)} values",
            next=f"give one, or {stages}: one a stage",
            exit_code=Exit.USAGE,
        )
    return values * stages if len(values) == 1 else values


def _measured(spec: "Spec") -> "Seconds":
    from tdmld.train.numerics import check_torch
    from tdmld.train.timing import measure

    check_torch()
    return measure(spec, lambda part: print(f"measuring: {part}", file=sys.stderr, flush=True))


def _document(
    job: "JobFile",
    seconds: "Seconds",
    lines: "list[Line]",
    speeds: list[float],
    room: list[int | None],
) -> dict[str, Any]:
    from tdmld.train.budget import link_step_bytes, stage_disk, stage_memory, standby_disk
    from tdmld.train.estimate import balanced, play, segment_overhead, stage_seconds, with_cuts
    from tdmld.train.spec import stage_parameters

    spec = job.spec
    steps = [play(spec, seconds, lines, speeds, lane) for lane in range(spec.lanes)]
    slowest = max(steps, key=lambda step: step.seconds)
    overhead = segment_overhead(spec, seconds) / min(speeds)
    total = spec.train.steps - spec.first_step
    whole = slowest.seconds * total + overhead * spec.rounds
    told = max(spec.contribution_bytes(stage) for stage in range(spec.stages))
    if told:
        rate = min(line.bytes_per_second for line in lines)
        whole += spec.rounds * (spec.lanes - 1) * told / rate
    best = balanced(spec, seconds, speeds, room)
    recut = play(with_cuts(spec, best.cuts), seconds, lines, speeds)
    stages = []
    for stage in range(spec.stages):
        times = stage_seconds(spec, stage, seconds)
        first, last = spec.layers(stage)
        stages.append(
            {
                "stage": stage,
                "layers": [first, last],
                "parameters": stage_parameters(spec, stage),
                "memory_bytes": stage_memory(spec, stage),
                "disk_bytes": stage_disk(spec, stage),
                "micro_batch_seconds": sum(times.values()) / speeds[stage],
                "busy": slowest.busy[stage] / slowest.seconds,
                "contribution_bytes": spec.contribution_bytes(stage),
                "links": {
                    link: link_step_bytes(spec, 0, stage, link) for link in spec.links(0, stage)
                },
            }
        )
    return {
        "name": job.name,
        "stages": stages,
        "standby_disk_bytes": standby_disk(spec),
        "step_seconds": slowest.seconds,
        "exchange_seconds": slowest.exchange,
        "bubble": slowest.bubble,
        "hours": whole / 3600,
        "tokens_per_second": _tokens(spec) / slowest.seconds,
        "price_at_most": _price(job),
        "layer_seconds": [one.both for one in seconds.layers],
        "entry_seconds": seconds.entry.both,
        "head_seconds": seconds.head.both,
        "suggested_cuts": list(best.cuts),
        "suggested_step_seconds": recut.seconds,
    }


def _tokens(spec: "Spec") -> int:
    """Tokens (images: pixels) that all lanes read in a step."""
    each = spec.train.micro_batch_size * spec.data.sequence
    return each * sum(spec.micro_batches(lane) for lane in range(spec.lanes))


def _price(job: "JobFile") -> int:
    """Units for workers, standby and audits if every slot gets its highest price."""
    spec, money = job.spec, job.money
    paid = sum(spec.lane_weights) * spec.stages
    audits = suggested_audit_budget(money.audit_rate, spec.slots, spec.rounds, money.audit_price)
    round_price = paid * money.slot_price_max + spec.slots * money.standby_price
    return spec.rounds * round_price + audits


async def _asks(data_dir: Path | None, spec: "Spec") -> dict[str, Any]:
    """What the standing asks of the spec's class say: how many fit each stage, and prices."""
    from tdmld.cli.node import connect
    from tdmld.train.budget import stage_memory
    from tdmld.train.spec import stage_parameters

    async with connect(data_dir) as client:
        standing = await client.call("chain_asks", {}, tuple[AskRow, ...])
    wanted = [ask for ask in standing if spec.class_ in ("any", ask.device_class)]
    stages, cheapest = [], 0
    for stage in range(spec.stages):
        fitting = [ask for ask in wanted if ask.memory >= stage_memory(spec, stage)]
        prices = sorted(
            slot_price(int(ask.price), stage_parameters(spec, stage), spec.tokens_per_segment)
            for ask in fitting
        )
        stages.append({"stage": stage, "fitting": len(fitting), "lowest": prices[:1]})
        cheapest += sum(prices[:1])
    rounds = spec.rounds * sum(spec.lane_weights)
    return {
        "standing": len(standing),
        "stages": stages,
        "price_now": cheapest * rounds if all(one["lowest"] for one in stages) else None,
    }


def _text(found: dict[str, Any]) -> list[str]:
    """The document for people."""
    rows = []
    for one in found["stages"]:
        first, last = one["layers"]
        rows.append(
            (
                one["stage"],
                f"{first}-{last - 1}" if last > first else "-",
                f"{one['parameters']:,}",
                size(one["memory_bytes"]),
                size(one["disk_bytes"]),
                f"{1000 * one['micro_batch_seconds']:.1f} ms",
                f"{100 * one['busy']:.0f} %",
                ", ".join(f"{link} {size(count)}" for link, count in one["links"].items()) or "-",
            )
        )
    head = ("stage", "layers", "parameters", "memory", "disk", "micro-batch", "busy", "sent a step")
    lines = [found["name"], *table(head, rows)]
    lines += [
        f"a step       {found['step_seconds']:.3f} s, bubble {100 * found['bubble']:.0f} %, "
        f"{found['tokens_per_second']:,.0f} tokens/s"
        + (f", lanes exchange {found['exchange_seconds']:.3f} s" * bool(found["exchange_seconds"])),
        f"the job      {span(3600 * found['hours'])}",
        f"standby      {size(found['standby_disk_bytes'])} of disk",
        f"price        {units(found['price_at_most'])} at most, audits included; fees are extra",
    ]
    if (asks := found["asks"]) is not None:
        now = asks["price_now"]
        fitting = ", ".join(str(one["fitting"]) for one in asks["stages"])
        lines.append(
            f"asks         {asks['standing']} stand; fit the stages: {fitting}; workers by the "
            f"cheapest ones: {'nobody fits some stage' if now is None else units(now)}"
        )
    lines.append(
        f"cuts         {found['suggested_cuts']} would give {found['suggested_step_seconds']:.3f} s"
    )
    return lines
