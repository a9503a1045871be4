"""Making tokens of documents: the work behind `tdmld data prepare`.

Memory is bounded by a batch of pieces, whatever the sources are. The same sources, tokenizer and
options give the same bytes. Words of the text that look like a tokenizer's special tokens
("<|endoftext|>") are ordinary text here: a document cannot forge the end of another one. Neither
special tokens, truncation nor padding is applied but the one token `end` after each document.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tdmld.files import FileTooLarge, read_file, sync_directory, write_file
from tdmld.train import limits
from tdmld.train.data import shard_file
from tdmld.train.digest import data_root
from tdmld.train.documents import Piece
from tdmld.train.errors import FileError
from tdmld.train.tokens import (
    BYTES,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    TOKENS_FILE,
    Manifest,
    token_width,
    write_manifest,
)

Numbers = NDArray[np.unsignedinteger[Any]]
"""Tokens, little-endian, of the encoder's width."""

_BATCH_PIECES = 64
_BATCH_BYTES = 4 << 20
"""At most so much text is tokenized at a time (by all cores)."""


class Encoder(Protocol):
    """Text to token numbers."""

    @property
    def identity(self) -> str:
        """As the manifest names the tokenizer."""
        ...

    @property
    def vocabulary(self) -> int:
        """One more than the greatest number that it can give."""
        ...

    @property
    def width(self) -> Literal[1, 2, 4]:
        """Bytes a token."""
        ...

    def encode(self, texts: list[str]) -> list[Numbers]:
        """The numbers of each text."""
        ...

    def end(self, text: str) -> Numbers:
        """The numbers of the end mark; FileError when the tokenizer has no such token."""
        ...

    def decode(self, numbers: list[int]) -> str:
        """The text of tokens, special ones included."""
        ...


class ByteEncoder:
    """A token is a byte of UTF-8."""

    identity: str = BYTES
    vocabulary = 256
    width: Literal[1, 2, 4] = 1

    def encode(self, texts: list[str]) -> list[Numbers]:
        """See `Encoder`."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def end(self, text: str) -> Numbers:
        """The bytes of any text."""
        return self.encode([text])[0]

    def decode(self, numbers: list[int]) -> str:
        """Bytes that are no UTF-8 appear as replacement characters."""
        return bytes(numbers).decode("utf-8", errors="replace")


class FileEncoder:
    """A Hugging Face tokenizer.json. FileError when it is none."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self.raw = read_file(path, limits.TOKENIZER_BYTES)
        except FileTooLarge as error:
            raise FileError(f"{path} is too long for a tokenizer; check the path") from error
        except OSError as error:
            raise FileError(f"tokenizer {path}: {error.strerror}; check the path") from error
        try:
            self._tokenizer = Tokenizer.from_buffer(self.raw)
        except Exception as error:  # the library raises nothing more exact
            raise FileError(f"{path} is no tokenizer.json: {error}; fetch it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        numbers = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(numbers.values(), default=0) + 1
        if not 2 <= self.vocabulary <= limits.VOCABULARY:
            raise FileError(
                f"{path} has {self.vocabulary} tokens; use one with 2 to {limits.VOCABULARY}"
            )
        self.identity = hashlib.sha256(self.raw).hexdigest()
        self.width: Literal[1, 2, 4] = token_width(self.vocabulary)

    def encode(self, texts: list[str]) -> list[Numbers]:
        """See `Encoder`. The order does not depend on the number of cores."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=f"<u{self.width}") for encoding in found]

    def end(self, text: str) -> Numbers:
        """The one token with this name."""
        number = self._tokenizer.token_to_id(text)
        if number is None:
            raise FileError(f"the tokenizer has no token {text!r}; look into tokenizer.json")
        return np.asarray([number], dtype=f"<u{self.width}")

    def decode(self, numbers: list[int]) -> str:
        """See `Encoder`."""
        return str(self._tokenizer.decode(numbers, skip_special_tokens=False))


def encoder_of(tokenizer: str) -> Encoder:
    """Of "bytes", or of the path of a tokenizer.json."""
    return ByteEncoder() if tokenizer == BYTES else FileEncoder(Path(tokenizer))


def prepare(
    pieces: Iterable[Piece],
    encoder: Encoder,
    out: Path,
    *,
    end: str = "",
    most: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Write a prepared directory (`tokens`) from pieces of documents, and give its manifest.

    `end` names the token that follows each document ("" none); the file ends after `most` tokens
    at the latest. FileError when a source or the tokenizer cannot be read, when there are no
    tokens, or more than a job can have; OSError from the disk. What was there before stays until
    all is written.
    """
    mark = encoder.end(end) if end else None
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".{TOKENS_FILE}.{os.getpid()}.new"
    try:
        with aside.open("wb") as file:
            writer = _Writer(file, encoder.width, most)
            for batch in _batches(pieces):
                for piece, numbers in zip(
                    batch, encoder.encode([piece.text for piece in batch]), strict=True
                ):
                    writer.write(piece, numbers)
                    if piece.last and mark is not None:
                        writer.append(mark)
                if on_progress is not None:
                    on_progress(writer.tokens)
                if writer.full:
                    break
            file.flush()
            os.fsync(file.fileno())
        if not writer.tokens:
            raise FileError("the sources hold no text; name other files or another field")
        shards = list(shard_file(aside))
        manifest = Manifest(
            version=1,
            tokenizer=encoder.identity,
            vocabulary=encoder.vocabulary,
            width=encoder.width,
            tokens=writer.tokens,
            documents=writer.documents,
            greatest=writer.greatest,
            text_bytes=writer.text_bytes,
            root=data_root(shards).hex(),
        )
        (out / MANIFEST_FILE).unlink(missing_ok=True)
        aside.replace(out / TOKENS_FILE)
    finally:
        aside.unlink(missing_ok=True)
    if isinstance(encoder, FileEncoder):
        write_file(out / TOKENIZER_FILE, encoder.raw)
    else:
        (out / TOKENIZER_FILE).unlink(missing_ok=True)
    sync_directory(out)
    write_manifest(out, manifest)  # last: with it the directory is whole
    return manifest


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text)
        if len(batch) == _BATCH_PIECES or held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _Writer:
    """Tokens into a file, counted."""

    def __init__(self, file: BinaryIO, width: int, most: int | None) -> None:
        self._file, self._width, self._most = file, width, most
        self.tokens = self.documents = self.text_bytes = self.greatest = 0
        self.full = False

    def write(self, piece: Piece, numbers: Numbers) -> None:
        """Append a piece's tokens, as many as there is room for."""
        if not self.full:
            self.documents += piece.last
            self.text_bytes += len(piece.text.encode("utf-8"))
            self.append(numbers)

    def append(self, numbers: Numbers) -> None:
        """Append tokens, as many as there is room for."""
        if self._most is not None and self.tokens + len(numbers) >= self._most:
            numbers = numbers[: self._most - self.tokens]
            self.full = True
        if not len(numbers):
            return
        self.tokens += len(numbers)
        if self.tokens * self._width > limits.TEXT_BYTES:
            raise FileError(
                f"more than {limits.TEXT_BYTES // self._width:,} tokens; "
                "a job has no more: give --most, or fewer sources"
            )
        self.greatest = max(self.greatest, int(numbers.max()))
        self._file.write(numbers.tobytes())
