"""Several lanes: what they lose by talking little, and what they win by talking at all.

One model learns ten plays of Shakespeare in each of these ways, every lane reading the same number
of tokens in the same windows, with the same steps, schedule and K:

    ours        the product's `diloco`: every K steps a contribution of a few bits, an outer step
    dense       every K steps the mean of all weights, in fp32
    allreduce   the product's `sync`: gradients in fp32 at every step
    single      one lane alone, without any synchronisation

Bytes are the payload that leaves one lane for others (a contribution or a tensor once, however many
lanes fetch it). All lanes are run by the product's own runner, without a network.


    scripts/bench sync [--steps N] [--seeds N] [--json FILE]
"""

import argparse
import multiprocessing
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from msgspec import to_builtins
from report import ROOT, Report, say

from tdmld.train.data import Tokens
from tdmld.train.export import merge_states
from tdmld.train.jobfile import load_job_file
from tdmld.train.numerics import check_torch, pin_process
from tdmld.train.spec import Spec
from tdmld.train.statefile import part_file

CONFIG = """{"model_type": "llama", "hidden_size": %(width)d, "intermediate_size": %(inner)d,
"max_position_embeddings": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
"num_hidden_layers": 4, "vocab_size": 256}"""
JOB = """
version = 1
name = "sync"
family = "llama"
config = "config.json"
seed = %(seed)d
init = "seed"
privacy = "open"
class = "any"
[data]
text = "%(text)s"
tokenizer = "bytes"
sequence = 64
heldout = "0.1"
[train]
steps = %(steps)d
micro_batches = 1
micro_batch_size = %(batch)d
precision = "fp32"
wire = "fp32"
optimizer = { name = "adamw", lr = "%(lr)s", %(adamw)s }
schedule = { kind = "linear", warmup = %(warmup)d, decay_from = %(decay)d, floor = "0.1" }
clip = { kind = "stage", norm = "1.0" }
[pipeline]
cuts = [0, 4]
lanes = %(lanes)s
segment_steps = %(every)d
unsettled = 8
state_every = 2
[money]
slot_price_max = 1
standby_price = 0
audit_rate = "0"
audit_price = 0
deadline_blocks = 1000
"""
SETTINGS: dict[str, Any] = {
    "width": 96,
    "inner": 256,
    "steps": 480,
    "batch": 4,
    "lr": "3e-3",
    "adamw": 'betas = ["0.9", "0.95"], eps = "1e-8", weight_decay = "0.1"',
    "warmup": 40,
    "decay": 320,
    "every": 10,
    "seed": 1,
}
SYNC = '{ count = 2, mode = "sync", wire = "fp32" }'
DILOCO = '{ count = 2, mode = "diloco" }'
SINGLE = '{ count = 1, mode = "sync" }'


class NoLinks:
    """The channel of a slot that has no neighbours."""

    def receive(self, link: str, seq: int) -> memoryview:
        raise KeyError(link)

    def release(self, link: str, seq: int) -> None:
        raise KeyError(link)

    def send(self, link: str, seq: int, payload: memoryview) -> None:
        raise KeyError(link)


class Pair:
    """Links between slots in threads of one process; counts what the first lane sends."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.sent = spec, 0
        self.boxes: dict[tuple[int, str], queue.SimpleQueue[bytes]] = {
            (lane, link): queue.SimpleQueue()
            for lane in range(spec.lanes)
            for link in spec.links(lane, 0)
        }

    def end(self, lane: int) -> "PairEnd":
        return PairEnd(self, lane)


class PairEnd:
    """One lane's end of a `Pair`."""

    def __init__(self, pair: Pair, lane: int) -> None:
        self.pair, self.lane = pair, lane

    def receive(self, link: str, seq: int) -> bytes:
        return self.pair.boxes[self.lane, link].get(timeout=120)

    def release(self, link: str, seq: int) -> None:
        """Nothing to free."""

    def send(self, link: str, seq: int, payload: memoryview) -> None:
        if self.lane == 0 and link == self.pair.spec.links(0, 0)[0]:
            self.pair.sent += len(payload)
        other, _, back = self.pair.spec.other_end(self.lane, 0, link)
        self.pair.boxes[other, back].put(bytes(payload))


def load(settings: dict[str, Any], lanes: str) -> tuple[Spec, Tokens]:
    """The spec of a way to train, and its data."""
    values = settings | {"lanes": lanes, "text": ROOT / "data" / "shakespeare.txt"}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(CONFIG % values)
        (Path(place) / "job.toml").write_text(JOB % values)
        job = load_job_file(Path(place) / "job.toml")
    return job.spec, Tokens.from_text(job.spec, job.text_path)


def slots_of(spec: Spec, data: Tokens) -> list[Any]:
    """A slot for each lane of a job of one stage, at its beginning."""
    from tdmld.train.slot import Slot

    made = [Slot.create(spec, 0, lane, data) for lane in range(spec.lanes)]
    for slot in made:
        slot.init_from_seed()
    return made


def heldout(slot: Any, data: Tokens, place: Path) -> float:
    """The held-out loss of the model that a slot stands at."""
    from tdmld.train.evaluate import heldout_loss

    slot.save(place / "state")
    merge_states(slot.spec, [place / "state" / part_file("shared")], place / "model")
    return heldout_loss(place / "model", slot.spec, data)


