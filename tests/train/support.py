"""A tiny job, and a pipeline of threads that runs it without any network."""

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tdmld.train.channel import LogChannel
from tdmld.train.data import Tokens, cut_shards, shard_id
from tdmld.train.digest import data_root
from tdmld.train.export import merge_states
from tdmld.train.families import FAMILIES
from tdmld.train.framelog import FrameLogWriter, frame_log_name
from tdmld.train.pretrained import Pretrained
from tdmld.train.segment import SegmentRecord
from tdmld.train.spec import Spec, decode_spec, spec_bytes
from tdmld.train.statefile import part_file

TEXT = b"".join(b"%d squared is %d, and that is that.\n" % (n, n * n) for n in range(900))
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 256,
}
_HEADS = {"head_dim": 8, "num_key_value_heads": 1}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": CONFIG | {"num_key_value_heads": 1, "attention_bias": True},
    "mistral": CONFIG | {"sliding_window": 5},
    "qwen2": CONFIG | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": CONFIG | _HEADS,
    "qwen3_moe": {key: value for key, value in CONFIG.items() if key != "intermediate_size"}
    | _HEADS
    | {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": CONFIG | _HEADS,
    "gemma2": CONFIG | _HEADS | {"sliding_window": 5},
    "gemma3": CONFIG | _HEADS | {"sliding_window": 5, "sliding_window_pattern": 3},
    "phi": CONFIG,
    "phi3": CONFIG | {"num_key_value_heads": 1, "sliding_window": 5},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 4, "n_positions": 16, "vocab_size": 256},
    "gpt_neox": CONFIG | {"rotary_pct": 0.5},
    "olmo2": CONFIG | {"num_key_value_heads": 1},
    "resnet": {
        "num_channels": 1,
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [2, 2],
        "layer_type": "basic",
        "num_labels": 3,
    },
}
"""A small config of four layers for each family."""
SIDE = 16
IMAGES = b"".join(
    bytes([n % 3])
    + bytes((x * (n % 3 + 1) * 9 + y * n) % 251 for x in range(SIDE) for y in range(SIDE))
    for n in range(60)
)
"""Sixty pictures with one of three labels, and stripes as wide as the label says."""
CUTS = {1: [0, 4], 2: [0, 2, 4], 3: [0, 1, 3, 4], 4: [0, 1, 2, 3, 4]}


def family_spec(family: str, stages: int = 2, **changes: Any) -> Spec:
    """The small spec of any family."""
    config = FAMILIES[family].canonical(FAMILY_CONFIGS[family])
    text = text_of(family)
    if family == "resnet":
        more: dict[str, Any] = {"data__tokenizer": "images", "data__sequence": SIDE * SIDE}
    else:
        more = {}
    changes = {"family": family, "config": config, "pipeline__cuts": CUTS[stages]} | more | changes
    return decode_spec(encode_document(spec_document(text, **changes)))


def text_of(family: str) -> bytes:
    """The data of the small job of a family."""
    return IMAGES if family == "resnet" else TEXT


def spec_document(text: bytes = TEXT, **changes: Any) -> dict[str, Any]:
    """A small spec as JSON values; `changes` name fields by dotted paths (dots as `__`)."""
    shards = [(shard_id(shard), len(shard)) for shard in cut_shards(text)]
    document: dict[str, Any] = {
        "version": 1,
        "family": "llama",
        "config": FAMILIES["llama"].canonical(CONFIG),
        "seed": 7,
        "init": {"kind": "seed"},
        "privacy": "open",
        "class": "any",
        "clip": {"kind": "stage", "norm": "1.0"},
        "data": {
            "tokenizer": "bytes",
            "sequence": 12,
            "heldout": "0.1",
            "tokens": len(text),
            "shards": [[name.hex(), size] for name, size in shards],
            "root": data_root(shards).hex(),
        },
        "train": {
            "steps": 6,
            "micro_batches": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "wire": "bf16",
            "optimizer": {
                "name": "adamw",
                "lr": "1e-2",
                "betas": ["0.9", "0.95"],
                "eps": "1e-8",
                "weight_decay": "0.1",
            },
            "schedule": {"kind": "linear", "warmup": 2, "decay_from": 4, "floor": "0.1"},
        },
        "pipeline": {
            "cuts": [0, 2, 4],
            "lanes": {"count": 1, "mode": "sync"},
            "segment_steps": 3,
            "unsettled": 4,
            "state_every": 2,
        },
    }
    for path, value in changes.items():
        *way, last = path.split("__")
        place = document
        for key in way:
            place = place[key]
        place[last] = value
    return document


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Canonical JSON of a spec document."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def make_spec(**changes: Any) -> Spec:
    """The small spec with changes."""
    return decode_spec(encode_document(spec_document(**changes)))


