"""Nullifies every view as it begins, and notarizes and finalizes in it as well."""

from collections.abc import Sequence

from tdmld.chain.blocks import Kind
from tdmld.chain.consensus import Effect, EnterView
from tests.simulation.attackers.attacker import Attacker


class Nuller(Attacker):
    """NULLIFY beside everything else."""

    def act(self, effects: Sequence[Effect]) -> None:
        super().act(effects)
        for effect in effects:
            if isinstance(effect, EnterView):
                self.vote_to(self.targets(), self.sign(Kind.NULLIFY, effect.view))
