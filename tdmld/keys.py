"""Keys on disk: the node key, plain and private to its user; the owner key, in a keystore.

A node key is needed unattended (a restart must not ask for a password) and can be replaced; an
owner key is money. So `node.key` is guarded by its mode alone, 0600, and refused when others may
read it; the keystore is sealed by XChaCha20-Poly1305 under a key that Argon2id makes of the
password. The keystore's header is authenticated with the box: nobody can weaken it unnoticed.
"""

import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from nacl import pwhash, secret
from nacl.exceptions import CryptoError

from tdmld.chain.crypto import KeyPair
from tdmld.errors import UserError
from tdmld.files import FileTooLarge, read_file, write_file

NODE_KEY = "keys/node.key"
OWNER_KEYSTORE = "keys/owner.json"
"""Where `tdmld init` puts them below the data directory."""

_FILE_BYTES_MAX = 4096
_REFUSED = 5
"""`tdmld.cli.exits.Exit.REFUSED`, spelt out: this module stands below the command line."""


class KeyFileError(UserError):
    """A key file is missing, readable by others, damaged, or the password is wrong."""


@dataclass(frozen=True)
class Kdf:
    """Argon2id's cost: passes over memory, and bytes of memory."""

    ops: int
    mem: int


MODERATE = Kdf(pwhash.argon2id.OPSLIMIT_MODERATE, pwhash.argon2id.MEMLIMIT_MODERATE)
"""256 MiB, about half a second. What a person's keystore gets."""
MINIMUM = Kdf(pwhash.argon2id.OPSLIMIT_MIN, pwhash.argon2id.MEMLIMIT_MIN)
"""No protection of a weak password: tests and throw-away networks."""
_KDF_LIMIT = Kdf(10, 1 << 30)
"""A planted file must not eat the machine."""

_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2})+$", max_length=512)]
_Seed = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class _NodeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    address: str
    seed: _Seed


class _KdfHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Literal["argon2id"]
    ops: Annotated[int, msgspec.Meta(ge=1, le=_KDF_LIMIT.ops)]
    mem: Annotated[int, msgspec.Meta(ge=pwhash.argon2id.MEMLIMIT_MIN, le=_KDF_LIMIT.mem)]
    salt: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]


class _KeystoreFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    address: str
    kdf: _KdfHeader
    cipher: Literal["xchacha20poly1305"]
    box: _Hex


def create_node_key(path: Path) -> KeyPair:
    """Make a node key and write it, mode 0600. KeyFileError when the file exists already."""
    key = KeyPair(secrets.token_bytes(32))
    text = json.dumps({"version": 1, "address": key.address, "seed": key.seed.hex()}, indent=2)
    _write(path, text)
    return key


def load_node_key(path: Path) -> KeyPair:
    """Read a node key; KeyFileError says what is wrong with the file and what to do."""
    raw = _read_private(path)
    try:
        found = msgspec.json.decode(raw, type=_NodeFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    key = KeyPair(bytes.fromhex(found.seed))
    if key.address != found.address:
        raise _damaged(path, "its address does not belong to its seed")
    return key


def seal(seed: bytes, password: bytes, kdf: Kdf = MODERATE) -> bytes:
    """The keystore document that holds `seed` under `password`."""
    salt = secrets.token_bytes(pwhash.argon2id.SALTBYTES)
    header = _header(KeyPair(seed).address, kdf.ops, kdf.mem, salt.hex())
    box = secret.Aead(_derive(password, salt, kdf)).encrypt(seed, _associated(header))
    return (json.dumps(header | {"box": bytes(box).hex()}, indent=2) + "\n").encode()


def unseal(document: bytes, password: bytes, name: str = "the keystore") -> KeyPair:
    """The key in a keystore document; KeyFileError when damaged or the password is wrong."""
    found = _parse_keystore(document, name)
    kdf, salt = Kdf(found.kdf.ops, found.kdf.mem), bytes.fromhex(found.kdf.salt)
    header = _header(found.address, kdf.ops, kdf.mem, found.kdf.salt)
    try:
        seed = secret.Aead(_derive(password, salt, kdf)).decrypt(
            bytes.fromhex(found.box), _associated(header)
        )
    except (CryptoError, ValueError) as error:
        raise KeyFileError(
            f"{name} does not open",
            why="the password is wrong, or the file was changed",
            next="try the password again; if it is surely right, restore the file from a backup",
            exit_code=_REFUSED,
        ) from error
    if len(seed) != 32 or KeyPair(seed).address != found.address:
        raise _damaged(name, "its address does not belong to its key")
    return KeyPair(seed)


def create_owner_key(path: Path, password: bytes, kdf: Kdf = MODERATE) -> KeyPair:
    """Make an owner key and its keystore; KeyFileError when the file exists already."""
    key = KeyPair(secrets.token_bytes(32))
    _write(path, seal(key.seed, password, kdf).decode())
    return key


def load_owner_key(path: Path, password: bytes) -> KeyPair:
    """Open the keystore file at `path`. Takes half a second of CPU and 256 MiB at full cost."""
    return unseal(_read_private(path), password, str(path))


def owner_address(path: Path) -> str:
    """The address that a keystore file claims, without opening it."""
    return _parse_keystore(_read_private(path), str(path)).address


def _header(owner: str, ops: int, mem: int, salt: str) -> dict[str, object]:
    kdf = {"name": "argon2id", "ops": ops, "mem": mem, "salt": salt}
    return {"version": 1, "address": owner, "kdf": kdf, "cipher": "xchacha20poly1305"}


def _associated(header: dict[str, object]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _derive(password: bytes, salt: bytes, kdf: Kdf) -> bytes:
    key: bytes = pwhash.argon2id.kdf(secret.Aead.KEY_SIZE, password, salt, kdf.ops, kdf.mem)
    return key


def _parse_keystore(document: bytes, name: str) -> _KeystoreFile:
    try:
        return msgspec.json.decode(document, type=_KeystoreFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(name, str(error)) from error


def _damaged(name: object, why: str) -> KeyFileError:
    return KeyFileError(
        f"{name} is not a key file of tdmld, or is damaged",
        why=why,
        next="restore it from a backup; without one the key is lost, and `tdmld init` in a new"
        " directory makes another",
    )


def _read_private(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise KeyFileError(f"{path} is not a file", next="name a key file")
        if mode & 0o077:
            raise KeyFileError(
                f"{path} may be read by others",
                why=f"its mode is {stat.S_IMODE(mode):04o}; a key is its user's alone",
                next=f"chmod 600 {path}",
                exit_code=_REFUSED,
            )
        return read_file(path, _FILE_BYTES_MAX)
    except FileNotFoundError as error:
        raise KeyFileError(
            f"{path} does not exist", next=f"tdmld init --data-dir {path.parent.parent}"
        ) from error
    except FileTooLarge as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read", why=os.strerror(error.errno or 0)) from error


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        write_file(path, text.encode(), mode=0o600, exclusive=True)
    except FileExistsError as error:
        raise KeyFileError(
            f"{path} exists already",
            why="a key that is overwritten is lost, with the money it owns",
            next="choose another directory, or move the file away yourself",
        ) from error
