"""What `scripts/chaos chain` would notice: planted double votes, and nothing else."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "lib"))

from chainpeer import SIGNED  # found by the line before
from chaos_chain import double_signs

from tdmld.chain.blocks import EPOCH_VIEWS, Kind, Vote, sign_vote
from tdmld.chain.codec import ZERO_HASH
from tests.node.chainkit import CHAIN, GENESIS, KEYS

ONE, OTHER = bytes([1]) * 32, bytes([2]) * 32


def vote(kind: Kind, block: bytes, *, view: int = 7, voter: int = 1) -> Vote:
    return sign_vote(KEYS[voter], CHAIN, kind, view, block, voter)


def heard(path: Path, *votes: Vote) -> SimpleNamespace:
    """A network of one node that heard these votes."""
    rows = [SIGNED.pack(int(v.kind), v.view, v.voter, v.hash, v.signature) for v in votes]
    (path / "heard").write_bytes(b"".join(rows))
    peer = SimpleNamespace(directory=path)
    return SimpleNamespace(genesis=GENESIS, chain_id=CHAIN, peers=[peer])


@pytest.mark.parametrize(
    "votes",
    [
        (vote(Kind.NOTARIZE, ONE), vote(Kind.NOTARIZE, OTHER)),
        (vote(Kind.FINALIZE, ONE), vote(Kind.FINALIZE, OTHER)),
        (vote(Kind.NULLIFY, ZERO_HASH), vote(Kind.FINALIZE, ONE)),
        (
            vote(Kind.NOTARIZE, ONE, view=EPOCH_VIEWS + 7),
            vote(Kind.NOTARIZE, OTHER, view=EPOCH_VIEWS + 7),
        ),
    ],
)
def test_votes_that_exclude_each_other_are_found(tmp_path: Path, votes: tuple[Vote, ...]) -> None:
    assert len(double_signs(heard(tmp_path, *votes))) == 1


def test_a_forged_vote_is_nobodys_double_sign(tmp_path: Path) -> None:
    forged = Vote(Kind.NOTARIZE, 7, OTHER, 1, bytes(64))
    assert double_signs(heard(tmp_path, vote(Kind.NOTARIZE, ONE), forged)) == []


def test_what_an_honest_validator_says_in_a_view_is_no_fault(tmp_path: Path) -> None:
    honest = [
        vote(Kind.NOTARIZE, ONE),
        vote(Kind.NOTARIZE, ONE),
        vote(Kind.FINALIZE, ONE),
        vote(Kind.NOTARIZE, OTHER, view=8),
        vote(Kind.NULLIFY, ZERO_HASH, view=8),
        vote(Kind.NOTARIZE, OTHER, voter=2),
    ]
    assert double_signs(heard(tmp_path, *honest)) == []
