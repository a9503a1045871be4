"""Shows each half of the others another block, and votes for one of them only: who saw one has no
evidence, but for what others were shown (N8)."""

from tdmld.chain.blocks import transactions_root
from tests.simulation.attackers.attacker import Attacker


class TwoFaces(Attacker):
    """Contradicts itself as leader alone."""

    def _propose(self, view: int) -> None:
        block = self.build(view)
        if block is None:
            return
        body = () if block.transactions else (b"bribe %d" % view,)
        other = self.forge(block, {"tx_root": transactions_root(body)}, body)
        half = self.some()
        self.block_to(half, block)
        self.block_to([peer for peer in self.targets() if peer not in half], other)