def ours(settings: dict[str, Any], place: Path) -> tuple[float, int]:
    """(held-out loss, bytes a lane) of `diloco`."""
    from tdmld.train.runner import run_segment

    spec, data = load(settings, settings.get("lanes", DILOCO))
    slots, sent = slots_of(spec, data), 0
    for segment in range(spec.rounds):
        everybody = range(spec.lanes) if segment else ()
        for slot in slots:
            record = run_segment(
                slot, segment, NoLinks(), included=everybody, contributions=place / "told"
            )
        if record.contribution:
            sent += (place / "told" / f"{segment}.0").stat().st_size
    assert len({slot.roots()[0] for slot in slots}) == 1
    return heldout(slots[0], data, place), sent


def dense(settings: dict[str, Any], place: Path) -> tuple[float, int]:
    """(held-out loss, bytes a lane) when the weights are averaged every K steps."""
    import torch

    from tdmld.train.runner import run_steps

    spec, data = load(settings, settings.get("lanes", DILOCO))
    slots, sent = slots_of(spec, data), 0
    for _ in range(spec.training_rounds):
        for slot in slots:
            run_steps(slot, spec.pipeline.segment_steps, NoLinks(), None, {})
        with torch.no_grad():
            for tensors in zip(*(slot.moving for slot in slots), strict=True):
                middle = sum(tensors[1:], tensors[0]) / len(tensors)
                for tensor in tensors:
                    tensor.copy_(middle)
        sent += sum(4 * tensor.numel() for tensor in slots[0].moving)
    slots[0].touch()
    return heldout(slots[0], data, place), sent


def allreduce(settings: dict[str, Any], place: Path) -> tuple[float, int]:
    """(held-out loss, bytes a lane) of `sync`: the lanes are threads here."""
    from tdmld.train.runner import run_segment

    spec, data = load(settings, settings.get("lanes", SYNC))
    slots, pair = slots_of(spec, data), Pair(spec)
    errors: list[BaseException] = []

    def work(slot: Any) -> None:
        try:
            for segment in range(spec.rounds):
                run_segment(slot, segment, pair.end(slot.lane))
        except BaseException as error:  # carried to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert len({slot.roots() for slot in slots}) == 1
    return heldout(slots[0], data, place), pair.sent


def single(settings: dict[str, Any], place: Path) -> tuple[float, int]:
    """(held-out loss, nothing) of one lane alone."""
    from tdmld.train.runner import run_segment

    spec, data = load(settings, SINGLE)
    (slot,) = slots_of(spec, data)
    for segment in range(spec.rounds):
        run_segment(slot, segment, NoLinks())
    return heldout(slot, data, place), 0


WAYS: dict[str, Callable[[dict[str, Any], Path], tuple[float, int]]] = {
    "ours": ours,
    "dense": dense,
    "allreduce": allreduce,
    "single": single,
}
Task = tuple[str, dict[str, Any]]


def run(task: Task) -> tuple[float, int, float]:
    """(held-out loss, bytes a lane, seconds) of one way to train; in a process of its own."""
    name, settings = task
    pin_process()
    check_torch()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        loss, sent = WAYS[name](settings, Path(place))
    return loss, sent, time.monotonic() - began


def run_all(tasks: Sequence[Task]) -> list[tuple[float, int, float]]:
    """The results of tasks, two at a time, each in a fresh process."""
    pin_process()  # before the children import torch
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        return list(pool.imap(run, tasks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="of each lane")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way; means are shown")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("scripts/bench sync")
    every = SETTINGS["every"]
    steps = max(1, arguments.steps // every) * every
    base = SETTINGS | {"steps": steps, "decay": steps * 2 // 3, "warmup": steps // 12}
    tasks: list[Task] = [
        (way, base | {"seed": seed + 1}) for seed in range(arguments.seeds) for way in WAYS
    ]
    say(f"{len(tasks)} trainings of {steps} steps a lane, K = {every}, two at a time")
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    sent: dict[str, int] = {}
    for (way, settings), (loss, told, seconds) in zip(tasks, run_all(tasks), strict=True):
        losses[way].append(loss)
        sent[way] = told
        name = f"{way}, seed {settings['seed']}"
        say(f"{name:18} {loss:.4f} nats a byte, {told:,} bytes, {seconds:.0f} s")
    found = {way: mean(values) for way, values in losses.items()}
    spec, _ = load(base, DILOCO)
    report.document |= {
        "steps": steps,
        "tokens_per_lane": steps * base["batch"] * 64,
        "segment_steps": every,
        "parameters": sum(weight.count for weight in spec.weights(0)),
        "outer": to_builtins(spec.outer),
        "repeats": arguments.seeds,
        "loss_dense": found["dense"],
        "loss_ours": found["ours"],
        "loss_ratio": found["ours"] / found["dense"],
        "loss_allreduce": found["allreduce"],
        "loss_single_lane": found["single"],
        "loss_ours_to_single_lane": found["ours"] / found["single"],
        "bytes_dense": sent["dense"],
        "bytes_ours": sent["ours"],
        "bytes_allreduce": sent["allreduce"],
        "bytes_ratio": sent["ours"] / sent["dense"],
    }
    report.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
