"""Proposes two blocks in a view, one to each half, and votes for every block that it sees."""

from tdmld.chain.blocks import Block, Certificate
from tests.simulation.attackers.attacker import Attacker


class Equivocator(Attacker):
    """Two faces as leader, two votes as voter."""

    def propose(self, view: int) -> None:
        block = self.build(view)
        if block is None:
            return
        self.start_view(view, block)
        header = block.header
        other_body = () if header.tx_root != bytes(32) else (b"bribe %d" % view,)
        parent = self.header_of(header.parent)
        assert parent is not None
        other = self.make(view, parent, header.parent, other_body)
        half = self.some()
        rest = [peer for peer in self.targets() if peer not in half or not peer.honest]
        self.block_to(half, block)
        self.block_to(rest, other)
        self.endorse(block, half)
        self.endorse(other, rest)

    def on_proposal(self, source: int, data: tuple[Block, tuple[Certificate, ...]]) -> None:
        super().on_proposal(source, data)
        self.endorse(data[0], self.some())
