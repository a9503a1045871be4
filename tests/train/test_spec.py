"""Specs: canonical, strict, complete; every malformed field is named."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdmld.train.budget import stage_disk, stage_memory, standby_disk
from tdmld.train.errors import SpecError
from tdmld.train.spec import decode_spec, spec_bytes, spec_id, stage_parameters
from tdmld.train.statefile import state_tensors
from tests.train.support import TEXT, encode_document, make_spec, spec_document


def test_a_spec_survives_its_bytes() -> None:
    raw = encode_document(spec_document())
    assert spec_bytes(decode_spec(raw)) == raw
    assert len(spec_id(raw)) == 32


def test_true_false_and_null_survive_in_the_config() -> None:
    document = spec_document(config__bos_token_id=None, config__attention_bias=True)
    spec = decode_spec(encode_document(document))
    assert spec.config["bos_token_id"] is None
    assert spec.config["attention_bias"] is True
    assert spec.model.hugging_face(spec.config)["rms_norm_eps"] == 1e-6


def test_derived_numbers() -> None:
    spec = make_spec()
    assert (spec.stages, spec.lanes, spec.slots, spec.rounds) == (2, 1, 2, 2)
    assert spec.frame_bytes == 2 * 12 * 16 * 2
    assert spec.links(0, 0) == ("down",)
    assert spec.links(0, 1) == ("up",)
    assert make_spec(pipeline__cuts=[0, 1, 2, 4]).links(0, 1) == ("up", "down")
    assert spec.heldout_tokens == len(TEXT) // 10
    assert spec.train_tokens + spec.heldout_tokens == len(TEXT)
    assert sum(stage_parameters(spec, stage) for stage in range(2)) == sum(
        weight.count for weight in spec.model.weights(spec.config, spec.whole)
    )
    assert stage_memory(spec, 0) > 16 * stage_parameters(spec, 0)
    assert stage_disk(spec, 0) > spec.frame_bytes * 2 * 3 * 4 * 5 + 12 * stage_parameters(spec, 0)
    assert standby_disk(spec) > 24 * sum(stage_parameters(spec, stage) for stage in range(2))
    lane = [tensor for tensor in state_tensors(spec, 0) if tensor.part == "lane"]
    assert [t.name for t in lane] == sorted(t.name for t in lane)
    assert lane[-1].name == "step"


def test_lanes_are_joined_stage_by_stage_in_sync_alone() -> None:
    sync = make_spec(pipeline__lanes={"count": 3, "mode": "sync", "weights": [1, 2, 1]})
    assert sync.links(1, 0) == ("down", "lane0", "lane2")
    assert sync.links(2, 1) == ("up", "lane0", "lane1")
    for lane in range(3):
        for stage in range(2):
            for link in sync.links(lane, stage):
                other = sync.other_end(lane, stage, link)
                assert sync.other_end(*other) == (lane, stage, link)
                assert sync.link_frames(lane, stage, link) == sync.link_frames(*other)
    assert (sync.link_frames(1, 0, "down"), sync.link_frames(0, 0, "down")) == (3 * 8, 3 * 4)
    assert (sync.link_frames(1, 0, "lane0"), sync.link_ahead(0, "lane0")) == (3, 1)
    assert sync.link_frame_bytes(0, "lane1") == 2 * stage_parameters(sync, 0)
    assert (sync.link_places(0, "lane1"), sync.link_places(0, "down")) == (4, 6)
    assert (sync.rounds, sync.slots, sync.contribution_bytes(0)) == (2, 6, 0)
    with pytest.raises(KeyError):
        sync.other_end(0, 0, "lane0")
    diloco = make_spec(pipeline__lanes=DILOCO)
    assert (diloco.links(1, 0), diloco.training_rounds, diloco.rounds) == (("down",), 2, 3)
    assert [diloco.boundary_step(number) for number in range(4)] == [0, 3, 6, 6]
    assert diloco.contribution_bytes(0) > 0
    assert spec_bytes(diloco) == encode_document(spec_document(pipeline__lanes=DILOCO))


def test_a_split_job_is_a_ring_of_one_lane() -> None:
    spec = make_spec(privacy="split")
    assert spec.is_ring
    assert [spec.reads_text(stage) for stage in range(2)] == [True, False]
    for change in ({"pipeline__cuts": [0, 4]}, {"pipeline__lanes": DILOCO}):
        with pytest.raises(SpecError, match="privacy: split"):
            make_spec(privacy="split", **change)


def test_a_step_and_a_segment_without_measure_are_refused() -> None:
    """What a small model can still do to a volunteer: text and digests beyond its memory."""
    with pytest.raises(SpecError, match=r"train\.micro_batches: a step has 100663296 tokens"):
        make_spec(train__micro_batches=4096, train__micro_batch_size=2048)
    with pytest.raises(SpecError, match=r"pipeline\.segment_steps: a segment has 81920"):
        make_spec(train__micro_batches=4096, train__steps=20, pipeline__segment_steps=20)
    wide = make_spec(train__micro_batches=512, train__micro_batch_size=4096)
    text = 512 * 4096 * 13
    assert stage_memory(wide, 0) - stage_memory(make_spec(), 0) > 17 * text


def test_a_segment_whose_list_nobody_would_read_is_refused() -> None:
    """Gradients between lanes are frames, too, and a list of digests has an entry for each."""
    config = make_spec().config | {"vocab_size": 1 << 19}
    lanes = {"count": 16, "mode": "sync", "wire": "fp32"}
    steps = {"train__steps": 4096, "train__schedule__decay_from": 4096}
    more = {"config": config, "pipeline__lanes": lanes, **steps}
    with pytest.raises(SpecError, match=r"pipeline\.segment_steps: the list of a segment has 3"):
        make_spec(pipeline__segment_steps=4096, **more)
    assert make_spec(pipeline__segment_steps=1024, **more).lanes == 16


OUTER = {
    "lr": "0.7",
    "momentum": "0.9",
    "nesterov": True,
    "density": 64,
    "bits": 2,
    "feedback": "0.95",
}
DILOCO = {"count": 2, "mode": "diloco", "outer": OUTER}
WRONG: list[tuple[str, Any, str]] = [
    ("version", 2, "version"),
    ("family", "opt", "unknown model family 'opt'"),
    ("seed", -1, "seed"),
    ("seed", 2**63, "seed"),
    ("init", {"kind": "file"}, "init"),
    ("privacy", "secret", "privacy"),
    ("class", "Any!", "class"),
    ("clip", {"kind": "global", "norm": "1"}, "clip"),
    ("clip", {"kind": "stage", "norm": "0"}, "clip.norm"),
    ("clip", {"kind": "stage", "norm": "one"}, "clip.norm"),
    ("config__hidden_size", 16.0, "config"),
    ("config__hidden_size", "16", "config.hidden_size"),
    ("config__hidden_size", True, "config.hidden_size"),
    ("config__hidden_size", 10**9, "config.hidden_size"),
    ("config__hidden_size", 15, "config.hidden_size"),
    ("config__num_key_value_heads", 3, "config.num_key_value_heads"),
    ("config__head_dim", 3, "config.head_dim"),
    ("config__rms_norm_eps", "0.000001", "shortest decimal"),
    ("config__rms_norm_eps", "nan", "config.rms_norm_eps"),
    ("config__hidden_act", "os.system", "config.hidden_act"),
    ("config__model_type", "gpt2", "config.model_type"),
    ("config__vocab_size", 200, "config.vocab_size"),
    ("config__eos_token_id", 256, "config.eos_token_id"),
    ("config__auto_map", "code", "config.auto_map"),
    ("data__tokenizer", "words", "data.tokenizer"),
    ("data__sequence", 0, "data.sequence"),
    ("data__sequence", 17, "max_position_embeddings"),
    ("data__heldout", "0.6", "data.heldout"),
    ("data__heldout", ".1", "data.heldout"),
    ("data__tokens", 5, "data.shards"),
    ("data__shards", [], "data.shards"),
    ("data__shards", [["zz", 1]], "data.shards"),
    ("data__shards", [["00" * 32, 2**20 + 1]], "data.shards"),
    ("data__root", "00" * 32, "data.root"),
    ("train__steps", 0, "train.steps"),
    ("train__steps", 10**9, "train.steps"),
    ("train__steps", 7, "pipeline.segment_steps"),
    ("train__micro_batches", -1, "train.micro_batches"),
    ("train__micro_batch_size", 0, "train.micro_batch_size"),
    ("train__precision", "fp16", "train.precision"),
    ("train__wire", "int4", "train.wire"),
    ("train__wire", ["bf16"], "train.wire"),
    ("train__wire", ["bf16", "int8"], "train.wire"),
    ("train__optimizer__name", "sgd", "train.optimizer.name"),
    ("train__optimizer__lr", "0", "train.optimizer.lr"),
    ("train__optimizer__lr", 0.001, "train.optimizer.lr"),
    ("train__optimizer__lr", "-1", "train.optimizer.lr"),
    ("train__optimizer__lr", "1" * 30, "train.optimizer.lr"),
    ("train__optimizer__betas", ["0.9"], "train.optimizer.betas"),
    ("train__optimizer__betas", ["0.9", "1"], "train.optimizer.betas[1]"),
    ("train__optimizer__eps", "1", "train.optimizer.eps"),
    ("train__optimizer__weight_decay", "11", "train.optimizer.weight_decay"),
    ("train__schedule__kind", "cosine", "train.schedule.kind"),
    ("train__schedule__warmup", 5, "train.schedule.warmup"),
    ("train__schedule__decay_from", 7, "train.schedule.decay_from"),
    ("train__schedule__floor", "1.5", "train.schedule.floor"),
    ("pipeline__cuts", [0], "pipeline.cuts"),
    ("pipeline__cuts", [0, 2, 2, 4], "does not increase"),
    ("pipeline__cuts", [1, 4], "does not cover"),
    ("pipeline__cuts", [0, 3], "does not cover"),
    ("pipeline__cuts", [0, -1], "pipeline.cuts"),
    ("pipeline__lanes__count", 17, "pipeline.lanes.count"),
    ("pipeline__lanes__mode", "diloco", "pipeline.lanes.mode"),
    ("pipeline__lanes__wire", "fp32", "pipeline.lanes.wire"),
    ("pipeline__lanes__weights", [2], "pipeline.lanes.mode"),
    ("pipeline__lanes", {"count": 2, "mode": "sync", "weights": [1, 1]}, "pipeline.lanes.weights"),
    ("pipeline__lanes", {"count": 2, "mode": "sync", "weights": [2]}, "pipeline.lanes.weights"),
    ("pipeline__lanes", {"count": 2, "mode": "diloco"}, "pipeline.lanes.outer: missing"),
    ("pipeline__lanes", {"count": 2, "mode": "sync", "outer": OUTER}, "pipeline.lanes.outer"),
    ("pipeline__lanes", DILOCO | {"wire": "fp32"}, "pipeline.lanes.wire"),
    ("pipeline__lanes", DILOCO | {"outer": OUTER | {"lr": "0"}}, "pipeline.lanes.outer.lr"),
    ("pipeline__lanes", DILOCO | {"outer": OUTER | {"momentum": "1"}}, "lanes.outer.momentum"),
    ("pipeline__lanes", DILOCO | {"outer": OUTER | {"feedback": "2"}}, "lanes.outer.feedback"),
    ("pipeline__lanes", DILOCO | {"outer": OUTER | {"density": 4097}}, "lanes.outer.density"),
    ("pipeline__lanes", DILOCO | {"outer": OUTER | {"bits": 4}}, "pipeline.lanes.outer.bits"),
    ("pipeline__segment_steps", 4, "pipeline.segment_steps"),
    ("pipeline__unsettled", 3, "pipeline.state_every"),
    ("pipeline__unsettled", 100, "pipeline.unsettled"),
    ("pipeline__state_every", 0, "pipeline.state_every"),
    ("surprise", 1, "surprise: unknown key"),
    ("train__surprise", 1, "train.surprise: unknown key"),
]


@pytest.mark.parametrize(("path", "value", "named"), WRONG)
def test_a_malformed_field_is_named_with_a_remedy(path: str, value: Any, named: str) -> None:
    raw = encode_document(spec_document(**{path: value}))
    with pytest.raises(SpecError) as caught:
        decode_spec(raw)
    assert named in str(caught.value)
    assert caught.value.remedy


def paths(document: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in document.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += paths(value, f"{prefix}{key}.")
    return found


@pytest.mark.parametrize("path", paths(spec_document()))
def test_a_missing_field_is_named(path: str) -> None:
    document = spec_document()
    *way, last = path.split(".")
    place = document
    for key in way:
        place = place[key]
    del place[last]
    with pytest.raises(SpecError) as caught:
        decode_spec(encode_document(document))
    assert last in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw + b" ",
        lambda raw: raw.replace(b'"seed":7', b'"seed": 7'),
        lambda raw: raw.replace(b'"seed":7', b'"seed":7,"seed":7'),
        lambda raw: json.dumps(json.loads(raw), separators=(",", ":"), sort_keys=False).encode()[
            ::-1
        ],
        lambda raw: raw[:-1],
        lambda raw: b"[" * 100_000,
        lambda raw: raw + b" " * 70_000,
        lambda raw: b"\xff\xfe",
        lambda raw: b"",
    ],
)
def test_other_spellings_and_rubbish_are_refused(spoil: Any) -> None:
    with pytest.raises(SpecError):
        decode_spec(spoil(encode_document(spec_document())))


@given(st.data())
def test_one_changed_byte_never_passes_as_the_same_spec(data: st.DataObject) -> None:
    raw = bytearray(encode_document(spec_document()))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        spec = decode_spec(bytes(raw))
    except SpecError:
        return
    assert spec_bytes(spec) == raw
