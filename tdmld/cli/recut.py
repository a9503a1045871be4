"""`tdmld job recut`: the copies of a boundary as a directory that another job goes on from."""

import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tdmld.cli.common import AsJson, DataDir, emit, resolve_data_dir
from tdmld.cli.exits import Exit
from tdmld.cli.reference import training_errors
from tdmld.cli.text import job_id
from tdmld.errors import UserError
from tdmld.files import read_file
from tdmld.node.layout import Layout
from tdmld.train import limits
from tdmld.train.spec import Spec, decode_spec, spec_id

_STATE = re.compile(r"[1-9][0-9]{0,9}")


def recut(
    job: Annotated[str, Parameter(help="The job's id, or enough of its first characters.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="Directory for the model and its moments.")],
    boundary: Annotated[
        int | None, Parameter(help="After how many segments (default: the last that is whole).")
    ] = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> int:
    """Put the states that this node holds of all stages together, as they were at a boundary.

    The standby of a job holds copies of every stage. OUT is a directory that from_pretrained loads
    (judge it with `tdmld evaluate OUT --job FILE`), and with its moments what another job goes on
    from, with other cuts or another number of lanes: init = "OUT" in its file, and train.steps
    that count the steps done before. The states are taken as they lie on this disk; their roots
    stand on the chain.
    """
    layout = Layout(resolve_data_dir(data_dir))
    found = _job(layout, job)
    with training_errors():
        spec = decode_spec(read_file(layout.spec(found), limits.SPEC_BYTES))
        if boundary is None:
            boundary = _newest(layout, found, spec)
        from tdmld.train.recut import write_boundary

        states = _states(layout, found, spec, boundary)
        result = write_boundary(spec, boundary, states, out)
    step = spec.boundary_step(boundary)
    document = {
        "job": found.hex(),
        "spec_id": spec_id(read_file(layout.spec(found), limits.SPEC_BYTES)).hex(),
        "boundary": boundary,
        "step": step,
        "directory": str(out),
        "result_id": result.result_id.hex(),
    }
    text = [
        f"{out}: boundary {boundary} of {spec.rounds}, after step {step} of {spec.train.steps}",
        f'next: tdmld evaluate {out} --job FILE, or a job file with init = "{out}"',
    ]
    emit(document, text, as_json=json)
    return Exit.OK


def _job(layout: Layout, given: str) -> bytes:
    """The job that the characters begin, of those this node has files of."""
    wanted = job_id(given)
    known = sorted(path.parent.name for path in layout.jobs.glob("*/spec.json"))
    found = [name for name in known if wanted and name.startswith(wanted)]
    if len(found) != 1:
        raise UserError(
            f"{len(found)} jobs of this node begin with {wanted[:64]!r}",
            why="states lie on the machines of a job's workers and of its standby",
            next="tdmld job status JOB names them; say --data-dir for another node's directory",
            exit_code=Exit.NOT_FOUND,
        )
    return bytes.fromhex(found[0])


def _states(layout: Layout, job: bytes, spec: Spec, boundary: int) -> dict[tuple[int, int], Path]:
    """The states of a boundary that lie here, those of own slots before copies."""
    found = {}
    for lane in range(spec.lanes):
        for stage in range(spec.stages):
            for path in layout.states(job, lane, stage, boundary):
                if (path / "lane.safetensors").is_file() and (lane, stage) not in found:
                    found[lane, stage] = path
    return found


def _newest(layout: Layout, job: bytes, spec: Spec) -> int:
    """The newest boundary of which every stage lies here."""
    names = {
        int(path.name)
        for path in layout.job(job).glob("s*-*/state/*")
        if _STATE.fullmatch(path.name)
    }
    for boundary in sorted(names, reverse=True):
        states = _states(layout, job, spec, boundary)
        lanes = {stage: {a for a, b in states if b == stage} for stage in range(spec.stages)}
        needed = spec.lanes if spec.is_diloco else 1
        whole = not spec.is_diloco or boundary == spec.rounds
        if whole and all(len(own) >= needed for own in lanes.values()):
            return boundary
    raise UserError(
        "this node has no boundary of which it holds all stages",
        why="a worker keeps its own stages only; a diloco job is whole at its end",
        next="use the standby's directory: tdmld job status JOB names it",
        exit_code=Exit.NOT_FOUND,
    )
