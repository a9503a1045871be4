"""Commands end with words and an exit code; help is light."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdmld import keys
from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import chain_id, load_genesis
from tdmld.cli import app as table_of_commands
from tdmld.cli import main
from tdmld.cli.common import table
from tdmld.cli.exits import Exit
from tdmld.cli.init import settings_template
from tdmld.config import Config, load_config
from tdmld.errors import UserError

HEAVY = {"torch", "transformers", "libp2p", "textual", "rocksdict", "hypercorn", "numpy", "trio"}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TDMLD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("correct horse\n")
    return path


@pytest.fixture(autouse=True)
def _cheap_keystores(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdmld.cli import init

    monkeypatch.setattr(init.make_directory, "__defaults__", (keys.MINIMUM,))


def genesis_document() -> dict[str, object]:
    owner, node = KeyPair(bytes(32)), KeyPair(b"\x01" * 32)
    return {
        "chain": "tdmld-test-1",
        "time": "2026-01-01T00:00:00Z",
        "validators": [[owner.address, node.address, 5]],
    }


def test_help_imports_nothing_heavy() -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tdmld", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "tdmld.cli.app" in modules
    assert not {name for name in modules if name.partition(".")[0] in HEAVY}
    assert "devnet" in answer.stdout


def test_every_command_can_be_imported() -> None:
    for name in table_of_commands.app:
        if not name.startswith("-"):
            table_of_commands.app[name]


def test_version_is_there_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["tdmld"] == "0.1.0"
    assert main(["--version"]) == Exit.OK
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_init_makes_a_node(
    tmp_path: Path, password: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genesis, directory = tmp_path / "g.json", tmp_path / "node"
    genesis.write_text(json.dumps(genesis_document(), indent=1))
    arguments = ["init", "--data-dir", str(directory), "--genesis", str(genesis)]
    assert main([*arguments, "--password-file", str(password), "--json"]) == Exit.OK
    told = json.loads(capsys.readouterr().out)
    copied = load_genesis((directory / "genesis.json").read_bytes())
    assert told["chain_id"] == chain_id(copied).hex()
    assert keys.load_node_key(directory / keys.NODE_KEY).address == told["node"]
    owner = keys.load_owner_key(directory / keys.OWNER_KEYSTORE, b"correct horse")
    assert owner.address == told["owner"]
    assert load_config(directory, {}, {}) == Config(data_dir=directory)


def test_init_never_overwrites(
    tmp_path: Path, password: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", "--data-dir", str(tmp_path / "n"), "--password-file", str(password)]
    assert main(arguments) == Exit.OK
    before = (tmp_path / "n" / keys.OWNER_KEYSTORE).read_bytes()
    assert main(arguments) == Exit.FAILED
    assert "holds a node already" in capsys.readouterr().err
    assert (tmp_path / "n" / keys.OWNER_KEYSTORE).read_bytes() == before


def test_init_that_fails_leaves_nothing(
    tmp_path: Path, password: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdmld.cli import init

    def full() -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(init, "settings_template", full)
    arguments = ["init", "--data-dir", str(tmp_path / "n"), "--password-file", str(password)]
    assert main(arguments) == Exit.FAILED
    assert [p for p in (tmp_path / "n").rglob("*") if p.is_file()] == []


def test_init_names_what_is_wrong_with_a_genesis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genesis = tmp_path / "g.json"
    genesis.write_text(json.dumps(genesis_document() | {"accounts": [["x", 1]]}))
    arguments = ["init", "--data-dir", str(tmp_path / "n"), "--no-owner", "--genesis"]
    assert main([*arguments, str(genesis)]) == Exit.USAGE
    assert "accounts[0][0]" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "none")]) == Exit.USAGE
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_without_a_terminal_nobody_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--data-dir", str(tmp_path / "n")]) == Exit.USAGE
    assert "--password-file" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_a_password_file_may_be_named_by_the_environment(
    tmp_path: Path, password: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDMLD_PASSWORD_FILE", str(password))
    monkeypatch.setenv("TDMLD_DATA_DIR", str(tmp_path / "n"))
    assert main(["init"]) == Exit.OK
    assert keys.load_owner_key(tmp_path / "n" / keys.OWNER_KEYSTORE, b"correct horse")


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 2000])
def test_a_bad_password_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    arguments = ["init", "--data-dir", str(tmp_path / "n"), "--password-file", str(file)]
    assert main(arguments) == Exit.USAGE


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inti"], "next: tdmld init"),
        (["devnet", "upp"], "next: tdmld devnet up"),
        (["version", "--nonsense"], "--nonsense"),
        (["run", "--ask-price", "cheap"], "--ask-price"),
        (["run", "--data-dir", "/nowhere/at/all"], "tdmld init --data-dir /nowhere/at/all"),
    ],
)
def test_wrong_usage_is_told(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == Exit.USAGE
    out, err = capsys.readouterr()
    assert text in err
    assert out == ""


def test_run_names_an_unknown_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tdmld.toml").write_text('listn = ["x"]')
    assert main(["run", "--data-dir", str(tmp_path)]) == Exit.USAGE
    assert "unknown key 'listn'" in capsys.readouterr().err


def test_errors_inside_nurseries_are_told_bare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        told = UserError("it broke", why="rust", next="oil", exit_code=Exit.TIMED_OUT)
        raise ExceptionGroup("nursery", [ExceptionGroup("inner", [told])])

    monkeypatch.setattr(table_of_commands, "app", fail)
    assert main([]) == Exit.TIMED_OUT
    assert capsys.readouterr().err == "tdmld: it broke\n  why:  rust\n  next: oil\n"


def test_bugs_keep_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(table_of_commands, "app", fail)
    with pytest.raises(ZeroDivisionError):
        main([])


def test_the_template_shows_every_setting(tmp_path: Path) -> None:
    text = settings_template()
    lines = [line.removeprefix("# ") for line in text.splitlines()[2:]]
    (tmp_path / "tdmld.toml").write_text("\n".join(lines))
    assert load_config(tmp_path, {}, {}) == Config(data_dir=tmp_path)
    assert "carrier_listen" in text


def test_tables_align_numbers_to_the_right() -> None:
    assert table(["name", "n"], [["a", 5], ["b", "1,000"]]) == [
        "name      n",
        "a         5",
        "b     1,000",
    ]
