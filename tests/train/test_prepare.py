"""Documents become tokens: pieces, tokenizers, files, and what a job makes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tdmld.cli.data import prepare as command
from tdmld.errors import UserError
from tdmld.train import documents, limits
from tdmld.train.documents import Piece, cut, pieces
from tdmld.train.errors import FileError, SpecError
from tdmld.train.jobfile import load_job_file
from tdmld.train.prepare import ByteEncoder, FileEncoder, prepare
from tdmld.train.tokens import MANIFEST_FILE, TOKENS_FILE, read_manifest
from tests.train.support import CONFIG
from tests.train.test_jobfile import JOB

WORDS = [f"the {n}th line says that {n} times {n} is {n * n}.\n" for n in range(400)]
END = "<|end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE, as published ones are, with a post-processor's worth of traps."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(WORDS, trainer)
    made.enable_truncation(5)
    made.enable_padding(length=64)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def numbers(directory: Path) -> list[int]:
    width = read_manifest(directory).width
    return [int(n) for n in np.fromfile(directory / TOKENS_FILE, dtype=f"<u{width}")]


def test_a_long_document_is_cut_at_line_ends_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    text = "ab\ncdefgh\nij\n" + "€" * 9 + "😀" * 5 + "x"
    found = list(cut(text))
    assert "".join(piece.text for piece in found) == text
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    assert found[0].text == "ab\ncdefgh\n"
    assert all(len(piece.text.encode()) <= 10 for piece in found)
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert list(pieces([path], "text")) == found


@pytest.mark.parametrize("length", [9, 10, 11, 20, 21])
def test_a_text_file_ends_with_its_last_piece(
    length: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text("x" * length)
    found = list(pieces([path], "text"))
    assert [piece.last for piece in found][-1]
    assert sum(piece.last for piece in found) == 1
    assert "".join(piece.text for piece in found) == "x" * length


def test_an_empty_file_has_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    assert list(pieces([tmp_path / "a.txt"], "text")) == []


def test_lines_of_json_give_the_named_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "body": "x\\n"}\n\n{"body": "", "deep": [[{}]]}\n{"body": "é"}')
    assert list(pieces([path], "body")) == [Piece("x\n", True), Piece("é", True)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "line 2"),
        (b'["text"]', "line 2"),
        (b'{"text": 5}', "line 2"),
        (b'{"other": "a"}', "no field 'text'"),
        (b'{"text": "\xff"}', "line 2"),
        (b'{"text": "\\ud800"}', "line 2"),
        (b'{"text": ' + b"[" * 100_000, "line 2"),
        (b'{"text": "' + b"a" * 2000 + b'"}', "more than 1000 bytes"),
    ],
)
def test_a_bad_line_is_named(
    line: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "1000" in words:
        monkeypatch.setattr(limits, "DOCUMENT_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(FileError, match=words):
        list(pieces([path], "text"))


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff")
    with pytest.raises(FileError, match="byte 5"):
        list(pieces([path], "text"))


def test_parquet_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FileError, match="pyarrow"):
        list(pieces([tmp_path / "a.parquet"], "text"))


def test_parquet_gives_the_named_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: tdmld[parquet]")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows: dict[str, Any] = {"n": list(range(200)), "body": [*WORDS[:198], None, ""]}
    parquet.write_table(pyarrow.table(rows), path, row_group_size=50)
    assert [piece.text for piece in pieces([path], "body")] == WORDS[:198]
    with pytest.raises(FileError, match="no column 'text'"):
        list(pieces([path], "text"))
    with pytest.raises(FileError, match="is no text"):
        list(pieces([path], "n"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="fetch it again"):
        list(pieces([path], "body"))


def test_bytes_are_the_text_itself(tmp_path: Path) -> None:
    found = prepare([Piece("aé", False), Piece("b", True)], ByteEncoder(), tmp_path, end="\n")
    assert (tmp_path / TOKENS_FILE).read_bytes() == "aéb\n".encode()
    assert (found.tokens, found.documents, found.width, found.text_bytes) == (5, 1, 1, 4)


def test_tokens_decode_to_the_text_with_an_end_after_each_document(
    tokenizer: Path, tmp_path: Path
) -> None:
    encoder = FileEncoder(tokenizer)
    made = prepare([Piece(word, True) for word in WORDS], encoder, tmp_path, end=END)
    found = numbers(tmp_path)
    assert (made.width, made.documents, made.vocabulary) == (2, 400, 400)
    assert (len(found), max(found)) == (made.tokens, made.greatest)
    assert encoder.decode(found) == "".join(word + END for word in WORDS)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_a_document_cannot_forge_the_end_of_one(tokenizer: Path, tmp_path: Path) -> None:
    prepare([Piece(f"a{END}b", True)], FileEncoder(tokenizer), tmp_path, end=END)
    assert numbers(tmp_path).count(0) == 1  # its own


def test_the_same_sources_give_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    roots = {
        prepare([Piece(w, True) for w in WORDS], FileEncoder(tokenizer), tmp_path / str(n)).root
        for n in range(2)
    }
    assert len(roots) == 1


def test_no_more_than_wanted_is_written(tokenizer: Path, tmp_path: Path) -> None:
    made = prepare((Piece(w, True) for w in WORDS), FileEncoder(tokenizer), tmp_path, most=100)
    assert made.tokens == len(numbers(tmp_path)) == 100


def test_more_than_a_job_holds_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TEXT_BYTES", 100)
    with pytest.raises(FileError, match="--most"):
        prepare((Piece(word, True) for word in WORDS), ByteEncoder(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_text_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no text"):
        prepare([], ByteEncoder(), tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[" * 100_000, b'{"version": "1.0", "model": {}}'])
def test_what_is_no_tokenizer_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(FileError, match=r"no tokenizer\.json"):
        FileEncoder(path)


def test_an_unknown_end_token_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="has no token"):
        prepare([Piece("a", True)], FileEncoder(tokenizer), tmp_path, end="<|nothing|>")


@pytest.fixture
def job(tokenizer: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(WORDS))
    assert (
        command(
            tmp_path / "text.txt",
            out=tmp_path / "made",
            tokenizer=str(tokenizer),
            end=END,
            json=True,
        )
        == 0
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 400}))
    path = tmp_path / "job.toml"
    path.write_text(
        JOB.replace('text = "text.txt"', 'text = "made"').replace(
            'tokenizer = "bytes"', 'tokenizer = "tokens"'
        )
    )
    return path


def test_a_job_names_the_prepared_directory(job: Path) -> None:
    found = load_job_file(job)
    manifest = read_manifest(job.parent / "made")
    data = found.spec.data
    assert (data.tokenizer, data.width, data.tokens) == ("tokens", 2, 2 * manifest.tokens)
    assert found.tokenizer_path == job.parent / "made" / "tokenizer.json"
    assert found.spec.heldout_tokens % 2 == found.spec.train_tokens % 2 == 0


def test_bytes_that_were_prepared_are_a_job_of_bytes(job: Path) -> None:
    assert command(job.parent / "text.txt", out=job.parent / "made", json=True) == 0
    found = load_job_file(job)
    assert (found.spec.data.tokenizer, found.spec.data.width) == ("bytes", 1)
    assert found.tokenizer_path is None


def test_a_vocabulary_larger_than_the_models_is_refused(job: Path) -> None:
    (job.parent / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 399}))
    with pytest.raises(SpecError, match="vocab_size"):
        load_job_file(job)


def test_a_token_file_that_was_changed_is_refused(job: Path) -> None:
    path = job.parent / "made" / TOKENS_FILE
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(SpecError, match="manifest"):
        load_job_file(job)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"[" * 60_000, b"{" + b" " * 70_000])
def test_what_is_no_manifest_is_refused(raw: bytes, job: Path) -> None:
    (job.parent / "made" / MANIFEST_FILE).write_bytes(raw)
    with pytest.raises(SpecError, match=r"data\.text"):
        load_job_file(job)


def test_the_command_wants_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no files"):
        command(out=tmp_path)
    with pytest.raises(UserError, match="check the path"):
        command(tmp_path / "absent.txt", out=tmp_path)
