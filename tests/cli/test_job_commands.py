"""job, wallet, status, peers and rpc commands, through `main`, against a served fake node."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import Parameters
from tdmld.chain.market import slot_price
from tdmld.chain.offers import lock_of
from tdmld.chain.transactions import (
    Fetched,
    Offer,
    Transfer,
    decode_transaction,
    verify_transaction,
)
from tdmld.cli import main
from tdmld.cli.exits import Exit
from tdmld.keys import MINIMUM, create_owner_key
from tdmld.rpc.access import TOKEN_FILE, URL_FILE
from tdmld.rpc.staketypes import AskRow
from tdmld.rpc.types import ResultStatus
from tdmld.train.jobfile import load_job_file
from tdmld.train.spec import stage_parameters
from tests.rpc.conftest import serving_in_a_thread
from tests.rpc.fake import CHAIN_ID, JOB, NODES, FakeBackend, node_status

REAL_NODES = tuple(KeyPair(bytes([n]) * 32).address for n in (1, 2))


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("correct horse\n")
    return path


@pytest.fixture
def backend() -> FakeBackend:
    status = msgspec.structs.replace(node_status(), node=REAL_NODES[0], session=REAL_NODES[1])
    return FakeBackend(status=status)


@pytest.fixture
def node(tmp_path: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The data directory of a running node with an owner's keystore."""
    monkeypatch.delenv("TDMLD_API_INFO", raising=False)
    directory = tmp_path / "node"
    (directory / "run").mkdir(parents=True)
    create_owner_key(directory / "keys" / "owner.json", b"correct horse", MINIMUM)
    with serving_in_a_thread(backend) as running:
        (directory / TOKEN_FILE).write_text("admin\n")
        (directory / URL_FILE).write_text(running.server.url + "\n")
        yield directory


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

