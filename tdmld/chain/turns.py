"""Who validates an epoch, shown to somebody who holds no chain.

    the set of e          signs the last block of e, whose header names the set of e + 1
    a turn of epoch e   = that header, its certificate, and the set of e + 1

So whoever knows one set follows the turns, one an epoch, to any later set. Two things are known
without anybody's word: genesis, which says the sets of epochs 0 and 1, and a trusted checkpoint,
whose header names those of its epoch and the next.

The last block of an epoch is final by its own epoch's validators only (EPOCH-6), and every voter
computed the set that its header names. Of a set less than a third is faulty as long as its stake
can be slashed: hence the age at which a trusted point needs a second look (`trust_ends_ms`).
"""

from collections.abc import Iterable

from tdmld.chain.accounts import (
    ValidatorSet,
)
from tdmld.chain.blocks import Certificate, Committee, Header, check_finalization
from tdmld.chain.codec import Record
from tdmld.chain.epochs import committee, set_id
from tdmld.chain.errors import ProofRefused
from tdmld.chain.genesis import Genesis

MAX_TURNS = 4096
"""In one bundle: what a stranger checks at most. Nodes follow them in pages, without an end."""


class Turn(Record, frozen=True):
    """The end of an epoch: its last header, final by `certificate`, and the next epoch's set."""

    header: Header
    certificate: Certificate
    validators: ValidatorSet


def committee_of(chain: bytes, chosen: ValidatorSet) -> Committee:
    """The set as votes are checked against it; ProofRefused when its seats are no committee."""
    try:
        return committee(chain, chosen)
    except ValueError as error:
        raise ProofRefused(f"the validators of epoch {chosen.epoch}: {error}") from error


def check_set(chosen: ValidatorSet, epoch: int, name: bytes) -> None:
    """Whether this is the set that a header names for an epoch; ProofRefused."""
    if chosen.epoch != epoch or set_id(chosen) != name:
        raise ProofRefused(f"the validators of epoch {epoch} are not those that the header names")


def follow(
    chain: bytes, epoch_blocks: int, known: ValidatorSet, turns: Iterable[Turn]
) -> ValidatorSet:
    """From the set of an epoch over the turns of this epoch and those after it, to the set that
    the last of them names. ProofRefused at the first that does not hold."""
    for turn in turns:
        known = _next(chain, epoch_blocks, known, turn)
    return known


def _next(chain: bytes, epoch_blocks: int, known: ValidatorSet, turn: Turn) -> ValidatorSet:
    header, epoch = turn.header, known.epoch
    if header.height != (epoch + 1) * epoch_blocks:
        raise ProofRefused(
            f"block {header.height} stands where the last of epoch {epoch} must stand, "
            f"{(epoch + 1) * epoch_blocks}"
        )
    check_final(chain, epoch_blocks, known, header, turn.certificate)
    check_set(turn.validators, epoch + 1, header.next_validators)
    return turn.validators


def check_final(
    chain: bytes,
    epoch_blocks: int,
    chosen: ValidatorSet,
    header: Header,
    certificate: Certificate,
) -> None:
    """Whether a quorum of the set of the header's epoch finalized it; ProofRefused."""
    check_set(chosen, chosen.epoch, header.validators)
    if not check_finalization(committee_of(chain, chosen), header, epoch_blocks, certificate):
        raise ProofRefused(
            f"block {header.height} is not signed, as final, by two thirds of the stake of the "
            f"validators of epoch {chosen.epoch}"
        )


def trust_ends_ms(genesis: Genesis, time_ms: int) -> int:
    """When a trusted point of `time_ms` is older than the unbonding period (Unix milliseconds): its
    validators may then have withdrawn their stake, and have nothing to lose by signing twice."""
    return time_ms + 1000 * genesis.parameters.unbonding[1]
