"""Where a password comes from: a file, or a person at a terminal. Never from an argument."""

import getpass
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tdmld.cli.exits import Exit
from tdmld.errors import UserError
from tdmld.files import FileTooLarge, read_file

ENVIRONMENT = "TDMLD_PASSWORD_FILE"
_BYTES_MAX = 1024


def get_password(
    file: Path | None,
    *,
    confirm: bool = False,
    purpose: str = "owner key",
    environment: Mapping[str, str] = os.environ,
) -> bytes:
    """The password in `file`, else in the file that TDMLD_PASSWORD_FILE names, else asked for.

    Asks on the terminal only (twice with `confirm`); without one a UserError says how to give it.
    """
    if file is None and (named := environment.get(ENVIRONMENT)):
        file = Path(named)
    if file is not None:
        return _from_file(file)
    if not _terminal():
        raise UserError(
            f"the password of the {purpose} is needed, and there is no terminal to ask on",
            next=f"--password-file FILE, or {ENVIRONMENT}=FILE",
            exit_code=Exit.USAGE,
        )
    first = getpass.getpass(f"Password of the {purpose}: ", stream=sys.stderr)
    if confirm and getpass.getpass("The same again: ", stream=sys.stderr) != first:
        raise UserError("the two passwords differ", next="try again", exit_code=Exit.USAGE)
    return _checked(first.encode(), "the password")


def has_password(file: Path | None, *, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `get_password` has somewhere to look: a file, the environment, a terminal."""
    return bool(file or environment.get(ENVIRONMENT) or _terminal())


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _from_file(file: Path) -> bytes:
    try:
        raw = read_file(file, _BYTES_MAX)
    except FileTooLarge as error:
        raise UserError(str(error), next="name a password file", exit_code=Exit.USAGE) from error
    except OSError as error:
        raise UserError(
            f"the password file {file} cannot be read",
            why=os.strerror(error.errno or 0),
            exit_code=Exit.USAGE,
        ) from error
    return _checked(raw.removesuffix(b"\n").removesuffix(b"\r"), str(file))


def _checked(password: bytes, where: str) -> bytes:
    if not password:
        raise UserError(f"{where} is empty", next="choose a password", exit_code=Exit.USAGE)
    return password
