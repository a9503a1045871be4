"""`tdmld reference`: train a job's model in this process, unsplit, and say every root."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tdmld.cli.common import AsJson, emit
from tdmld.cli.exits import Exit
from tdmld.errors import UserError

if TYPE_CHECKING:
    from tdmld.train.jobfile import JobFile
    from tdmld.train.segment import StepReport


@contextmanager
def training_errors() -> Iterator[None]:
    """Tell what the training package refuses the way the command line tells things."""
    from tdmld.train.errors import SpecError, TrainError

    try:
        yield
    except SpecError as error:
        raise UserError(
            f"{error.field}: {error.problem}", next=error.remedy, exit_code=Exit.USAGE
        ) from error
    except TrainError as error:
        what, _, following = str(error).partition("; ")
        raise UserError(what, next=following) from error


def read_job(path: Path) -> "JobFile":
    """The job file with its spec, after this process's numerics are pinned."""
    from tdmld.train.jobfile import load_job_file
    from tdmld.train.numerics import pin_process

    pin_process()
    return load_job_file(path)


def copy_tokenizer(job: "JobFile", model: Path) -> None:
    """Put the tokenizer of a job's data beside its model, where other programs look for it."""
    if job.tokenizer_path is not None:
        shutil.copyfile(job.tokenizer_path, model / job.tokenizer_path.name)


def reference(
    job: Annotated[Path, Parameter(help="The job file (TOML).")],
    *,
    out: Annotated[Path, Parameter(help="Directory for roots.json and the model.")],
    json: AsJson = False,
) -> int:
    """Train a job's model in one process, without the network.

    The same spec on the unsplit Hugging Face model with a loop of its own. OUT/roots.json holds the
    state roots of every slot at every segment boundary, OUT/model the result: an honest job on the
    network gives the same, bit for bit, on the same class of machine.
    """
    with training_errors():
        found = read_job(job)
        spec = found.spec
        from tdmld.train.data import Tokens
        from tdmld.train.evaluate import heldout_loss
        from tdmld.train.numerics import check_torch
        from tdmld.train.reference import MODEL_DIRECTORY, ROOTS_FILE, run_reference
        from tdmld.train.spec import spec_id

        check_torch()

        def on_step(report: "StepReport") -> None:
            done = report.step + 1
            if done % spec.pipeline.segment_steps == 0:
                loss = f"{report.loss:.4f}" if report.loss is not None else "-"
                print(f"step {done} of {spec.train.steps}: loss {loss}", file=sys.stderr)

        tokens = Tokens.from_text(spec, found.text_path)
        result = run_reference(spec, tokens, out, on_step, found.given_path)
        copy_tokenizer(found, out / MODEL_DIRECTORY)
        heldout = heldout_loss(out / MODEL_DIRECTORY, spec, tokens) if spec.has_heldout else None
    document = {
        "name": found.name,
        "spec_id": spec_id(found.raw).hex(),
        "result_id": result.result.result_id.hex(),
        "rounds": spec.rounds,
        "loss_first": result.losses[0],
        "loss_last": result.losses[-1],
        "loss_heldout": heldout,
        "seconds": result.seconds,
        "export_dir": str(out / MODEL_DIRECTORY),
        "roots": str(out / ROOTS_FILE),
    }
    emit(document, [f"{key:13} {value}" for key, value in document.items()], as_json=json)
    return Exit.OK
