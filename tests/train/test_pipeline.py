"""The engine against the reference, bit for bit, live and in replay."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tdmld.train.channel import LogChannel
from tdmld.train.errors import FileError, SegmentFault
from tdmld.train.export import merge_states, read_result
from tdmld.train.framelog import HEADER
from tdmld.train.segment import SegmentRecord, decode_record, encode_record
from tdmld.train.spec import Spec
from tdmld.train.statefile import part_file, read_manifest, state_tensors
from tests.train.support import make_spec, run_pipeline, tokens_of

CUTS = {1: [0, 4], 2: [0, 2, 4], 3: [0, 1, 3, 4]}


def case(stages: int, wire: str, **changes: Any) -> Spec:
    return make_spec(pipeline__cuts=CUTS[stages], train__wire=wire, **changes)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, Path, list[list[SegmentRecord]]]:
    """A finished job of three stages."""
    spec, root = case(3, "bf16"), tmp_path_factory.mktemp("job")
    return spec, root, run_pipeline(spec, tokens_of(spec), root)


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_pipeline_equals_the_unsplit_model_bit_for_bit(
    stages: int, wire: str, tmp_path: Path
) -> None:
    from tdmld.train.reference import run_reference

    spec = case(stages, wire)
    records = run_pipeline(spec, tokens_of(spec), tmp_path / "live")
    reference = run_reference(spec, tokens_of(spec), tmp_path / "reference")
    for stage, own in enumerate(records):
        for segment, record in enumerate(own):
            before, after = reference.boundaries[segment : segment + 2]
            assert (record.start_shared, record.start_lane) == before[f"0.{stage}"]
            assert (record.end_shared, record.end_lane) == after[f"0.{stage}"]
    losses = [loss for record in records[-1] for loss in record.losses or ()]
    assert losses == list(reference.losses)
    assert losses[-1] < losses[0]
    final = [tmp_path / "live" / str(n) / "state" / str(spec.rounds) for n in range(stages)]
    merged = merge_states(spec, [place / part_file("shared") for place in final], tmp_path / "out")
    assert merged.result_id == reference.result.result_id


def test_without_clipping_too(tmp_path: Path) -> None:
    from tdmld.train.reference import run_reference

    spec = case(2, "bf16", clip={"kind": "none"})
    records = run_pipeline(spec, tokens_of(spec), tmp_path / "live")
    reference = run_reference(spec, tokens_of(spec), tmp_path / "reference")
    assert records[1][-1].end_shared == reference.boundaries[-1]["0.1"][0]


def replay(spec: Spec, root: Path, stage: int, segment: int) -> SegmentRecord:
    from tdmld.train.runner import run_segment
    from tdmld.train.slot import Slot

    slot = Slot.create(spec, stage, 0, tokens_of(spec))
    slot.load(root / str(stage) / "state" / str(segment))
    ring = root / str(stage) / "ring"
    with LogChannel(ring, segment, spec.links(0, stage), spec.frame_bytes) as channel:
        return run_segment(slot, segment, channel)


def test_replay_of_every_segment_gives_the_same_record(job: Any) -> None:
    spec, root, records = job
    for stage in range(spec.stages):
        for segment in range(spec.rounds):
            again = replay(spec, root, stage, segment)
            assert again == records[stage][segment]
            assert decode_record(encode_record(again)) == again


def test_both_ends_of_a_link_find_the_same_roots(job: Any) -> None:
    spec, _, records = job
    for stage in range(spec.stages - 1):
        for upper, lower in zip(records[stage], records[stage + 1], strict=True):
            assert upper.links["down"] == tuple(reversed(lower.links["up"]))


def test_segments_join_without_a_gap(job: Any) -> None:
    _, _, records = job
    for own in records:
        for before, after in pairwise(own):
            assert (before.end_shared, before.end_lane) == (after.start_shared, after.start_lane)


def test_saved_snapshots_have_the_recorded_roots(job: Any) -> None:
    spec, root, records = job
    for stage, own in enumerate(records):
        for record in own:
            place = root / str(stage) / "state" / str(record.segment + 1)
            assert read_manifest(place / part_file("shared")).root == record.end_shared
            assert read_manifest(place / part_file("lane")).root == record.end_lane
            found = {
                (part, leaf.name, leaf.dtype, leaf.shape)
                for part in ("shared", "lane")
                for leaf in read_manifest(place / part_file(part)).leaves
            }
            expected = state_tensors(spec, stage)
            assert found == {(t.part, t.name, t.dtype, t.shape) for t in expected}


def test_one_flipped_bit_in_one_gradient_gives_another_record(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tdmld.train import runner

    spec, root, records = job
    honest, calls = runner.collect_gradients, []

    def flip(slot: Any) -> Any:
        gradients = honest(slot)
        calls.append(None)
        if len(calls) == 2:
            gradients[0].view(-1).view(torch.int32)[0] ^= 1
        return gradients

    monkeypatch.setattr(runner, "collect_gradients", flip)
    wrong = replay(spec, root, 1, 1)
    true = records[1][1]
    assert wrong.first_difference(true) == true.steps[1].step
    job_id = bytes(32)
    assert wrong.list_root(job_id, 1) != true.list_root(job_id, 1)
    assert wrong.leaves[0] == true.leaves[0]


def test_one_flipped_bit_in_one_frame_gives_another_record(job: Any, tmp_path: Path) -> None:
    from tdmld.train.runner import run_segment
    from tdmld.train.slot import Slot

    spec, root, records = job
    for path in (root / "1" / "ring").glob("0.*"):
        raw = bytearray(path.read_bytes())
        if ".up." in path.name:
            raw[HEADER.size + 20] ^= 1
        (tmp_path / path.name).write_bytes(raw)
    slot = Slot.create(spec, 1, 0, None)
    slot.load(root / "1" / "state" / "0")
    with LogChannel(tmp_path, 0, spec.links(0, 1), spec.frame_bytes) as channel:
        record = run_segment(slot, 0, channel)
    assert record.links["up"][1] != records[1][0].links["up"][1]
    assert record.first_difference(records[1][0]) == 0


class OneFrame:
    """A channel that gives the same payload for every frame."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def receive(self, link: str, seq: int) -> bytes:
        return self.payload

    def release(self, link: str, seq: int) -> None:
        pass

    def send(self, link: str, seq: int, payload: memoryview) -> None:
        pass


