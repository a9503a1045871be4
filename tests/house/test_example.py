"""The example that a newcomer submits is a job that this version accepts."""

from pathlib import Path

from tdmld.train.jobfile import load_job_file

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_job_is_accepted() -> None:
    job = load_job_file(ROOT / "examples" / "plays-3m.toml")
    assert job.name == "plays-3m"
    assert (job.spec.stages, job.spec.lanes, job.spec.rounds) == (2, 1, 20)
    assert job.text_path.resolve() == ROOT / "data" / "shakespeare.txt"
    assert job.money.audit_rate == 250_000


def test_the_example_with_images_is_accepted() -> None:
    job = load_job_file(ROOT / "examples" / "digits.toml")
    spec = job.spec
    assert (spec.stages, spec.record, spec.data.tokens) == (3, 257, 1797 * 257)
    assert spec.heldout_tokens == 359 * 257
