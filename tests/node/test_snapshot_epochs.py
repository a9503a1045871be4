"""Beginning with a snapshot where the validators change: every epoch's end is followed."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from tdmld.chain.codec import encode
from tdmld.chain.genesis import chain_id
from tdmld.chain.light import Bundle, check_bundle
from tdmld.chain.state import State
from tdmld.node.chainerrors import NotProvable, SnapshotUnavailable
from tdmld.node.chainservice import ChainService
from tdmld.node.chainwire import Protocols, Spec, StateItems, SyncAnswer, Turns
from tdmld.node.finality import Finality
from tdmld.node.prover import prove
from tdmld.node.snapshot import SnapshotClient
from tdmld.node.store import ChainStore
from tdmld.p2p import PeerInfo, open_host
from tests.node.lonechain import CHANGING, CHANGING_PAYEE, extend, finalization, grow
from tests.node.snapkit import checkpoint, follow, join, pipe, same

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChainStore]:
    """Of 12 epochs, each with other validators; the head is in the middle of one."""
    with ChainStore(tmp_path_factory.mktemp("changed") / "chain", CHANGING) as store:
        grow(store, 58)
        yield store


def prove_account(store: ChainStore, checkpoint: int = 0) -> Bundle:
    return trio.run(prove, Finality(store), "account", CHANGING_PAYEE, checkpoint)


def test_a_snapshot_is_joined_over_the_ends_of_all_epochs(
    changed: ChainStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page after page (SNAP-1); what was learned serves light clients and other nodes (SNAP-5)."""
    monkeypatch.setattr("tdmld.node.snapshot.TURNS", 3)
    with ChainStore(tmp_path / "new", CHANGING) as new:
        join(new, pipe(changed))
        assert new.base > 50
        follow(new, changed)
        same(new, changed)
    with ChainStore(tmp_path / "new", CHANGING) as new:
        for epoch in range(1, 11):
            assert new.turn(epoch) == changed.turn(epoch) is not None
        proven = check_bundle(prove_account(new), CHANGING)
        assert proven == check_bundle(prove_account(changed), CHANGING)
        head = checkpoint(new, new.base + 1)
        check_bundle(prove_account(new, new.base + 1), CHANGING, head)
        with pytest.raises(NotProvable, match="began with a snapshot"):
            prove_account(new, 20)
        with ChainStore(tmp_path / "third", CHANGING) as third:
            grow(new, 13)
            join(third, pipe(new))
            assert third.base > 60
            follow(third, new)
            same(third, new)


@pytest.mark.parametrize("blocks", [1, 2, 4, 6, 9, 11, 14, 16, 21])
def test_a_young_chain_is_joined_at_any_height(tmp_path: Path, blocks: int) -> None:
    with (
        ChainStore(tmp_path / "old", CHANGING) as old,
        ChainStore(tmp_path / "new", CHANGING) as new,
    ):
        grow(old, blocks + 1)
        if old.closed:
            extend(old)
            join(new, pipe(old))
        follow(new, old)
        same(new, old)


def about_turns(kind: str) -> Callable[[SyncAnswer], SyncAnswer]:
    """Lies about who validated."""

    def change(answer: SyncAnswer) -> SyncAnswer:
        if not isinstance(answer, Turns):
            return answer
        first, second, *rest = answer.turns
        signatures = first.certificate.signatures
        match kind:
            case "no turn":
                return Turns(())
            case "a turn skipped":
                return Turns((second, *rest))
            case "the first turn twice":
                return Turns((first, first, *rest))
            case "turns swapped":
                return Turns((second, first, *rest))
            case "another set":
                return Turns((replace(first, validators=second.validators), second, *rest))
            case "a signature missing":
                fewer = replace(first.certificate, signatures=signatures[:3])
                return Turns((replace(first, certificate=fewer), second, *rest))
            case "a signature altered":
                voter, raw = signatures[0]
                rows = ((voter, raw[:-1] + bytes([raw[-1] ^ 1])), *signatures[1:])
                forged = replace(first.certificate, signatures=rows)
                return Turns((replace(first, certificate=forged), second, *rest))
        return Spec(b"")

    return change


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ("no turn", "does not show how epoch 1 ended"),
        ("a turn skipped", "where the last of epoch 1 must stand"),
        ("the first turn twice", "where the last of epoch 2 must stand"),
        ("turns swapped", "where the last of epoch 1 must stand"),
        ("another set", "not those that the header names"),
        ("a signature missing", "not signed"),
        ("a signature altered", "not signed"),
        ("an answer to something else", "does not show how epoch 1 ended"),
    ],
)
def test_a_peer_that_lies_about_the_validators_is_left_for_an_honest_one(
    changed: ChainStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str, why: str
) -> None:
    monkeypatch.setattr("tdmld.node.snapshot.JOIN_SECONDS", 0.1)
    monkeypatch.setattr("tdmld.node.snapshot.ROUND_SECONDS", 0.05)
    with ChainStore(tmp_path / "new", CHANGING) as new:
        with pytest.raises(SnapshotUnavailable, match=why):
            join(new, pipe(changed, about_turns(lie)))
        assert (new.height, new.turn(1)) == (0, None)
        join(new, pipe(changed, about_turns(lie)), pipe(changed))
        follow(new, changed)
        same(new, changed)


