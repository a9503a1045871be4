"""Key files: made once, private, refused when damaged; keystores open with their password only."""

import json
import os
from pathlib import Path

import pytest

from tdmld import keys
from tdmld.chain.crypto import KeyPair
from tdmld.keys import MINIMUM, KeyFileError

SEED = bytes(range(32))


def test_a_node_key_is_private_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.key"
    made = keys.create_node_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert keys.load_node_key(path).address == made.address


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    made = keys.create_node_key(path)
    with pytest.raises(KeyFileError, match="exists already"):
        keys.create_node_key(path)
    with pytest.raises(KeyFileError, match="exists already"):
        keys.create_owner_key(path, b"pw", MINIMUM)
    assert keys.load_node_key(path).seed == made.seed
    assert os.listdir(tmp_path) == ["node.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "node.key"
    keys.create_node_key(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        keys.load_node_key(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "{}",
        "\xff",
        json.dumps({"version": 1, "address": "x", "seed": SEED.hex()}),
        json.dumps({"version": 2, "address": KeyPair(SEED).address, "seed": SEED.hex()}),
        json.dumps({"version": 1, "address": KeyPair(SEED).address, "seed": SEED.hex()[:-2]}),
        json.dumps({"version": 1, "address": KeyPair(SEED).address, "seed": SEED.hex(), "more": 1}),
        "x" * 5000,
    ],
)
def test_a_damaged_node_key_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(text.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="damaged"):
        keys.load_node_key(path)


def test_a_missing_key_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="tdmld init --data-dir"):
        keys.load_node_key(tmp_path / "keys" / "node.key")


def test_a_directory_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="not a file"):
        keys.load_node_key(tmp_path)


def test_a_keystore_opens_with_its_password_only(tmp_path: Path) -> None:
    path = tmp_path / "owner.json"
    made = keys.create_owner_key(path, b"correct horse", MINIMUM)
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.seed.hex() not in path.read_text()
    assert keys.owner_address(path) == made.address
    assert keys.load_owner_key(path, b"correct horse").seed == made.seed
    with pytest.raises(KeyFileError, match="does not open") as caught:
        keys.load_owner_key(path, b"battery staple")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("field", ["address", "ops", "salt", "box"])
def test_a_changed_keystore_does_not_open(field: str) -> None:
    document = json.loads(keys.seal(SEED, b"pw", MINIMUM))
    if field == "address":
        document["address"] = KeyPair(bytes(32)).address
    elif field == "ops":
        document["kdf"]["ops"] += 1
    elif field == "salt":
        document["kdf"]["salt"] = "00" * 16
    else:
        document["box"] = document["box"][:-2] + "00"
    with pytest.raises(KeyFileError, match="does not open"):
        keys.unseal(json.dumps(document).encode(), b"pw")


@pytest.mark.parametrize(
    "change",
    [
        {"mem": 1 << 40},
        {"ops": 1000},
        {"mem": 1},
        {"name": "scrypt"},
        {"salt": "zz"},
        {"extra": 1},
    ],
    ids=str,
)
def test_absurd_parameters_are_refused_before_they_are_tried(change: dict[str, object]) -> None:
    document = json.loads(keys.seal(SEED, b"pw", MINIMUM))
    document["kdf"] |= change
    with pytest.raises(KeyFileError, match="damaged"):
        keys.unseal(json.dumps(document).encode(), b"pw")


def test_a_short_box_does_not_crash() -> None:
    document = json.loads(keys.seal(SEED, b"pw", MINIMUM))
    document["box"] = "00"
    with pytest.raises(KeyFileError, match="does not open"):
        keys.unseal(json.dumps(document).encode(), b"pw")
