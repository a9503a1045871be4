"""On a GPU: the same bits each time, replayed, and near to the CPU's values. And without one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tdmld.train.errors import NumericsError
from tdmld.train.numerics import check_environment, pinned_environment, worker_device
from tdmld.train.slot import Slot
from tests.train.support import make_spec, tokens_of

ROOT = Path(__file__).parents[2]
HAS_GPU = Path("/proc/driver/nvidia/version").exists()
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA driver on this machine"),
]


def on_gpu(place: Path, family: str, wire: str, lanes: int) -> Any:
    words = [sys.executable, "-m", "tests.train.gpu_job", family, wire, str(lanes), str(place)]
    done = subprocess.run(
        words, cwd=ROOT, env=pinned_environment(device="cuda:0"), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("family", "wire", "lanes"),
    [
        pytest.param(*case, marks=needs_gpu)
        for case in (
            ("llama", "fp32", 1),
            ("llama", "bf16+zlib", 2),
            ("gemma", "int8", 1),
            ("gpt2", "bf16", 1),
            ("qwen3_moe", "bf16", 1),
            ("resnet", "fp32", 2),
        )
    ],
)
def test_a_gpu_gives_the_same_bits_each_time(
    family: str, wire: str, lanes: int, tmp_path: Path
) -> None:
    found = on_gpu(tmp_path, family, wire, lanes)
    assert found["device"] == "cuda:0"
    assert found["same"]
    assert found["replayed"]
    assert all(found["start"])  # what is drawn does not depend on the device
    gpu, host = found["losses"]
    for mine, theirs in zip(gpu, host, strict=True):
        assert mine == pytest.approx(theirs, abs=0.02)


def test_the_environment_of_a_gpu_is_pinned_and_checked() -> None:
    environment = pinned_environment({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, "cuda:3")
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    check_environment(environment)
    assert worker_device(environment) == "cuda:0"
    for wrong in ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"):
        with pytest.raises(NumericsError, match=wrong):
            check_environment(environment | {wrong: "1"})
    with pytest.raises(NumericsError, match="CUDA_VISIBLE_DEVICES"):
        check_environment(environment | {"CUDA_VISIBLE_DEVICES": "all"})
    assert worker_device(pinned_environment({})) == "cpu"


def test_a_gpu_that_torch_cannot_use_is_told() -> None:
    spec = make_spec()
    with pytest.raises(NumericsError, match=r'set device = "cpu"'):
        Slot.create(spec, 0, 0, tokens_of(spec), "cuda:0")
