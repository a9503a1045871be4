"""Gives its blocks, votes and certificates to some only, and answers nobody."""

from collections.abc import Sequence
from typing import Any

from tdmld.chain.blocks import Vote
from tdmld.node.chainlinks import Link
from tdmld.node.chainwire import BlockRequest, ConsensusMessage, Transactions
from tdmld.node.validator import Batch
from tests.simulation.attackers.attacker import Attacker


class Withholder(Attacker):
    """What one half knows the other does not."""

    def start(self) -> None:
        self.node.helps = False
        self.links: Any = _Some(self)
        super().start()

    def _propose(self, view: int) -> None:
        block = self.build(view)
        if block is not None:
            self.block_to(self.some(), block)
            self.endorse(block, self.some())

    def _publish(self, batch: Batch, kept: Sequence[Vote]) -> None:
        for vote in kept:
            self.vote_to(self.some(), vote)

    def _help(self, voter: int) -> None:
        """Not me."""

    async def receive(self, link: Link, message: ConsensusMessage) -> None:
        if not isinstance(message, BlockRequest):
            await super().receive(link, message)


class _Some:
    """Links of which every broadcast reaches some only."""

    def __init__(self, attacker: Withholder) -> None:
        self._attacker, self._links = attacker, attacker.node.links

    def __getattr__(self, name: str) -> Any:
        return getattr(self._links, name)

    def broadcast(self, message: object) -> None:
        targets = self._attacker.targets()
        if not isinstance(message, Transactions):
            targets = self._attacker.some()
        self._attacker.tell(targets, message)
