"""What every document of our scripts carries, and how it is written and shown."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def say(text: str = "") -> None:
    """To people, at once; stdout is for the table at the end."""
    print(text, file=sys.stderr, flush=True)


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Report:
    """One run of a script: made at its beginning, finished at its end."""

    def __init__(self, command: str) -> None:
        self._began = time.monotonic()
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        self.document: dict[str, Any] = {
            "command": " ".join([command, *sys.argv[1:]]),
            "version": described.stdout.strip() or version("tdmld"),
            "python": platform.python_version(),
            "torch": version("torch"),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2),
        }

    @property
    def seconds(self) -> float:
        """How long the run has taken."""
        return time.monotonic() - self._began

    def finish(self, path: Path | None) -> None:
        """Print the table, and write the document when a path is given."""
        self.document["seconds"] = round(self.seconds, 1)
        width = max(map(len, self.document))
        for name, value in self.document.items():
            shown = f"{value:,.6g}" if isinstance(value, float) else value
            print(f"{name:{width}}  {shown}")
        self.write(path)

    def write(self, path: Path | None) -> None:
        """Write the document when a path is given."""
        self.document["seconds"] = round(self.seconds, 1)
        if path is not None:
            path.write_text(json.dumps(self.document, indent=2) + "\n")


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
