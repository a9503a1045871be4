"""Proposes on the wrong parent, names a wrong state, time or epoch, and forges what others said."""

from collections.abc import Sequence

from tdmld.chain.blocks import (
    EPOCH_VIEWS,
    Block,
    Certificate,
    Kind,
    Vote,
    block_hash,
    sign_vote,
)
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import Effect
from tdmld.chain.genesis import protocol_at
from tdmld.node.proposer import Position, build_block
from tests.simulation.attackers.attacker import Attacker
from tests.simulation.facts import CHAIN_ID
from tests.simulation.parts import entered


class LyingParent(Attacker):
    """Breaks one rule of form or of descent in each block, before the interval is over: while the
    finalization of the block before is still in flight. The last block of an epoch is a parent
    like any other to it."""

    def _act(self, effects: Sequence[Effect]) -> None:
        super()._act(effects)
        view = self.core.view
        leading = self.committee.leader(view) == self.me
        free = view not in self._proposed
        if entered(effects) and leading and free and self.world.rng.random() < 0.7:
            self._propose(view)

    def _propose(self, view: int) -> None:
        rng, store = self.world.rng, self.node.store
        places = [(self.node.finality.header, self.node.finality.hash)]
        places += [(block.header, key) for key, block in self._bodies.tree.items()]
        header, key = rng.choice([place for place in places if place[0].view < view])
        body = self._body_for() if rng.random() < 0.5 else ()
        block = build_block(
            self.key,
            CHAIN_ID,
            Position(view, header, key, self._bodies.mix(key) or ZERO_HASH),
            body,
            protocol=protocol_at(store.genesis, header.height + 1),
            now_ms=self.node.now_ms(),
            state_height=store.height,
            history_root=store.history_root(store.height) or ZERO_HASH,
            state_root=store.head.state_root,
            sets=self._sets,
        )
        lies: tuple[dict[str, object], ...] = (
            *[dict[str, object]() for _ in range(8)],
            {"parent_view": max(0, header.view - 1)},
            {"parent_view": view - 1},
            {"parent": rng.randbytes(32)},
            {"height": header.height + 2},
            {"state_root": rng.randbytes(32)},
            {"history_root": rng.randbytes(32)},
            {"state_height": header.height, "state_root": rng.randbytes(32)},
            {"time_ms": 0},
            {"time_ms": block.header.time_ms + rng.choice((9_000, 20_000, 90_000))},
            {"proposer": self.committee.nodes[(self.me + 1) % len(self.committee.nodes)]},
            {"tx_root": rng.randbytes(32)},
            {"validators": rng.randbytes(32)},
            {"next_validators": self._sets[0]},
            {"view": view + EPOCH_VIEWS},
        )
        self._proposed.add(view)
        lie = self.forge(block, rng.choice(lies))
        self.block_to(self.targets(), lie)
        self.endorse(lie, self.targets())
        self._forge(lie)

    def _body_for(self) -> tuple[bytes, ...]:
        return tuple(waiting.raw for waiting in self.node.pool.select(()))

    def _forge(self, lie: Block) -> None:
        """Votes and a certificate in the name of others, with a signature that is not theirs."""
        key, view = block_hash(lie.header), lie.header.view
        everybody = range(len(self.committee.nodes))
        kinds = {kind: self._mine(kind, view, key) for kind in Kind}
        forged = Certificate(
            Kind.NOTARIZE, view, key, tuple((i, kinds[Kind.NOTARIZE]) for i in everybody)
        )
        few = Certificate(Kind.NULLIFY, view, ZERO_HASH, ((self.me, kinds[Kind.NULLIFY]),))
        often = Certificate(
            Kind.FINALIZE, view, key, tuple((self.me, kinds[Kind.FINALIZE]) for _ in everybody)
        )
        for certificate in (forged, few, often):
            self.tell(self.targets(), certificate)
        for voter in everybody:
            if voter != self.me:
                vote = Vote(Kind.NOTARIZE, view, key, voter, kinds[Kind.NOTARIZE])
                self.tell(self.targets(), vote)

    def _mine(self, kind: Kind, view: int, key: bytes) -> bytes:
        """Our signature of such a vote, which shows nobody that we signed it."""
        block = ZERO_HASH if kind is Kind.NULLIFY else key
        return sign_vote(self.key, CHAIN_ID, kind, view, block, self.me).signature
