"""Beginning with another node's state: what is taken, what is refused, and what a crash leaves."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from tdmld.chain.blocks import block_hash
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import sha256
from tdmld.chain.epochs import genesis_set
from tdmld.chain.errors import InvariantViolation, ProofRefused
from tdmld.chain.ledger import recount
from tdmld.chain.state import State
from tdmld.node.chainerrors import CheckpointMismatch, SnapshotUnavailable
from tdmld.node.chainwire import Snapshot, SyncAnswer
from tdmld.node.finality import Finality
from tdmld.node.snapshot import SnapshotServer, check_snapshot
from tdmld.node.store import ChainStore
from tdmld.node.sync import SyncServer
from tests.node.lonechain import GENESIS, extend, finalization, grow, pay
from tests.node.snapkit import checkpoint, follow, join, nobody, pipe, same

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChainStore]:
    with ChainStore(tmp_path_factory.mktemp("served") / "chain", GENESIS) as store:
        grow(store, 60)
        yield store


# ---- joining -------------------------------------------------------------------------------------


def test_a_new_node_joins_by_snapshot_and_goes_on(served: ChainStore, tmp_path: Path) -> None:
    with ChainStore(tmp_path / "new", GENESIS) as store:
        join(store, pipe(served))
        assert store.base == store.height == served.height - 1
        follow(store, served)
        same(store, served)
        recount(store.state_items())
    with ChainStore(tmp_path / "new", GENESIS) as store:
        assert (store.base, store.lowest) == (served.height - 1, served.height)
        same(store, served)


def test_it_joins_while_the_chain_runs(tmp_path: Path) -> None:
    """The copy stays what it was while blocks are applied between its parts."""
    with ChainStore(tmp_path / "old", GENESIS) as old, ChainStore(tmp_path / "new", GENESIS) as new:
        grow(old, 30)

        def meanwhile(answer: SyncAnswer) -> SyncAnswer:
            if isinstance(answer, Snapshot):
                for _ in range(20):
                    extend(old, [pay(old.height - 1)])
            return answer

        join(new, pipe(old, meanwhile))
        assert new.base == 29
        follow(new, old)
        same(new, old)


def test_a_node_that_joined_gives_snapshots_and_proofs_itself(
    served: ChainStore, tmp_path: Path
) -> None:
    with ChainStore(tmp_path / "new", GENESIS) as new:
        join(new, pipe(served))
        follow(new, served)
        for _ in range(3):
            block = extend(served)
            new.apply(block, finalization(served, block.header))
        with ChainStore(tmp_path / "third", GENESIS) as third:
            join(third, pipe(new))
            follow(third, new)
            same(third, served)


def lies(kind: str) -> Callable[[SyncAnswer], SyncAnswer]:
    def change(answer: SyncAnswer) -> SyncAnswer:
        if not isinstance(answer, Snapshot):
            if kind == "an item" and hasattr(answer, "items"):
                (key, value), *rest = answer.items
                return replace(answer, items=((key, value + b"\0"), *rest))
            if kind == "an item left out" and hasattr(answer, "items"):
                return replace(answer, items=answer.items[1:])
            return answer
        match kind:
            case "the mix":
                return replace(answer, mix=ZERO_HASH)
            case "the peaks":
                return replace(answer, peaks=(ZERO_HASH, *answer.peaks[1:]))
            case "the view":
                return replace(answer, header=replace(answer.header, view=5))
            case "the certificate":
                return replace(answer, certificate=replace(answer.certificate, view=1))
            case "the headers":
                return replace(answer, headers=())
        return answer

    return change


@pytest.mark.parametrize(
    "lie",
    ["the mix", "the peaks", "the view", "the certificate", "the headers", "an item",
     "an item left out"],
)  # fmt: skip
def test_a_lying_peer_is_left_for_an_honest_one(
    served: ChainStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    monkeypatch.setattr("tdmld.node.snapshot.JOIN_SECONDS", 0.1)
    monkeypatch.setattr("tdmld.node.snapshot.ROUND_SECONDS", 0.05)
    with ChainStore(tmp_path / "new", GENESIS) as store:
        with pytest.raises(SnapshotUnavailable):
            join(store, pipe(served, lies(lie)))
        assert store.height == 0
        join(store, pipe(served, lies(lie)), pipe(served))
        follow(store, served)
        same(store, served)


def test_nobody_honest_is_said_and_leaves_genesis(
    served: ChainStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdmld.node.snapshot.JOIN_SECONDS", 0.1)
    monkeypatch.setattr("tdmld.node.snapshot.ROUND_SECONDS", 0.05)
    with ChainStore(tmp_path / "new", GENESIS) as store:
        with pytest.raises(SnapshotUnavailable, match="another root"):
            join(store, pipe(served, lies("an item")))
        assert store.height == 0
        follow(store, served)
        same(store, served)


def test_a_broken_off_snapshot_is_forgotten(served: ChainStore, tmp_path: Path) -> None:
    with ChainStore(tmp_path / "new", GENESIS) as store:
        root = store.state_root
        store.begin_snapshot()
        store.take_state(list(served.state_items())[:50])
    with ChainStore(tmp_path / "new", GENESIS) as store:
        assert (store.height, store.state_root, store.taken_root()) == (0, root, root)
        follow(store, served)
        same(store, served)


def test_no_validators_are_believed_while_a_state_is_taken(tmp_path: Path) -> None:
    """Peers are chosen meanwhile; a set that a liar gave is not remembered."""
    false = State(dict[bytes, bytes]().get)
    false.put_validator_set(replace(genesis_set(GENESIS, 0), seats=()))
    with ChainStore(tmp_path / "new", GENESIS) as store:
        store.begin_snapshot()
        store.take_state([(key, value or b"") for key, value in false.changes.items()])
        assert store.committee(0) is None
        store.drop_snapshot()
        committee = store.committee(0)
        assert committee is not None
        assert committee.nodes == tuple(seat.node for seat in genesis_set(GENESIS, 0).seats)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [1, 20, 58, 59])
def test_the_right_checkpoint_is_passed(served: ChainStore, tmp_path: Path, height: int) -> None:
    trusted = checkpoint(served, height)
    for name, by in (("snapshot", join), ("blocks", None)):
        with ChainStore(tmp_path / name, GENESIS, checkpoint=trusted) as store:
            if by is not None:
                by(store, pipe(served))
            follow(store, served)
            same(store, served)
        ChainStore(tmp_path / name, GENESIS, checkpoint=trusted).close()


@pytest.mark.parametrize("height", [1, 20, 58, 59])
def test_a_chain_without_the_checkpoint_ends_the_node(
    served: ChainStore, tmp_path: Path, height: int
) -> None:
    false = Checkpoint(height, b"\x05" * 32)
    with (
        ChainStore(tmp_path / "snapshot", GENESIS, checkpoint=false) as store,
        pytest.raises(CheckpointMismatch, match=r"checkpoint in tdmld\.toml"),
    ):
        join(store, pipe(served))
    with ChainStore(tmp_path / "blocks", GENESIS, checkpoint=false) as store:
        with pytest.raises(CheckpointMismatch):
            follow(store, served)
        assert store.height == height - 1
    with ChainStore(tmp_path / "late", GENESIS) as store:
        follow(store, served)
    with pytest.raises(CheckpointMismatch):
        ChainStore(tmp_path / "late", GENESIS, checkpoint=false)


def test_a_snapshot_below_the_checkpoint_is_not_taken(served: ChainStore, tmp_path: Path) -> None:
    with ChainStore(tmp_path / "new", GENESIS, checkpoint=Checkpoint(10**6, ZERO_HASH)) as store:
        server = SnapshotServer(Finality(served))
        offered = trio.run(server.offer, 0)
        server.close()
        assert isinstance(offered, Snapshot)
        with pytest.raises(ProofRefused, match="below the checkpoint"):
            check_snapshot(store, genesis_set(GENESIS, 0), offered)


# ---- pruning -------------------------------------------------------------------------------------


def test_old_blocks_go_and_everything_else_stays(tmp_path: Path) -> None:
    with (
        ChainStore(tmp_path / "whole", GENESIS) as whole,
        ChainStore(tmp_path / "short", GENESIS, keep=3) as short,
    ):
        for height in range(60):
            block = extend(whole, [pay(height)])
            short.apply(block, finalization(whole, block.header))
        assert short.lowest == 60 - 10 + 1, "never fewer than the unbonding period's"
        assert short.block(50) is None
        assert short.certificate(50) is None
        assert short.block(51) == whole.block(51)
        assert short.receipt(sha256(pay(3))) == whole.receipt(sha256(pay(3)))
        assert short.history_proof(7, 59) == whole.history_proof(7, 59)
        same(short, whole)
        answer = SyncServer(short, nobody, lambda _: None).blocks(20, 64)
        assert (answer.blocks, answer.lowest, answer.height) == ((), 51, 60)
    with ChainStore(tmp_path / "short", GENESIS) as short:
        assert short.lowest == 51


def test_young_blocks_stay_though_there_are_many(tmp_path: Path) -> None:
    """The unbonding period is over when both its blocks and its seconds are."""
    with ChainStore(tmp_path / "chain", GENESIS, keep=3) as store:
        for _ in range(30):
            extend(store, step_ms=10)
        assert store.lowest == 1
        extend(store, step_ms=2000)
        assert store.lowest == 1 + 16
        extend(store)
        assert store.lowest == 23


# ---- kill -9 -------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from tests.node.lonechain import GENESIS, ChainStore, extend, pay
with ChainStore(Path(sys.argv[1]), GENESIS, keep=3) as store:
    print("ready", flush=True)
    while True:
        extend(store, [pay(store.height)])
"""


