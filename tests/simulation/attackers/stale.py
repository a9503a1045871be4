"""Says old things again, votes and certificates of the past, also of epochs that are over, and
votes for the far future, also of epochs to come."""

from collections.abc import Sequence

from tdmld.chain.blocks import EPOCH_VIEWS, Certificate, Kind, Vote, turn
from tdmld.chain.consensus import AHEAD, Effect
from tdmld.node.chainlinks import Link
from tdmld.node.chainwire import ConsensusMessage
from tests.simulation.attackers.attacker import Attacker
from tests.simulation.parts import entered

HOARD = 60


class StaleVotes(Attacker):
    """Hoards what it hears, for ever, and lets it loose in random order."""

    @property
    def hoard(self) -> list[object]:
        return self.node.hoard

    async def receive(self, link: Link, message: ConsensusMessage) -> None:
        if isinstance(message, Vote | Certificate):
            if len(self.hoard) < HOARD:
                self.hoard.append(message)
            elif self.world.rng.random() < 0.2:
                self.hoard[self.world.rng.randrange(HOARD)] = message
        await super().receive(link, message)

    def _act(self, effects: Sequence[Effect]) -> None:
        super()._act(effects)
        for view in entered(effects):
            self._let_loose(view)

    def _let_loose(self, view: int) -> None:
        rng = self.world.rng
        for target in self.some():
            for message in rng.sample(self.hoard, min(3, len(self.hoard))):
                self.tell([target], message)
        far = (1, 2, 5, AHEAD, AHEAD + 1, 4 * AHEAD, EPOCH_VIEWS, EPOCH_VIEWS + 1 - turn(view))
        ahead = view + rng.choice(far)
        for _ in range(3):
            kind = rng.choice((Kind.NOTARIZE, Kind.FINALIZE))
            self.vote_to(self.some(), self.sign(kind, ahead, rng.randbytes(32)))
        self.vote_to(self.some(), self.sign(Kind.NULLIFY, max(1, view - rng.randrange(3))))
