"""The chain database: one apply, a sign guard that survives, and errors that say what to do."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tdmld.chain.blocks import Kind, Vote
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.state import State
from tdmld.node.chainerrors import (
    ProtocolUnknown,
    SignGuardError,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    StoreMismatch,
)
from tdmld.node.store import ChainStore
from tests.node.chainkit import (
    GENESIS,
    KEYS,
    OWNERS,
    certificate,
    make_genesis,
    next_block,
    transfer,
    vote,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChainStore]:
    with ChainStore(tmp_path / "chain", GENESIS) as opened:
        yield opened


def balance(store: ChainStore, owner: int) -> int:
    return State(store.get).account(OWNERS[owner].public).balance


def record(store: ChainStore, *votes: Vote) -> list[Vote]:
    return store.record(KEYS[0].public, votes, (), ())


# ---- applying ------------------------------------------------------------------------------------


def test_a_height_is_known_at_once_with_its_root_and_its_history(
    store: ChainStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread applies: what was written is asked for before the head here has moved."""
    answers: list[tuple[bytes | None, bytes | None]] = []
    write = store._write

    def write_and_ask(*arguments: Any) -> None:
        answers.append((store.root_at(1), store.history_root(1)))
        write(*arguments)
        answers.append((store.root_at(1), store.history_root(1)))

    monkeypatch.setattr(store, "_write", write_and_ask)
    store.apply(next_block(store, [transfer(0, 0)]), None)
    assert answers == [(None, None), (store.root_at(1), store.history_root(1))]
    assert None not in answers[1]


def test_applying_executes_and_answers_questions(store: ChainStore) -> None:
    good, bad = transfer(0, 0), transfer(1, 7)
    block = next_block(store, [good, bad])
    applied = store.apply(block, certificate(Kind.FINALIZE, block))
    assert [receipt.ok for receipt in applied.receipts] == [True, False]
    assert balance(store, 0) == 1000 - 5 - 10
    assert balance(store, 3) == 1005
    assert store.block(1) == block
    assert store.certificate(1) == certificate(Kind.FINALIZE, block)
    receipt = store.receipt(sha256(bad))
    assert receipt is not None
    assert (receipt.height, receipt.ok) == (1, False)
    assert "nonce" in receipt.reason
    assert store.root_at(1) == store.state_root != store.root_at(0)


def test_what_succeeded_stays_so_when_a_leader_puts_it_into_a_block_again(
    store: ChainStore,
) -> None:
    late, once = transfer(0, 1), transfer(0, 0)
    store.apply(next_block(store, [late, once, once, late]), None)
    store.apply(next_block(store, [once]), None)
    for raw in (late, once):
        receipt = store.receipt(sha256(raw))
        assert receipt is not None
        assert (receipt.height, receipt.ok) == (1, True)
    assert [outcome.ok for outcome in store.outcomes(1) or ()] == [False, True, False, True]
    assert [outcome.ok for outcome in store.outcomes(2) or ()] == [False]
    assert store.outcomes(3) is None


def test_the_chain_is_closed_when_a_header_commits_the_state(store: ChainStore) -> None:
    assert store.closed
    store.apply(next_block(store, [transfer(0, 0)]), None)
    assert not store.closed
    store.apply(next_block(store), None)
    assert store.closed
    store.apply(next_block(store), None)
    assert store.closed


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    with ChainStore(tmp_path, GENESIS) as store:
        store.apply(next_block(store, [transfer(0, 0)]), None)
        head = store.head
    with ChainStore(tmp_path, GENESIS) as store:
        assert store.head == head
        store.apply(next_block(store, [transfer(0, 1)]), None)
        assert balance(store, 3) == 1010


def test_two_stores_compute_the_same_roots(tmp_path: Path) -> None:
    with ChainStore(tmp_path / "a", GENESIS) as one, ChainStore(tmp_path / "b", GENESIS) as two:
        for nonce in range(3):
            block = next_block(one, [transfer(0, nonce), transfer(2, nonce, 3, 1)])
            one.apply(block, None)
            two.apply(block, None)
            assert one.head == two.head


def test_a_block_that_does_not_follow_is_refused_and_nothing_is_written(store: ChainStore) -> None:
    before = store.head
    for changes in ({"height": 2}, {"parent": ZERO_HASH}, {"state_root": ZERO_HASH}):
        with pytest.raises(InvariantViolation):
            store.apply(next_block(store, [transfer(0, 0)], **changes), None)
    with pytest.raises(InvariantViolation, match="VRF"):
        store.apply(next_block(store, proof=bytes(80)), None)
    with pytest.raises(InvariantViolation, match="quorum"):
        store.apply(next_block(store, [b"no transaction"]), None)
    assert store.head == before
    assert store.block(1) is None


def test_an_unknown_protocol_stops_with_its_remedy(store: ChainStore) -> None:
    with pytest.raises(ProtocolUnknown, match="newer version"):
        store.apply(next_block(store, protocol=9), None)


# ---- the sign guard ------------------------------------------------------------------------------


