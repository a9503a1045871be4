"""The rules S1 to S11 of the consensus core, one by one."""

from tdmld.chain.blocks import Certificate, Kind, Vote
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import (
    AHEAD,
    MAX_CERTIFICATES,
    MAX_DEPTH,
    MAX_VARIANTS,
    Answer,
    CastVote,
    Certified,
    Conflict,
    EnterView,
    Finalized,
    Proposed,
    Simplex,
)

HEAD = b"\x01" * 32
SIGNATURE = bytes(64)


def block(number: int) -> bytes:
    return number.to_bytes(32, "big")


def vote(kind: Kind, view: int, value: bytes, voter: int) -> Vote:
    return Vote(kind, view, value, voter, SIGNATURE)


def certificate(kind: Kind, view: int, value: bytes = ZERO_HASH) -> Certificate:
    return Certificate(kind, view, value, tuple((i, SIGNATURE) for i in range(3)))


def core(stakes: tuple[int, ...] = (1, 1, 1, 1), stored: tuple[Vote, ...] = ()) -> Simplex:
    return Simplex(stakes, 0, 0, HEAD, stored)


def child(parent_view: int = 0, parent: bytes = HEAD, empty: bool = True) -> Proposed:
    return Proposed(parent_view, parent, empty)


def test_s1_two_thirds_exactly_is_no_quorum() -> None:
    simplex = core((1, 1, 1))
    for voter in (1, 2):
        effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(5), voter))
    assert effects == []
    assert simplex.view == 1


def test_s1_weight_counts_not_heads() -> None:
    simplex = core((1, 1, 2, 6))
    effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(5), 3))
    assert not any(isinstance(effect, Certified) for effect in effects)
    effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(5), 2))
    assert any(isinstance(effect, Certified) for effect in effects)


def test_s2_notarizes_one_block_a_view() -> None:
    simplex = core()
    first = simplex.add_block(1, block(5), child())
    assert first == [CastVote(Kind.NOTARIZE, 1, block(5))]
    assert simplex.add_block(1, block(6), child()) == []


def test_s2_does_not_notarize_after_its_own_nullify() -> None:
    simplex = core()
    assert simplex.time_out(1) == [CastVote(Kind.NULLIFY, 1, ZERO_HASH)]
    assert simplex.add_block(1, block(5), child()) == []


def test_s3_a_view_between_parent_and_child_must_be_nullified() -> None:
    simplex = core()
    simplex.add_certificate(certificate(Kind.NOTARIZE, 2, block(2)))
    assert simplex.view == 3
    assert simplex.add_block(3, block(5), child()) == []
    simplex.add_certificate(certificate(Kind.NULLIFY, 1))
    assert not simplex.cast(Kind.NOTARIZE, 3)
    effects = simplex.add_certificate(certificate(Kind.NULLIFY, 2))
    assert CastVote(Kind.NOTARIZE, 3, block(5)) in effects


def test_s3_the_parent_must_be_the_notarized_block() -> None:
    simplex = core()
    simplex.add_certificate(certificate(Kind.NOTARIZE, 1, block(1)))
    assert simplex.add_block(2, block(5), child(1, block(9))) == []
    assert simplex.add_block(2, block(6), child(1, block(1))) != []


def test_s4_no_finalize_after_nullify() -> None:
    simplex = core()
    simplex.time_out(1)
    effects = simplex.add_certificate(certificate(Kind.NOTARIZE, 1, block(5)))
    assert not any(isinstance(effect, CastVote) for effect in effects)


def test_s4_and_s5_no_nullify_after_finalize_or_of_another_view() -> None:
    simplex = core()
    effects = simplex.add_certificate(certificate(Kind.NOTARIZE, 1, block(5)))
    assert CastVote(Kind.FINALIZE, 1, block(5)) in effects
    assert simplex.time_out(1) == []
    assert simplex.time_out(3) == []


def test_s6_a_later_certificate_ends_the_view() -> None:
    simplex = core()
    effects = simplex.add_certificate(certificate(Kind.NULLIFY, 9))
    assert EnterView(10, True) in effects
    assert simplex.parent() is None


def test_s7_at_the_depth_bound_only_empty_blocks_are_notarized() -> None:
    simplex = core()
    for view in range(1, MAX_DEPTH + 1):
        simplex.add_certificate(certificate(Kind.NOTARIZE, view, block(view)))
    assert simplex.depth == MAX_DEPTH
    view, parent = MAX_DEPTH + 1, child(MAX_DEPTH, block(MAX_DEPTH), empty=False)
    assert simplex.add_block(view, block(90), parent) == []
    parent = child(MAX_DEPTH, block(MAX_DEPTH), empty=True)
    assert simplex.add_block(view, block(91), parent) != []


def test_s8_every_distinct_vote_counts() -> None:
    simplex = core()
    simplex.add_vote(vote(Kind.NOTARIZE, 1, block(5), 3))
    effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(6), 3))
    assert any(isinstance(effect, Conflict) for effect in effects)
    for voter in (1, 2):
        effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(6), voter))
    assert [e.certificate.hash for e in effects if isinstance(e, Certified)] == [block(6)]


