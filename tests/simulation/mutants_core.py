"""Mutants of the consensus core: each breaks one rule of S1 to S11, by subclassing."""

from collections.abc import Iterable

from tdmld.chain.blocks import Certificate, Kind, Vote
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import (
    AHEAD,
    MAX_DEPTH,
    Answer,
    CastVote,
    Effect,
    Finalized,
    Proposed,
    Simplex,
)


class HalfQuorum(Simplex):
    """S1: a half is enough."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._quorum = sum(self._stakes) // 2


class ThirdQuorum(Simplex):
    """S1: more than a third is enough."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._quorum = sum(self._stakes) // 3 + 1


class CountsHeads(Simplex):
    """S1: two thirds of the validators, whatever their stake."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._stakes = (1,) * len(self._stakes)
        self._quorum = len(self._stakes) * 2 // 3 + 1


class NotarizesTwice(Simplex):
    """S2: every good block of the view."""

    def _vote(self, out: list[Effect]) -> list[Effect]:
        for block, proposed in self._blocks.get(self.view, {}).items():
            free = self.view > self.silent and not self.cast(Kind.NULLIFY, self.view)
            if free and self._extends(self.view, proposed):
                self._cast.pop((Kind.NOTARIZE, self.view), None)
                self._cast_vote(Kind.NOTARIZE, self.view, block, out)
        return out

    def add_block(self, view: int, block: bytes, proposed: Proposed) -> list[Effect]:
        known = block in self._blocks.get(view, {})
        return [] if known else super().add_block(view, block, proposed)


class NotarizesAfterNullify(Simplex):
    """S2: a late block is still voted for."""

    def may_propose(self) -> bool:
        return self.view > self.silent and not self.cast(Kind.NOTARIZE, self.view)


class NotarizesOtherViews(Simplex):
    """S2: not only in the current view."""

    def _vote(self, out: list[Effect]) -> list[Effect]:
        for view, blocks in self._blocks.items():
            for block, proposed in blocks.items():
                if self._extends(view, proposed):
                    self._cast_vote(Kind.NOTARIZE, view, block, out)
        return out


class AnyParent(Simplex):
    """S3: the parent need not be notarized."""

    def _extends(self, view: int, proposed: Proposed) -> bool:
        return all(v in self._nullified for v in range(proposed.parent_view + 1, view))


class AnyGap(Simplex):
    """S3: the views between need not be nullified."""

    def _extends(self, view: int, proposed: Proposed) -> bool:
        return self._notarized.get(proposed.parent_view) == proposed.parent


class FinalizesUncertified(Simplex):
    """S3: FINALIZE together with NOTARIZE."""

    def _cast_vote(self, kind: Kind, view: int, block: bytes, out: list[Effect]) -> None:
        super()._cast_vote(kind, view, block, out)
        if kind is Kind.NOTARIZE:
            super()._cast_vote(Kind.FINALIZE, view, block, out)


class FinalizesAfterNullify(Simplex):
    """S4."""

    def _cast_vote(self, kind: Kind, view: int, block: bytes, out: list[Effect]) -> None:
        if kind is Kind.FINALIZE and self.cast(Kind.NULLIFY, view) and not self.cast(kind, view):
            self._cast[kind, view] = block
            out.append(CastVote(kind, view, block))
            return
        super()._cast_vote(kind, view, block, out)


class NullifiesAfterFinalize(Simplex):
    """S4, S5: a view is nullified even after it was finalized."""

    def time_out(self, view: int) -> list[Effect]:
        out = super().time_out(view)
        for kind, past in list(self._cast):
            if kind is Kind.FINALIZE and not self.cast(Kind.NULLIFY, past):
                self._cast[Kind.NULLIFY, past] = ZERO_HASH
                out.append(CastVote(Kind.NULLIFY, past, ZERO_HASH))
        return out


class NullifiesAhead(Simplex):
    """S5: the next view too."""

    def time_out(self, view: int) -> list[Effect]:
        out = super().time_out(view)
        self._cast_vote(Kind.NULLIFY, view + 1, ZERO_HASH, out)
        return out


class StaysAfterNotarization(Simplex):
    """S6: only a nullification ends a view."""

    def _leave(self, view: int, failed: bool, out: list[Effect]) -> None:
        if failed:
            super()._leave(view, failed, out)


class StaysAfterNullification(Simplex):
    """S6: only a notarization ends a view."""

    def _leave(self, view: int, failed: bool, out: list[Effect]) -> None:
        if not failed:
            super()._leave(view, failed, out)


class SkipsNothing(Simplex):
    """S6: a certificate of a later view does not end the current one."""

    def _leave(self, view: int, failed: bool, out: list[Effect]) -> None:
        if view == self.view:
            super()._leave(view, failed, out)


class NoDepthBound(Simplex):
    """S7: full blocks at any depth."""

    @property
    def depth(self) -> int:
        return 0


class StopsAtDepth(Simplex):
    """S7: at the bound nothing is notarized, not even empty blocks."""

    def _vote(self, out: list[Effect]) -> list[Effect]:
        return out if len(self._notarized) - 1 >= MAX_DEPTH else super()._vote(out)


class FirstVoteOnly(Simplex):
    """S8: an equivocator's second vote does not count."""

    def wants_vote(self, vote: Vote) -> bool:
        first = self._first.get((vote.voter, vote.view, vote.kind), ())
        return super().wants_vote(vote) and not first


