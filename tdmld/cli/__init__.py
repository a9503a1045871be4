"""The command line. `main` is the entry point; everything else is imported when it is needed."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: the process's arguments); its exit code, see `tdmld.cli.exits`."""
    from tdmld.cli.app import run

    return run(arguments)