def test_s8_bounds_variants_and_far_views() -> None:
    simplex = core()
    for number in range(MAX_VARIANTS):
        assert simplex.wants_vote(vote(Kind.NOTARIZE, 1, block(number + 5), 3))
        simplex.add_vote(vote(Kind.NOTARIZE, 1, block(number + 5), 3))
    assert not simplex.wants_vote(vote(Kind.NOTARIZE, 1, block(99), 3))
    assert not simplex.wants_vote(vote(Kind.NOTARIZE, 2 + AHEAD, block(99), 2))
    assert simplex.wants_certificate(certificate(Kind.NULLIFY, 2 + AHEAD))
    assert not simplex.wants_vote(vote(Kind.NOTARIZE, 1, block(99), 4))


def test_s9_a_stored_vote_is_not_made_again() -> None:
    mine = vote(Kind.NOTARIZE, 1, block(5), 0)
    simplex = core(stored=(mine,))
    assert simplex.start() == []
    assert simplex.add_block(1, block(6), child()) == []
    assert simplex.repeat()[0] == [mine]
    for voter in (1, 2):
        effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(5), voter))
    assert CastVote(Kind.FINALIZE, 1, block(5)) in effects


def test_s9_a_vote_counts_only_after_it_was_stored() -> None:
    simplex = core()
    simplex.add_block(1, block(5), child())
    for voter in (1, 2):
        effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(5), voter))
    assert effects == []
    effects = simplex.add_vote(vote(Kind.NOTARIZE, 1, block(5), 0))
    assert any(isinstance(effect, Certified) for effect in effects)


def test_s10_a_finalization_forgets_what_is_below() -> None:
    simplex = core()
    simplex.add_certificate(certificate(Kind.NOTARIZE, 1, block(1)))
    effects = simplex.add_certificate(certificate(Kind.FINALIZE, 1, block(1)))
    assert Finalized(1, block(1)) in effects
    assert simplex.depth == 0
    assert simplex.tip == (1, block(1))
    assert simplex.finalization(1) is not None
    assert simplex.add_certificate(certificate(Kind.NOTARIZE, 1, block(1))) == []


def test_s11_an_old_nullify_is_answered_and_a_nullification_forwarded() -> None:
    simplex = core()
    effects = simplex.add_vote(vote(Kind.NULLIFY, 1, ZERO_HASH, 1))
    effects += simplex.add_vote(vote(Kind.NULLIFY, 1, ZERO_HASH, 2))
    effects += simplex.add_vote(vote(Kind.NULLIFY, 1, ZERO_HASH, 3))
    assert [e.forward for e in effects if isinstance(e, Certified)] == [True]
    assert simplex.add_vote(vote(Kind.NULLIFY, 1, ZERO_HASH, 2)) == [Answer(2)]


def test_finalize_with_nullify_by_one_voter_is_evidence() -> None:
    simplex = core()
    simplex.add_vote(vote(Kind.NULLIFY, 1, ZERO_HASH, 3))
    effects = simplex.add_vote(vote(Kind.FINALIZE, 1, block(5), 3))
    assert [type(effect) for effect in effects] == [Conflict]


def test_block_sync_jumps_over_views() -> None:
    simplex = core()
    effects = simplex.jump(certificate(Kind.FINALIZE, 40, block(40)))
    assert effects == [EnterView(41, False)]
    parent = simplex.parent()
    assert parent is not None
    assert (parent.view, parent.hash) == (40, block(40))


def test_s9_stored_certificates_end_views_again_and_bring_no_second_vote() -> None:
    before = (vote(Kind.FINALIZE, 1, block(1), 0),)
    simplex = core(stored=before)
    known = [certificate(Kind.NULLIFY, 2), certificate(Kind.NOTARIZE, 1, block(1))]
    effects = simplex.start(known)
    assert simplex.view == 3
    assert not any(isinstance(effect, CastVote) for effect in effects)
    assert set(simplex.certificates()) == set(known)


def test_whoever_has_much_to_catch_up_is_told_all_of_it() -> None:
    """A nullification that lacks would forbid it for ever to extend what is below."""
    simplex = core()
    for view in range(1, MAX_CERTIFICATES + 9):
        simplex.add_certificate(certificate(Kind.NULLIFY, view))
    assert len(simplex.certificates()) == MAX_CERTIFICATES + 8


def test_a_silent_validator_casts_nothing_and_then_what_it_may() -> None:
    simplex = core()
    simplex.silence(2)
    assert simplex.add_block(1, block(5), child()) == []
    assert simplex.time_out(1) == []
    assert not simplex.may_propose()
    effects = simplex.add_certificate(certificate(Kind.NOTARIZE, 1, block(5)))
    assert not any(isinstance(effect, CastVote) for effect in effects)
    simplex.add_block(2, block(6), child(1, block(5)))
    assert simplex.silence(1) == [CastVote(Kind.NOTARIZE, 2, block(6))]
    assert simplex.time_out(2) == [CastVote(Kind.NULLIFY, 2, ZERO_HASH)]
