"""Blocks, votes, certificates: what they are, what is hashed and what is signed.

    block id      SHA-256 of the header's canonical bytes; the header fixes the body by `tx_root`
    proposal      the leader's signature over the block id, domain "proposal"
    vote          a validator's signature over (kind, view, block id), domain "vote"
    certificate   votes of one kind, view and block id by more than 2/3 of the stake

A voter is named by its index in the `Committee`, the validators sorted by node key. Domain and
chain id (see `crypto.signing_bytes`) keep a signature from meaning anything elsewhere.

Heights are cut into epochs of `epoch_blocks`; each has its validators. Views count from 1 in every
epoch and carry its number in their upper bits, so a vote says by whom it may be cast, and votes of
two epochs never meet. The last block of an epoch is final before the next epoch begins; until then
the views that follow vote on that same block again, with nobody's proposal. So a finalization's
view may be later than its block's, there and only there.
"""

import enum
import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated

import msgspec

from tdmld.chain import crypto, vrf
from tdmld.chain.codec import ZERO_HASH, Hash, Natural, PublicKey, Record, Signature, encode
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.errors import InvalidBlock
from tdmld.chain.leader import Rotation
from tdmld.chain.merkle import root as merkle_root

MAX_VALIDATORS = 1024
"""Bounds certificates: a voter's index is below it."""

VOTE_DOMAIN = "vote"
PROPOSAL_DOMAIN = "proposal"
BEACON_DOMAIN = "beacon"

EPOCH_VIEWS = 1 << 32
"""Views of an epoch; a height's failures in a row never come near it."""

_vote_bytes = struct.Struct("!BQ32s")


class Kind(enum.IntEnum):
    """The three votes of Simplex. NULLIFY carries the zero hash."""

    NOTARIZE = 0
    NULLIFY = 1
    FINALIZE = 2


class Header(Record, frozen=True):
    """What a leader proposes; its hash is the block's id.

    `parent_view` is the view of the parent; a height is *tainted* for draws when a view between
    them failed (`follows`). `time_ms` is for people: Unix milliseconds, strictly greater than the
    parent's. `proof` is the leader's VRF proof over `beacon_input`. `state_root` is the root
    after executing the finalized height `state_height`, which never decreases along the chain;
    `history_root` covers the heights up to and with it (see `history`), and is zero in height 0.
    `validators` and `next_validators` are the ids of the validator sets of this epoch and the next.
    """

    protocol: Natural
    height: Natural
    view: Natural
    parent_view: Natural
    parent: Hash
    time_ms: Natural
    proposer: PublicKey
    proof: Annotated[bytes, msgspec.Meta(max_length=vrf.PROOF_BYTES)]
    tx_root: Hash
    state_height: Natural
    history_root: Hash
    state_root: Hash
    validators: Hash
    next_validators: Hash


class Block(Record, frozen=True):
    """A header, its leader's signature over the block id, and the raw transactions."""

    header: Header
    signature: Signature
    transactions: tuple[bytes, ...]


class Vote(Record, tag="vote", frozen=True):
    """One signed vote; `voter` is an index into the committee."""

    kind: Kind
    view: Natural
    hash: Hash
    voter: Natural
    signature: Signature


class Certificate(Record, tag="certificate", frozen=True):
    """A quorum of votes; `signatures` are (voter, signature), voters strictly ascending."""

    kind: Kind
    view: Natural
    hash: Hash
    signatures: tuple[tuple[Natural, Signature], ...]


@dataclass(frozen=True)
class Committee:
    """The validators of an epoch: node keys in ascending order and their voting stakes. All of them
    vote; `leads` says who has turns to lead, too (nothing: everybody)."""

    chain_id: bytes
    nodes: tuple[bytes, ...]
    stakes: tuple[int, ...]
    epoch: int = 0
    leads: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.leads:
            object.__setattr__(self, "leads", (True,) * len(self.nodes))
        if len(self.leads) != len(self.nodes) or not any(self.leads):
            raise ValueError("a committee says of each validator whether it leads, and one does")
        if not 0 < len(self.nodes) == len(self.stakes) <= MAX_VALIDATORS:
            raise ValueError(f"a committee has 1 to {MAX_VALIDATORS} validators, one stake each")
        if list(self.nodes) != sorted(set(self.nodes)) or min(self.stakes) <= 0:
            raise ValueError("validators are distinct, ascending by node key, with stake > 0")

    @classmethod
    def of(
        cls, chain_id: bytes, members: Iterable[tuple[bytes, int]], epoch: int = 0
    ) -> "Committee":
        """A committee of (node key, stake) pairs in any order."""
        rows = sorted(members)
        nodes, stakes = tuple(node for node, _ in rows), tuple(stake for _, stake in rows)
        return cls(chain_id, nodes, stakes, epoch)

    @property
    def quorum(self) -> int:
        """The least weight that is more than two thirds of the stake."""
        return quorum(self.stakes)

    @cached_property
    def rotation(self) -> Rotation:
        """Who leads which view."""
        return Rotation(self.stakes, self.leads)

    def leader(self, view: int) -> int:
        """The index of the validator that leads `view`, a view of this epoch."""
        return self.rotation.leader(turn(view))

    def index(self, node: bytes) -> int | None:
        """The voter index of a node key, or None."""
        try:
            return self.nodes.index(node)
        except ValueError:
            return None

    def weight(self, voters: Iterable[int]) -> int:
        """The stake of distinct voters."""
        return sum(self.stakes[voter] for voter in voters)


