"""`tdmld light`: what it says of a good proof, and how it ends on a bad one."""

import json
from pathlib import Path

import pytest
import trio

from tdmld.chain.blocks import Kind, block_hash
from tdmld.chain.crypto import sha256
from tdmld.chain.genesis import genesis_bytes
from tdmld.chain.light import bundle_bytes
from tdmld.cli.app import run
from tdmld.cli.exits import Exit
from tdmld.node.finality import Finality
from tdmld.node.prover import prove
from tdmld.node.store import ChainStore
from tests.node.chainkit import GENESIS, OWNERS, certificate, make_genesis, next_block, transfer
from tests.node.lonechain import CHANGING, CHANGING_PAYEE, grow

PAID = OWNERS[3].address
NOBODY = OWNERS[1].address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genesis document, proofs, and in `head` a checkpoint."""
    path = tmp_path_factory.mktemp("light")
    (path / "genesis.json").write_bytes(genesis_bytes(GENESIS))
    (path / "other.json").write_bytes(genesis_bytes(make_genesis("another")))
    with ChainStore(path / "chain", GENESIS) as store:
        for body in ([transfer(0, 0)], [], [], []):
            block = next_block(store, body)
            store.apply(block, certificate(Kind.FINALIZE, block))
            if store.height == 2:
                (path / "head").write_text(f"2:{block_hash(block.header).hex()}")
        for name, kind, key, checkpoint in (
            ("paid", "account", PAID, 0),
            ("trusted", "account", PAID, 2),
            ("tx", "transaction", sha256(transfer(0, 0)).hex(), 0),
            ("block", "block", "1", 0),
            ("none", "audit", f"{'00' * 32}/0/3", 0),
        ):
            bundle = trio.run(prove, Finality(store), kind, key, checkpoint)
            (path / name).write_bytes(bundle_bytes(bundle))
    return path


def verify(folder: Path, *arguments: str, genesis: str = "genesis.json") -> int:
    file, *rest = arguments
    return run(["light", "verify", str(folder / file), *rest, "--genesis", str(folder / genesis)])


def test_a_good_proof_says_what_it_proves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder, "paid", f"account/{PAID}") == Exit.OK
    said = capsys.readouterr().out
    assert said.startswith(f"proven: {PAID} has 1005, and 10 + 0 staked, after block ")
    assert "vouched for by block 4" in said
    assert verify(folder, "tx", "--json") == Exit.OK
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["ok"], told["height"]) == ("transaction", True, 1)
    assert told["record"]["Transfer"]["amount"] == 5
    assert verify(folder, "block", "block/1") == Exit.OK
    assert verify(folder, "none") == Exit.OK
    assert "there is no such audit" in capsys.readouterr().out


def test_a_checkpoint_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (folder / "head").read_text()
    assert verify(folder, "trusted", "--checkpoint", good) == Exit.OK
    assert verify(folder, "trusted", "--checkpoint", f"2:{'05' * 32}") == Exit.REFUSED
    assert "another chain" in capsys.readouterr().err
    assert verify(folder, "paid", "--checkpoint", good) == Exit.REFUSED
    assert f"fetch it again with --checkpoint {good}" in capsys.readouterr().err
    assert verify(folder, "paid", "--checkpoint", "2:zz") == Exit.USAGE


# ---- validators that change: what is trusted, and how old it is ----------------------------------


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proofs of one account in epoch 6: from genesis, and from a block of epoch 3."""
    path = tmp_path_factory.mktemp("changing")
    (path / "genesis.json").write_bytes(genesis_bytes(CHANGING))
    with ChainStore(path / "chain", CHANGING) as store:
        grow(store, 33)
        leaf, block = store.history_leaf(17), store.block(17)
        assert leaf is not None
        assert block is not None
        (path / "trusted").write_text(f"17:{leaf[0].hex()}")
        (path / "time").write_text(str(block.header.time_ms))
        for name, checkpoint in (("first", 0), ("later", 17)):
            bundle = trio.run(prove, Finality(store), "account", CHANGING_PAYEE, checkpoint)
            (path / name).write_bytes(bundle_bytes(bundle))
    return path


def at(monkeypatch: pytest.MonkeyPatch, now_ms: int) -> None:
    monkeypatch.setattr("tdmld.cli.light.now_ms", lambda: now_ms)


def test_what_a_proof_rests_on_is_said(
    changing: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROOF-7: a warning, not a refusal."""
    trusted, time_ms = (changing / "trusted").read_text(), int((changing / "time").read_text())
    seconds = CHANGING.parameters.unbonding[1]
    at(monkeypatch, time_ms + 1000 * seconds)
    young = ("later", f"account/{CHANGING_PAYEE}", "--checkpoint", trusted)
    assert verify(changing, *young) == Exit.OK
    said = capsys.readouterr().out
    assert "trusting block 17 of 2026-01-01T00:00:0" in said
    assert "warning" not in said
    at(monkeypatch, time_ms + 1000 * seconds + 1)
    assert verify(changing, *young) == Exit.OK
    said = capsys.readouterr().out
    assert f"warning: that is longer ago than the unbonding period of {seconds} s" in said
    assert verify(changing, *young, "--json") == Exit.OK
    told = json.loads(capsys.readouterr().out)
    assert (told["trusted_height"], told["trust_expired"]) == (17, True)
    assert told["unbonding_seconds"] == seconds


def test_genesis_is_trusted_while_it_is_young(
    changing: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for later, expired in ((0, False), (10**6, True)):
        at(monkeypatch, CHANGING.time_ms + later)
        assert verify(changing, "first", "--json") == Exit.OK
        told = json.loads(capsys.readouterr().out)
        assert (told["trusted_height"], told["trust_expired"]) == (0, expired)
        assert told["trusted_time"] == "2026-01-01T00:00:00.000Z"
    assert verify(changing, "first") == Exit.OK
    assert "trusting genesis of" in capsys.readouterr().out


def test_a_proof_from_a_checkpoint_is_none_from_genesis(
    changing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trusted = (changing / "trusted").read_text()
    assert verify(changing, "later") == Exit.REFUSED
    assert "none is trusted here" in capsys.readouterr().err
    assert verify(changing, "first", "--checkpoint", trusted) == Exit.REFUSED
    assert f"--checkpoint {trusted}" in capsys.readouterr().err
    false = f"17:{'05' * 32}"
    assert verify(changing, "later", "--checkpoint", false) == Exit.REFUSED
    assert "another chain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "genesis", "code", "why"),
    [
        (("paid", f"account/{NOBODY}"), "genesis.json", Exit.REFUSED, "something else"),
        (("paid", "block/1"), "genesis.json", Exit.REFUSED, "something else"),
        (("tx", f"account/{PAID}"), "genesis.json", Exit.REFUSED, "something else"),
        (("paid", "nonsense/1"), "genesis.json", Exit.USAGE, "can be proven"),
        (("paid",), "other.json", Exit.REFUSED, "of the chain"),
        (("genesis.json",), "genesis.json", Exit.REFUSED, "no proof bundle"),
        (("paid",), "missing.json", Exit.NOT_FOUND, "--genesis FILE"),
    ],
)
def test_what_does_not_hold_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    genesis: str,
    code: Exit,
    why: str,
) -> None:
    assert verify(folder, *arguments, genesis=genesis) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert why in told.err
