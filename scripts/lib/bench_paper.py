"""The experiment of the paper behind the project: a residual network in 1, 2 and 4 lanes.

It learns to read 1,797 real handwritten digits; a fifth is held out. All ways see the same number
of images in all: with n lanes a lane makes 1/n of the steps. Beside the lanes stand one process
that runs the unsplit model (the reference) and FedAvg (the mean of the weights every K steps).

    single      one process, the unsplit model
    sync-N      the product, two stages, N lanes that meet in every step (gradients in bf16)
    diloco-N    the product, two stages, N lanes that meet every K steps in an outer step
    fedavg-N    N lanes of the unsplit model, dense averaging every K steps

    scripts/bench paper [--steps N] [--json FILE]

Lanes and stages are threads of one process here, so with fewer cores than slots `seconds` says
what the work costs, not what many machines would take.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_sync import NoLinks
from report import ROOT, Report, say

from tdmld.train.data import Tokens
from tdmld.train.export import merge_states
from tdmld.train.jobfile import load_job_file
from tdmld.train.numerics import check_torch, pin_process
from tdmld.train.spec import Spec
from tdmld.train.statefile import part_file
from tests.train.support import run_job, slot_place

EVERY = 10
BATCH = 32
LANES = (1, 2, 4)


def load(steps: int, stages: int, lanes: str, place: Path) -> tuple[Spec, Tokens]:
    """The digits of `examples/digits.toml`, with other steps, cuts and lanes."""
    text = (ROOT / "examples" / "digits.toml").read_text()
    changes = {
        'text = "../data/digits.bin"': f'text = "{ROOT / "data" / "digits.bin"}"',
        'config = "resnet.json"': f'config = "{ROOT / "examples" / "resnet.json"}"',
        "steps = 120": f"steps = {steps}",
        "warmup = 10": f"warmup = {steps // 12}",
        "micro_batches = 4": "micro_batches = 1",
        "micro_batch_size = 32": f"micro_batch_size = {BATCH}",
        "decay_from = 60": f"decay_from = {steps // 2}",
        "cuts = [0, 1, 3, 4]": f"cuts = {[0, 4] if stages == 1 else [0, 2, 4]}",
        'lanes = { count = 1, mode = "sync" }': f"lanes = {lanes}",
    }
    for old, new in changes.items():
        if old not in text:
            raise SystemExit(f"examples/digits.toml has no longer: {old}")
        text = text.replace(old, new)
    (place / "job.toml").write_text(text)
    job = load_job_file(place / "job.toml")
    return job.spec, Tokens.from_text(job.spec, job.text_path)


def accuracy(spec: Spec, data: Tokens, model: Path) -> float:
    from tdmld.train.evaluate import heldout_accuracy

    return heldout_accuracy(model, spec, data)


def single(steps: int, place: Path) -> float:
    """The reference."""
    from tdmld.train.reference import MODEL_DIRECTORY, run_reference

    spec, data = load(steps, 1, '{ count = 1, mode = "sync" }', place)
    run_reference(spec, data, place / "reference")
    return accuracy(spec, data, place / "reference" / MODEL_DIRECTORY)


def cut(steps: int, lanes: int, mode: str, place: Path) -> float:
    """The product's own runner, a thread a slot."""
    written = f'{{ count = {lanes}, mode = "{mode if lanes > 1 else "sync"}" }}'
    spec, data = load(steps // lanes, 2, written, place)
    run_job(spec, data, place / "live")
    final = [
        slot_place(place / "live", 0, stage) / "state" / str(spec.rounds) / part_file("shared")
        for stage in range(spec.stages)
    ]
    merge_states(spec, final, place / "model")
    return accuracy(spec, data, place / "model")


def fedavg(steps: int, lanes: int, place: Path) -> float:
    """Dense averaging; every lane in a thread, as above."""
    import torch

    from tdmld.train.runner import run_steps
    from tdmld.train.slot import Slot

    written = f'{{ count = {lanes}, mode = "diloco" }}'
    spec, data = load(steps // lanes, 1, written, place)
    slots = [Slot.create(spec, 0, lane, data) for lane in range(lanes)]
    for slot in slots:
        slot.init_from_seed()
    for _ in range(spec.training_rounds):
        work: list[Any] = [
            threading.Thread(target=run_steps, args=(slot, EVERY, NoLinks(), None, {}))
            for slot in slots
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        with torch.no_grad():
            for tensors in zip(*(slot.moving for slot in slots), strict=True):
                if tensors[0].is_floating_point():
                    middle = sum(tensors[1:], tensors[0]) / lanes
                    for tensor in tensors:
                        tensor.copy_(middle)
    slots[0].touch()
    slots[0].save(place / "state")
    merge_states(spec, [place / "state" / part_file("shared")], place / "model")
    return accuracy(spec, data, place / "model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=480, help="of 32 images, of all lanes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("scripts/bench paper")
    pin_process()
    check_torch()
    steps = max(1, arguments.steps // (EVERY * max(LANES))) * EVERY * max(LANES)
    ways: list[tuple[str, Any]] = [("single", lambda place: single(steps, place))]
    for lanes in LANES:
        for mode in ("sync", "diloco") if lanes > 1 else ("sync",):
            ways.append(
                (
                    f"{mode}-{lanes}",
                    lambda place, lanes=lanes, mode=mode: cut(steps, lanes, mode, place),
                )
            )
        if lanes > 1:
            ways.append((f"fedavg-{lanes}", lambda place, lanes=lanes: fedavg(steps, lanes, place)))
    rows = []
    for name, way in ways:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            right = way(Path(place))
        seconds = time.monotonic() - began
        rows.append({"way": name, "accuracy": round(right, 4), "seconds": round(seconds, 1)})
        say(f"{name:10} {right:.1%} of the held-out digits read rightly, {seconds:.0f} s")
    report.document |= {"images": steps * BATCH, "segment_steps": EVERY, "rows": rows}
    report.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
