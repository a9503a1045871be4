"""What all attackers have: they follow the protocol to know what goes on, keep no record of what
they sign, and say what they like under their own name."""

from collections.abc import Sequence

from tdmld.chain.blocks import Block, Kind, Vote, block_hash
from tdmld.chain.codec import ZERO_HASH
from tests.simulation.facts import signature
from tests.simulation.node import Node


class Attacker(Node):
    """A validator without scruples; by itself it behaves."""

    def targets(self) -> list[Node]:
        return self.world.peers(self)

    def some(self) -> list[Node]:
        """A random half of the others, accomplices included."""
        rng = self.world.rng
        return [peer for peer in self.targets() if not peer.honest or rng.random() < 0.5]

    def sign(self, kind: Kind, view: int, block: bytes = ZERO_HASH) -> Vote:
        return Vote(kind, view, block, self.index, signature(self.index))

    def vote_to(self, targets: Sequence[Node], vote: Vote, hold: float = 0.0) -> None:
        """Say a vote to some, perhaps later."""
        self.world.watcher.sent(self, vote)
        for target in targets:
            self.world.transmit(self, target, "on_vote", vote, hold)

    def block_to(self, targets: Sequence[Node], block: Block, hold: float = 0.0) -> None:
        parent = self.core.parent()
        data = (block, parent.why if parent is not None else ())
        for target in targets:
            self.world.transmit(self, target, "on_proposal", data, hold)

    def start_view(self, view: int, block: Block | None) -> None:
        """Take the block as one's own proposal of `view`, so that the turn is over."""
        self.world.blocks_made += 1
        self.proposed.add(view)
        if block is not None:
            self.keep(block, True)

    def endorse(self, block: Block, targets: Sequence[Node], hold: float = 0.0) -> None:
        """NOTARIZE and FINALIZE at once, whatever else was signed."""
        key = block_hash(block.header)
        for kind in (Kind.NOTARIZE, Kind.FINALIZE):
            self.vote_to(targets, self.sign(kind, block.header.view, key), hold)
