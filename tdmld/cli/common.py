"""What every command shares: its common options, and how results are printed."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tdmld.config import default_data_dir

DataDir = Annotated[
    Path | None,
    Parameter(
        name="--data-dir",
        help="The node's directory (default: TDMLD_DATA_DIR, else the user's data directory).",
    ),
]
AsJson = Annotated[
    bool, Parameter(name="--json", negative="", help="Print one JSON document instead of text.")
]
PasswordFile = Annotated[
    Path | None,
    Parameter(
        name="--password-file",
        help="Read the owner key's password from here (default: TDMLD_PASSWORD_FILE, else ask).",
    ),
]


def resolve_data_dir(data_dir: Path | None) -> Path:
    """The directory meant by a --data-dir that may be missing; absolute."""
    return (data_dir or default_data_dir()).absolute()


def emit(document: object, text: str | Iterable[str], *, as_json: bool) -> None:
    """Print a command's result on stdout: one JSON document, or text for people."""
    if as_json:
        print(json.dumps(document, indent=2, sort_keys=True), flush=True)
    else:
        print(text if isinstance(text, str) else "\n".join(text), flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; columns that hold only numbers are set to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    right = [
        bool(cells) and all(row[i].replace(",", "").lstrip("-").isdigit() for row in cells)
        for i in range(len(head))
    ]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [list(head), *cells]
    ]
