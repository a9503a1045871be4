"""Transactions: what people and nodes ask the ledger to do (ANNEX A4).

On the wire: signature (64 bytes) ‖ canonical body; the id is the SHA-256 of all of it, and the id
of an Offer is the id of its job. There are three families:

- **owner transactions** (Transfer, Bond, Unbond, Withdraw, Register, Nominate, Revoke, Offer,
  Fetched) are signed by an owner key, carry its exact next nonce, and pay a fee, which is burned
  also when the effect fails;
- **node transactions** (the others) are signed by a node key, have nonce 0 and fee 0, can succeed
  once for what they speak of, and burn `tx_fee` from their job's locked fee budget (Ask and Return:
  nothing).
  One that fails costs nobody anything; nodes do not admit those to their pools;
- **evidence** is signed by anybody, and like them has nonce 0 and fee 0: what it proves is on the
  chain once at most.

`expiry` is the last height at which the transaction may stand in a block; 0 means none.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from tdmld.chain import limits
from tdmld.chain.blocks import Header, Kind
from tdmld.chain.codec import (
    Amount,
    Hash,
    Maybe32,
    Natural,
    PublicKey,
    Record,
    Signature,
    decode,
    encode,
)
from tdmld.chain.complaints import Leave, Present, Stall, Witness
from tdmld.chain.crypto import KeyPair, sha256, verify
from tdmld.chain.errors import DecodeError, InvalidTransaction

DOMAIN = "transaction"
REGISTER_DOMAIN = "register"
DIAL_DOMAIN = "dial"
DIAL_OPEN, DIAL_PAIR = 1, 2
"""Kinds of dial receipts."""

Text = Annotated[str, msgspec.Meta(max_length=limits.TEXT_BYTES)]


class Stage(Record, frozen=True):
    """What one stage needs: its parameter count and the memory in bytes that a worker must have."""

    parameters: Natural
    memory: Natural


class LaneMode(StrEnum):
    """How the lanes of a job come to one model."""

    SINGLE = "single"  # there is one lane
    SYNC = "sync"  # gradients are averaged at every step: same stages of all lanes have links
    DILOCO = "diloco"  # each segment makes a contribution, and the next one begins with them


class LinkRoots(Record, frozen=True):
    """Merkle roots (BLAKE3) of the frames that crossed one link in one segment, by direction.

    `link`: "up" (to stage - 1), "down" (to stage + 1), or "lane<k>" (same stage of lane k)."""

    link: Annotated[str, msgspec.Meta(max_length=8)]
    sent: Hash
    received: Hash


class Transfer(Record, frozen=True, tag="transfer"):
    """Moves `amount` from the signer to `to`."""

    to: PublicKey
    amount: Amount


class Bond(Record, frozen=True, tag="bond"):
    """Moves `amount` of the signer's balance into its stake bucket `vote` or `work`."""

    bucket: Annotated[str, msgspec.Meta(max_length=8)]
    amount: Amount


class Unbond(Record, frozen=True, tag="unbond"):
    """Takes `amount` out of a stake bucket. It can be withdrawn when the unbonding period is over,
    which begins when the stake certainly votes no more."""

    bucket: Annotated[str, msgspec.Meta(max_length=8)]
    amount: Amount


class Withdraw(Record, frozen=True, tag="withdraw"):
    """Moves everything whose unbonding period is over to the signer's balance."""


class Nominate(Record, frozen=True, tag="nominate"):
    """Names the node, bound to the signer, that votes for its vote stake. A later one replaces it
    (from the epochs that are not fixed yet on); another key is brought in by Register first."""

    node: PublicKey


class Revoke(Record, frozen=True, tag="revoke"):
    """The signer's node key may do nothing from the next block on, for good, and does not vote in
    epochs that are not fixed yet."""

    node: PublicKey


class Return(Record, frozen=True, tag="return"):
    """A jailed node is at work again, and asks for its turns to lead. `jailed`: the height of the
    jailing that it answers (records.Node), so that nobody can say it again after the next one."""

    jailed: Natural


