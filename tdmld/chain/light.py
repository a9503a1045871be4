"""Proofs for somebody who holds no chain: what is in a bundle, and how it is checked.

    bundle = an anchor, when a checkpoint is trusted: its header, its place in D's history and the
             validators that sign on from it
           + turns (`turns`): from genesis' validators, or the anchor's, to those of D's epoch
           + headers C..D, linked by parent, and the certificate that finalizes D
           + one claim:
               StateClaim        a state key's value, or its absence, under C's `state_root`
               TransactionClaim  a transaction and whether it succeeded, under D's history
               BlockClaim        an old block's header, under D's history

`check_bundle` trusts the genesis document, and perhaps a checkpoint. It believes nothing else in
the bundle, so any peer may have made it. Every byte of a bundle is bound by a hash or a signature,
and nothing in it can be left out or added (tests/node/test_proofs.py, test_turns.py).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import msgspec

from tdmld.chain import history, merkle
from tdmld.chain.accounts import (
    Account,
    Facts,
    ValidatorSet,
)
from tdmld.chain.blocks import Certificate, Header, block_hash, epoch_of
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import Hash, Natural, Record, decode, encode
from tdmld.chain.crypto import public_key, sha256
from tdmld.chain.epochs import genesis_set
from tdmld.chain.errors import DecodeError, InvalidTransaction, ProofRefused
from tdmld.chain.genesis import Genesis, chain_id
from tdmld.chain.limits import RECORD_BYTES, TRANSACTION_BYTES
from tdmld.chain.records import (
    Audit,
    Earnings,
    Job,
    Node,
    Segment,
    SlotState,
)
from tdmld.chain.state import u32, u64
from tdmld.chain.transactions import Transaction, decode_transaction
from tdmld.chain.tree import TreeProof, verify_proof
from tdmld.chain.turns import MAX_TURNS, Turn, check_final, check_set, follow

BUNDLE_BYTES = 16 << 20
"""Greatest bundle that is looked at."""
MAX_HEADERS = 512
"""From the header that commits a state to the next one with a finalization of its own."""
HISTORY_DEPTH = 64

Siblings = Annotated[tuple[Hash, ...], msgspec.Meta(max_length=HISTORY_DEPTH)]


class Ancestor(Record, frozen=True):
    """Where a height stands in a later header's history; the block's id comes from elsewhere."""

    height: Natural
    outcomes: Hash
    siblings: Siblings


class Anchor(Record, frozen=True):
    """A checkpoint's header, and where it stands in the last header's history (none: it is among
    the headers). `validators` sign on from it: the set of its epoch when the last header is of that
    epoch, else that of the next."""

    header: Header
    place: Ancestor | None
    validators: ValidatorSet


class StateClaim(Record, tag="state", frozen=True):
    """`key` has `value` in the state that the first header commits; no value: it is absent."""

    key: bytes
    value: bytes
    proof: TreeProof


class TransactionClaim(Record, tag="transaction", frozen=True):
    """Transaction number `index` of `count` in the block of `header`, and what became of it."""

    header: Header
    raw: Annotated[bytes, msgspec.Meta(max_length=TRANSACTION_BYTES)]
    ok: bool
    index: Natural
    count: Natural
    siblings: Siblings
    place: Ancestor


class BlockClaim(Record, tag="block", frozen=True):
    """An old block's header."""

    header: Header
    place: Ancestor


class Bundle(Record, tag="tdmld-proof-2", frozen=True):
    """Everything that a stranger needs; see the module's head."""

    chain: Hash
    anchor: Anchor | None
    turns: Annotated[tuple[Turn, ...], msgspec.Meta(max_length=MAX_TURNS)]
    headers: Annotated[tuple[Header, ...], msgspec.Meta(min_length=1, max_length=MAX_HEADERS)]
    certificate: Certificate
    claim: StateClaim | TransactionClaim | BlockClaim


@dataclass(frozen=True, slots=True)
class Proven:
    """What a bundle showed. `height`: the state's, or the block's; `time_ms`: of the block that
    says so; `final`: the certified block, with its id; `trusted`: the checkpoint's header, or none
    when the bundle rests on genesis alone."""

    height: int
    time_ms: int
    final: Header
    final_hash: bytes
    trusted: Header | None
    claim: StateClaim | TransactionClaim | BlockClaim
    transaction: Transaction | None


