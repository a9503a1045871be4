"""A validator's directory: one log whose unsynced tail a crash may take, and the sign guard.

Like the store: a batch is whole or absent, syncing one makes everything before it durable, applying
a block is not synced, and votes up to the applied head are forgotten.
"""

import random
from dataclasses import dataclass

from tdmld.chain.blocks import Block, Certificate, Kind, Vote, block_hash

PROPOSAL = 3


class GuardTripped(AssertionError):
    """The shell was about to sign against itself: a real node would end here."""


@dataclass(frozen=True, slots=True)
class Signed:
    """One synced batch: own votes and proposals, the bodies of what was notarized, and the
    certificates that the votes rest on."""

    votes: tuple[Vote, ...]
    proposals: tuple[Block, ...]
    bodies: tuple[Block, ...]
    certificates: tuple[Certificate, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """An executed final block."""

    block: Block
    certificate: Certificate | None
    root: bytes


class Disk:
    """What survives. `signer` is whether anything was ever signed here."""

    def __init__(self) -> None:
        self.rows: list[Signed | Applied] = []
        self.synced = 0
        self.signer = False
        self._guard: dict[tuple[int, int], bytes] = {}

    def crash(self, rng: random.Random) -> None:
        """Lose some of the unsynced tail."""
        keep = rng.randint(self.synced, len(self.rows))
        del self.rows[keep:]
        self.synced = len(self.rows)

    def wipe(self) -> None:
        """The directory is gone; the key is not."""
        self.__init__()  # type: ignore[misc]

    # ---- reading ---------------------------------------------------------------------------

    def chain(self) -> list[Applied]:
        return [row for row in self.rows if isinstance(row, Applied)]

    def votes(self) -> list[Vote]:
        """Own votes above the applied head."""
        view = self._view()
        return [v for row in self._signed() for v in row.votes if v.view > view]

    def proposals(self) -> list[Block]:
        view = self._view()
        return [b for row in self._signed() for b in row.proposals if b.header.view > view]

    def bodies(self) -> list[Block]:
        """Own proposals and the bodies of own notarizations above the applied head."""
        view = self._view()
        held = [b for row in self._signed() for b in row.bodies if b.header.view > view]
        return self.proposals() + held

    def _signed(self) -> list[Signed]:
        return [row for row in self.rows if isinstance(row, Signed)]

    def _view(self) -> int:
        for row in reversed(self.rows):
            if isinstance(row, Applied):
                return row.block.header.view
        return 0

    # ---- writing ---------------------------------------------------------------------------

    def view_certificates(self) -> list[Certificate]:
        """The certificates above the applied head that own votes rest on."""
        view = self._view()
        return [c for row in self._signed() for c in row.certificates if c.view > view]

    def record(self, batch: Signed) -> list[Vote]:
        """Sync what was signed; the votes that may be sent. Raises GuardTripped."""
        final = self._view()
        kept = [vote for vote in batch.votes if vote.view > final]
        made = tuple(block for block in batch.proposals if block.header.view > final)
        for vote in kept:
            self._check(vote.kind, vote.view, vote.hash)
        for block in made:
            self._check(PROPOSAL, block.header.view, block_hash(block.header))
        self.rows.append(Signed(tuple(kept), made, batch.bodies, batch.certificates))
        self.synced = len(self.rows)
        self.signer = True
        return kept

    def _check(self, kind: int, view: int, value: bytes) -> None:
        known = self._guard.setdefault((kind, view), value)
        both = (Kind.NULLIFY, view) in self._guard and (Kind.FINALIZE, view) in self._guard
        if known != value or both:
            raise GuardTripped(f"view {view}: kind {kind} contradicts what is stored")

    def apply(self, row: Applied) -> None:
        """Not synced: the next `record` makes it durable."""
        self.rows.append(row)