class Register(Record, frozen=True, tag="register"):
    """Binds a node key to the signing owner, for good. `proof`: see `sign_registration`."""

    node: PublicKey
    from_height: Natural
    proof: Signature


class DialReceipt(Record, frozen=True):
    """Another node says how it reached the asking node's carrier: `DIAL_OPEN`, it dialled it anew
    at an announced address; `DIAL_PAIR`, the carriers of the two hold a direct connection, whoever
    of them opened it and however. `height`: what was final at the witness. See `receipt_bytes`."""

    witness: PublicKey
    kind: Annotated[int, msgspec.Meta(ge=DIAL_OPEN, le=DIAL_PAIR)]
    height: Natural
    signature: Signature


class Ask(Record, frozen=True, tag="ask"):
    """A node's standing offer of work. One per node; a later one (greater `until_height`) replaces
    it.

    `price`: units per 10^6 parameters and 10^3 tokens. `memory`: bytes, shared by all slots that
    the node serves. `audit_capacity`: audits open at a time. `standby_slots`: slots that it can
    hold copies of. `session`: key of the node's carrier, where auditors are reached. `receipts`:
    who reached it, by kind and witness: neighbours in a pipeline need a direct path.
    """

    session: PublicKey
    class_id: Text
    memory: Natural
    price: Amount
    audit_capacity: Natural
    standby_slots: Natural
    until_height: Natural
    receipts: Annotated[tuple[DialReceipt, ...], msgspec.Meta(max_length=limits.RECEIPTS)] = ()


class Offer(Record, frozen=True, tag="offer"):
    """A job with its money (signed by the submitting owner). Its transaction id is the job id.

    `rounds`: segments of each slot; `segment_steps` K, `unsettled` D, `state_every` R.
    `tokens`: tokens that pass one slot in one segment. `class_id`: one class, or "any": the chain
    picks the cheapest class that can fill every slot. `slot_price_max`, `standby_price`: units per
    slot and segment. `audit_rate`: parts per million. `deadline`: height. `source`: node whose
    carrier (`session`) serves the data; neither it nor any node of its owner is matched, but for
    the privacy mode "split", in which it works in slot 0 for nothing. `ring`: the last stage is
    linked to the first. `lane_weights`: micro-batches of each lane, as multiples; `tokens` and the
    prices are those of a lane of weight 1.
    """

    spec_id: Hash
    spec_bytes: Natural
    stages: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1, max_length=limits.STAGES)]
    lanes: Natural
    rounds: Natural
    segment_steps: Natural
    unsettled: Natural
    state_every: Natural
    tokens: Natural
    class_id: Text
    privacy: Text
    slot_price_max: Amount
    standby_price: Amount
    audit_rate: Natural
    audit_price: Amount
    audit_budget: Amount
    deadline: Natural
    source: PublicKey
    session: PublicKey
    ring: bool = False
    lane_mode: LaneMode = LaneMode.SINGLE
    lane_weights: Annotated[
        tuple[Natural, ...], msgspec.Meta(min_length=1, max_length=limits.LANES)
    ] = (1,)


class Fetched(Record, frozen=True, tag="fetched"):
    """The submitter has the result: the job may be closed (signed by the submitting owner)."""

    job: Hash


class Accept(Record, frozen=True, tag="accept"):
    """A matched node takes its place. `slot` is a slot index, or limits.STANDBY_SLOT; `attempt` is
    Job.attempt, so that an answer to an earlier matching says nothing about a later one."""

    job: Hash
    attempt: Natural
    slot: Natural
    session: PublicKey


class Decline(Record, frozen=True, tag="decline"):
    """A matched node gives its place back before it accepted; fields as in Accept."""

    job: Hash
    attempt: Natural
    slot: Natural


class AttestGenesis(Record, frozen=True, tag="attest_genesis"):
    """State roots of boundary 0 of a slot and the root of the data, as the signer made them."""

    job: Hash
    slot: Natural
    shared: Hash
    lane: Hash
    data: Hash


