"""`tdmld reference` and `tdmld evaluate`."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tdmld.cli.data import prepare
from tdmld.cli.evaluate import evaluate
from tdmld.cli.reference import reference
from tdmld.errors import UserError
from tests.train.support import CONFIG, TEXT
from tests.train.test_jobfile import JOB


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_bytes(TEXT)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path / "job.toml"


def test_reference_then_evaluate(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference(job, out=tmp_path / "out", json=True) == 0
    made = json.loads(capsys.readouterr().out)
    roots = json.loads((tmp_path / "out" / "roots.json").read_text())
    assert roots["result_id"] == made["result_id"]
    assert [sorted(boundary) for boundary in roots["boundaries"]] == [["0.0", "0.1"]] * 3
    assert evaluate(tmp_path / "out" / "model", job=job, length=5, json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss_heldout"] == made["loss_heldout"]


def test_a_bad_job_is_told_with_field_and_remedy(job: Path, tmp_path: Path) -> None:
    job.write_text(JOB.replace("cuts = [0, 2, 4]", "cuts = [0, 2, 9]"))
    with pytest.raises(UserError) as caught:
        reference(job, out=tmp_path / "out")
    assert "pipeline.cuts" in caught.value.what
    assert caught.value.exit_code == 2


def test_evaluate_refuses_what_is_no_model(job: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        evaluate(tmp_path, job=job)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds no model"):
        evaluate(tmp_path / "model", job=job)


def test_a_model_of_tokens_has_its_tokenizer_beside_it_and_writes_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("a b c c b a d " * 300)
    prepare(tmp_path / "text.txt", out=tmp_path / "made", tokenizer=str(tmp_path / "words.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 4}))
    job = tmp_path / "job.toml"
    job.write_text(
        JOB.replace('"text.txt"', '"made"').replace('tokenizer = "bytes"', 'tokenizer = "tokens"')
    )
    assert reference(job, out=tmp_path / "out") == 0
    model = tmp_path / "out" / "model"
    assert (model / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    capsys.readouterr()
    assert evaluate(model, job=job, prompt="a b", length=6, json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["heldout_tokens"] == 210
    assert set(found["sample"].split()) <= {"a", "b", "c", "[UNK]"}
    assert len(found["sample"].split()) == 8
