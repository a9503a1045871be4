"""`tdmld init`"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tdmld import keys
from tdmld.chain.errors import GenesisError
from tdmld.chain.genesis import (
    GENESIS_BYTES_MAX,
    Genesis,
    chain_id,
    genesis_bytes,
    genesis_from_toml,
    load_genesis,
)
from tdmld.cli.common import AsJson, DataDir, PasswordFile, emit, resolve_data_dir
from tdmld.cli.exits import Exit
from tdmld.cli.password import get_password
from tdmld.config import CONFIG_FILE, config_toml, default_settings
from tdmld.errors import UserError
from tdmld.files import FileTooLarge, read_file, write_file

GENESIS_FILE = "genesis.json"
DIRECTORIES = ("keys", "content", "jobs", "logs", "run")


def init(
    *,
    data_dir: DataDir = None,
    genesis: Path | None = None,
    password_file: PasswordFile = None,
    owner: Annotated[bool, Parameter(negative="--no-owner")] = True,
    json: AsJson = False,
) -> None:
    """Make a node's directory: node key, owner key, settings and the chain's genesis.

    Nothing that exists is overwritten.

    Parameters
    ----------
    genesis: The chain to join: its genesis.json (or the same as TOML). May be put there later.
    owner: Make an owner key here. With --no-owner it lies on another machine.
    """
    directory = resolve_data_dir(data_dir)
    found = load_genesis_file(genesis) if genesis else None
    _refuse_to_overwrite(directory)
    password = get_password(password_file, confirm=True) if owner else None
    document = make_directory(directory, found, password)
    lines = [
        f"made   {directory}",
        f"node   {document['node']}",
        f"owner  {document['owner'] or 'none here'}",
        f"chain  {document['chain'] or f'none yet: put its genesis.json into {directory}'}",
        f"next   tdmld run --data-dir {directory}",
    ]
    emit(document, lines, as_json=json)


def load_genesis_file(path: Path) -> Genesis:
    """Read a genesis in JSON or TOML; UserError names the file and the field that is wrong."""
    try:
        raw = read_file(path, GENESIS_BYTES_MAX)
        return genesis_from_toml(raw) if path.suffix == ".toml" else load_genesis(raw)
    except GenesisError as error:
        raise UserError(
            f"{path} cannot found a chain", why=str(error), exit_code=Exit.USAGE
        ) from error
    except FileTooLarge as error:
        raise UserError(str(error), exit_code=Exit.USAGE) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read", why=os.strerror(error.errno or 0), exit_code=Exit.USAGE
        ) from error


def make_directory(
    directory: Path,
    genesis: Genesis | None,
    password: bytes | None,
    kdf: keys.Kdf = keys.MODERATE,
) -> dict[str, str | None]:
    """Make keys, tdmld.toml and genesis.json below `directory`; all of it or nothing.

    Without a password there will be no owner key. What was made, as `tdmld init --json` tells it.
    """
    made: list[Path] = []
    with _removed_on_failure(made):
        directory.mkdir(parents=True, exist_ok=True)
        for name in DIRECTORIES:
            (directory / name).mkdir(mode=0o700, exist_ok=True)
        made.append(directory / keys.NODE_KEY)
        node = keys.create_node_key(made[-1])
        owner = None
        if password is not None:
            made.append(directory / keys.OWNER_KEYSTORE)
            owner = keys.create_owner_key(made[-1], password, kdf).address
        if genesis is not None:
            made.append(directory / GENESIS_FILE)
            write_file(made[-1], genesis_bytes(genesis) + b"\n", exclusive=True)
        made.append(directory / CONFIG_FILE)
        write_file(made[-1], settings_template().encode(), exclusive=True)
    return {
        "data_dir": str(directory),
        "node": node.address,
        "owner": owner,
        "chain": genesis.chain if genesis else None,
        "chain_id": chain_id(genesis).hex() if genesis else None,
    }


def settings_template() -> str:
    """A tdmld.toml in which every setting stands, switched off, at its default."""
    lines = [
        "# Settings of this node. Flags win over TDMLD_* variables, those over this file.",
        "# Each line shows a default; take away the # to change it.",
    ]
    for line in config_toml(default_settings()).splitlines():
        lines.append(f"# {line}" if line and not line.startswith("[") else line)
    return "\n".join(lines) + "\n"


def _refuse_to_overwrite(directory: Path) -> None:
    for name in (keys.NODE_KEY, keys.OWNER_KEYSTORE, CONFIG_FILE, GENESIS_FILE, "chain"):
        if (directory / name).exists():
            raise UserError(
                f"{directory} holds a node already",
                why=f"{name} is there, and nothing is ever overwritten",
                next="choose another --data-dir, or move that directory away",
            )


@contextmanager
def _removed_on_failure(made: list[Path]) -> Iterator[None]:
    """Take away the files of this call when it does not come to its end.

    The one file in `made` that could not be made because it exists is not ours: it stays.
    """
    try:
        yield
    except BaseException as error:
        exists = isinstance(error, keys.KeyFileError | FileExistsError)
        for path in made[:-1] if exists else made:
            path.unlink(missing_ok=True)
        raise
