"""Commits when it hurts: blocks and votes arrive just as the time-outs of the others run out,
before them at one half and after them at the other."""

from collections.abc import Sequence

from tdmld.chain.blocks import Vote
from tdmld.node.validator import Batch
from tests.simulation.attackers.attacker import Attacker


class Timer(Attacker):
    """Aims at the moment in which some have nullified and others have not."""

    def _hold(self) -> float:
        return self.world.plan.times.timeout * (0.85 + 0.3 * self.world.rng.random())

    def _propose(self, view: int) -> None:
        block = self.build(view)
        if block is not None:
            for target in self.targets():
                hold = self._hold()
                self.block_to([target], block, hold)
                self.endorse(block, [target], hold)

    def _publish(self, batch: Batch, kept: Sequence[Vote]) -> None:
        for vote in kept:
            for target in self.targets():
                early = self.world.rng.random() < 0.5
                self.vote_to([target], vote, 0.0 if early else self._hold())