class CountsEverything(Simplex):
    """S8: no bound on variants and on far views."""

    def wants_vote(self, vote: Vote) -> bool:
        tally = self._tallies.get((vote.kind, vote.view, vote.hash))
        return vote.view > self.final_view and (tally is None or vote.voter not in tally.votes)

    def add_vote(self, vote: Vote) -> list[Effect]:
        view, self.view = self.view, max(self.view, vote.view)
        if view == self.view:
            return super().add_vote(vote)
        self._count(vote)
        self.view = view
        return []


class NearCertificatesOnly(Simplex):
    """S8: certificates are limited in view like votes."""

    def wants_certificate(self, certificate: Certificate) -> bool:
        return super().wants_certificate(certificate) and certificate.view <= self.view + AHEAD


class CountsUnstored(Simplex):
    """S9: one's own vote counts when it is cast."""

    def _cast_vote(self, kind: Kind, view: int, block: bytes, out: list[Effect]) -> None:
        before = len(out)
        super()._cast_vote(kind, view, block, out)
        if len(out) > before and self.me is not None:
            self._count(Vote(kind, view, block, self.me, bytes(64)))
            self._certify(kind, view, block, out)


class ForgetsCertificates(Simplex):
    """S9: a restart draws no conclusions from stored certificates."""

    def start(self, certificates: Iterable[Certificate] = ()) -> list[Effect]:
        return super().start()


class ForgetsNothing(Simplex):
    """S10: what is below the finalized view stays."""

    def _finalize(self, view: int, block: bytes) -> None:
        tallies, first, heard = self._tallies, self._first, self._heard
        super()._finalize(view, block)
        self._tallies, self._first, self._heard = tallies, first, heard


class FinalizesNothing(Simplex):
    """S10: a finalization is taken for one more certificate."""

    def _accept(self, certificate: Certificate, forward: bool, out: list[Effect]) -> None:
        before = len(out)
        super()._accept(certificate, forward, out)
        out[before:] = [effect for effect in out[before:] if not isinstance(effect, Finalized)]


class ForwardsNothing(Simplex):
    """S11: certificates stay here."""

    def _accept(self, certificate: Certificate, forward: bool, out: list[Effect]) -> None:
        super()._accept(certificate, False, out)


class ForwardsNoContradicted(Simplex):
    """S11: only nullifications are forwarded."""

    def _accept(self, certificate: Certificate, forward: bool, out: list[Effect]) -> None:
        super()._accept(certificate, forward and certificate.kind is Kind.NULLIFY, out)


class AnswersNobody(Simplex):
    """S11: who is in an old view stays there."""

    def add_vote(self, vote: Vote) -> list[Effect]:
        return [effect for effect in super().add_vote(vote) if not isinstance(effect, Answer)]
