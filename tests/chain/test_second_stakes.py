"""Two ledgers, one written from docs/spec/chain.md alone, agree on validators, whoever they are.

Each seed is a schedule of some epochs: who binds and unbinds, votes with which node, signs twice,
is shown to have, is away when it should lead, comes back. After every block both have one state.
"""

import random
from collections import Counter
from typing import Any

from msgspec.structs import replace

from tdmld.chain.blocks import EPOCH_VIEWS, Kind, first_header, sign_block, sign_vote
from tdmld.chain.crypto import KeyPair
from tdmld.chain.ledger import BlockResult
from tdmld.chain.slashing import from_votes
from tdmld.chain.transactions import (
    Bond,
    Evidence,
    Nominate,
    Payload,
    ProposalEvidence,
    Register,
    Return,
    Revoke,
    Unbond,
    Withdraw,
    sign_registration,
)
from tests.chain.test_second_ledger import Pair
from tests.chain.world import mark, node_key, owner_key

OWNERS = 7
SHAPES: tuple[dict[str, Any], ...] = (
    {"epoch_blocks": 3, "unbonding": [4, 1], "slash_ppm": 1_000_000},
    {"epoch_blocks": 2, "unbonding": [1, 2], "vote_stake_min": 400, "validators_max": 4},
    {"epoch_blocks": 12, "unbonding": [2, 1]},
    {"epoch_blocks": 5, "unbonding": [3, 4], "validators_max": 3, "slash_ppm": 1},
)


class Schedule:
    """What happens next, by chance."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.world = Pair(OWNERS, seed, **SHAPES[seed % len(SHAPES)])
        self.spare = [node_key(index) for index in range(OWNERS, 18)]
        self.seen: Counter[tuple[str, bool]] = Counter()

    def run(self, blocks: int) -> None:
        for _ in range(blocks):
            seats = self.world.second.seats(self.epoch)
            if self.dice.random() < 0.2:
                absent = self.dice.choice(seats)["node"]
                self.world.away = {absent} if self.dice.random() < 0.7 else set()
            if {seat["node"] for seat in seats if seat["leads"]} <= self.world.away:
                self.world.away = set()
            signed = {key.public: (key, payload) for key, payload in self.wishes()}
            raws = [self.world.sign(key, payload) for key, payload in signed.values()]
            result = self.world.block(*raws, passed=self.dice.choice([0, 0, 0, 1, 5]))
            self.count([payload for _, payload in signed.values()], result)

    def count(self, payloads: list[Payload], result: BlockResult) -> None:
        for payload, receipt in zip(payloads, result.receipts, strict=True):
            self.seen[type(payload).__name__, receipt.ok] += 1
        db = self.world.second.db
        seats = self.world.second.seats(self.epoch)
        entries = [e for key, found in db.items() if key[:1] == b"b" for e in found["entries"]]
        facts = {
            "many_seats": len(seats) > 4,
            "idle": not all(seat["leads"] for seat in seats),
            "jailed": any(key[:1] == b"n" and found["jailed"] for key, found in db.items()),
            "held_back": self.world.height % self.world.parameters.epoch_blocks == 0
            and any(entry["epoch"] == self.epoch + 2 for entry in entries),
            "slashed_unbonding": any(
                key[:1] == b"x" and found["height"] == self.world.height and b"b" + key[1:33] in db
                for key, found in db.items()
            ),
        }
        self.seen.update((fact, True) for fact, holds in facts.items() if holds)

    @property
    def epoch(self) -> int:
        """Of the next block."""
        return self.world.height // self.world.parameters.epoch_blocks

    def wishes(self) -> list[tuple[KeyPair, Payload]]:
        kinds = [self.stake, self.stake, self.vote, self.node, self.accuse, self.come_back]
        return [self.dice.choice(kinds)() for _ in range(self.dice.randrange(6))]

    def stake(self) -> tuple[KeyPair, Payload]:
        owner = owner_key(self.dice.randrange(OWNERS))
        bucket = self.dice.choice(["vote", "vote", "vote", "work", "rest"])
        amount = self.dice.choice([0, 1, 7, 333, 1000, 1002, 4000, 10**8])
        payloads = Bond(bucket, amount), Unbond(bucket, amount), Unbond(bucket, amount), Withdraw()
        return owner, self.dice.choice(payloads)

    def vote(self) -> tuple[KeyPair, Payload]:
        owner = self.dice.randrange(OWNERS)
        mine = [key for key, node in self.world.second.db.items() if key[:1] == b"n"
                and node["owner"] == owner_key(owner).public]  # fmt: skip
        node = self.dice.choice(mine)[1:] if self.dice.random() < 0.8 else node_key(3).public
        what = Revoke(node) if self.dice.random() < 0.25 else Nominate(node)
        return owner_key(owner), what

    def node(self) -> tuple[KeyPair, Payload]:
        owner, node = owner_key(self.dice.randrange(OWNERS)), self.dice.choice(self.spare)
        start = self.world.height + self.dice.choice([1, 2, 2, 2])
        proof = sign_registration(node, self.world.chain_id, owner.public, start)
        return owner, Register(node.public, start, proof)

    def come_back(self) -> tuple[KeyPair, Payload]:
        jailed = [
            (key[1:], node["jailed"])
            for key, node in self.world.second.db.items()
            if key[:1] == b"n" and node["jailed"]
        ]
        node, height = self.dice.choice([*jailed, (node_key(0).public, 0), (node_key(1).public, 5)])
        return self.world.keys[node], Return(height)

    def accuse(self) -> tuple[KeyPair, Payload]:
        epoch = max(0, self.epoch + self.dice.choice([-2, -1, -1, 0, 0, 0, 1, 2]))
        view = epoch * EPOCH_VIEWS + self.dice.randrange(1, 4)
        node = node_key(self.dice.randrange(12))
        evidence = (self.votes if self.dice.random() < 0.6 else self.blocks)(node, view)
        return owner_key(19), evidence

    def votes(self, node: KeyPair, view: int) -> Evidence:
        kinds = [Kind.NOTARIZE, Kind.NULLIFY, Kind.FINALIZE]
        first, second = (
            sign_vote(
                self.dice.choice([node] * 9 + [node_key(1)]),
                self.world.chain_id,
                kind,
                view,
                bytes(32) if kind is Kind.NULLIFY else mark(self.dice.randrange(3)),
                0,
            )
            for kind in (self.dice.choice(kinds), self.dice.choice(kinds))
        )
        return from_votes(node.public, first, second)

    def blocks(self, node: KeyPair, view: int) -> Evidence:
        base = first_header(self.world.chain_id, 1, 0, mark("root"))
        one, two = (
            sign_block(
                node,
                self.world.chain_id,
                replace(base, view=view, proposer=node.public, time_ms=self.dice.randrange(3)),
                (),
            )
            for _ in range(2)
        )
        return ProposalEvidence(one.header, one.signature, two.header, two.signature)


def test_any_validators() -> None:
    seen = Counter[tuple[str, bool]]()
    for seed in range(16):
        schedule = Schedule(seed)
        schedule.run(60)
        seen += schedule.seen
    kinds = "Bond Unbond Withdraw Nominate Revoke Register Return VoteEvidence ProposalEvidence"
    assert {(kind, ok) for kind in kinds.split() for ok in (True, False)} <= set(seen)
    facts = ["idle", "jailed", "held_back", "slashed_unbonding", "many_seats"]
    assert all(seen[fact, True] for fact in facts), seen
