"""A chain whose validators change in every epoch, its proofs, and forgeries of them by somebody who
holds every validator's key, but not at the time when it mattered."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import trio

from tdmld.chain.accounts import (
    Account,
    Seat,
    ValidatorSet,
)
from tdmld.chain.blocks import Kind
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import ZERO_HASH, encode
from tdmld.chain.epochs import set_id
from tdmld.chain.genesis import chain_id
from tdmld.chain.light import Ancestor, Anchor, Bundle
from tdmld.chain.state import State
from tdmld.chain.turns import Turn
from tdmld.node.finality import Finality
from tdmld.node.prover import prove
from tdmld.node.store import ChainStore
from tests.node.lonechain import CHANGING, CHANGING_PAYEE, certify, finalization

replace = msgspec.structs.replace
CHAIN = chain_id(CHANGING)
EPOCH = CHANGING.parameters.epoch_blocks
TOP = 33
"""The chain's height, in epoch 6."""
OLD = 17
"""The checkpoint's, in epoch 3: so the turns of epochs 4 and 5 lead from it to now."""


@dataclass
class Made:
    store: ChainStore

    def prove(self, kind: str, name: str, checkpoint: int = OLD) -> Bundle:
        async def run() -> Bundle:
            return await prove(Finality(self.store), kind, name, checkpoint)

        return trio.run(run)

    def paid(self, checkpoint: int = OLD) -> Bundle:
        return self.prove("account", CHANGING_PAYEE, checkpoint)

    def checkpoint(self, height: int = OLD) -> Checkpoint:
        leaf = self.store.history_leaf(height)
        assert leaf is not None
        return Checkpoint(height, leaf[0])

    def turn(self, epoch: int) -> Turn:
        found = self.store.turn(epoch)
        assert found is not None
        return found

    def set(self, epoch: int) -> ValidatorSet:
        found = State(self.store.get).validator_set(epoch)
        assert found is not None
        return found


Forgery = Callable[[Bundle, Made], Bundle]


def _turn(at: int, **changes: Callable[[Turn, Made], object]) -> Forgery:
    def forge(bundle: Bundle, made: Made) -> Bundle:
        rows = list(bundle.turns)
        rows[at] = replace(
            rows[at], **{name: change(rows[at], made) for name, change in changes.items()}
        )
        return replace(bundle, turns=tuple(rows))

    return forge


def _turns(change: Callable[[tuple[Turn, ...], Made], tuple[Turn, ...]]) -> Forgery:
    return lambda bundle, made: replace(bundle, turns=change(bundle.turns, made))


def _seats(change: Callable[[list[Seat]], list[Seat]]) -> Callable[[Turn, Made], ValidatorSet]:
    def forge(turn: Turn, _: Made) -> ValidatorSet:
        return replace(turn.validators, seats=tuple(change(list(turn.validators.seats))))

    return forge


def _anchor(**changes: Callable[[Anchor, Made], object]) -> Forgery:
    def forge(bundle: Bundle, made: Made) -> Bundle:
        anchor = bundle.anchor
        assert anchor is not None
        found = {name: change(anchor, made) for name, change in changes.items()}
        return replace(bundle, anchor=replace(anchor, **found))

    return forge


def _place(**changes: object) -> Forgery:
    def forge(anchor: Anchor, _: Made) -> Ancestor:
        assert anchor.place is not None
        return replace(anchor.place, **changes)

    return _anchor(place=forge)


def _last(**options: object) -> Forgery:
    """The last header, signed otherwise; `epoch`: by the whole set of that one."""

    def forge(bundle: Bundle, made: Made) -> Bundle:
        header, chosen = bundle.headers[-1], made.set(int(str(options.get("epoch", 6))))
        rest = {name: value for name, value in options.items() if name not in ("epoch", "later")}
        view = header.view + int(str(options.get("later", 0)))
        proof = certify(CHAIN, header, chosen, **({"view": view} | rest))  # type: ignore[arg-type]
        return replace(bundle, certificate=proof)

    return forge


