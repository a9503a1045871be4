"""The world of `world.py` on a real chain: signed headers, a beacon, certificates, a database."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from tdmld.chain.blocks import (
    Certificate,
    Committee,
    Kind,
    Vote,
    block_hash,
    ends_epoch,
    sign_vote,
    start_view,
    turn,
)
from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import Genesis, validators
from tdmld.chain.ledger import BlockResult
from tdmld.chain.records import JobStatus
from tdmld.chain.slashing import from_votes
from tdmld.chain.transactions import (
    Bond,
    Nominate,
    Register,
    Return,
    Revoke,
    Transfer,
    Unbond,
    Withdraw,
    sign_registration,
)
from tdmld.node.proposer import Position, build_block
from tdmld.node.store import ChainStore
from tests.chain.world import BALANCE, World, make_genesis, node_key, owner_key

START_MS = 1_767_225_600_000
SHORT = {
    "accept_window": 6,
    "activate_window": 10,
    "segment_window": 12,
    "standby_window": 8,
    "audit_window": 8,
    "open_window": 5,
    "reveal_window": 5,
    "settle_window": 3,
    "result_window": 20,
}


class _Records(Mapping[bytes, bytes]):
    """The state of a store as World wants it: a mapping that is only read."""

    def __init__(self, store: ChainStore) -> None:
        self._store = store

    def __getitem__(self, key: bytes) -> bytes:
        found = self._store.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def __iter__(self) -> Iterator[bytes]:
        return (key for key, _ in self._store.state_items())

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ChainWorld(World):
    """A World whose blocks are signed, finalized and applied by a ChainStore.

    `gap`: a block whose height it divides is finalized by its descendant only.
    """

    def __init__(self, path: Path, genesis: Genesis | None = None, gap: int = 3) -> None:
        super().__init__(make_genesis(**SHORT) if genesis is None else genesis)
        self.chain = ChainStore(path, self.genesis)
        self.gap = gap
        self.store = _Records(self.chain)  # type: ignore[assignment]
        rows = [(v.node, v.stake) for v in validators(self.genesis)]
        self.committee = Committee.of(self.chain_id, rows)
        self.rotation = self.committee.rotation

    def block(self, *raws: bytes, tainted: bool = False, passed: int = 0) -> BlockResult:
        head, epoch_blocks = self.chain.head, self.parameters.epoch_blocks
        committee = self.chain.committee(self.chain.epoch)
        assert committee is not None
        self.committee, self.rotation = committee, committee.rotation
        start = start_view(head.height, head.view, epoch_blocks)
        self.height, self.view = head.height + 1, start + 1 + (passed or int(tainted))
        while self.away and self.leader(self.view) in self.away:
            self.view += 1
        leader = self._key(self.rotation.leader(turn(self.view)))
        proposed = build_block(
            leader,
            self.chain_id,
            Position(self.view, head.header, head.hash, head.mix),
            raws,
            protocol=1,
            now_ms=START_MS + 500 * self.height,
            state_height=head.height,
            history_root=self.chain.history_root(head.height) or b"",
            state_root=head.state_root,
            sets=self.chain.set_ids(self.chain.epoch),
        )
        key = block_hash(proposed.header)
        voters = [index for index in range(len(self.committee.nodes)) if index != self.height % 4]
        if self.committee.weight(voters) < self.committee.quorum:
            voters = list(range(len(self.committee.nodes)))
        votes = [
            sign_vote(self._key(index), self.chain_id, Kind.FINALIZE, self.view, key, index)
            for index in voters
        ]
        rows = tuple((vote.voter, vote.signature) for vote in votes)
        final = None
        if self.height % self.gap or ends_epoch(self.height, epoch_blocks):
            final = Certificate(Kind.FINALIZE, self.view, key, rows)
        applied = self.chain.apply(proposed, final)
        self.beacon = self.chain.head.mix
        self.events.extend(applied.events)
        self.receipts.extend(applied.receipts)
        return BlockResult({}, applied.receipts, applied.events)

    def close(self) -> None:
        self.chain.close()

    def _key(self, index: int) -> KeyPair:
        return self.keys[self.committee.nodes[index]]


def live_through_a_job(world: World) -> None:
    """Transfers, a new node, failures, a job that is audited and paid, one that is refunded."""
    alice, bob = owner_key(0), owner_key(1)
    world.all_ask()
    world.block(
        world.sign(alice, Transfer(bob.public, 700)),
        world.sign(bob, Transfer(alice.public, BALANCE * 2)),
        world.sign(bob, Transfer(alice.public, 5), nonce=7),
    )
    proof = sign_registration(node_key(9), world.chain_id, bob.public, world.height + 5)
    world.do(bob, Register(node_key(9).public, world.height + 5, proof))
    job = world.submit(audit_rate=1_000_000, rounds=2, unsettled=2, state_every=1)
    assert world.play_until(job).status is JobStatus.CLOSED
    again = world.sign(alice, Transfer(bob.public, 1))
    world.block(again, again, tainted=True)
    job = world.submit(deadline=world.height + 9)
    world.play_until(job)
    world.wait(2)
    while world.height % 3 != 1:
        world.block()


EPOCH = 12


def epochs_genesis() -> Genesis:
    """Epochs of 12 blocks, and stake that is free a few blocks after the last epoch it voted in."""
    return make_genesis(**SHORT, epoch_blocks=EPOCH, unbonding=[3, 1])


def live_through_epochs(world: World) -> None:
    """Four epochs: one validator is away, jailed and returns, one leaves and is paid, one votes
    twice, one votes with another key; a newcomer joins."""
    owners, nodes = [owner_key(n) for n in range(7)], [node_key(n) for n in range(10)]
    world.away = frozenset({nodes[1].public})
    world.block(
        world.sign(owners[3], Unbond("vote", 1003)),
        world.sign(owners[5], Bond("vote", 1500)),
        world.sign(owners[5], Nominate(nodes[5].public), nonce=1),
    )
    _to(world, EPOCH)
    assert world.state.node(nodes[1].public).jailed == EPOCH  # type: ignore[union-attr]
    world.block(world.sign(owners[6], from_votes(nodes[2].public, *_two_votes(world, nodes[2]))))
    start = world.height + 2
    proof = sign_registration(nodes[9], world.chain_id, owners[0].public, start)
    rest = (Register(nodes[9].public, start, proof), Nominate(nodes[9].public))
    raws = [world.sign(owners[0], payload, nonce=n) for n, payload in enumerate(rest)]
    world.block(*raws, world.sign(owners[4], Revoke(nodes[4].public)))
    _to(world, 2 * EPOCH + 1)
    world.away = frozenset()
    world.block(world.sign(nodes[1], Return(EPOCH)), passed=5)
    _to(world, 2 * EPOCH + 5)
    world.do(owners[3], Withdraw())
    _to(world, 4 * EPOCH + 1)


def _to(world: World, height: int) -> None:
    world.wait(height - world.height)


def _two_votes(world: World, node: KeyPair) -> tuple[Vote, Vote]:
    """Of a validator in the first view of the chain."""
    one, two = (
        sign_vote(node, world.chain_id, Kind.NOTARIZE, 1, bytes([n]) * 32, 0) for n in (1, 2)
    )
    return one, two
