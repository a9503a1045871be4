"""A written file is there whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdmld.files import FileTooLarge, read_file, write_file


def test_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"one")
    write_file(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["a"]


def test_exclusive_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        write_file(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_file(path, b"one")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def slow() -> Iterator[bytes]:
        yield b"on"
        write_file(path, b"two")
        yield b"e"

    write_file(path, slow())
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_reads_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(FileTooLarge, match="more than 4 bytes"):
        read_file(path, 4)
