"""Proposes two blocks in a view, one to each half, and votes for every block that it sees."""

from tdmld.chain.blocks import Block, transactions_root
from tdmld.node.chainlinks import Link
from tdmld.node.chainwire import ConsensusMessage, Proposal
from tests.simulation.attackers.attacker import Attacker


class Equivocator(Attacker):
    """Two faces as leader, two votes as voter."""

    def _propose(self, view: int) -> None:
        block = self.build(view)
        if block is None:
            return
        body = () if block.transactions else (b"bribe %d" % view,)
        other = self.forge(block, {"tx_root": transactions_root(body)}, body)
        half = self.some()
        rest = [peer for peer in self.targets() if peer not in half or not peer.honest]
        self.show(block, half)
        self.show(other, rest)

    def show(self, block: Block, targets: list) -> None:  # type: ignore[type-arg]
        self.block_to(targets, block)
        self.endorse(block, targets)

    async def receive(self, link: Link, message: ConsensusMessage) -> None:
        await super().receive(link, message)
        if isinstance(message, Proposal):
            self.endorse(message.block, self.some())
