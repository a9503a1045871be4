"""Who may call: scopes, the token file, and how clients of the same machine find their node.

The daemon makes a new admin token at each start and writes two files into its data directory:

    rpc.token     the token, mode 0600: whoever may read the owner's files may command the node
    run/rpc.url   where the server listens, for example http://127.0.0.1:7717

`TDMLD_API_INFO=token:url` names a node without its directory. Files are written aside, synced and
renamed, so that a reader sees a whole old or a whole new one.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tdmld.files import write_file
from tdmld.rpc.errors import Unauthorized, Unreachable

TOKEN_FILE = "rpc.token"
URL_FILE = "run/rpc.url"
ENVIRONMENT = "TDMLD_API_INFO"
_FILE_LIMIT = 4096


class Scope(IntEnum):
    """What a token allows; each scope includes those before it."""

    READ = 1
    WRITE = 2
    SIGN = 3
    ADMIN = 4


@dataclass(frozen=True)
class Access:
    """Where a node's RPC is and what to show it."""

    url: str
    token: str

    def __repr__(self) -> str:
        return f"Access({self.url})"


def new_token() -> str:
    """256 random bits, printable."""
    return secrets.token_urlsafe(32)


def scope_of(tokens: Mapping[str, Scope], given: str) -> Scope | None:
    """The scope of a token, or None. Takes the same time wherever the strings differ."""
    found = None
    for token, scope in tokens.items():
        if hmac.compare_digest(token.encode(), given.encode()):
            found = scope
    return found


def write_access(data_dir: Path, url: str) -> str:
    """Make a fresh admin token for the server at `url`, write both files, return the token."""
    token = new_token()
    _write_private(data_dir / TOKEN_FILE, token)
    _write_private(data_dir / URL_FILE, url)
    return token


def clear_access(data_dir: Path) -> None:
    """At a clean stop: the address is no longer true. The token file stays, useless."""
    (data_dir / URL_FILE).unlink(missing_ok=True)


def read_access(data_dir: Path) -> Access:
    """What a daemon wrote into `data_dir`; Unreachable or Unauthorized says what to do."""
    start = f"start it with: tdmld run --data-dir {data_dir}"
    try:
        url = _read_small(data_dir / URL_FILE)
    except FileNotFoundError as error:
        if not data_dir.is_dir():
            raise Unreachable(
                f"there is no directory {data_dir}; make a node with: "
                f"tdmld init --data-dir {data_dir}"
            ) from error
        raise Unreachable(f"no node runs in {data_dir}; {start}") from error
    except OSError as error:
        raise Unreachable(f"cannot read {data_dir / URL_FILE}: {error.strerror}") from error
    try:
        token = _read_small(data_dir / TOKEN_FILE)
    except OSError as error:
        raise Unauthorized(
            f"cannot read the token {data_dir / TOKEN_FILE}: {error.strerror}; "
            "only the user that runs the node may"
        ) from error
    return Access(url, token)


def parse_access(text: str) -> Access:
    """`token:url`, as in TDMLD_API_INFO."""
    token, separator, url = text.partition(":")
    if not separator or not url.startswith(("http://", "https://")):
        raise Unreachable(
            f"{ENVIRONMENT} must be token:url, for example s3cret:http://127.0.0.1:7717"
        )
    return Access(url, token)


def find_access(data_dir: Path | None, fallback: Path) -> Access:
    """An explicit directory wins over TDMLD_API_INFO, which wins over the default directory."""
    if data_dir is None and (text := os.environ.get(ENVIRONMENT)):
        return parse_access(text)
    return read_access(data_dir or fallback)


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(path, text.encode() + b"\n", mode=0o600)


def _read_small(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(_FILE_LIMIT)
    return raw.decode("ascii", "replace").strip()