def test_what_a_false_chain_showed_is_not_passed_on(
    changed: ChainStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no snapshot is joined after all, and every block is executed."""
    monkeypatch.setattr("tdmld.node.snapshot.JOIN_SECONDS", 0.1)
    monkeypatch.setattr("tdmld.node.snapshot.ROUND_SECONDS", 0.05)
    with (
        ChainStore(tmp_path / "false", CHANGING) as false,
        ChainStore(tmp_path / "new", CHANGING) as new,
    ):
        extend(false)
        grow(false, 30)
        with pytest.raises(SnapshotUnavailable):
            join(new, pipe(false, no_state))
        for height in range(1, 12):
            for epoch in range(4):
                over = new.height >= (epoch + 1) * 5
                assert new.turn(epoch) == (changed.turn(epoch) if over else None)
            block = changed.block(height)
            assert block is not None
            new.apply(block, changed.certificate(height))


def no_state(answer: SyncAnswer) -> SyncAnswer:
    """Whose turns hold, and who then gives nothing."""
    return Spec(b"") if isinstance(answer, StateItems) else answer


def test_what_a_false_chain_showed_is_forgotten(changed: ChainStore, tmp_path: Path) -> None:
    """A second chain by the same validators shows its turns and then no state; they are not given
    out, and the next snapshot puts the true ones there."""
    with (
        ChainStore(tmp_path / "false", CHANGING) as false,
        ChainStore(tmp_path / "new", CHANGING) as new,
    ):
        extend(false)
        grow(false, 80)
        join(new, pipe(false, no_state), pipe(changed))
        follow(new, changed)
        same(new, changed)
        for epoch in range(1, 11):
            assert new.turn(epoch) == changed.turn(epoch) != false.turn(epoch)
        assert new._read(b"T" + (14).to_bytes(8, "big")) is None


# ---- the long chain ------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_blocks_by_snapshot_and_by_replay_give_one_root(tmp_path: Path) -> None:
    """2,000 epochs, each with other validators. Prints what each way took, and a proof from
    genesis over all of them:

        pytest -s -m slow -k ten_thousand tests/node/test_snapshot_epochs.py
    """
    times = {}

    def timed(name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        times[name] = time.perf_counter() - start

    with (
        ChainStore(tmp_path / "made", CHANGING) as made,
        ChainStore(tmp_path / "snapshot", CHANGING) as snapshot,
        ChainStore(tmp_path / "replay", CHANGING) as replay,
    ):
        timed("make", lambda: grow(made, 10_000))
        extend(made)  # after the end of an epoch: its header commits the state
        timed("replay", lambda: follow(replay, made))
        timed("snapshot", lambda: join(snapshot, pipe(made)))
        assert snapshot.base >= 10_000 - 2
        follow(snapshot, made)
        same(replay, made)
        same(snapshot, made)
        for store in (replay, snapshot):
            extended = extend(made) if store is replay else made.block(made.height)
            assert extended is not None
            store.apply(extended, finalization(made, extended.header))
            same(store, made)
        sets = {encode(State(made.get).validator_set(epoch)) for epoch in range(1, 2001)}
        assert len(sets) == 2000
        bundle = prove_account(snapshot)
        timed("light client", lambda: check_it(bundle))
        assert len(bundle.turns) == 1999
    size = len(encode(bundle))
    print({name: round(seconds, 2) for name, seconds in times.items()}, f"proof: {size} bytes")


def check_it(bundle: Bundle) -> None:
    assert check_bundle(bundle, CHANGING).final.height == 10_002


@pytest.mark.slow
async def test_new_nodes_join_ten_thousand_blocks_over_the_network(tmp_path: Path) -> None:
    """The same between running nodes, over sockets: one new node begins with a snapshot, one takes
    every block, and both follow to one root."""
    chain = chain_id(CHANGING)
    with (
        ChainStore(tmp_path / "made", CHANGING) as made,
        ChainStore(tmp_path / "snapshot", CHANGING) as snapshot,
        ChainStore(tmp_path / "replay", CHANGING) as replay,
        trio.fail_after(300),
    ):
        grow(made, 10_000)
        extend(made)
        async with (
            open_host(bytes([81]) * 32) as maker,
            open_host(bytes([82]) * 32) as by_snapshot,
            open_host(bytes([83]) * 32) as by_blocks,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(ChainService(maker, made, CHANGING).run)
            seconds = {}
            for host in (by_snapshot, by_blocks):
                host.add_peer(PeerInfo(maker.peer_id, tuple(maker.addresses)))
            start = trio.current_time()
            await SnapshotClient(by_snapshot, Protocols(chain).sync, snapshot).join()
            seconds["snapshot"] = round(trio.current_time() - start, 2)
            assert snapshot.base >= 10_000 - 2
            start = trio.current_time()
            for host, store in ((by_snapshot, snapshot), (by_blocks, replay)):
                service = ChainService(host, store, CHANGING)
                feed = service.heads()
                await nursery.start(service.run)
                while store.height < made.height:
                    await feed.receive()
            seconds["replay"] = round(trio.current_time() - start, 2)
            nursery.cancel_scope.cancel()
        for store in (snapshot, replay):
            same(store, made)
    print(seconds)
