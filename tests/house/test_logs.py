"""Our lines and our libraries' lines end up in one JSON file."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tdmld import logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_every_line_is_one_object(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "daemon.jsonl"
    logs.configure("info", file=file, console=False, process="daemon")
    structlog.get_logger("tdmld.test").info("block final", height=7, id=b"\x01")
    logging.getLogger("hypercorn.error").warning("went %s", "wrong")
    logging.getLogger("libp2p").info("noise")
    try:
        raise ValueError("cause")
    except ValueError:
        structlog.get_logger("tdmld.test").exception("failed")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["block final", "went wrong", "failed"]
    assert lines[0] | {"height": 7, "process": "daemon", "level": "info"} == lines[0]
    assert lines[2]["exception"][0]["exc_value"] == "cause"


def test_stdout_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", console=True)
    structlog.get_logger().info("hello")
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello" in err


def test_tracebacks_tell_no_secrets(tmp_path: Path) -> None:
    def fail(password: str) -> None:
        raise ValueError("cause")

    file = tmp_path / "daemon.jsonl"
    logs.configure("info", file=file, console=False)
    try:
        fail("open sesame")
    except ValueError:
        logging.getLogger("tdmld.test").exception("failed")
    (line,) = file.read_text().splitlines()
    assert "fail" in line
    assert "open sesame" not in line


def test_what_peers_send_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", console=True)
    logging.getLogger("tdmld.test").warning("a peer said %s", "\x1b[2J\rall is well")
    told = capsys.readouterr().err
    assert "\x1b[2J" not in told
    assert "\r" not in told
    assert "all is well" in told
