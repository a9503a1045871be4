"""What each kind of process loads when it starts (DESIGN: three kinds of process, one job each)."""

import subprocess
import sys

import pytest

LOADS = {
    "tdmld.node.daemon": {"torch", "transformers", "textual", "cyclopts"},
    "tdmld.node.carrier": {"torch", "transformers", "textual", "rocksdict", "hypercorn"},
    "tdmld.node.worker": {"libp2p", "trio", "rocksdict", "hypercorn", "httpx", "textual", "ssl"},
    "tui.app": {"torch", "transformers", "libp2p", "rocksdict", "hypercorn"},
    "tdmld.cli.job": {"torch", "transformers", "libp2p", "textual", "rocksdict", "hypercorn"},
    "tdmld.devnet": {"torch", "transformers", "libp2p", "textual", "rocksdict", "trio"},
}


@pytest.mark.parametrize("module", LOADS)
def test_does_not_load(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert not set(answer.stdout.split()) & LOADS[module]