def quorum(stakes: Sequence[int]) -> int:
    """The least weight that is more than two thirds of the sum of `stakes`."""
    return sum(stakes) * 2 // 3 + 1


def epoch_of(height: int, epoch_blocks: int) -> int:
    """The epoch of a height from 1; epoch 0 begins with it."""
    return (height - 1) // epoch_blocks


def ends_epoch(height: int, epoch_blocks: int) -> bool:
    """Whether `height` is the last of its epoch; genesis ends none."""
    return height > 0 and height % epoch_blocks == 0


def view_epoch(view: int) -> int:
    """The epoch that a view belongs to."""
    return view // EPOCH_VIEWS


def turn(view: int) -> int:
    """Which view of its epoch this is, from 1: what leaders rotate by."""
    return view % EPOCH_VIEWS


def start_view(height: int, view: int, epoch_blocks: int) -> int:
    """The view after which votes are cast on a final block of `height` and `view`: its own, or 0
    of the next epoch when it ends one."""
    if ends_epoch(height, epoch_blocks):
        return epoch_of(height + 1, epoch_blocks) * EPOCH_VIEWS
    return view


def follows(parent_view: int, view: int) -> bool:
    """Whether no view failed between a block and its parent."""
    first = turn(view) == 1 and view_epoch(parent_view) < view_epoch(view)
    return first or view == parent_view + 1


def block_hash(header: Header) -> bytes:
    """The block's id."""
    return sha256(encode(header))


def first_header(chain_id: bytes, protocol: int, time_ms: int, state_root: bytes) -> Header:
    """Height 0: nobody proposed it; it ties the first block to genesis and its state."""
    none = ZERO_HASH
    return Header(
        protocol, 0, 0, 0, chain_id, time_ms, none, b"", none, 0, none, state_root, none, none
    )


def transactions_root(transactions: Sequence[bytes]) -> bytes:
    """Merkle root over the transactions' ids (SHA-256 of their bytes)."""
    return merkle_root([sha256(raw) for raw in transactions])


def sign_block(key: KeyPair, chain_id: bytes, header: Header, body: Sequence[bytes]) -> Block:
    """The leader's signed block."""
    return Block(header, key.sign(PROPOSAL_DOMAIN, chain_id, block_hash(header)), tuple(body))


def verify_proposal(chain_id: bytes, header: Header, signature: bytes) -> bool:
    """Whether the header's proposer signed it. Whether that is the leader is another question."""
    return crypto.verify(header.proposer, PROPOSAL_DOMAIN, chain_id, block_hash(header), signature)


def sign_vote(
    key: KeyPair, chain_id: bytes, kind: Kind, view: int, block: bytes, voter: int
) -> Vote:
    """A signed vote. Make it durable before anybody sees it."""
    return Vote(
        kind, view, block, voter, key.sign(VOTE_DOMAIN, chain_id, vote_bytes(kind, view, block))
    )


def vote_bytes(kind: int, view: int, block: bytes) -> bytes:
    """The message that a vote signs."""
    return _vote_bytes.pack(kind, view, block)


def verify_vote(committee: Committee, vote: Vote) -> bool:
    """Whether the voter exists, signed this, and the hash is zero exactly for NULLIFY."""
    return (
        view_epoch(vote.view) == committee.epoch
        and vote.voter < len(committee.nodes)
        and (vote.kind is Kind.NULLIFY) == (vote.hash == ZERO_HASH)
        and crypto.verify(
            committee.nodes[vote.voter],
            VOTE_DOMAIN,
            committee.chain_id,
            vote_bytes(vote.kind, vote.view, vote.hash),
            vote.signature,
        )
    )


def verify_certificate(committee: Committee, certificate: Certificate) -> bool:
    """Whether distinct members with a quorum of stake signed; one bad signature spoils it.

    Cheap refusals (order, weight) come before the signatures (about 40 us each).
    """
    voters = [voter for voter, _ in certificate.signatures]
    if view_epoch(certificate.view) != committee.epoch:
        return False
    if not voters or len(voters) > len(committee.nodes) or voters[-1] >= len(committee.nodes):
        return False
    if any(left >= right for left, right in itertools.pairwise(voters)):
        return False
    if committee.weight(voters) < committee.quorum:
        return False
    return all(
        verify_vote(
            committee,
            Vote(certificate.kind, certificate.view, certificate.hash, voter, signature),
        )
        for voter, signature in certificate.signatures
    )


