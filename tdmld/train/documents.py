"""Documents of source files: text, JSON lines or parquet, one after another in bounded memory.

A document is a text file, the named field of a line, or the named column of a row; files are read
in the order given. What a tokenizer gets at once is a *piece*: a document, or of a long one at
most PIECE_BYTES of UTF-8 up to the last line end among them (or, without one, to the last whole
character). Pieces depend on the document alone, so the same files make the same tokens everywhere.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec

from tdmld.train import limits
from tdmld.train.errors import FileError

PIECE_BYTES = 1 << 20
"""A tokenizer needs many times this in memory."""
_ROWS = 64
"""Rows of a parquet file that are decoded at a time."""

Format = Literal["text", "jsonl", "parquet"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


class Piece(NamedTuple):
    """A part of a document, and whether it is the last one."""

    text: str
    last: bool


def format_of(path: Path, wanted: Format | None = None) -> Format:
    """How a file is read: as wanted, else by its name; text is what no other name says."""
    return wanted or _SUFFIXES.get(path.suffix.lower(), "text")


def pieces(paths: Sequence[Path], field: str, wanted: Format | None = None) -> Iterator[Piece]:
    """The pieces of all documents of the files; empty documents are left out.

    FileError names the file, and the line or row, that cannot be read.
    """
    assert wanted is None or wanted in get_args(Format)
    for path in paths:
        kind = format_of(path, wanted)
        if kind == "text":
            yield from _text_file(path)
            continue
        documents = _json_lines(path, field) if kind == "jsonl" else _parquet(path, field)
        for document in documents:
            yield from cut(document)


def cut(document: str) -> Iterator[Piece]:
    """The pieces of a document that is in memory."""
    raw = document.encode("utf-8")
    while len(raw) > PIECE_BYTES:
        end = _end(raw[:PIECE_BYTES])
        yield Piece(raw[:end].decode("utf-8"), False)
        raw = raw[end:]
    if raw:
        yield Piece(raw.decode("utf-8"), True)


def _end(raw: bytes) -> int:
    """Where a piece ends that may not be longer than `raw`."""
    line = raw.rfind(b"\n") + 1
    if line:
        return line
    end = len(raw)
    while end > 1 and raw[end - 1] & 0xC0 == 0x80:
        end -= 1  # over the bytes that go on a character; its first one belongs to them
    first = raw[end - 1]
    size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
    return len(raw) if end - 1 + size == len(raw) else end - 1


def _text_file(path: Path) -> Iterator[Piece]:
    rest, at = b"", 0
    try:
        with path.open("rb") as file:
            while True:
                more = file.read(PIECE_BYTES + 1 - len(rest))
                rest += more
                final = len(rest) <= PIECE_BYTES
                end = len(rest) if final else _end(rest[:PIECE_BYTES])
                if not end:
                    if final:
                        return
                    raise FileError(f"{path} is not UTF-8 at byte {at}; save it as UTF-8")
                yield Piece(rest[:end].decode("utf-8"), final)
                rest, at = rest[end:], at + end
                if final:
                    return
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        where = at + error.start
        raise FileError(f"{path} is not UTF-8 at byte {where}; save it as UTF-8") from error


def _json_lines(path: Path, field: str) -> Iterator[str]:
    limit, number = limits.DOCUMENT_BYTES, 0
    try:
        with path.open("rb") as file:
            while line := file.readline(limit + 1):
                number += 1
                if len(line) > limit:
                    raise FileError(
                        f"{path}, line {number}: more than {limit} bytes; split the document"
                    )
                if not line.isspace():
                    yield _field(path, number, line, field)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; check the path") from error


def _field(path: Path, number: int, line: bytes, field: str) -> str:
    try:
        found = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        if field not in found:
            raise FileError(
                f"{path}, line {number}: no field {field!r}; name another one with --field"
            )
        text = msgspec.json.decode(found[field], type=str)
        text.encode("utf-8")
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise FileError(f"{path}, line {number}: {error}; correct or remove the line") from error
    return text


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise FileError(
            "parquet files need the package pyarrow, which is not installed; "
            'pip install "tdmld[parquet]", or convert them to JSON lines'
        ) from error
    row = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            if field not in file.schema_arrow.names:
                raise FileError(f"{path} has no column {field!r}; name another one with --field")
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if text is None:
                        continue
                    if not isinstance(text, str):
                        raise FileError(f"{path}, row {row}: {field!r} is no text; name another")
                    if len(text) > limits.DOCUMENT_BYTES:
                        raise FileError(
                            f"{path}, row {row}: more than {limits.DOCUMENT_BYTES} characters; "
                            "split the document"
                        )
                    yield text
    except (ArrowException, OSError, UnicodeError) as error:
        raise FileError(f"{path}, after row {row}: {error}; fetch it again") from error
