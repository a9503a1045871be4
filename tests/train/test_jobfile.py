"""The job file: what people write, and what they are told."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tdmld.train.errors import SpecError
from tdmld.train.jobfile import load_job_file
from tdmld.train.spec import decode_spec
from tests.train.support import CONFIG, TEXT

JOB = """
version = 1
name = "squares"
family = "llama"
config = "config.json"
seed = 7
init = "seed"
privacy = "open"
class = "any"
[data]
text = "text.txt"
tokenizer = "bytes"
sequence = 12
heldout = "0.1"
[train]
steps = 6
micro_batches = 4
micro_batch_size = 2
precision = "fp32"
wire = "bf16"
optimizer = { name = "adamw", lr = "1e-2", betas = ["0.9", "0.95"], eps = "1e-8", weight_decay = "0.1" }
schedule = { kind = "linear", warmup = 2, decay_from = 4, floor = "0.1" }
clip = { kind = "stage", norm = "1.0" }
[pipeline]
cuts = [0, 2, 4]
lanes = { count = 1, mode = "sync" }
segment_steps = 3
unsettled = 4
state_every = 2
[money]
slot_price_max = 40000
standby_price = 4000
audit_rate = "0.25"
audit_price = 48000
deadline_blocks = 2000
"""  # noqa: E501


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_bytes(TEXT)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


def refusal(place: Path, old: str, new: str) -> str:
    assert old in JOB
    (place / "job.toml").write_text(JOB.replace(old, new, 1))
    with pytest.raises(SpecError) as caught:
        load_job_file(place / "job.toml")
    return str(caught.value)


def test_a_job_file_becomes_a_spec_and_money(place: Path) -> None:
    job = load_job_file(place / "job.toml")
    assert decode_spec(job.raw) == job.spec
    assert (job.name, job.money.audit_rate) == ("squares", 250_000)
    assert job.text_path == place / "text.txt"
    assert b"squares" not in job.raw
    assert b"40000" not in job.raw


@pytest.mark.parametrize(
    "line",
    [line for line in JOB.splitlines() if "=" in line and not line.startswith("privacy")],
    ids=lambda line: line.split()[0],
)
def test_a_missing_key_is_named(place: Path, line: str) -> None:
    assert line.split()[0] in refusal(place, line + "\n", "")


def test_a_job_is_sealed_unless_it_says_open(place: Path) -> None:
    assert load_job_file(place / "job.toml").spec.privacy == "open"
    (place / "job.toml").write_text(JOB.replace('privacy = "open"\n', ""))
    job = load_job_file(place / "job.toml")
    assert job.spec.privacy == "sealed"
    assert b'"privacy":"sealed"' in job.raw
    assert "privacy" in refusal(place, '"open"', '"secret"')


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed = 7", "seed = 7\nsede = 8", "sede: unknown key"),
        ("steps = 6", "steps = 6\nstep = 6", "train.step: unknown key"),
        ('name = "squares"', 'name = "../etc"', "name"),
        ('family = "llama"', 'family = "gpt9"', "unknown model family"),
        ('config = "config.json"', 'config = "none.json"', "config: cannot read"),
        ('text = "text.txt"', 'text = "none.txt"', "data.text"),
        ('text = "text.txt"', 'text = "."', "data.text"),
        ('lr = "1e-2"', "lr = 0.01", "train.optimizer.lr"),
        ("cuts = [0, 2, 4]", "cuts = [0, 4, 2]", "pipeline.cuts"),
        ("segment_steps = 3", "segment_steps = 4", "pipeline.segment_steps"),
        ("state_every = 2", "state_every = 3", "2R <= D"),
        ("sequence = 12", "sequence = 99", "max_position_embeddings"),
        ("slot_price_max = 40000", "slot_price_max = -1", "money.slot_price_max"),
        ('audit_rate = "0.25"', 'audit_rate = "1.5"', "money.audit_rate"),
        ('audit_rate = "0.25"', 'audit_rate = "0.0000001"', "six decimals"),
        ('audit_rate = "0.25"', "audit_rate = 0.25", "money.audit_rate"),
        ("deadline_blocks = 2000", "deadline_blocks = 0", "money.deadline_blocks"),
        ("[money]", "[money", "job file"),
        ('clip = { kind = "stage", norm = "1.0" }', 'clip = { kind = "all" }', "train.clip"),
    ],
)
def test_a_malformed_field_is_named(place: Path, old: str, new: str, named: str) -> None:
    assert named in refusal(place, old, new)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"auto_map": {"AutoModel": "x.py"}}, "names code"),
        ({"model_type": "gpt2"}, "not of the family llama"),
        ({"vocab_size": 200}, "config.vocab_size"),
        ({"rope_scaling": {"type": "linear"}}, "config.rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "config.rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": []}}, "config.rope_theta"),
        ({"attention_dropout": 0.1}, "config.attention_dropout"),
        ({"hidden_size": 17}, "config.hidden_size"),
        ({"hidden_size": None}, "config.hidden_size"),
        ({"num_attention_heads": 0}, "config.num_attention_heads"),
        ({"colour": "red"}, "config.colour: unknown key"),
    ],
)
def test_a_malformed_config_is_named(place: Path, change: dict[str, Any], named: str) -> None:
    (place / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(SpecError) as caught:
        load_job_file(place / "job.toml")
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 60_000, " " * 70_000])
def test_a_config_that_is_no_object_is_refused(place: Path, text: str) -> None:
    (place / "config.json").write_text(text)
    with pytest.raises(SpecError, match="config"):
        load_job_file(place / "job.toml")


def test_each_link_may_have_a_format_of_its_own(place: Path) -> None:
    text = JOB.replace("cuts = [0, 2, 4]", "cuts = [0, 1, 2, 4]")
    (place / "job.toml").write_text(text.replace('wire = "bf16"', 'wire = ["int8", "bf16+zlib"]'))
    spec = load_job_file(place / "job.toml").spec
    assert [spec.wire(1, link) for link in ("up", "down")] == ["int8", "bf16+zlib"]
    assert spec.frame_bytes == spec.link_frame_bytes(1, "down") == 2 * 12 * 16 * 2
    assert spec.link_frame_bytes(0, "down") == 2 * 12 * 16 + 4 * 2 * 12 * 16 // 64


def test_an_empty_text_is_refused(place: Path) -> None:
    (place / "text.txt").write_bytes(b"")
    with pytest.raises(SpecError, match=r"data\.text"):
        load_job_file(place / "job.toml")


def test_lanes_are_written_shortly_and_spelled_out_in_the_spec(place: Path) -> None:
    text = JOB.replace('lanes = { count = 1, mode = "sync" }', "lanes = LANES")
    assert text != JOB

    def lanes(written: str) -> Any:
        (place / "job.toml").write_text(text.replace("LANES", written))
        return load_job_file(place / "job.toml").spec.pipeline.lanes

    plain = lanes('{ count = 3, mode = "diloco", weights = [1, 1, 1] }')
    assert (plain.weights, plain.outer.density, plain.outer.bits) == ((), 128, 2)
    other = lanes('{ count = 2, mode = "diloco", weights = [1, 3], outer = { lr = "0.5" } }')
    assert other.weights == (1, 3)
    assert other.outer == msgspec.structs.replace(plain.outer, lr="0.5")
    assert lanes('{ count = 2, mode = "sync", wire = "int8" }').wire == "int8"
    for wrong, named in (
        ('{ count = 2, mode = "diloco", outer = { lr = "0.5", rate = "1" } }', "lanes.outer.rate"),
        ('{ count = 2, mode = "diloco", outer = { bits = 3 } }', "pipeline.lanes.outer.bits"),
        ('{ count = 0, mode = "sync" }', "pipeline.lanes.count"),
        ('{ count = 2, mode = "gossip" }', "pipeline.lanes.mode"),
        ('{ count = 2, mode = "sync", weights = [0, 1] }', "pipeline.lanes.weights"),
        ('{ count = 3, mode = "sync", weights = [1, 1] }', "pipeline.lanes.weights"),
        ('{ count = 2, mode = "sync", outer = {} }', "pipeline.lanes.outer"),
    ):
        with pytest.raises(SpecError) as caught:
            lanes(wrong)
        assert named in str(caught.value)