def beacon_start(chain_id: bytes) -> bytes:
    """The beacon mix of height 0."""
    return sha256(b"tdmld\0beacon\0", chain_id)


def beacon_input(chain_id: bytes, parent_mix: bytes, height: int) -> bytes:
    """What the leader of `height` proves over: nothing in it is the leader's to choose."""
    return crypto.signing_bytes(BEACON_DOMAIN, chain_id, parent_mix + height.to_bytes(8, "big"))


@lru_cache(maxsize=256)
def _vrf_output(public: bytes, alpha: bytes, proof: bytes) -> bytes | None:
    return vrf.verify(public, alpha, proof)


def beacon_mix(chain_id: bytes, parent_mix: bytes, header: Header) -> bytes:
    """mix_h = SHA-256(mix_{h-1}, VRF output); InvalidBlock when the proof does not verify.

    The verification (0.8 ms) is remembered, since voting and executing both need it.
    """
    alpha = beacon_input(chain_id, parent_mix, header.height)
    output = _vrf_output(header.proposer, alpha, header.proof)
    if output is None:
        raise InvalidBlock(f"height {header.height}: the leader's VRF proof does not verify")
    return sha256(parent_mix, output)


def check_proposer(committee: Committee, leader: int, header: Header, signature: bytes) -> None:
    """That the view's leader signed it; raises InvalidBlock."""
    if header.proposer != committee.nodes[leader]:
        raise InvalidBlock(f"view {header.view} is led by validator {leader}, not by the proposer")
    if not verify_proposal(committee.chain_id, header, signature):
        raise InvalidBlock("the leader's signature does not verify")


def check_block(committee: Committee, leader: int, block: Block, limits: "BlockLimits") -> None:
    """The rules of form that need no other block; raises InvalidBlock naming the broken one.

    The leader's signature comes first: what follows costs milliseconds for a full block.
    """
    header = block.header
    if view_epoch(header.view) != committee.epoch:
        raise InvalidBlock(f"view {header.view} is not of epoch {committee.epoch}")
    check_proposer(committee, leader, header, block.signature)
    if header.view <= header.parent_view:
        raise InvalidBlock(f"view {header.view} does not follow its parent's {header.parent_view}")
    if header.state_height >= header.height:
        raise InvalidBlock(f"state height {header.state_height} is not below {header.height}")
    if header.protocol != limits.protocol:
        raise InvalidBlock(
            f"protocol {header.protocol} at height {header.height}; this node speaks "
            f"{limits.protocol}: update it"
        )
    if len(block.transactions) > limits.transactions:
        raise InvalidBlock(f"{len(block.transactions)} transactions, limit {limits.transactions}")
    if sum(map(len, block.transactions)) > limits.size:
        raise InvalidBlock(f"the transactions have more than {limits.size} bytes")
    if transactions_root(block.transactions) != header.tx_root:
        raise InvalidBlock("the transactions are not those of the header")


def check_finalization(
    committee: Committee, header: Header, epoch_blocks: int, certificate: Certificate
) -> bool:
    """Whether `certificate` finalizes exactly the block of `header`, which is of this epoch."""
    return (
        certificate.kind is Kind.FINALIZE
        and certificate.hash == block_hash(header)
        and epoch_of(header.height, epoch_blocks) == committee.epoch
        and view_epoch(header.view) == view_epoch(certificate.view) == committee.epoch
        and (
            certificate.view == header.view
            or (certificate.view > header.view and ends_epoch(header.height, epoch_blocks))
        )
        and verify_certificate(committee, certificate)
    )


def check_child(parent: Header, parent_hash: bytes, header: Header, epoch_blocks: int) -> None:
    """The rules between a block and its parent; raises InvalidBlock."""
    if epoch_of(header.height, epoch_blocks) != view_epoch(header.view):
        raise InvalidBlock(f"height {header.height} is not of the epoch of view {header.view}")
    if header.parent != parent_hash or header.parent_view != parent.view:
        raise InvalidBlock(f"height {header.height}: the parent is another block")
    if header.height != parent.height + 1:
        raise InvalidBlock(f"height {header.height} does not follow {parent.height}")
    if header.time_ms <= parent.time_ms:
        raise InvalidBlock(f"height {header.height}: the time does not grow")
    if header.state_height < parent.state_height:
        raise InvalidBlock(f"height {header.height}: the named state height goes back")


@dataclass(frozen=True)
class BlockLimits:
    """Genesis parameters that bound a block: bytes and count of transactions, and the protocol."""

    size: int
    transactions: int
    protocol: int
