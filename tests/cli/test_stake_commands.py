"""stake and keys commands, through `main`, against a served fake node."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tdmld import keys
from tdmld.chain.crypto import KeyPair, public_key, verify
from tdmld.chain.transactions import (
    REGISTER_DOMAIN,
    Bond,
    Nominate,
    Payload,
    Register,
    Revoke,
    Unbond,
    Withdraw,
    decode_transaction,
    registration_bytes,
)
from tdmld.cli import main
from tdmld.cli.exits import Exit
from tdmld.cli.text import span
from tdmld.rpc.access import TOKEN_FILE, URL_FILE
from tests.rpc.conftest import serving_in_a_thread
from tests.rpc.fake import CHAIN_ID, FakeBackend, node_key_info, node_status, stake_info

OLD, NEW = KeyPair(b"\x01" * 32), KeyPair(b"\x02" * 32)


@pytest.fixture
def backend() -> FakeBackend:
    status = msgspec.structs.replace(node_status(), node=OLD.address)
    return FakeBackend(status=status, keys=(node_key_info(OLD.address, nominated=True),))


class Shell:
    """A person at a node's directory."""

    def __init__(
        self, directory: Path, backend: FakeBackend, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.directory, self.backend, self._capsys = directory, backend, capsys
        self.owner = keys.owner_address(directory / keys.OWNER_KEYSTORE)

    def __call__(self, *arguments: str, secret: bool = True, expect: int = Exit.OK) -> str:
        """The output of a command; what it says on stderr when it is to fail."""
        place = ["--data-dir", str(self.directory)]
        if secret:
            place += ["--password-file", str(self.directory / "password")]
        code = main([*arguments, *place])
        out, err = self._capsys.readouterr()
        assert code == expect, err
        assert (out == "") is (expect != Exit.OK)
        return str(err if expect != Exit.OK else out)

    def sent(self) -> Payload:
        """The one transaction that was submitted."""
        (raw,) = self.backend.submitted
        transaction = decode_transaction(bytes.fromhex(raw), bytes.fromhex(CHAIN_ID))
        assert transaction.signer == public_key(self.owner)
        assert (transaction.nonce, transaction.fee) == (7, 10)
        return transaction.payload


@pytest.fixture
def shell(
    tmp_path: Path,
    backend: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Shell]:
    monkeypatch.delenv("TDMLD_API_INFO", raising=False)
    directory = tmp_path / "node"
    (directory / "run").mkdir(parents=True)
    (directory / "password").write_text("correct horse\n")
    keys.create_owner_key(directory / keys.OWNER_KEYSTORE, b"correct horse", keys.MINIMUM)
    with serving_in_a_thread(backend) as running:
        (directory / TOKEN_FILE).write_text("admin\n")
        (directory / URL_FILE).write_text(running.server.url + "\n")
        yield Shell(directory, backend, capsys)


def key_file(path: Path, key: KeyPair = NEW) -> str:
    document = {"version": 1, "address": key.address, "seed": key.seed.hex()}
    path.write_text(json.dumps(document))
    path.chmod(0o600)
    return str(path)


# ---- stake -------------------------------------------------------------------------------------


def test_show_says_when_what_can_be_withdrawn(shell: Shell) -> None:
    shown = shell("stake", "show", secret=False)
    assert "epoch 2 (to block 1,500)" in shown
    assert "33 of 133 (24.8 %)" in shown
    assert "without turns to lead" in shown  # in the next epoch
    lines = [line for line in shown.splitlines() if line.startswith(("vote  ", "work  "))]
    assert [line.split()[1] for line in lines] == ["7", "50", "60"]
    assert lines[0].endswith("ready")
    assert lines[1].endswith("96 blocks, 51 min 38 s")
    assert "epoch 4 has begun" in lines[2]
    assert lines[2].endswith("1,096 blocks")
    assert "voted twice" in shown
    assert "51" in shown
    found = json.loads(shell("stake", "show", "--json", secret=False))
    assert [entry["ready"] for entry in found["unbonding"]] == [True, False, False]


def test_bond_sends_a_bond_and_says_from_when_it_votes(shell: Shell) -> None:
    shell.backend.height = 501  # of epoch 1
    told = shell("stake", "bond", "vote", "1000")
    assert shell.sent() == Bond("vote", 1000)
    assert "bonded 1,000 as vote stake; final in block 501" in told
    assert "from epoch 3 on" in told


def test_vote_stake_without_a_node_is_told_what_is_missing(shell: Shell) -> None:
    shell.backend.stake = msgspec.structs.replace(stake_info(), nominee="")
    assert "tdmld stake nominate" in shell("stake", "bond", "vote", "5")
    assert "tdmld stake nominate" in shell("stake", "show", secret=False)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("bond", "vote", "0"), Exit.USAGE, "above zero"),
        (("bond", "vote", "-5"), Exit.USAGE, ""),
        (("bond", "voting", "5"), Exit.USAGE, "vote"),
        (("bond", "vote", "999999991"), Exit.REFUSED, "1,000,000,001"),
        (("unbond", "work", "50000001"), Exit.REFUSED, "50,000,000 of work stake"),
        (("nominate", "12D3KooWx"), Exit.USAGE, "not an address"),
        (("nominate", NEW.address), Exit.REFUSED, "tdmld keys register"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(
    shell: Shell, arguments: tuple[str, ...], code: int, says: str
) -> None:
    assert says in shell("stake", *arguments, expect=code)
    assert shell.backend.submitted == []


def test_unbond_says_until_when_it_votes_and_when_it_comes_back(shell: Shell) -> None:
    told = shell("stake", "unbond", "work", "60")
    assert shell.sent() == Unbond("work", 60)
    assert "60 can be withdrawn from block 2,101 on" in told
    assert "begins with epoch 4" in told
    assert "keep the node running" not in told
    shell.backend.submitted.clear()
    assert "until epoch 1 is over: keep the node running" in shell("stake", "unbond", "vote", "50")


def test_withdraw_brings_what_is_ready(shell: Shell) -> None:
    told = json.loads(shell("stake", "withdraw", "--json"))
    assert shell.sent() == Withdraw()
    assert told["amount"] == "7"
    assert told["state"] == "ok"


def test_withdraw_too_early_says_when(shell: Shell) -> None:
    whole = stake_info()
    shell.backend.stake = msgspec.structs.replace(whole, unbonding=whole.unbonding[1:])
    told = shell("stake", "withdraw", expect=Exit.REFUSED)
    assert "50 of vote stake can be withdrawn from block 1,101 on and after 2026-01-01" in told
    shell.backend.stake = msgspec.structs.replace(whole, unbonding=())
    assert "nothing of" in shell("stake", "withdraw", expect=Exit.REFUSED)
    assert shell.backend.submitted == []


def test_nominate_takes_the_running_node_unless_told_otherwise(shell: Shell) -> None:
    shell("stake", "nominate")
    assert shell.sent() == Nominate(OLD.public)
    shell.backend.submitted.clear()
    shell.backend.keys += (node_key_info(NEW.address),)
    shell("stake", "nominate", NEW.address)
    assert shell.sent() == Nominate(NEW.public)


def test_a_key_that_is_over_cannot_be_nominated(shell: Shell) -> None:
    for state, says in (({"revoked": 9}, "revoked at height 9"), ({"convicted": 8}, "voted twice")):
        shell.backend.keys = (node_key_info(OLD.address, **state),)
        assert says in shell("stake", "nominate", expect=Exit.REFUSED)


def test_who_has_too_little_vote_stake_is_told_to_bond(shell: Shell) -> None:
    shell.backend.stake = msgspec.structs.replace(stake_info(), vote_stake="0")
    assert "tdmld stake bond vote" in shell("stake", "nominate", expect=Exit.REFUSED)


def test_a_refusal_of_the_chain_is_told(shell: Shell) -> None:
    shell.backend.outcome = "the balance of 5 is 6 short"
    told = shell("stake", "bond", "work", "5", expect=Exit.REFUSED)
    assert "the balance of 5 is 6 short" in told


# ---- keys --------------------------------------------------------------------------------------


def test_list_says_what_each_key_does(shell: Shell) -> None:
    shell.backend.keys = (
        node_key_info(OLD.address, nominated=True, epochs=(2, 3), asks=True),
        node_key_info(NEW.address, revoked=17),
    )
    first, second = shell("keys", "list", secret=False).splitlines()[1:]
    assert "nominated" in first
    assert "epoch 2, epoch 3" in first
    assert "revoked at 17" in second
    found = json.loads(shell("keys", "list", "--json", secret=False))
    assert found["owner"] == shell.owner
    assert [key["revoked"] for key in found["keys"]] == [0, 17]
    shell.backend.keys = ()
    assert "tdmld keys register" in shell("keys", "list", secret=False)


def consents(sent: Payload, owner: str) -> bool:
    assert isinstance(sent, Register)
    message = registration_bytes(public_key(owner), sent.from_height)
    return verify(sent.node, REGISTER_DOMAIN, bytes.fromhex(CHAIN_ID), message, sent.proof)


def test_register_signs_with_the_node_key_of_a_file(shell: Shell, tmp_path: Path) -> None:
    shell("keys", "register", "--node-key", key_file(tmp_path / "new.key"))
    sent = shell.sent()
    assert isinstance(sent, Register)
    assert (sent.node, sent.from_height) == (NEW.public, shell.backend.height + 20)
    assert consents(sent, shell.owner)


def test_register_takes_the_key_of_the_directory(shell: Shell) -> None:
    node = keys.create_node_key(shell.directory / keys.NODE_KEY)
    shell("keys", "register")
    sent = shell.sent()
    assert isinstance(sent, Register)
    assert sent.node == node.public


def test_a_key_is_not_registered_twice(shell: Shell, tmp_path: Path) -> None:
    file = key_file(tmp_path / "old.key", OLD)
    told = shell("keys", "register", "--node-key", file, expect=Exit.REFUSED)
    assert "registered" in told
    assert shell.backend.submitted == []


def test_a_proof_travels_from_the_node_to_the_owner(shell: Shell, tmp_path: Path) -> None:
    file, proof = key_file(tmp_path / "new.key"), tmp_path / "proof.json"
    shell("keys", "prove", shell.owner, "--node-key", file, "--out", str(proof), secret=False)
    assert NEW.seed.hex() not in proof.read_text()
    shell("keys", "register", "--proof", str(proof))
    assert consents(shell.sent(), shell.owner)
    printed = json.loads(shell("keys", "prove", shell.owner, "--node-key", file, secret=False))
    assert printed["node"] == NEW.address


@pytest.mark.parametrize(
    ("change", "says", "code"),
    [
        ({"owner": OLD.address}, "for the owner", Exit.REFUSED),
        ({"chain_id": "d0" * 32}, "for the chain", Exit.REFUSED),
        ({"from_height": 2}, "good until block 1", Exit.REFUSED),
        ({"proof": "00"}, "is not what", Exit.USAGE),
        ({"seed": "00"}, "is not what", Exit.USAGE),
    ],
)
def test_a_proof_that_does_not_serve_says_why(
    shell: Shell, tmp_path: Path, change: dict[str, object], says: str, code: int
) -> None:
    file, proof = key_file(tmp_path / "new.key"), tmp_path / "proof.json"
    shell("keys", "prove", shell.owner, "--node-key", file, "--out", str(proof), secret=False)
    proof.write_text(json.dumps(json.loads(proof.read_text()) | change))
    told = shell("keys", "register", "--proof", str(proof), expect=code)
    assert says in told
    assert "tdmld keys prove" in told
    assert shell.backend.submitted == []


def test_revoke_is_confirmed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    told = shell("keys", "revoke", OLD.address, expect=Exit.USAGE)
    assert f"tdmld keys revoke {OLD.address} --yes" in told
    for answer, code in (("no\n", Exit.FAILED), ("yes\n", Exit.OK)):
        monkeypatch.setattr("tdmld.cli.keys.sys", Terminal(answer))
        shell("keys", "revoke", OLD.address, expect=code)
    assert shell.sent() == Revoke(OLD.public)


class Terminal:
    """`sys` where a person types an answer."""

    def __init__(self, answer: str) -> None:
        self.stdin = self.stderr = self
        self._answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self._answer

    def write(self, _: str) -> int:
        return 0

    def flush(self) -> None: ...


def test_revoke_with_yes_asks_nobody(shell: Shell) -> None:
    shell.backend.keys = (node_key_info(OLD.address, epochs=(2, 3)),)
    told = shell("keys", "revoke", OLD.address, "--yes")
    assert shell.sent() == Revoke(OLD.public)
    assert "until epoch 3 is over" in told


def test_a_key_of_others_or_revoked_before_is_refused(shell: Shell) -> None:
    told = shell("keys", "revoke", NEW.address, "--yes", expect=Exit.REFUSED)
    assert "is not registered to" in told
    shell.backend.keys = (node_key_info(OLD.address, revoked=5),)
    told = shell("keys", "revoke", OLD.address, "--yes", expect=Exit.REFUSED)
    assert "was revoked at height 5" in told


def test_spans_of_time() -> None:
    assert [span(seconds) for seconds in (-1, 0.4, 59, 3600, 3661, 90061)] == [
        "0 s",
        "0 s",
        "59 s",
        "1 h",
        "1 h 1 min",
        "1 d 1 h",
    ]