def test_twenty_kills_leave_head_state_tree_and_receipts_in_agreement(tmp_path: Path) -> None:
    seen = 0
    for round in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "chain")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.01 + 0.007 * round)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with ChainStore(tmp_path / "chain", GENESIS, keep=3) as store:
            height = store.height
            assert height >= seen, "an applied block is lost to no kill of the process"
            assert store.taken_root() == store.state_root == store.root_at(height)
            assert sum(1 for _ in store.state_items()) > 0
            recount(store.state_items())
            for nonce in range(height):
                receipt = store.receipt(sha256(pay(nonce)))
                assert receipt is not None
                assert (receipt.ok, receipt.height) == (True, nonce + 1)
            assert store.receipt(sha256(pay(height))) is None
            if height:
                newest = store.block(height)
                assert newest is not None
                assert block_hash(newest.header) == store.head.hash
                leaf = store.history_leaf(height)
                assert leaf is not None
                assert leaf[0] == store.head.hash
            extend(store, [pay(height)])
            seen = height + 1
    assert seen > 40


def test_a_snapshot_begins_only_with_an_empty_store(served: ChainStore) -> None:
    with pytest.raises(Exception, match="holds a chain already"):
        served.begin_snapshot()


def test_another_state_than_the_heads_is_not_begun_with(served: ChainStore, tmp_path: Path) -> None:
    with ChainStore(tmp_path / "new", GENESIS) as store:
        store.begin_snapshot()
        with pytest.raises(InvariantViolation):
            store.finish_snapshot(served.head, served.history_peaks(served.height))