def _strangers(seats: list[Seat]) -> list[Seat]:
    return [*seats[:-1], replace(seats[-1], node=ZERO_HASH)]


def _of_an_unfinished_epoch(rows: tuple[Turn, ...], made: Made) -> tuple[Turn, ...]:
    """A block in the middle of epoch 4, really final, in the place of its last."""
    block = made.store.block(22)
    assert block is not None
    return (Turn(block.header, finalization(made.store, block.header), made.set(5)), *rows[1:])


FORGERIES: dict[str, tuple[str, Forgery]] = {
    # validators
    "a seat with more weight": (
        "not those that the header names",
        _turn(0, validators=_seats(lambda s: [replace(s[0], weight=10**6), *s[1:]])),
    ),
    "a seat left out": (
        "not those that the header names",
        _turn(1, validators=_seats(lambda s: s[1:])),
    ),
    "a stranger's seat": (
        "not those that the header names",
        _turn(1, validators=_seats(_strangers)),
    ),
    "seats in another order": (
        "not those that the header names",
        _turn(0, validators=_seats(lambda s: s[::-1])),
    ),
    "nobody's seat": ("not those that the header names", _turn(0, validators=_seats(lambda s: []))),
    "the set of the epoch before": (
        "not those that the header names",
        _turn(0, validators=lambda turn, made: made.set(4)),
    ),
    "the set of the epoch after": (
        "not those that the header names",
        _turn(0, validators=lambda turn, made: made.set(6)),
    ),
    # turns
    "all turns left out": ("the ends of 0 epochs", _turns(lambda rows, _: ())),
    "the first turn skipped": ("the ends of 1 epochs", _turns(lambda rows, _: rows[1:])),
    "the last turn skipped": ("the ends of 1 epochs", _turns(lambda rows, _: rows[:1])),
    "turns in swapped order": ("where the last of epoch 4", _turns(lambda rows, _: rows[::-1])),
    "a turn twice": ("where the last of epoch 5", _turns(lambda rows, _: (rows[0], rows[0]))),
    "a surplus turn at the end": (
        "the ends of 3 epochs",
        _turns(lambda rows, _: (*rows, rows[-1])),
    ),
    "a surplus turn at the begin": (
        "the ends of 3 epochs",
        _turns(lambda rows, made: (made.turn(3), *rows)),
    ),
    "a final block that ends no epoch": (
        "where the last of epoch 4",
        _turns(_of_an_unfinished_epoch),
    ),
    "a header that names other validators after it": (
        "not signed",
        _turn(
            0,
            header=lambda turn, made: replace(turn.header, next_validators=set_id(made.set(6))),
        ),
    ),
    "a header that names other validators of its own": (
        "not those that the header names",
        _turn(0, header=lambda turn, made: replace(turn.header, validators=set_id(made.set(3)))),
    ),
    # signatures of turns
    "a turn signed by the set before": (
        "not signed",
        _turn(0, certificate=lambda turn, made: certify(CHAIN, turn.header, made.set(3))),
    ),
    "a turn signed by the set after": (
        "not signed",
        _turn(0, certificate=lambda turn, made: certify(CHAIN, turn.header, made.set(5))),
    ),
    "a turn with two thirds, not more": (
        "not signed",
        _turn(
            0,
            certificate=lambda turn, made: certify(
                CHAIN, turn.header, made.set(4), voters=_weighing(made.set(4), 2, 3)
            ),
        ),
    ),
    "a turn that was notarized": (
        "not signed",
        _turn(
            0,
            certificate=lambda turn, made: certify(
                CHAIN, turn.header, made.set(4), kind=Kind.NOTARIZE
            ),
        ),
    ),
    "a turn with a view before its block's": (
        "not signed",
        _turn(
            0,
            certificate=lambda turn, made: certify(
                CHAIN, turn.header, made.set(4), view=turn.header.view - 1
            ),
        ),
    ),
    "a turn with a view of the next epoch": (
        "not signed",
        _turn(
            0,
            certificate=lambda turn, made: certify(
                CHAIN, turn.header, made.set(4), view=turn.header.view + (1 << 32)
            ),
        ),
    ),
    "a turn with the certificate of another": (
        "not signed",
        lambda b, m: _turn(0, certificate=lambda turn, made: b.turns[1].certificate)(b, m),
    ),
    "a turn signed for another chain": (
        "not signed",
        _turn(0, certificate=lambda turn, made: certify(ZERO_HASH, turn.header, made.set(4))),
    ),
    # the last header
    "the last block signed by the set before": ("not signed", _last(epoch=5)),
    "the last block signed by the set of the checkpoint": ("not signed", _last(epoch=3)),
    "the last block signed by genesis' validators": ("not signed", _last(epoch=0)),
    "the last block notarized": ("not signed", _last(kind=Kind.NOTARIZE)),
    "the last block in a later view": ("not signed", _last(later=1)),
    "the last block by one validator": ("not signed", _last(voters=[0])),
    "the last block of an epoch not shown": (
        "are not those|does not contain|is not of epoch|ends of 2 epochs",
        lambda b, made: replace(
            b, headers=(replace(b.headers[-1], height=TOP + EPOCH),), certificate=b.certificate
        ),
    ),
    # the anchor
    "no checkpoint": ("does not show the checkpoint", lambda b, _: replace(b, anchor=None)),
    "the checkpoint's header altered": (
        "does not contain the checkpoint",
        _anchor(header=lambda anchor, _: replace(anchor.header, time_ms=5)),
    ),
    "a checkpoint that names other validators": (
        "does not contain the checkpoint",
        _anchor(
            header=lambda anchor, made: replace(anchor.header, next_validators=set_id(made.set(5)))
        ),
    ),
    "other validators after the checkpoint": (
        "not those that the header names",
        _anchor(validators=lambda _, made: made.set(5)),
    ),
    "the checkpoint's own validators": (
        "not those that the header names",
        _anchor(validators=lambda _, made: made.set(3)),
    ),
    "a checkpoint without its place": ("does not place", _anchor(place=lambda *_: None)),
    "a checkpoint in another place": (
        "does not contain the checkpoint",
        _place(height=16),
    ),
    "a place with other outcomes": (
        "does not contain the checkpoint",
        _place(outcomes=ZERO_HASH),
    ),
    "another block as the checkpoint": (
        "does not show the checkpoint",
        lambda b, made: made.paid(16),
    ),
    # the claim
    "more money": (
        "does not lead to the header's state root",
        lambda b, _: replace(b, claim=replace(b.claim, value=encode(Account(balance=10**9)))),
    ),
    "an absence": (
        "does not lead to the header's state root",
        lambda b, _: replace(b, claim=replace(b.claim, value=b"")),
    ),
    "no path": (
        "does not lead to the header's state root",
        lambda b, _: replace(b, claim=replace(b.claim, proof=replace(b.claim.proof, siblings=()))),  # type: ignore[union-attr]
    ),
    "a state root of its own": (
        "not signed|does not follow",
        lambda b, _: replace(b, headers=(replace(b.headers[0], state_root=ZERO_HASH),)),
    ),
    # the chain
    "another chain": ("of the chain", lambda b, _: replace(b, chain=ZERO_HASH)),
}  # fmt: skip


def _weighing(chosen: ValidatorSet, part: int, whole: int) -> list[int]:
    """Voters of at most this part of the weight."""
    limit = sum(seat.weight for seat in chosen.seats) * part // whole
    voters, weight = [], 0
    for voter, seat in enumerate(chosen.seats):
        if weight + seat.weight <= limit:
            voters.append(voter)
            weight += seat.weight
    return voters
