"""Says old things again: votes and certificates of the past, and votes for the far future."""

from collections.abc import Sequence

from tdmld.chain.blocks import Certificate, Kind, Vote
from tdmld.chain.consensus import AHEAD, Effect, EnterView
from tests.simulation.attackers.attacker import Attacker

HOARD = 60


class StaleVotes(Attacker):
    """Hoards what it hears, and lets it loose in random order."""

    def boot(self) -> None:
        self.hoard: list[tuple[str, Vote | Certificate]] = []
        super().boot()

    def _keep(self, what: str, message: Vote | Certificate) -> None:
        if len(self.hoard) < HOARD:
            self.hoard.append((what, message))
        elif self.world.rng.random() < 0.2:
            self.hoard[self.world.rng.randrange(HOARD)] = what, message

    def on_vote(self, source: int, vote: Vote) -> None:
        self._keep("on_vote", vote)
        super().on_vote(source, vote)

    def on_certificate(self, source: int, certificate: Certificate) -> None:
        self._keep("on_certificate", certificate)
        super().on_certificate(source, certificate)

    def act(self, effects: Sequence[Effect]) -> None:
        super().act(effects)
        for effect in effects:
            if isinstance(effect, EnterView):
                self._let_loose(effect.view)

    def _let_loose(self, view: int) -> None:
        rng = self.world.rng
        for target in self.some():
            for what, message in rng.sample(self.hoard, min(3, len(self.hoard))):
                self.world.transmit(self, target, what, message)
        ahead = view + rng.choice((1, 2, 5, AHEAD, AHEAD + 1, 4 * AHEAD))
        for _ in range(3):
            kind = rng.choice((Kind.NOTARIZE, Kind.FINALIZE))
            self.vote_to(self.some(), self.sign(kind, ahead, rng.randbytes(32)))
        self.vote_to(self.some(), self.sign(Kind.NULLIFY, max(1, view - rng.randrange(3))))
