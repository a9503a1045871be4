"""Simplex consensus (Chan and Pass, eprint 2023/463) with stake as weight: inputs in, effects out.

No clock, no disk, no network, no randomness: the shell checks signatures before it calls, makes
votes durable before it publishes them, and decides when a view has lasted too long (`pacing`).

Views are numbered from 1; every view has one leader. In a view a validator may cast

    NOTARIZE(v, block)    "block is the one of view v"        after checking its body and parent
    NULLIFY(v)            "view v shall pass without me"      when its time is up
    FINALIZE(v, block)    "v is notarized and I did not nullify it"

and more than 2/3 of the stake casting the same vote make a certificate, good for anybody.

Rules
  S1  A quorum is more than 2/3 of the total stake.
  S2  At most one NOTARIZE a view; only in the current view, and never after one's own NULLIFY.
  S3  A block of view v with parent (p, hash) is notarized only while a notarization of exactly
      (p, hash) is known, or that block is the finalized head, and a nullification of every view
      between p and v is known. At most one FINALIZE a view, only for a certified notarization.
  S4  FINALIZE(v) and NULLIFY(v) by one validator exclude each other.
  S5  NULLIFY(v) only while v is the current view.
  S6  A notarization, nullification or finalization of view w >= v ends view v: enter w + 1.
  S7  With MAX_DEPTH notarized views above the finalized one, only empty blocks are notarized.
  S8  Every distinct vote counts, at most MAX_VARIANTS blocks per validator, kind and view, for
      views up to AHEAD beyond the current one. Certificates are never limited in view.
  S9  One's own vote counts after the shell has stored it: `add_vote` closes the loop. After a
      restart stored votes come back through the constructor and are never made again. With a vote
      are stored the certificates seen before it, which `start` gets back: when all restart at once
      and somebody who signed is gone, the votes of the others may not be enough to make them anew.
  S10 A finalization of (v, block) finalizes its ancestors; everything below v is forgotten.
  S11 A nullification is forwarded at once, as is a notarization of a view whose leader or voters
      were seen to contradict themselves. Everything else travels when it is missed: who says
      NULLIFY(w) for a view that we have left is answered with our certificates.

Safety, for less than 1/3 of the stake faulty. (a) Two quorums share an honest validator (S1).
(b) It notarizes one block a view, so a view has at most one notarized block (S2, S9). (c) It never
casts both FINALIZE(v) and NULLIFY(v), so when v is finalized no nullification of v exists (S4, S9).
(d) A block of a view w > v that an honest validator notarizes has a notarized parent p with all
views between p and w nullified (S3); by (c) v is not among them, so p >= v, and by (b) and
induction over w the block extends the finalized one.

Liveness, once messages arrive: whoever is in an old view either hears a certificate of it or
repeats its votes (`repeat`) until S11 answers; a view whose leader is honest and heard ends in a
notarization; when nobody nullified it, in a finalization.

Epochs. A core serves one epoch, whose first view follows `final_view` (see `blocks.EPOCH_VIEWS`).
Once the epoch's last block is notarized in view p, the shell names that block again in every view
after p, as its own child (parent (p, hash), empty); everybody does so by itself, so no leader can
stop it. (d) holds as before, with "is or extends" for "extends", and no honest validator votes for
a child of the epoch's last block. The next epoch begins on the final block alone.

Deviations from the paper. A certificate of a later view lets one skip the views between (as in
commonware's Simplex): a validator casts nothing in a skipped view except FINALIZE, which S4 covers.
Certificates are forwarded when needed, not always (S11): on the good path everybody collects the
same votes. Timers are the shell's: any time-out is safe. S7 bounds memory while finalization fails;
refusing blocks altogether at that depth would stop the chain, for only a new view can finalize.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tdmld.chain.blocks import Certificate, Kind, Vote, quorum
from tdmld.chain.codec import ZERO_HASH

MAX_DEPTH = 8
"""Notarized, unfinalized views above which blocks must be empty (S7)."""
AHEAD = 128
"""Views beyond the current one for which single votes are kept (S8)."""
MAX_VARIANTS = 4
"""Distinct blocks per validator, kind and view that are counted (S8). Honest ones vote for one."""
MAX_CERTIFICATES = 64
"""Certificates in one proposal (the newest) or hello (what is more follows it)."""


@dataclass(frozen=True, slots=True)
class CastVote:
    """Sign, store (synced), publish, then give the vote back through `add_vote`."""

    kind: Kind
    view: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Certified:
    """A quorum was seen. `forward`: send it to every validator (S11)."""

    certificate: Certificate
    forward: bool


@dataclass(frozen=True, slots=True)
class EnterView:
    """The current view is now `view`; `failed` when the one before was nullified."""

    view: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Finalized:
    """The block and all its ancestors are final."""

    view: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """`voter` is in a view that we have left: send it `certificates()` (S11)."""

    voter: int


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two votes that no honest validator casts together; self-contained evidence."""

    first: Vote
    second: Vote