@pytest.mark.parametrize(
    ("payload", "reason"),
    [(b"short", "size"), (b"\xff\x7f" * (2 * 12 * 16), "nonfinite")],
)
def test_a_hostile_frame_is_a_fault_not_a_wrong_state(
    job: Any, payload: bytes, reason: str
) -> None:
    from tdmld.train.runner import run_segment
    from tdmld.train.slot import Slot

    spec, root, _ = job
    slot = Slot.create(spec, 1, 0, None)
    slot.load(root / "1" / "state" / "0")
    with pytest.raises(SegmentFault) as caught:
        run_segment(slot, 0, OneFrame(payload))
    assert caught.value.reason == reason


def test_a_log_that_lacks_a_frame_is_named(job: Any, tmp_path: Path) -> None:
    from tdmld.train.runner import run_segment
    from tdmld.train.slot import Slot

    spec, root, _ = job
    path = root / "2" / "ring" / "0.up.received"
    (tmp_path / path.name).write_bytes(path.read_bytes()[:-10])
    slot = Slot.create(spec, 2, 0, tokens_of(spec))
    slot.load(root / "2" / "state" / "0")
    with (
        LogChannel(tmp_path, 0, ("up",), spec.frame_bytes) as channel,
        pytest.raises(FileError, match="no frame 11"),
    ):
        run_segment(slot, 0, channel)


def test_a_segment_runs_only_from_its_own_boundary(job: Any) -> None:
    from tdmld.train.runner import run_segment
    from tdmld.train.slot import Slot

    spec, root, _ = job
    slot = Slot.create(spec, 1, 0, None)
    slot.load(root / "1" / "state" / "0")
    with pytest.raises(ValueError, match="starts at step 3"):
        run_segment(slot, 1, OneFrame(b""))


def test_the_state_of_another_stage_is_refused(job: Any) -> None:
    from tdmld.train.slot import Slot

    spec, root, _ = job
    slot = Slot.create(spec, 0, 0, tokens_of(spec))
    with pytest.raises(FileError, match="no state of stage 0"):
        slot.load(root / "1" / "state" / "0")


def test_the_export_loads_as_a_hugging_face_model(job: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tdmld.train.evaluate import heldout_loss, sample_text
    from tdmld.train.slot import Slot

    spec, root, _ = job
    final = [root / str(stage) / "state" / str(spec.rounds) for stage in range(spec.stages)]
    out = tmp_path / "result"
    result = merge_states(spec, [place / part_file("shared") for place in final], out)
    assert read_result(out) == result
    names = {weight.name for weight in spec.model.weights(spec.config, spec.whole)}
    assert set(load_file(out / "model.safetensors")) == names

    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    tokens = torch.arange(24).view(2, 12)
    hidden: torch.Tensor = tokens
    with torch.no_grad():
        for stage, place in enumerate(final):
            slot = Slot.create(spec, stage, 0, tokens_of(spec))
            slot.load(place)
            hidden = slot.module(hidden)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, hidden)
    assert 0 < heldout_loss(out, spec, tokens_of(spec)) < 7
    assert sample_text(out, "12", 8, seed=1) == sample_text(out, "12", 8, seed=1)
    assert len(sample_text(out, "12", 8, temperature=0)) <= 10


def test_a_merge_refuses_states_in_the_wrong_order(job: Any, tmp_path: Path) -> None:
    spec, root, _ = job
    files = [root / str(stage) / "state" / "0" / "shared.safetensors" for stage in (1, 0, 2)]
    with pytest.raises(FileError, match="weights of stage 0"):
        merge_states(spec, files, tmp_path)
