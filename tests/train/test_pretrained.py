"""Fine-tuning: a job that goes on from given safetensors."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tdmld.train.errors import FileError, SpecError
from tdmld.train.families import FAMILIES
from tdmld.train.jobfile import load_job_file
from tdmld.train.pretrained import Pretrained
from tdmld.train.spec import decode_spec
from tdmld.train.specfields import GivenInit
from tdmld.train.statefile import read_manifest
from tests.train.support import (
    CONFIG,
    SHORT,
    TEXT,
    check_equal,
    family_spec,
    going_on,
    published,
    tokens_of,
)
from tests.train.test_jobfile import JOB


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_going_on_from_published_weights_equals_the_reference(family: str, tmp_path: Path) -> None:
    """The reference lets transformers itself read the directory."""
    spec = family_spec(family, 3, **SHORT)
    place = published(spec, tmp_path / "published")
    check_equal(going_on(spec, place), tmp_path, given=place)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_widened_exactly(dtype: str, tmp_path: Path) -> None:
    spec = family_spec("llama", 2, **SHORT)
    place = published(spec, tmp_path / "published", dtype)
    check_equal(going_on(spec, place), tmp_path, given=place)


def test_a_stage_refuses_other_weights_than_the_spec_names(tmp_path: Path) -> None:
    from tdmld.train.slot import Slot

    spec = family_spec("llama", 2)
    place = published(spec, tmp_path / "published")
    given = going_on(spec, place)
    for stage in range(2):
        Pretrained(place).write(given, stage, tmp_path / str(stage))
        root = read_manifest(tmp_path / str(stage), part="shared").root.hex()
        assert isinstance(given.init, GivenInit)
        assert root == given.init.roots[stage]
    slot = Slot.create(given, 1, 0, tokens_of(given))
    slot.init_from_file(tmp_path / "1")
    with pytest.raises(FileError, match="does not hold the weights"):
        slot.init_from_file(tmp_path / "0")
    with pytest.raises(FileError, match="goes on from given weights"):
        slot.init_from_seed()


def test_a_job_file_names_a_directory_to_go_on_from(tmp_path: Path) -> None:
    place = published(
        family_spec("llama", config=FAMILIES["llama"].canonical(CONFIG)), tmp_path / "m"
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_bytes(TEXT)
    (tmp_path / "job.toml").write_text(JOB.replace('init = "seed"', 'init = "m"'))
    job = load_job_file(tmp_path / "job.toml")
    assert job.given_path == place
    assert job.spec.init == GivenInit(Pretrained(place).roots(job.spec))
    assert decode_spec(job.raw) == job.spec


def test_the_number_of_roots_is_that_of_the_stages() -> None:
    with pytest.raises(SpecError, match="1 roots for 2 stages"):
        family_spec("llama", init={"kind": "given", "roots": ["00" * 32]})


def spoil(place: Path, how: str) -> None:
    """Break a published directory in one way."""
    file = sorted(place.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    match how:
        case "empty":
            for path in place.glob("*.safetensors"):
                path.unlink()
        case "missing":
            del tensors[name]
            save_file(tensors, file)
        case "shape":
            tensors[name] = np.zeros((3, 3), dtype=np.float32)
            save_file(tensors, file)
        case "transposed":
            name = next(name for name in tensors if len(set(tensors[name].shape)) == 2)
            tensors[name] = np.ascontiguousarray(tensors[name].T)
            save_file(tensors, file)
        case "dtype":
            tensors[name] = tensors[name].astype(np.float64)
            save_file(tensors, file)
        case "twice":
            save_file({name: tensors[name]}, place / "more.safetensors")
        case "truncated":
            file.write_bytes(file.read_bytes()[:-5])
        case "header":
            file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
        case "rubbish":
            file.write_bytes(b"pickle")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("empty", "has 0 safetensors files"),
        ("missing", "has no "),
        ("shape", "has the shape [3, 3]"),
        ("transposed", "has the shape ["),
        ("dtype", "values are F64"),
        ("twice", "is there twice"),
        ("truncated", "has a wrong size or place"),
        ("header", "a header of"),
        ("rubbish", "no safetensors file"),
    ],
)
def test_a_directory_that_cannot_be_used_is_named(how: str, named: str, tmp_path: Path) -> None:
    spec = family_spec("llama", 2)
    place = published(spec, tmp_path / "published")
    spoil(place, how)
    with pytest.raises(SpecError) as caught:
        Pretrained(place).roots(spec)
    assert named in str(caught.value)
    assert caught.value.field == "init"
