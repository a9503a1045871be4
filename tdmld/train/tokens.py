"""A prepared directory: a token file, what is known about it, and the tokenizer that made it.

    tokens.bin       the tokens one behind another, unsigned little-endian, 1, 2 or 4 bytes each
    manifest.json    `Manifest`: what a job file needs to know without reading them
    tokenizer.json   the Hugging Face tokenizer, unless a token is a byte

`tdmld data prepare` writes it (`prepare`), a job file names it. Neither torch nor tokenizers are
needed.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tdmld.files import FileTooLarge, read_file, write_file
from tdmld.train import limits
from tdmld.train.errors import FileError

TOKENS_FILE = "tokens.bin"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
BYTES = "bytes"
"""The tokenizer that needs no file."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `manifest.json` says."""

    version: Literal[1]
    tokenizer: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64}|bytes)$")]
    """SHA-256 of tokenizer.json, or the word bytes."""
    vocabulary: Annotated[int, msgspec.Meta(ge=2, le=limits.VOCABULARY)]
    """Tokens that the tokenizer can make: 1 more than its greatest."""
    width: Literal[1, 2, 4]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=limits.TEXT_BYTES)]
    documents: _Count
    greatest: Annotated[int, msgspec.Meta(ge=0, lt=limits.VOCABULARY)]
    """The greatest token that occurs."""
    text_bytes: _Count
    """UTF-8 bytes of all documents."""
    root: _Hex
    """Of the file's shards, as in the spec (`data.root`)."""

    @property
    def data_tokenizer(self) -> Literal["bytes", "tokens"]:
        """`data.tokenizer` of a spec with these data."""
        return "bytes" if self.width == 1 else "tokens"


def token_width(vocabulary: int) -> Literal[2, 4]:
    """Bytes a token of a vocabulary."""
    return 2 if vocabulary <= 1 << 16 else 4


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it, durably; OSError."""
    text = json.dumps(msgspec.to_builtins(manifest), indent=1, sort_keys=True) + "\n"
    write_file(directory / MANIFEST_FILE, text.encode("ascii"))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory; FileError when there is none or it is not one."""
    path = directory / MANIFEST_FILE
    try:
        return msgspec.json.decode(read_file(path, limits.MANIFEST_BYTES), type=Manifest)
    except FileTooLarge as error:
        raise FileError(f"{path} is too long for a manifest; prepare the data again") from error
    except OSError as error:
        raise FileError(
            f"{directory} holds no prepared data: {error.strerror}; make it: tdmld data prepare"
        ) from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is no manifest: {error}; prepare the data again") from error
