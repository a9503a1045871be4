"""Every family, cut in every way, against its own unsplit model, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tdmld.train.data import step_indices
from tdmld.train.errors import SpecError
from tdmld.train.export import merge_states
from tdmld.train.families import FAMILIES
from tdmld.train.statefile import part_file
from tests.train.support import (
    FAMILY_CONFIGS,
    IMAGES,
    SHORT,
    SIDE,
    check_equal,
    family_spec,
    run_pipeline,
    spec_document,
    text_of,
    tokens_of,
)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cut_family_equals_its_unsplit_model_bit_for_bit(
    family: str, stages: int, tmp_path: Path
) -> None:
    check_equal(family_spec(family, stages, **SHORT), tmp_path)


def test_every_family_is_tried() -> None:
    assert set(FAMILY_CONFIGS) == set(FAMILIES)


WAYS = {
    "more stages than micro-batches": ("llama", 4, {"train__micro_batches": 2}),
    "one micro-batch in a line": ("gpt_neox", 3, {"train__micro_batches": 1}),
    "one micro-batch in a ring": ("gpt2", 3, {"train__micro_batches": 1}),
    "many micro-batches in a ring": ("gemma2", 4, {"train__micro_batches": 11}),
    "micro-batches of one": ("qwen2", 3, {"train__micro_batch_size": 1}),
    "a ring without layers at its ends": ("gpt2", 3, {"pipeline__cuts": [0, 0, 2, 4]}),
    "a scaled embedding on the wire": ("gemma", 2, {"pipeline__cuts": [0, 0, 4]}),
    "a format each link": ("llama", 4, {"train__wire": ["fp32", "int8", "bf16+zlib"]}),
    "a format each link of a ring": ("gemma3", 3, {"train__wire": ["int8+zlib", "fp32", "bf16"]}),
    "full precision": ("qwen3_moe", 2, {"train__wire": "fp32"}),
    "full precision, deflated": ("gpt2", 2, {"train__wire": "fp32+zlib"}),
    "eight bits": ("olmo2", 2, {"train__wire": "int8"}),
    "images in eight bits": ("resnet", 3, {"train__wire": "int8+zlib"}),
    "images in full precision": ("resnet", 2, {"train__wire": "fp32"}),
    "without clipping": ("phi", 2, {"clip": {"kind": "none"}}),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_shapes_and_wires_equal_the_reference_too(way: str, tmp_path: Path) -> None:
    family, stages, changes = WAYS[way]
    check_equal(family_spec(family, stages, **SHORT | changes), tmp_path)


@pytest.mark.parametrize("family", ["gemma3", "resnet", "qwen3_moe"])
def test_a_replay_from_the_logs_gives_the_same_record(family: str, tmp_path: Path) -> None:
    spec = family_spec(family, 3, **SHORT, train__wire="bf16+zlib")
    check_equal(spec, tmp_path, replay=True)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_stage_has_memory_for_its_own_weights_alone(family: str) -> None:
    from tdmld.train.model import StageModule

    whole = family_spec(family, 1)
    names: list[str] = []
    for stage in range(4):
        spec = family_spec(family, 4)
        module = StageModule(spec, stage)
        kept = [*module.parameters(), *module.buffers()]
        assert not any(tensor.is_meta for tensor in kept)
        held = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
        assert len(held) == len(spec.weights(stage))
        assert list(module.weights) == [weight.name for weight in spec.weights(stage)]
        names += [weight.name for weight in spec.shared(stage)]
    assert sorted(names) == [weight.name for weight in whole.shared(0)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_config_that_transformers_wrote_reads_back(family: str, tmp_path: Path) -> None:
    from tdmld.train.model import hugging_face_config

    spec = family_spec(family)
    hugging_face_config(spec).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert FAMILIES[family].canonical(written) == spec.config
    assert FAMILIES[family].canonical(FAMILIES[family].hugging_face(spec.config)) == spec.config


@pytest.mark.parametrize("family", ["gpt2", "resnet"])
def test_a_result_loads_and_answers_as_the_slots_do(family: str, tmp_path: Path) -> None:
    import torch

    from tdmld.train.evaluate import heldout_accuracy, heldout_loss, load_model
    from tdmld.train.model import pixel_values
    from tdmld.train.slot import Slot

    spec = family_spec(family, 3, **SHORT)
    data = tokens_of(spec, text_of(family))
    run_pipeline(spec, data, tmp_path)
    final = [tmp_path / str(stage) / "state" / str(spec.rounds) for stage in range(3)]
    out = tmp_path / "result"
    merge_states(spec, [place / part_file("shared") for place in final], out)
    if family == "resnet":
        raw = torch.arange(2 * SIDE * SIDE).view(2, -1).to(torch.uint8)
        value = pixel_values(raw, 1)
        inputs: dict[str, Any] = {"pixel_values": value}
    else:
        value = torch.arange(24).view(2, 12)
        inputs = {"input_ids": value, "use_cache": False}
    slots = [Slot.create(spec, stage, 0, data) for stage in range(3)]
    with torch.no_grad():
        for slot, place in zip(slots, final, strict=True):
            slot.load(place)
            value = slot.module.eval()(value)
        if spec.is_ring:
            value = slots[0].module.head(value)
        assert torch.equal(load_model(out)(**inputs).logits, value)
    if family == "resnet":
        stem = "resnet.embedder.embedder.normalization."
        counted = slots[0].module.statistics[f"{stem}num_batches_tracked"]
        assert int(counted) == spec.train.steps * spec.train.micro_batches
        assert float(slots[0].module.statistics[f"{stem}running_mean"].abs().max()) > 0
    assert 0 < heldout_loss(out, spec, data) < 7
    assert 0 <= heldout_accuracy(out, spec, data) <= 1


def test_a_missing_table_of_positions_changes_no_bit() -> None:
    import torch

    from tdmld.train.model import StageModule

    module: Any = StageModule(family_spec("gpt2", 2), 1)
    value = torch.tensor([-0.0, 0.0, 1.0])
    again = value + module.body.model.base_model.wpe(torch.zeros(1))
    assert torch.equal(again.view(torch.int32), value.view(torch.int32))


def test_a_label_beyond_the_classes_is_a_fault(tmp_path: Path) -> None:
    from tdmld.train.errors import SegmentFault

    text = IMAGES.replace(bytes([2]), bytes([3]))
    spec = family_spec(
        "resnet",
        1,
        **SHORT,
        data=spec_document(text)["data"] | {"tokenizer": "images", "sequence": SIDE * SIDE},
    )
    with pytest.raises(SegmentFault, match=r"label 3.*\[label\]"):
        run_pipeline(spec, tokens_of(spec, text), tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__sequence": 255}, "data.sequence"),
        ({"data__tokenizer": "bytes"}, "data.tokenizer"),
        ({"config__depths": "2,2,2"}, "config.depths"),
        ({"config__hidden_sizes": "4,x"}, "config.hidden_sizes"),
        ({"config__layer_type": "bottleneck", "config__hidden_sizes": "4,6"}, "hidden_sizes"),
        ({"pipeline__cuts": [0, 5]}, "pipeline.cuts"),
    ],
)
def test_a_malformed_classifier_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError) as caught:
        family_spec("resnet", **changes)
    assert named in str(caught.value)


def test_images_are_drawn_and_held_out_whole() -> None:
    spec = family_spec("resnet")
    assert (spec.record, spec.heldout_tokens, spec.train_tokens) == (257, 6 * 257, 54 * 257)
    drawn = {index for step in range(99) for index in step_indices(spec, 0, step)}
    assert drawn == {257 * number for number in range(54)}