_ADDRESSED = {"account": b"a", "facts": b"f", "node": b"n"}
_OF_SEGMENT = {"segment": b"g", "audit": b"u"}
STATE_KINDS = (*_ADDRESSED, "job", "payment", "slot", *_OF_SEGMENT)
KINDS = (*STATE_KINDS, "transaction", "block")
"""What can be proven."""


def state_key(kind: str, name: str) -> bytes:
    """The state key of `account ADDRESS`, `job ID`, `payment JOB/ADDRESS`, `slot JOB/SLOT`,
    `segment` or `audit JOB/SLOT/SEGMENT`, ... DecodeError when it cannot be read."""
    parts = name.split("/")
    try:
        match kind, parts:
            case (("account" | "facts" | "node"), [owner]):
                return _ADDRESSED[kind] + public_key(owner)
            case "job", [job]:
                return b"j" + _hash(job)
            case "payment", [job, owner]:
                return b"p" + _hash(job) + public_key(owner)
            case "slot", [job, slot]:
                return b"s" + _hash(job) + u32(int(slot))
            case (("segment" | "audit"), [job, slot, segment]):
                return _OF_SEGMENT[kind] + _hash(job) + u32(int(slot)) + u64(int(segment))
    except (ValueError, OverflowError) as error:
        raise DecodeError(f"{name!r} is not the name of a {kind}: {error}") from error
    raise DecodeError(
        f"{kind} {name!r} is nothing that can be proven: write account ADDRESS, node ADDRESS, "
        "facts ADDRESS, job ID, payment JOB/ADDRESS, slot JOB/SLOT, segment or audit "
        "JOB/SLOT/SEGMENT"
    )


def _hash(text: str) -> bytes:
    raw = bytes.fromhex(text)
    if len(raw) != 32:
        raise ValueError("an id has 64 hex digits")
    return raw


def record_of(claim: StateClaim) -> Record | None:
    """The record that a state claim carries; None when it shows an absence. ProofRefused when
    the key is of a kind that light clients do not read."""
    kind = _RECORDS.get(claim.key[:1])
    if kind is None:
        raise ProofRefused(f"the proof is of the state key {claim.key.hex()}, of no known kind")
    if not claim.value:
        return None
    try:
        return decode(kind, claim.value, RECORD_BYTES)
    except DecodeError as error:
        raise ProofRefused(f"the value cannot be read: {error}") from error


_RECORDS: dict[bytes, type[Record]] = {
    b"a": Account,
    b"f": Facts,
    b"n": Node,
    b"j": Job,
    b"p": Earnings,
    b"s": SlotState,
    b"g": Segment,
    b"u": Audit,
}


def read_bundle(raw: bytes) -> Bundle:
    """A bundle file's content; ProofRefused when it is none."""
    try:
        return decode(Bundle, raw, BUNDLE_BYTES)
    except DecodeError as error:
        raise ProofRefused(f"the file is no proof bundle, or is damaged: {error}") from error


def check_bundle(bundle: Bundle, genesis: Genesis, trusted: Checkpoint | None = None) -> Proven:
    """Check everything; ProofRefused names what does not hold."""
    chain, epoch_blocks = chain_id(genesis), genesis.parameters.epoch_blocks
    if bundle.chain != chain:
        raise ProofRefused(f"the proof is of the chain {bundle.chain.hex()}, not {chain.hex()}")
    first, last = bundle.headers[0], bundle.headers[-1]
    epoch = epoch_of(last.height, epoch_blocks)
    known = _known(bundle, genesis, epoch, trusted)
    if len(bundle.turns) != max(epoch - known.epoch, 0):
        raise ProofRefused(
            f"the proof has the ends of {len(bundle.turns)} epochs, and those from {known.epoch} "
            f"to before {epoch} lead to block {last.height}"
        )
    chosen = follow(chain, epoch_blocks, known, bundle.turns)
    last_hash = check_headers(bundle.headers)
    check_final(chain, epoch_blocks, chosen, last, bundle.certificate)
    _check_anchor(bundle, last)
    claim, transaction = bundle.claim, None
    match claim:
        case StateClaim(key, value, proof):
            digest = sha256(value) if value else b""
            if not verify_proof(first.state_root, sha256(key), digest, proof):
                raise ProofRefused("the state proof does not lead to the header's state root")
            height, time_ms = first.state_height, first.time_ms
        case TransactionClaim():
            _check_alone(bundle)
            transaction = _check_transaction(claim, chain)
            outcome = history.outcome_leaf(sha256(claim.raw), claim.ok, min(claim.count, 2**32 - 1))
            place = claim.place
            if not merkle.verify_proof(
                place.outcomes, outcome, claim.index, claim.count, claim.siblings
            ):
                raise ProofRefused("the transaction is not where the proof says it is")
            _check_place(claim.header, place, last)
            height, time_ms = place.height, claim.header.time_ms
        case BlockClaim(header, place):
            _check_alone(bundle)
            _check_place(header, place, last)
            height, time_ms = header.height, header.time_ms
    anchor = None if bundle.anchor is None else bundle.anchor.header
    return Proven(height, time_ms, last, last_hash, anchor, claim, transaction)