JOB_FILE = """
version = 1
name = "tiny"
family = "llama"
config = "config.json"
seed = 7
init = "seed"
privacy = "open"
class = "any"
[data]
text = "text.txt"
tokenizer = "bytes"
sequence = 16
heldout = "0.1"
[train]
steps = 20
micro_batches = 2
micro_batch_size = 2
precision = "fp32"
wire = "bf16"
schedule = { kind = "linear", warmup = 2, decay_from = 12, floor = "0.1" }
clip = { kind = "stage", norm = "1.0" }
[train.optimizer]
name = "adamw"
lr = "2e-3"
betas = ["0.9", "0.95"]
eps = "1e-8"
weight_decay = "0.1"
[pipeline]
cuts = [0, 2, 4]
lanes = { count = 1, mode = "sync" }
segment_steps = 5
unsettled = 8
state_every = 2
[money]
slot_price_max = 40000
standby_price = 4000
audit_rate = "0.25"
audit_price = 48000
deadline_blocks = 2000
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "text.txt").write_text("to be or not to be, " * 500)
    (folder / "job.toml").write_text(JOB_FILE)
    return folder / "job.toml"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def submit(
    capsys: pytest.CaptureFixture[str], node: Path, password: Path, file: Path, *more: str
) -> tuple[int, str, str]:
    return run(
        capsys, "job", "submit", file, "--data-dir", node, "--password-file", password, *more
    )


def test_submit_signs_the_offer_of_the_job_file(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    job_file: Path,
    backend: FakeBackend,
) -> None:
    code, out, err = submit(capsys, node, password, job_file)
    assert (code, out.strip()) == (Exit.OK, "77" * 32), err
    (raw,) = (bytes.fromhex(one) for one in backend.submitted)
    transaction = decode_transaction(raw, bytes.fromhex(CHAIN_ID))
    assert verify_transaction(transaction, bytes.fromhex(CHAIN_ID))
    offer = transaction.payload
    assert isinstance(offer, Offer)
    assert (transaction.nonce, transaction.fee) == (7, 10)
    assert (offer.rounds, offer.lanes, len(offer.stages)) == (4, 1, 2)
    assert offer.deadline == 4211 + 2000
    assert offer.tokens == 2 * 2 * 16 * 5
    ((spec, text_path, name),) = backend.published
    assert (len(spec), name) == (offer.spec_bytes, "tiny")
    assert text_path == str(job_file.parent / "text.txt")
    assert "privacy open" in err
    total = lock_of(offer, Parameters()).total + 10
    assert f"{total:,}" in err


def test_submit_in_json_has_only_json_on_stdout(
    capsys: pytest.CaptureFixture[str], node: Path, password: Path, job_file: Path
) -> None:
    code, out, _ = submit(capsys, node, password, job_file, "--json")
    document = json.loads(out)
    assert (code, document["job"], document["name"]) == (Exit.OK, "77" * 32, "tiny")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("steps = 20", "steps = 0", "train.steps"),
        ("steps = 20", "steps = 21", "pipeline.segment_steps"),
        ("cuts = [0, 2, 4]", "cuts = [0, 2, 5]", "pipeline.cuts"),
        ('family = "llama"', 'family = "bloom"', "bloom"),
        ("seed = 7", "sead = 7", "sead"),
        ('audit_rate = "0.25"', 'audit_rate = "2"', "audit_rate"),
        ('text = "text.txt"', 'text = "none.txt"', "text"),
        ("version = 1", "version = ", "job"),
    ],
)
def test_a_malformed_job_file_names_the_field_and_submits_nothing(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    job_file: Path,
    backend: FakeBackend,
    old: str,
    new: str,
    field: str,
) -> None:
    job_file.write_text(job_file.read_text().replace(old, new))
    code, out, err = submit(capsys, node, password, job_file)
    assert (code, out) == (Exit.USAGE, "")
    assert field in err
    assert "next:" in err
    assert not backend.published
    assert not backend.submitted


def test_too_little_money_is_told_before_anything_is_done(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    job_file: Path,
    backend: FakeBackend,
) -> None:
    backend.balance = 1000
    code, out, err = submit(capsys, node, password, job_file)
    assert (code, out) == (Exit.REFUSED, "")
    assert "are missing" in err
    assert "slot_price_max" in err
    assert not backend.published


def test_an_offer_that_the_chain_refuses_is_an_error_with_its_reason(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    job_file: Path,
    backend: FakeBackend,
) -> None:
    backend.outcome = "source: this node key is not registered"
    code, out, err = submit(capsys, node, password, job_file)
    assert (code, out) == (Exit.REFUSED, "")
    assert "this node key is not registered" in err


def test_a_wrong_password_submits_nothing(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    job_file: Path,
    backend: FakeBackend,
) -> None:
    password.write_text("wrong\n")
    code, _, err = submit(capsys, node, password, job_file)
    assert code == Exit.REFUSED
    assert "the password is wrong" in err
    assert not backend.submitted


def test_a_syncing_node_takes_no_job(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    job_file: Path,
    backend: FakeBackend,
) -> None:
    backend.status = msgspec.structs.replace(backend.status, syncing=True)
    code, _, err = submit(capsys, node, password, job_file)
    assert code == Exit.FAILED
    assert "catching up" in err


@pytest.mark.parametrize(
    ("state", "expected"), [("closed", Exit.OK), ("refunded", Exit.FAILED), ("active", Exit.OK)]
)
def test_watch_ends_with_the_job_and_its_verdict(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    backend: FakeBackend,
    state: str,
    expected: Exit,
) -> None:
    summary = msgspec.structs.replace(backend.detail.summary, state=state)
    backend.detail = msgspec.structs.replace(backend.detail, summary=summary)
    code, out, _ = run(capsys, "job", "watch", "a91f", "--data-dir", node, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == expected
    assert lines[-1]["summary"]["state"] == state
    assert [line["segment"] for line in lines[:-1]] == ([0, 1, 2] if state == "active" else [])


def test_job_status_for_people_and_for_programs(
    capsys: pytest.CaptureFixture[str], node: Path
) -> None:
    code, out, _ = run(capsys, "job", "status", JOB, "--data-dir", node)
    assert code == Exit.OK
    assert "714,000 of 2,410,000 (30 %)" in out
    assert "2 passed, 1 committed" in out
    _, out, _ = run(capsys, "job", "status", JOB[:6], "--json", "--data-dir", node)
    assert json.loads(out)["summary"]["id"] == JOB


def test_job_list(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    code, out, _ = run(capsys, "job", "list", "--data-dir", node)
    assert code == Exit.OK
    assert "plays-3m" in out
    _, out, _ = run(capsys, "job", "list", "--json", "--data-dir", node)
    assert [job["id"] for job in json.loads(out)] == [JOB]


@pytest.mark.parametrize(
    ("given", "code"), [("beef", Exit.NOT_FOUND), ("0" * 64, Exit.NOT_FOUND), ("xyz", Exit.USAGE)]
)
def test_an_unknown_job_is_told(
    capsys: pytest.CaptureFixture[str], node: Path, given: str, code: Exit
) -> None:
    found, out, err = run(capsys, "job", "status", given, "--data-dir", node)
    assert (found, out) == (code, "")
    assert err.startswith("tdmld: ")


def test_fetch_signs_the_receipt_of_the_submitter(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    tmp_path: Path,
    backend: FakeBackend,
) -> None:
    from tdmld.cli.node import owner

    summary = msgspec.structs.replace(
        backend.detail.summary, state="finishing", submitter=owner(node)
    )
    backend.detail = msgspec.structs.replace(
        backend.detail,
        summary=summary,
        result=ResultStatus(id="9d" * 32, holders=NODES[:2], fetched=False),
    )
    target = tmp_path / "model"
    code, out, _ = run(
        capsys, "job", "fetch", "a91f", target, "--data-dir", node,
        "--password-file", password, "--json",
    )  # fmt: skip
    document = json.loads(out)
    assert (code, document["directory"]) == (Exit.OK, str(target))
    assert document["receipt"] == "77" * 32
    transaction = decode_transaction(bytes.fromhex(backend.submitted[0]), bytes.fromhex(CHAIN_ID))
    assert transaction.payload == Fetched(bytes.fromhex(JOB))


def test_fetch_by_somebody_else_signs_nothing(
    capsys: pytest.CaptureFixture[str], node: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    code, out, _ = run(
        capsys, "job", "fetch", "a91f", tmp_path / "model", "--data-dir", node, "--json"
    )
    assert (code, json.loads(out)["receipt"]) == (Exit.OK, None)
    assert not backend.submitted


def test_balance_of_the_owner_and_of_others(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    from tdmld.cli.node import owner

    code, out, _ = run(capsys, "wallet", "balance", "--data-dir", node, "--json")
    assert (code, json.loads(out)["address"]) == (Exit.OK, owner(node))
    code, out, _ = run(capsys, "wallet", "balance", REAL_NODES[0], "--data-dir", node)
    assert out.startswith(REAL_NODES[0])
    assert "1,000,000,000" in out
    code, _, err = run(capsys, "wallet", "balance", NODES[0] + "x", "--data-dir", node)
    assert code == Exit.USAGE
    assert "is not an address" in err


def test_send_moves_money(
    capsys: pytest.CaptureFixture[str], node: Path, password: Path, backend: FakeBackend
) -> None:
    code, out, _ = run(
        capsys, "wallet", "send", REAL_NODES[0], 1500, "--data-dir", node,
        "--password-file", password,
    )  # fmt: skip
    assert code == Exit.OK
    assert "final in block 3" in out
    transaction = decode_transaction(bytes.fromhex(backend.submitted[0]), bytes.fromhex(CHAIN_ID))
    assert transaction.payload == Transfer(KeyPair(b"\x01" * 32).public, 1500)


@pytest.mark.parametrize(("amount", "code"), [(0, 2), (-5, 2), (10**18, 5), ("x", 2)])
def test_send_refuses_odd_amounts(
    capsys: pytest.CaptureFixture[str],
    node: Path,
    password: Path,
    backend: FakeBackend,
    amount: object,
    code: int,
) -> None:
    found, _, err = run(
        capsys, "wallet", "send", REAL_NODES[0], amount, "--data-dir", node,
        "--password-file", password,
    )  # fmt: skip
    assert found == code, err
    assert not backend.submitted


def test_status_shows_work_or_why_there_is_none(
    capsys: pytest.CaptureFixture[str], node: Path, backend: FakeBackend
) -> None:
    code, out, _ = run(capsys, "status", "--data-dir", node)
    assert code == Exit.OK
    assert "live" in out
    assert "worker" in out
    backend.status = msgspec.structs.replace(
        backend.status, tasks=(), why_not_earning="no job needs 2 GiB; lower ask.price"
    )
    _, out, _ = run(capsys, "status", "--data-dir", node)
    assert "not earning: no job needs 2 GiB" in out
    _, out, _ = run(capsys, "status", "--data-dir", node, "--json")
    assert json.loads(out)["height"] == 4211


def test_peers(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    code, out, _ = run(capsys, "peers", "list", "--data-dir", node)
    assert code == Exit.OK
    assert "connected" in out
    _, out, _ = run(capsys, "peers", "list", "--data-dir", node, "--json")
    assert [peer["connected"] for peer in json.loads(out)] == [True, False]


def test_peers_are_connected_with_by_hand(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    there = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq"
    code, out, _ = run(capsys, "peers", "connect", there, "--data-dir", node)
    assert (code, "connected with 12D3Koo" in out) == (Exit.OK, True)
    code, _, err = run(capsys, "peers", "connect", there.replace("127", "192"), "--data-dir", node)
    assert code == Exit.REFUSED
    assert "Connection refused" in err


def test_peers_are_banned_and_let_in_again(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    code, out, _ = run(
        capsys, "peers", "ban", "192.0.2.0/24", "--for", "2h", "--reason", "spam",
        "--data-dir", node, "--json",
    )  # fmt: skip
    assert code == Exit.OK
    assert json.loads(out)["until"] == "2026-01-01T02:00:00.000Z"
    _, out, _ = run(capsys, "peers", "bans", "--data-dir", node)
    assert "192.0.2.0/24" in out
    assert "spam" in out
    _, out, _ = run(capsys, "peers", "list", "--data-dir", node)
    assert "1 banned: tdmld peers bans" in out
    assert run(capsys, "peers", "unban", "192.0.2.0/24", "--data-dir", node)[0] == Exit.OK
    code, _, err = run(capsys, "peers", "unban", "192.0.2.0/24", "--data-dir", node)
    assert (code, "is not banned" in err) == (Exit.NOT_FOUND, True)
    for wrong in ("soon", "0s", "2 h", "-1h", "9999999d"):
        code, _, err = run(capsys, "peers", "ban", "192.0.2.7", "--for", wrong, "--data-dir", node)
        assert (code, "write it like" in err or "--for" in err) == (Exit.USAGE, True)


@pytest.mark.parametrize("params", [["2"], ["[2]"], ['{"height": 2}']])
def test_rpc_calls_any_method(
    capsys: pytest.CaptureFixture[str], node: Path, params: list[str]
) -> None:
    code, out, _ = run(capsys, "rpc", "chain_block", *params, "--data-dir", node)
    assert (code, json.loads(out)["height"]) == (Exit.OK, 2)


def test_rpc_takes_digits_of_an_id_as_text(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    code, _, err = run(capsys, "rpc", "job_status", "1" * 64, "--data-dir", node)
    assert code == Exit.NOT_FOUND, err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rpc", "nope"], Exit.FAILED, "rpc.discover"),
        (["rpc", "chain_block", "x"], Exit.USAGE, "height"),
        (["rpc", "chain_block", "9"], Exit.NOT_FOUND, "no block 9"),
    ],
)
def test_errors_of_the_node_become_exit_codes(
    capsys: pytest.CaptureFixture[str], node: Path, arguments: list[str], code: Exit, words: str
) -> None:
    found, out, err = run(capsys, *arguments, "--data-dir", node)
    assert (found, out) == (code, "")
    assert words in err


def test_a_wrong_token_is_refused(capsys: pytest.CaptureFixture[str], node: Path) -> None:
    (node / TOKEN_FILE).write_text("wrong\n")
    code, _, err = run(capsys, "status", "--data-dir", node)
    assert code == Exit.REFUSED
    assert "token" in err


def test_a_node_that_is_down_says_how_to_start_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, node: Path
) -> None:
    (node / URL_FILE).write_text("http://127.0.0.1:9\n")
    code, _, err = run(capsys, "status", "--data-dir", node)
    assert code == Exit.UNREACHABLE
    assert "tdmld run" in err
    (node / URL_FILE).unlink()
    code, _, err = run(capsys, "job", "list", "--data-dir", node)
    assert code == Exit.UNREACHABLE
    assert f"tdmld run --data-dir {node}" in err
    code, _, err = run(capsys, "status", "--data-dir", tmp_path / "nothing")
    assert code == Exit.UNREACHABLE
    assert "tdmld init" in err


def test_the_environment_names_a_remote_node(
    capsys: pytest.CaptureFixture[str], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (node / URL_FILE).read_text().strip()
    monkeypatch.setenv("TDMLD_API_INFO", f"reader:{url}")
    code, out, _ = run(capsys, "status", "--json")
    assert (code, json.loads(out)["height"]) == (Exit.OK, 4211)
    code, _, err = run(capsys, "rpc", "admin_stop")
    assert code == Exit.REFUSED
    assert "needs scope admin" in err


def test_an_estimate_counts_the_asks_that_fit_each_stage(
    capsys: pytest.CaptureFixture[str], node: Path, job_file: Path, backend: FakeBackend
) -> None:
    def ask(price: int, memory: int) -> AskRow:
        return AskRow(
            node=NODES[0], price=str(price), device_class="cpu-x", memory=memory, until=99
        )

    options = ("--gflops", "1", "--asks", "--json", "--data-dir", node)
    backend.asks = (ask(100_000, 1 << 40), ask(50_000, 1 << 20))
    code, out, _ = run(capsys, "job", "estimate", job_file, *options)
    asks = json.loads(out)["asks"]
    assert code == 0
    assert asks["standing"] == 2
    assert [stage["fitting"] for stage in asks["stages"]] == [1, 1]
    spec = load_job_file(job_file).spec
    expected = sum(slot_price(100_000, stage_parameters(spec, n), 5 * 2 * 2 * 16) for n in (0, 1))
    assert asks["price_now"] == 4 * expected
    backend.asks = ()
    _, out, _ = run(capsys, "job", "estimate", job_file, *options)
    assert json.loads(out)["asks"]["price_now"] is None
