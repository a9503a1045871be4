"""What class a machine's asks name."""

import re
from pathlib import Path

import pytest

from tdmld.errors import UserError
from tdmld.node import machineclass
from tdmld.node.machineclass import machine_class

CLASS = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two GPUs, as the driver tells of them."""
    for address, model in (
        ("0000:41:00.0", "NVIDIA A100-SXM4-80GB"),
        ("0000:07:00.0", "NVIDIA L4"),
    ):
        place = tmp_path / "gpus" / address
        place.mkdir(parents=True)
        (place / "information").write_text(f"Model: \t\t {model}\nIRQ:   55\n")
    monkeypatch.setattr(machineclass, "_DRIVER", tmp_path)
    return tmp_path


def test_a_cpu_is_named_by_its_instruction_set() -> None:
    assert CLASS.match(machine_class())
    assert machine_class("cpu") == machine_class()


def test_a_gpu_is_named_by_its_model_in_the_order_of_the_bus(driver: Path) -> None:
    first, second = machine_class("cuda:0"), machine_class("cuda:1")
    assert first.startswith("nvidia-l4-torch")
    assert second.startswith("nvidia-a100-sxm4-80gb-torch")
    assert CLASS.match(first)
    assert CLASS.match(second)


def test_libraries_with_kernels_belong_to_the_class(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = machine_class("cuda:0")
    monkeypatch.setattr(machineclass, "_gpu_libraries", lambda: ["nvidia-cublas 99"])
    assert machine_class("cuda:0") != before


def test_a_gpu_that_is_not_there_is_told(driver: Path) -> None:
    with pytest.raises(UserError, match="no GPU 2"):
        machine_class("cuda:2")
    (driver / "gpus" / "0000:07:00.0" / "information").write_text("Model:\n")
    with pytest.raises(UserError, match="no GPU 0"):
        machine_class("cuda:0")