class Commit(Record, frozen=True, tag="commit"):
    """A worker's commitment to one finished segment (ANNEX A6).

    `links`: "up", "down", "lane<k>" by ascending k, those that the slot has. `seal` = BLAKE3(salt ‖
    steps root). `loss`: mean over the segment in micro-nats, of the slot that has the head; else
    None. `contribution`: the id of what the segment gives to the next round (`Job.contributes`).
    """

    job: Hash
    epoch: Natural
    slot: Natural
    incarnation: Natural
    segment: Natural
    start_shared: Hash
    start_lane: Hash
    end_shared: Hash
    end_lane: Hash
    links: Annotated[tuple[LinkRoots, ...], msgspec.Meta(max_length=limits.LINKS)]
    seal: Hash
    loss: Natural | None = None
    contribution: Maybe32 = b""


class AttestContributions(Record, frozen=True, tag="attest_contributions"):
    """The worker of `slot` holds what these other lanes' workers of its stage contributed in
    `round`: their Commits of that segment name the ids. `lanes` ascend; once more may be said
    later, again with those that were said before."""

    job: Hash
    epoch: Natural
    slot: Natural
    round: Natural
    lanes: Annotated[tuple[Natural, ...], msgspec.Meta(min_length=1, max_length=limits.LANES)]


class StandbyProof(Record, frozen=True, tag="standby_proof"):
    """Keyed hash (by Segment.proof_key) of the state after `segment`, which was committed by
    `incarnation`; the standby speaks first, then the worker."""

    job: Hash
    epoch: Natural
    slot: Natural
    incarnation: Natural
    segment: Natural
    keyed_hash: Hash


class AuditCommit(Record, frozen=True, tag="audit_commit"):
    """The auditor has replayed: `hash` = BLAKE3(list root found ‖ salt ‖ auditor's node key)."""

    job: Hash
    epoch: Natural
    slot: Natural
    segment: Natural
    hash: Hash


class Open(Record, frozen=True, tag="open"):
    """The audited worker opens its seal."""

    job: Hash
    epoch: Natural
    slot: Natural
    segment: Natural
    salt: Hash
    steps: Hash


class AuditOpen(Record, frozen=True, tag="audit_open"):
    """The auditor opens its commitment; equality with the worker's list root is the verdict."""

    job: Hash
    epoch: Natural
    slot: Natural
    segment: Natural
    list_root: Hash
    salt: Hash


class AuditFail(Record, frozen=True, tag="audit_fail"):
    """The drawn auditor could not replay, and says what was missing: another one is drawn."""

    job: Hash
    epoch: Natural
    slot: Natural
    segment: Natural
    missing: Annotated[str, msgspec.Meta(max_length=limits.MISSING_BYTES)]


class AttestResult(Record, frozen=True, tag="attest_result"):
    """A holder (standby, or worker of the last stage of lane 0) has merged and keeps the result."""

    job: Hash
    result: Hash


class Sworn(Record, frozen=True):
    """A vote as its signer made it; `kind` as in blocks.Kind."""

    kind: Kind
    hash: Hash
    signature: Signature


class VoteEvidence(Record, frozen=True, tag="vote_evidence"):
    """Two votes of a node in one view that no honest validator casts together: of one kind for two
    blocks, or NULLIFY and FINALIZE."""

    node: PublicKey
    view: Natural
    first: Sworn
    second: Sworn


class ProposalEvidence(Record, frozen=True, tag="proposal_evidence"):
    """Two blocks that one leader signed for one view."""

    first: Header
    first_signature: Signature
    second: Header
    second_signature: Signature


OwnerPayload = Transfer | Bond | Unbond | Withdraw | Register | Nominate | Revoke | Offer | Fetched
Evidence = VoteEvidence | ProposalEvidence
JobPayload = (
    Accept
    | Decline
    | AttestGenesis
    | Commit
    | AttestContributions
    | StandbyProof
    | AuditCommit
    | Open
    | AuditOpen
    | AuditFail
    | AttestResult
    | Leave
    | Stall
    | Present
    | Witness
)
Payload = OwnerPayload | Ask | Return | JobPayload | Evidence

