"""Votes like everybody, and never proposes."""

from tests.simulation.attackers.attacker import Attacker


class SilentLeader(Attacker):
    """Each of its turns costs a time-out."""

    def _propose(self, view: int) -> None:
        self._proposed.add(view)
