"""Gives its blocks, votes and certificates to some only, and answers nobody."""

from collections.abc import Sequence

from tdmld.chain.blocks import Block, Vote
from tests.simulation.attackers.attacker import Attacker


class Withholder(Attacker):
    """What one half knows the other does not."""

    def propose(self, view: int) -> None:
        block = self.build(view)
        if block is not None:
            self.start_view(view, block)
            self.block_to(self.some(), block)
            self.endorse(block, self.some())

    def publish(self, batch: Sequence[Vote | Block], kept: Sequence[Vote]) -> None:
        for vote in kept:
            self.vote_to(self.some(), vote)

    def help(self, voter: int) -> None:
        """Not me."""

    def say(self, what: str, data: object) -> None:
        if what == "on_transaction":
            super().say(what, data)
            return
        for target in self.some():
            self.world.transmit(self, target, what, data)

    def on_request(self, source: int, key: bytes) -> None:
        """Not me."""

    def on_blocks_request(self, source: int, start: int) -> None:
        """Not me."""