def check_headers(headers: tuple[Header, ...]) -> bytes:
    """Whether the headers follow one another; the id of the last. ProofRefused."""
    ids = [block_hash(header) for header in headers]
    for (parent, header), key in zip(pairwise(headers), ids, strict=False):
        if header.parent != key or header.height != parent.height + 1:
            raise ProofRefused(f"header {header.height} does not follow {parent.height}")
    return ids[-1]


def shows(place: Ancestor, block: bytes, header: Header) -> bool:
    """Whether `header`'s history has `block` (an id) at the place's height."""
    leaf = history.leaf(block, place.outcomes)
    count = header.state_height + 1
    return header.height > 0 and merkle.verify_proof(
        header.history_root, leaf, place.height, count, place.siblings
    )


def _known(
    bundle: Bundle, genesis: Genesis, epoch: int, trusted: Checkpoint | None
) -> ValidatorSet:
    """The validators that are known without the bundle's word: where its turns begin."""
    anchor = bundle.anchor
    if trusted is None:
        if anchor is not None:
            raise ProofRefused(
                f"the proof rests on the checkpoint {anchor.header.height}, and none is trusted "
                "here: name it with --checkpoint HEIGHT:HASH"
            )
        return genesis_set(genesis, min(max(epoch, 0), 1))
    last = bundle.headers[-1].height
    if last < trusted.height:
        raise ProofRefused(
            f"the proof is stale: it ends at block {last}, below the checkpoint {trusted.height}"
        )
    if anchor is None or anchor.header.height != trusted.height:
        raise ProofRefused(
            f"the proof does not show the checkpoint {trusted.height}: fetch it again with "
            f"--checkpoint {trusted.height}:{trusted.hash.hex()}"
        )
    header = anchor.header
    if block_hash(header) != trusted.hash:
        raise ProofRefused(
            f"the chain of this proof does not contain the checkpoint {trusted.height}: it is "
            "another chain"
        )
    begins = epoch_of(header.height, genesis.parameters.epoch_blocks)
    if begins == epoch:
        check_set(anchor.validators, begins, header.validators)
    else:
        check_set(anchor.validators, begins + 1, header.next_validators)
    return anchor.validators


def _check_anchor(bundle: Bundle, last: Header) -> None:
    anchor = bundle.anchor
    if anchor is None:
        return
    header, place = anchor.header, anchor.place
    if header.height >= bundle.headers[0].height:
        if place is not None or header not in bundle.headers:
            raise ProofRefused(f"block {header.height} of this proof is not the checkpoint's")
        return
    if place is None:
        raise ProofRefused(f"the proof does not place the checkpoint {header.height}")
    if not shows(place, block_hash(header), last):
        raise ProofRefused(
            f"the chain of this proof does not contain the checkpoint {header.height}: it is "
            "another chain"
        )


def _check_alone(bundle: Bundle) -> None:
    """What stands in the history needs the certified header only."""
    if len(bundle.headers) != 1:
        raise ProofRefused("there are headers in the proof that show nothing")


def _check_place(header: Header, place: Ancestor, last: Header) -> None:
    if header.height != place.height or not shows(place, block_hash(header), last):
        raise ProofRefused(f"block {header.height} is not in the history of the certified block")


def _check_transaction(claim: TransactionClaim, chain: bytes) -> Transaction:
    try:
        return decode_transaction(claim.raw, chain)
    except (DecodeError, InvalidTransaction) as error:
        raise ProofRefused(f"the transaction cannot be read: {error}") from error


def bundle_bytes(bundle: Bundle) -> bytes:
    """What is written to a bundle file."""
    return encode(bundle)