def tokens_of(spec: Spec, text: bytes = TEXT) -> Tokens:
    """The data of the small job."""
    return Tokens(spec, list(cut_shards(text)))


End = tuple[int, int, str]
"""(lane, stage, link)"""
Boxes = Mapping[End, "queue.SimpleQueue[tuple[int, bytes]]"]


class QueueChannel:
    """A slot's links to the slots in other threads; received frames go to its frame log."""

    def __init__(
        self, spec: Spec, lane: int, stage: int, boxes: Boxes, logs: Mapping[str, FrameLogWriter]
    ) -> None:
        self.spec, self.lane, self.stage = spec, lane, stage
        self.boxes, self.logs = boxes, logs
        self.held: dict[tuple[str, int], bytes] = {}

    def receive(self, link: str, seq: int) -> memoryview:
        number, payload = self.boxes[self.lane, self.stage, link].get(timeout=600)
        assert number == seq
        self.logs[link].append(seq, bytes(64), payload)
        self.held[link, seq] = payload
        return memoryview(payload)

    def release(self, link: str, seq: int) -> None:
        del self.held[link, seq]

    def send(self, link: str, seq: int, payload: memoryview) -> None:
        assert len(payload) <= self.spec.link_frame_bytes(self.stage, link)
        self.boxes[self.spec.other_end(self.lane, self.stage, link)].put((seq, bytes(payload)))


class Meeting:
    """Where the threads of a diloco job wait until a round's contributions are all there."""

    def __init__(self, spec: Spec, included: Mapping[int, Sequence[int]]) -> None:
        self._barrier = threading.Barrier(spec.slots)
        self._lanes, self._included = tuple(range(spec.lanes)), included

    def lanes(self, segment: int) -> tuple[int, ...]:
        """The lanes that enter the outer step of `segment`; returns when all slots ask."""
        if segment == 0:
            return ()
        self._barrier.wait(timeout=600)
        return tuple(self._included.get(segment - 1, self._lanes))

    def abort(self) -> None:
        """Somebody failed: nobody shall wait."""
        self._barrier.abort()


def slot_place(root: Path, lane: int, stage: int) -> Path:
    """The directory of a slot of `run_job`."""
    return root / (str(stage) if lane == 0 else f"{lane}.{stage}")


def contributions_place(root: Path, stage: int) -> Path:
    """Where the slots of a stage leave their contributions."""
    return root / f"contributions-{stage}"


def run_pipeline(
    spec: Spec,
    data: Tokens,
    root: Path,
    prepare: Callable[[Any], None] | None = None,
    given: Path | None = None,
) -> list[list[SegmentRecord]]:
    """Run a job of one lane, one thread a stage: records by stage and segment. See `run_job`."""
    records = run_job(spec, data, root, prepare, given)
    return [records[0, stage] for stage in range(spec.stages)]


def run_job(
    spec: Spec,
    data: Tokens,
    root: Path,
    prepare: Callable[[Any], None] | None = None,
    given: Path | None = None,
    included: Mapping[int, Sequence[int]] | None = None,
) -> dict[tuple[int, int], list[SegmentRecord]]:
    """Run a job, one thread a slot: (lane, stage) -> records by segment.

    `given` is a Hugging Face directory to go on from; `included` as in `run_reference`. In a
    slot's directory appear `state/<boundary>` and `ring/<segment>.<link>.received`.
    """
    from tdmld.train.runner import run_segment
    from tdmld.train.slot import Slot

    slots = [(lane, stage) for lane in range(spec.lanes) for stage in range(spec.stages)]
    boxes: Boxes = {
        (lane, stage, link): queue.SimpleQueue()
        for lane, stage in slots
        for link in spec.links(lane, stage)
    }
    records: dict[tuple[int, int], list[SegmentRecord]] = {slot: [] for slot in slots}
    errors: list[BaseException] = []
    meeting = Meeting(spec, included or {})

    def work(lane: int, stage: int) -> None:
        place = slot_place(root, lane, stage)
        (place / "ring").mkdir(parents=True)
        slot = Slot.create(spec, stage, lane, data if spec.reads_text(stage) else None)
        if given is None:
            slot.init_from_seed()
        else:
            first, second = place / "given.safetensors", place / "moments.safetensors"
            source = Pretrained(given)
            source.write(spec, stage, first)
            if spec.goes_on:
                source.write_lane(spec, lane, stage, second)
            slot.init_from_file(first, second if spec.goes_on else None)
        slot.save(place / "state" / "0")
        if prepare is not None:
            prepare(slot)
        more: dict[str, Any] = {}
        for segment in range(spec.rounds):
            logs = {
                link: FrameLogWriter(
                    place / "ring" / frame_log_name(segment, link, "received"), spec.frame_bytes
                )
                for link in spec.logged_links(lane, stage, segment)
            }
            channel = QueueChannel(spec, lane, stage, boxes, logs)
            if spec.is_diloco:
                more["included"] = meeting.lanes(segment)
                more["contributions"] = contributions_place(root, stage)
            records[lane, stage].append(run_segment(slot, segment, channel, **more))
            assert not channel.held  # every buffer was released
            for log in logs.values():
                log.close()
            slot.save(place / "state" / str(segment + 1))

    def guarded(lane: int, stage: int) -> None:
        try:
            work(lane, stage)
        except BaseException as error:  # carried to the test's own thread
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=guarded, args=slot) for slot in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return records