Effect = CastVote | Certified | EnterView | Finalized | Answer | Conflict


@dataclass(frozen=True, slots=True)
class Proposed:
    """What S2, S3 and S7 need of a block: its parent, and whether it carries transactions."""

    parent_view: int
    parent: bytes
    empty: bool


@dataclass(frozen=True, slots=True)
class Parent:
    """The block to extend in the current view, and the certificates that allow it."""

    view: int
    hash: bytes
    why: tuple[Certificate, ...]


class _Tally:
    """Votes of one (kind, view, hash) and their weight so far."""

    __slots__ = ("votes", "weight")

    def __init__(self) -> None:
        self.votes: dict[int, Vote] = {}
        self.weight = 0


class Simplex:
    """One validator's (or, with `me` None, an observer's) part in the protocol.

    `final_view` and `final_hash` are those of the last finalized block whose body is held.
    `stored` are the validator's own votes that a restart found on disk. Every method that takes
    an input returns the effects in the order in which they must be carried out.
    """

    def __init__(
        self,
        stakes: Sequence[int],
        me: int | None,
        final_view: int,
        final_hash: bytes,
        stored: Iterable[Vote] = (),
    ) -> None:
        self._stakes = tuple(stakes)
        self._quorum = quorum(stakes)
        self.me = me
        self.view = final_view + 1
        self.final_view = final_view
        self.final_hash = final_hash
        self._notarized: dict[int, bytes] = {final_view: final_hash}
        self._nullified: set[int] = set()
        self._blocks: dict[int, dict[bytes, Proposed]] = {}
        self._tallies: dict[tuple[Kind, int, bytes], _Tally] = {}
        self._first: dict[tuple[int, int, Kind], list[Vote]] = {}
        self._contradicted: set[int] = set()
        self._certificates: dict[tuple[Kind, int], Certificate] = {}
        self._cast: dict[tuple[Kind, int], bytes] = {}
        self._heard: set[int] = set()
        self.silent = 0
        """Nothing is cast in views up to this one: set by `silence`."""
        for vote in stored:
            if vote.view > final_view:
                self._cast[vote.kind, vote.view] = vote.hash
                self._count(vote)

    # ---- inputs ----------------------------------------------------------------------------

    def start(self, certificates: Iterable[Certificate] = ()) -> list[Effect]:
        """Draw the conclusions of the stored votes and of the `certificates` stored with them (S9).
        Call once, before any other input."""
        out: list[Effect] = []
        for certificate in sorted(certificates, key=lambda c: (c.view, c.kind)):
            if self.wants_certificate(certificate):
                self._accept(certificate, False, out)
        for kind, view, block in sorted(self._tallies):
            self._certify(kind, view, block, out)
        return self._vote(out)

    def add_block(self, view: int, block: bytes, proposed: Proposed) -> list[Effect]:
        """A block whose form, leader, transactions, beacon, time and state root are valid."""
        if view > self.final_view:
            self._heard.add(view)
            self._blocks.setdefault(view, {})[block] = proposed
        return self._vote([])

    def knows(self, view: int, block: bytes) -> bool:
        """Whether `add_block` has named this block in this view."""
        return block in self._blocks.get(view, ())

    def wants_vote(self, vote: Vote) -> bool:
        """False when the vote cannot matter, so that its signature need not be checked (S8)."""
        if vote.voter >= len(self._stakes):
            return False
        if vote.kind is Kind.NULLIFY and vote.view < self.view:
            return True
        if not self.final_view < vote.view <= self.view + AHEAD:
            return False
        if self._certified(vote.kind, vote.view, vote.hash):
            return False
        tally = self._tallies.get((vote.kind, vote.view, vote.hash))
        if tally is not None and vote.voter in tally.votes:
            return False
        kept = self._first.get((vote.voter, vote.view, vote.kind), ())
        return len(kept) < MAX_VARIANTS

    def add_vote(self, vote: Vote) -> list[Effect]:
        """A vote whose signature is valid; one's own after it was stored."""
        out: list[Effect] = []
        if not self.wants_vote(vote):
            return out
        if vote.kind is Kind.NULLIFY and vote.view < self.view and vote.voter != self.me:
            out.append(Answer(vote.voter))
        if self.final_view < vote.view <= self.view + AHEAD:
            self._heard.add(vote.view)
            conflict = self._count(vote)
            if conflict is not None:
                out.append(conflict)
            self._certify(vote.kind, vote.view, vote.hash, out)
        return self._vote(out)

    def wants_certificate(self, certificate: Certificate) -> bool:
        """False when the certificate is known or below the finalized head."""
        return certificate.view > self.final_view and not self._certified(
            certificate.kind, certificate.view, certificate.hash
        )

    def add_certificate(self, certificate: Certificate) -> list[Effect]:
        """A certificate whose signatures and weight are valid."""
        out: list[Effect] = []
        if self.wants_certificate(certificate):
            self._accept(certificate, False, out)
        return self._vote(out)

    def time_out(self, view: int) -> list[Effect]:
        """The time of `view` is up (S5)."""
        out: list[Effect] = []
        if view == self.view:
            self._cast_vote(Kind.NULLIFY, view, ZERO_HASH, out)
        return out

    def silence(self, until: int) -> list[Effect]:
        """Cast nothing in views up to `until`, which may be lower than before. For a validator that
        does not know what it cast earlier; views are none the wiser, as if it were away."""
        self.silent = until
        return self._vote([])

    def jump(self, certificate: Certificate) -> list[Effect]:
        """Block sync has the finalized block of `certificate` and all below: no Finalized."""
        out: list[Effect] = []
        if certificate.view <= self.final_view:
            return out
        self._certificates[certificate.kind, certificate.view] = certificate
        self._finalize(certificate.view, certificate.hash)
        self._leave(certificate.view, False, out)
        return self._vote(out)

    # ---- questions -------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Notarized views above the finalized one (S7)."""
        return len(self._notarized) - 1

    @property
    def tip(self) -> tuple[int, bytes]:
        """The highest notarized view and its block."""
        view = max(self._notarized)
        return view, self._notarized[view]

    def notarized(self) -> dict[int, bytes]:
        """Notarized blocks by view, the finalized head included."""
        return dict(self._notarized)

    def heard(self, view: int) -> bool:
        """Whether a valid message of `view` arrived or was cast: somebody wants it to end."""
        return view in self._heard

    def cast(self, kind: Kind, view: int) -> bool:
        """Whether this validator has cast `kind` in `view`."""
        return (kind, view) in self._cast

    def may_propose(self) -> bool:
        """Whether nothing that was cast in the current view forbids proposing in it."""
        return self.view > self.silent and not (
            self.cast(Kind.NOTARIZE, self.view) or self.cast(Kind.NULLIFY, self.view)
        )

    def parent(self) -> Parent | None:
        """What a leader of the current view must extend (S3); None while certificates lack."""
        view = self.view - 1
        while view not in self._notarized:
            if view not in self._nullified:
                return None
            view -= 1
        keys = [(Kind.NOTARIZE, view)] + [(Kind.NULLIFY, v) for v in range(view + 1, self.view)]
        why = [self._certificates[key] for key in keys if key in self._certificates]
        if view == self.final_view and (Kind.FINALIZE, view) in self._certificates:
            why.insert(0, self._certificates[Kind.FINALIZE, view])
        return Parent(view, self._notarized[view], tuple(why[-MAX_CERTIFICATES:]))

    def certificates(self) -> tuple[Certificate, ...]:
        """What brings another validator to the current view, oldest first."""
        return tuple(sorted(self._certificates.values(), key=lambda c: (c.view, c.kind)))

    def finalization(self, view: int) -> Certificate | None:
        """The certificate that finalized `view`, while it is remembered."""
        return self._certificates.get((Kind.FINALIZE, view))

    def repeat(self) -> tuple[list[Vote], list[Certificate]]:
        """One's own votes and the certificates to say again when a view does not end."""
        votes = [
            tally.votes[self.me]
            for tally in self._tallies.values()
            if self.me is not None and self.me in tally.votes
        ]
        entry = [c for c in self.certificates() if c.view >= self.view - 1]
        return votes[-MAX_CERTIFICATES:], entry

    # ---- rules -----------------------------------------------------------------------------

    def _certified(self, kind: Kind, view: int, block: bytes) -> bool:
        known = self._certificates.get((kind, view))
        return known is not None and known.hash == block

    def _count(self, vote: Vote) -> Conflict | None:
        """Keep the vote (S8); say when it contradicts an earlier one of the same validator."""
        tally = self._tallies.setdefault((vote.kind, vote.view, vote.hash), _Tally())
        if vote.voter in tally.votes:
            return None
        tally.votes[vote.voter] = vote
        tally.weight += self._stakes[vote.voter]
        kept = self._first.setdefault((vote.voter, vote.view, vote.kind), [])
        kept.append(vote)
        if len(kept) > 1:
            self._contradicted.add(vote.view)
            return Conflict(kept[0], vote) if len(kept) == 2 else None
        if vote.kind is not Kind.NOTARIZE:
            other = Kind.NULLIFY if vote.kind is Kind.FINALIZE else Kind.FINALIZE
            for first in self._first.get((vote.voter, vote.view, other), ())[:1]:
                self._contradicted.add(vote.view)
                return Conflict(first, vote)
        return None

    def _certify(self, kind: Kind, view: int, block: bytes, out: list[Effect]) -> None:
        """S1."""
        tally = self._tallies.get((kind, view, block))
        if tally is None or tally.weight < self._quorum or self._certified(kind, view, block):
            return
        signatures = tuple((voter, v.signature) for voter, v in sorted(tally.votes.items()))
        forward = kind is Kind.NULLIFY or view in self._contradicted
        self._accept(Certificate(kind, view, block, signatures), forward, out)

    def _accept(self, certificate: Certificate, forward: bool, out: list[Effect]) -> None:
        kind, view, block = certificate.kind, certificate.view, certificate.hash
        self._certificates[kind, view] = certificate
        out.append(Certified(certificate, forward))
        if kind is Kind.NOTARIZE:
            self._notarized[view] = block
            self._cast_vote(Kind.FINALIZE, view, block, out)
        elif kind is Kind.NULLIFY:
            self._nullified.add(view)
        else:
            out.append(Finalized(view, block))
            self._finalize(view, block)
        self._leave(view, kind is Kind.NULLIFY, out)

    def _leave(self, view: int, failed: bool, out: list[Effect]) -> None:
        """S6, and on through views that are already certified."""
        if view < self.view:
            return
        self.view = view + 1
        while self.view in self._notarized or self.view in self._nullified:
            failed = self.view not in self._notarized
            self.view += 1
        out.append(EnterView(self.view, failed))

    def _vote(self, out: list[Effect]) -> list[Effect]:
        """S2, S3, S7: notarize the first block of the current view that may be."""
        if self.may_propose():
            for block, proposed in self._blocks.get(self.view, {}).items():
                if self._extends(self.view, proposed) and (
                    proposed.empty or self.depth < MAX_DEPTH
                ):
                    self._cast_vote(Kind.NOTARIZE, self.view, block, out)
                    break
        return out

    def _extends(self, view: int, proposed: Proposed) -> bool:
        return self._notarized.get(proposed.parent_view) == proposed.parent and all(
            between in self._nullified for between in range(proposed.parent_view + 1, view)
        )

    def _cast_vote(self, kind: Kind, view: int, block: bytes, out: list[Effect]) -> None:
        """S2, S4, S9."""
        opposite = {Kind.FINALIZE: Kind.NULLIFY, Kind.NULLIFY: Kind.FINALIZE}.get(kind)
        if self.me is None or view <= self.silent or self.cast(kind, view):
            return
        if opposite is not None and self.cast(opposite, view):
            return
        self._cast[kind, view] = block
        self._heard.add(view)
        out.append(CastVote(kind, view, block))

    def _finalize(self, view: int, block: bytes) -> None:
        """S10."""
        self.final_view, self.final_hash = view, block
        self._notarized = {v: h for v, h in self._notarized.items() if v > view}
        self._notarized[view] = block
        self._nullified = {v for v in self._nullified if v > view}
        self._blocks = {v: blocks for v, blocks in self._blocks.items() if v > view}
        self._tallies = {key: tally for key, tally in self._tallies.items() if key[1] > view}
        self._first = {key: votes for key, votes in self._first.items() if key[1] > view}
        self._contradicted = {v for v in self._contradicted if v > view}
        self._certificates = {
            key: certificate
            for key, certificate in self._certificates.items()
            if key[1] > view or key == (Kind.FINALIZE, view)
        }
        self._cast = {key: cast for key, cast in self._cast.items() if key[1] > view}
        self._heard = {v for v in self._heard if v > view}