def test_the_guard_refuses_what_contradicts_a_stored_vote(tmp_path: Path) -> None:
    with ChainStore(tmp_path, GENESIS) as store:
        first, second = next_block(store), next_block(store, [transfer(0, 0)])
        nullify = Vote(Kind.NULLIFY, 2, ZERO_HASH, 0, bytes(64))
        assert len(record(store, vote(Kind.NOTARIZE, first, 0), nullify)) == 2
        record(store, vote(Kind.NOTARIZE, first, 0))
    with ChainStore(tmp_path, GENESIS) as store:
        assert store.votes() == (vote(Kind.NOTARIZE, first, 0), nullify)
        with pytest.raises(SignGuardError, match="view 1"):
            record(store, vote(Kind.NOTARIZE, second, 0))
        with pytest.raises(SignGuardError, match="view 2"):
            record(store, Vote(Kind.FINALIZE, 2, b"\x05" * 32, 0, bytes(64)))
        assert len(store.votes()) == 2


def test_the_guard_refuses_contradictions_in_one_batch(store: ChainStore) -> None:
    block = next_block(store)
    nullify = Vote(Kind.NULLIFY, 1, ZERO_HASH, 0, bytes(64))
    with pytest.raises(SignGuardError):
        record(store, nullify, vote(Kind.FINALIZE, block, 0))
    assert store.votes() == ()


def test_the_guard_refuses_a_second_proposal_in_a_view(store: ChainStore) -> None:
    store.record(KEYS[1].public, (), [next_block(store)], ())
    with pytest.raises(SignGuardError):
        store.record(KEYS[1].public, (), [next_block(store, [transfer(0, 0)])], ())
    assert store.proposal(1) == next_block(store)
    assert store.bodies() == (next_block(store),)


def test_final_views_take_no_votes_and_keep_none(store: ChainStore) -> None:
    block = next_block(store)
    store.record(KEYS[0].public, [vote(Kind.NOTARIZE, block, 0)], (), [block])
    assert store.bodies() == (block,)
    store.apply(block, None)
    assert store.votes() == ()
    assert store.bodies() == ()
    assert record(store, vote(Kind.FINALIZE, block, 0)) == []


def test_certificates_are_kept_with_the_votes_until_their_view_is_final(store: ChainStore) -> None:
    block = next_block(store)
    known = certificate(Kind.NOTARIZE, block)
    store.record(KEYS[0].public, [vote(Kind.FINALIZE, block, 0)], (), (), [known])
    assert store.view_certificates() == (known,)
    store.apply(block, None)
    assert store.view_certificates() == ()
    store.record(KEYS[0].public, (), (), (), [known])
    assert store.view_certificates() == ()


def test_a_directory_belongs_to_the_key_that_voted(store: ChainStore) -> None:
    store.bind(KEYS[0].public)
    assert store.signer is None
    record(store, vote(Kind.NOTARIZE, next_block(store), 0))
    assert store.signer == KEYS[0].public
    with pytest.raises(StoreMismatch, match="own data directory"):
        store.bind(KEYS[1].public)


# ---- opening -------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_is_there(store: ChainStore) -> None:
    with pytest.raises(StoreLocked, match="another tdmld process"):
        ChainStore(store.path, GENESIS)
    program = (
        "import sys; from pathlib import Path; from tests.node.chainkit import GENESIS\n"
        "from tdmld.node.chainerrors import StoreLocked; from tdmld.node.store import ChainStore\n"
        "try: ChainStore(Path(sys.argv[1]), GENESIS)\n"
        "except StoreLocked as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(store.path)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[2],
    )
    assert "another tdmld process" in said.stdout


def test_another_chains_directory_is_refused(tmp_path: Path) -> None:
    ChainStore(tmp_path, GENESIS).close()
    with pytest.raises(StoreMismatch, match="genesis"):
        ChainStore(tmp_path, make_genesis("another"))


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    ChainStore(tmp_path, GENESIS).close()
    for manifest in tmp_path.glob("MANIFEST*"):
        manifest.write_bytes(b"garbage")
    with pytest.raises(StoreCorrupt, match="move it away"):
        ChainStore(tmp_path, GENESIS)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    with ChainStore(tmp_path, GENESIS) as store:
        store._db.put(b"H", b"\x91\x00")
    with pytest.raises(StoreCorrupt, match="head is damaged"):
        ChainStore(tmp_path, GENESIS)


def test_another_versions_directory_is_refused(tmp_path: Path) -> None:
    with ChainStore(tmp_path, GENESIS) as store:
        store._db.put(b"V", b"tdmld-chain-0")
    with pytest.raises(StoreMismatch, match="another version"):
        ChainStore(tmp_path, GENESIS)


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "chain").write_text("x")
    with pytest.raises(StoreError, match="cannot make"):
        ChainStore(tmp_path / "chain", GENESIS)


# ---- specs ---------------------------------------------------------------------------------------


def test_specs_are_kept_by_id_and_bounded(store: ChainStore) -> None:
    spec = store.put_spec(b"{}")
    assert spec == sha256(b"{}")
    assert store.get_spec(spec) == b"{}"
    assert store.get_spec(ZERO_HASH) is None
    with pytest.raises(StoreError, match="at most"):
        store.put_spec(bytes(70_000))


def test_a_block_is_what_was_signed(store: ChainStore) -> None:
    block = next_block(store)
    assert msgspec.structs.replace(block, transactions=()) == block