def replayed(
    spec: Spec, data: Tokens, root: Path, stage: int, segment: int, lane: int = 0, **more: Any
) -> SegmentRecord:
    """The record of a segment of `run_job`, run again from its start state and its logs.

    `more`: what `run_segment` needs in a diloco job.
    """
    from tdmld.train.runner import run_segment
    from tdmld.train.slot import Slot

    slot = Slot.create(spec, stage, lane, data if spec.reads_text(stage) else None)
    place = slot_place(root, lane, stage)
    slot.load(place / "state" / str(segment))
    links = spec.logged_links(lane, stage, segment)
    with LogChannel(place / "ring", segment, links, spec.frame_bytes) as channel:
        return run_segment(slot, segment, channel, **more)


SHORT: dict[str, Any] = {
    "train__steps": 2,
    "pipeline__segment_steps": 1,
    "train__schedule__decay_from": 2,
}


def check_equal(
    spec: Spec,
    root: Path,
    given: Path | None = None,
    *,
    replay: bool = False,
    included: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Run the job cut and whole; every root, loss and byte of the result must be the same.

    With `replay` every segment is run again from its logs, too, and must give the same record.
    """
    from tdmld.train.reference import run_reference

    data = tokens_of(spec, text_of(spec.family))
    live = root / "live"
    records = run_job(spec, data, live, given=given, included=included)
    reference = run_reference(spec, data, root / "reference", given=given, included=included)
    assert len(reference.boundaries) == spec.rounds + 1
    for (lane, stage), own in records.items():
        for segment, record in enumerate(own):
            before, after = reference.boundaries[segment : segment + 2]
            assert (record.start_shared, record.start_lane) == before[f"{lane}.{stage}"]
            assert (record.end_shared, record.end_lane) == after[f"{lane}.{stage}"]
            assert record.end_shared == after[f"0.{stage}"][0]  # lanes agree
        if own[0].has_loss:
            losses = [loss for record in own for loss in record.losses or ()]
            assert losses == list(reference.lane_losses[lane])
    for lane, stage in records if replay else ():
        for segment, record in enumerate(records[lane, stage]):
            more: dict[str, Any] = {}
            if spec.is_diloco:
                place = contributions_place(live, stage)
                more = {"included": record.included, "contributions": place}
            again = replayed(spec, data, live, stage, segment, lane, **more)
            assert again == record
    for lane in range(spec.lanes):
        final = [
            slot_place(live, lane, stage) / "state" / str(spec.rounds)
            for stage in range(spec.stages)
        ]
        out = root / f"out-{lane}"
        merged = merge_states(spec, [place / part_file("shared") for place in final], out)
        assert merged.result_id == reference.result.result_id


def published(spec: Spec, place: Path, dtype: str = "float32") -> Path:
    """A directory as transformers publishes it: its own names, several files."""
    import torch

    from tdmld.train.model import whole_model

    torch.manual_seed(5)
    model: Any = whole_model(spec)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.to(getattr(torch, dtype)).save_pretrained(place, max_shard_size="30KB")
    return place


def going_on(spec: Spec, place: Path) -> Spec:
    """The spec that goes on from a directory."""
    given = msgspec.structs.replace(spec, init=Pretrained(place).init(spec))
    return decode_spec(spec_bytes(given))