OWNER_KINDS = (Transfer, Bond, Unbond, Withdraw, Register, Nominate, Revoke, Offer, Fetched)
EVIDENCE_KINDS = (VoteEvidence, ProposalEvidence)
FREE_KINDS = (Ask, Return, *EVIDENCE_KINDS)
"""Speak of no job, and nobody pays for them: so pools hold few of them."""


class Body(Record, frozen=True, tag="tx"):
    """What is signed. Sizes: `nonce` counts per signer, `fee` in units, `expiry` a height or 0."""

    chain_id: Hash
    signer: PublicKey
    nonce: Natural
    fee: Amount
    expiry: Natural
    payload: Payload


class Transaction(msgspec.Struct, frozen=True, gc=False):
    """A decoded transaction. That its signature is good is known only after verify_transaction."""

    id: bytes
    raw: bytes
    chain_id: bytes
    signer: bytes
    nonce: int
    fee: int
    expiry: int
    payload: Payload

    @property
    def by_owner(self) -> bool:
        """Whether it belongs to the family that has nonces and pays its own fee."""
        return isinstance(self.payload, OWNER_KINDS)


def registration_bytes(owner: bytes, from_height: int) -> bytes:
    """What a node key signs to be bound to `owner`."""
    return owner + from_height.to_bytes(8, "big")


def sign_registration(node: KeyPair, chain_id: bytes, owner: bytes, from_height: int) -> bytes:
    """The `proof` of a Register: the node agrees to work for `owner`."""
    return node.sign(REGISTER_DOMAIN, chain_id, registration_bytes(owner, from_height))


def receipt_bytes(node: bytes, session: bytes, kind: int, height: int) -> bytes:
    """What a witness signs with its node key (domain DIAL_DOMAIN): `node`, whose carrier has the
    key `session`, was reached."""
    return node + session + bytes([kind]) + height.to_bytes(8, "big")


def sign_receipt(
    witness: KeyPair, chain_id: bytes, node: bytes, session: bytes, kind: int, height: int
) -> DialReceipt:
    """A receipt for an ask of `node`."""
    signature = witness.sign(DIAL_DOMAIN, chain_id, receipt_bytes(node, session, kind, height))
    return DialReceipt(witness.public, kind, height, signature)


def sign_transaction(
    key: KeyPair,
    chain_id: bytes,
    payload: Payload,
    *,
    nonce: int = 0,
    fee: int = 0,
    expiry: int = 0,
) -> bytes:
    """The bytes of a signed transaction: signature ‖ body."""
    body = encode(Body(chain_id, key.public, nonce, fee, expiry, payload))
    return key.sign(DOMAIN, chain_id, body) + body


def decode_transaction(raw: bytes, chain_id: bytes) -> Transaction:
    """Decode `raw`; the signature is not checked here.

    Raises DecodeError for bytes that are no transaction, InvalidTransaction for another chain's.
    """
    if len(raw) > limits.TRANSACTION_BYTES:
        raise DecodeError(
            f"a transaction of {len(raw)} bytes; at most {limits.TRANSACTION_BYTES} are allowed"
        )
    if len(raw) <= 64:
        raise DecodeError(f"a transaction of {len(raw)} bytes is shorter than its signature")
    raw = bytes(raw)
    body = decode(Body, raw[64:], limits.TRANSACTION_BYTES)
    if body.chain_id != chain_id:
        raise InvalidTransaction(
            f"signed for the chain {body.chain_id.hex()[:16]}, this is {chain_id.hex()[:16]}: "
            "sign it again with this network's genesis"
        )
    return Transaction(
        id=sha256(raw),
        raw=raw,
        chain_id=chain_id,
        signer=body.signer,
        nonce=body.nonce,
        fee=body.fee,
        expiry=body.expiry,
        payload=body.payload,
    )


def verify_transaction(transaction: Transaction, chain_id: bytes) -> bool:
    """Whether the signature is the signer's."""
    raw = transaction.raw
    return verify(transaction.signer, DOMAIN, chain_id, raw[64:], raw[:64])
