"""Nullifies every view as it begins, and notarizes and finalizes in it as well."""

from collections.abc import Sequence

from tdmld.chain.blocks import Kind
from tdmld.chain.consensus import Effect
from tests.simulation.attackers.attacker import Attacker
from tests.simulation.parts import entered


class Nuller(Attacker):
    """NULLIFY beside everything else."""

    def _act(self, effects: Sequence[Effect]) -> None:
        super()._act(effects)
        for view in entered(effects):
            self.vote_to(self.targets(), self.sign(Kind.NULLIFY, view))
