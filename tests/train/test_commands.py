"""`tdmld reference` and `tdmld evaluate`."""

import json
from pathlib import Path

import pytest

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
