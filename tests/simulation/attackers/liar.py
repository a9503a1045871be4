"""Proposes on the wrong parent, names a wrong state or time, and forges what others said."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tdmld.chain.blocks import Block, Certificate, Header, Kind, Vote, block_hash
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import Effect, EnterView
from tests.simulation.attackers.attacker import Attacker
from tests.simulation.facts import public, signature


@dataclass(frozen=True)
class _Place:
    header: Header
    key: bytes


class LyingParent(Attacker):
    """Breaks one rule of form or of descent in each block, before the interval is over: while the
    finalization of the block before is still in flight."""

    def act(self, effects: Sequence[Effect]) -> None:
        super().act(effects)
        view = self.core.view
        entered = any(isinstance(effect, EnterView) for effect in effects)
        leading = self.electorate.rotation.leader(view) == self.index
        if entered and leading and view not in self.proposed and self.world.rng.random() < 0.7:
            self.propose(view)

    def propose(self, view: int) -> None:
        rng = self.world.rng
        places = [_Place(self.header, self.head)]
        places += [_Place(block.header, key) for key, block in self.tree.items()]
        places = [place for place in places if place.header.view < view]
        place = rng.choice(places)
        body = tuple(self.pool) if rng.random() < 0.5 else ()
        block = self.make(view, place.header, place.key, body)
        lies: tuple[dict[str, object], ...] = (
            *[dict[str, object]() for _ in range(8)],
            {"parent_view": max(0, place.header.view - 1)},
            {"parent_view": view - 1},
            {"parent": rng.randbytes(32)},
            {"height": place.header.height + 2},
            {"state_root": rng.randbytes(32)},
            {"state_height": place.header.height, "state_root": rng.randbytes(32)},
            {"time_ms": 0},
            {"time_ms": block.header.time_ms + rng.choice((9_000, 20_000, 90_000))},
            {"proposer": public((self.index + 1) % len(self.electorate.stakes))},
            {"tx_root": rng.randbytes(32)},
        )
        header = msgspec.structs.replace(block.header, **rng.choice(lies))
        self.start_view(view, None)
        lie = Block(header, signature(self.index), body)
        self.block_to(self.targets(), lie)
        self.endorse(lie, self.targets())
        self._forge(lie)

    def _forge(self, lie: Block) -> None:
        """Votes and a certificate in the name of others, with a signature that is not theirs."""
        key, view = block_hash(lie.header), lie.header.view
        everybody = range(len(self.electorate.stakes))
        mine = signature(self.index)
        forged = Certificate(Kind.NOTARIZE, view, key, tuple((i, mine) for i in everybody))
        few = Certificate(Kind.NULLIFY, view, ZERO_HASH, ((self.index, mine),))
        often = Certificate(Kind.FINALIZE, view, key, tuple((self.index, mine) for _ in everybody))
        for target in self.targets():
            for certificate in (forged, few, often):
                self.world.transmit(self, target, "on_certificate", certificate)
            for voter in everybody:
                if voter != self.index:
                    vote = Vote(Kind.NOTARIZE, view, key, voter, mine)
                    self.world.transmit(self, target, "on_vote", vote)
