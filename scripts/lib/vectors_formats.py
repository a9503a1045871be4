"""Vectors of bytes: encoding, genesis, headers, votes, certificates."""

from collections.abc import Mapping
from typing import Any

import msgspec

from scripts.lib.vectors_case import hexed, state_root
from tdmld.chain import history, merkle, vrf
from tdmld.chain.accounts import (
    Account,
    Supply,
)
from tdmld.chain.blocks import (
    EPOCH_VIEWS,
    Block,
    Certificate,
    Committee,
    Header,
    Kind,
    Vote,
    beacon_input,
    beacon_mix,
    beacon_start,
    block_hash,
    first_header,
    sign_block,
    sign_vote,
    transactions_root,
    verify_certificate,
    verify_vote,
)
from tdmld.chain.codec import ZERO_HASH, Record, encode
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.genesis import (
    Genesis,
    chain_id,
    genesis_bytes,
    genesis_document,
    genesis_from_document,
    protocol_at,
    validators,
)
from tdmld.chain.ledger import genesis_changes
from tdmld.chain.records import (
    Due,
    Keys,
    Timer,
)
from tdmld.chain.state import u64
from tdmld.chain.transactions import (
    Ask,
    AuditFail,
    Body,
    Commit,
    DialReceipt,
    LinkRoots,
    Register,
    Transfer,
    sign_transaction,
)
from tdmld.node.export import plain
from tests.chain.world import World, make_genesis, mark, node_key, owner_key

START_MS = 1_767_225_600_000


# -- encoding


def encoding() -> dict[str, Any]:
    """Records and their bytes; bytes that no decoder may take."""
    chain, alice = mark("chain"), owner_key(0)
    commit = Commit(
        mark("job"), 0, 1, 0, 2, *[mark(n) for n in range(4)],
        (LinkRoots("up", mark("sent"), mark("received")),), mark("seal"), None,
    )  # fmt: skip
    bodies = [
        Transfer(mark("to"), 2**63 - 1),
        Ask(
            mark("session"),
            "Köln",
            2**32,
            2**16,
            127,
            128,
            255,
            (DialReceipt(mark("witness"), 1, 256, bytes(64)),),
        ),
        Register(mark("node"), 256, bytes(64)),
        commit,
        msgspec.structs.replace(commit, loss=65_536, links=()),
        AuditFail(mark("job"), 0, 0, 2**32 - 1, "x" * 32),
        World().offer(),
    ]
    records: list[Record] = [
        *(Body(chain, alice.public, 0, 10, 0, payload) for payload in bodies),
        Account(1, 2, 3, 4),
        Supply(6, 1, 1, 1, 1, 2),
        Due(Timer.SETTLE, mark("job"), 3, 70_000),
        Keys(tuple(sorted(mark(n) for n in range(17)))),
        Vote(Kind.NULLIFY, 9, ZERO_HASH, 1, bytes(64)),
        Certificate(Kind.FINALIZE, 300, mark("block"), ((0, bytes(64)), (2, bytes(64)))),
        first_header(chain, 1, START_MS, mark("root")),
    ]
    return {
        "rules": ["ENC-1", "ENC-2", "ENC-3", "ENC-5"],
        "records": [
            {
                "kind": type(record).__name__,
                "value": plain(record),
                "bytes": encode(record).hex(),
            }
            for record in records
        ],
        "refused": _refused(),
    }


def _refused() -> list[dict[str, Any]]:
    good = encode(Account(5, 0, 0, 0))
    due = encode(Due(Timer.MATCH, mark("job")))
    job = bytes((0xC4, 32)) + mark("job")
    text = encode("match")
    rows = {
        "a longer integer": ("ENC-3", "Account", b"\x94\xcc\x05\x00\x00\x00"),
        "an integer in eight bytes": ("ENC-3", "Account", b"\x94\xcf" + u64(5) + bytes(3)),
        "a signed integer": ("ENC-3", "Account", b"\x94\xd0\x05\x00\x00\x00"),
        "a negative integer": ("ENC-5", "Account", b"\x94\xff\x00\x00\x00"),
        "an integer of 2^63": ("ENC-5", "Account", b"\x94\xcf" + u64(2**63) + bytes(3)),
        "a float": ("ENC-5", "Account", b"\x94\xcb" + bytes(8) + bytes(3)),
        "a longer array": ("ENC-3", "Account", b"\xdc\x00\x04" + good[1:]),
        "a field less": ("ENC-2", "Account", b"\x93\x05\x00\x00"),
        "a field more": ("ENC-4", "Account", b"\x95\x05\x00\x00\x00\x00"),
        "a byte more": ("ENC-4", "Account", good + b"\x00"),
        "no bytes": ("ENC-4", "Account", b""),
        "a map": ("ENC-1", "Account", b"\x80"),
        "a longer text": ("ENC-3", "Due", due.replace(text, b"\xd9\x05match")),
        "a text in bytes": ("ENC-5", "Due", due.replace(text, b"\xc4\x05match")),
        "another timer": ("ENC-5", "Due", due.replace(text, b"\xa5never")),
        "longer bytes": ("ENC-3", "Due", due.replace(job, b"\xc5\x00\x20" + job[2:])),
        "a short hash": ("ENC-5", "Due", due.replace(job, b"\xc4\x1f" + job[3:])),
    }
    body = Body(mark("chain"), owner_key(0).public, 0, 10, 0, Transfer(mark("to"), 5))
    raw = encode(body)
    rows |= {
        "another tag": ("ENC-1", "Body", raw.replace(b"\xa8transfer", b"\xa8Transfer")),
        "another tag of the body": ("ENC-1", "Body", raw.replace(b"\xa2tx", b"\xa2xt")),
        "text that is not UTF-8": (
            "ENC-3",
            "Body",
            encode(msgspec.structs.replace(body, payload=_fail("ab"))).replace(b"ab", b"\xff\xfe"),
        ),
        "too long a text": (
            "ENC-5",
            "Body",
            encode(msgspec.structs.replace(body, payload=_fail("é" * 129))),
        ),
    }
    return [
        {"name": name, "rules": [rule], "kind": kind, "bytes": found.hex()}
        for name, (rule, kind, found) in rows.items()
    ]


def _fail(missing: str) -> AuditFail:
    return AuditFail(mark("job"), 0, 0, 0, missing)


# -- genesis


def _typed() -> dict[str, Any]:
    """A document as somebody might type it: rows in no order, few parameters."""
    owners, nodes = [owner_key(n) for n in range(3)], [node_key(n) for n in range(4)]
    return {
        "validators": [[owners[n].address, nodes[n].address, 5 + n] for n in (2, 0)],
        "time": "2026-01-01T00:00:00.250Z",
        "chain": "tdmld-vectors-1",
        "nodes": [[owners[1].address, nodes[3].address], [owners[1].address, nodes[1].address]],
        "accounts": [[owner.address, 1000 * n] for n, owner in enumerate(owners)],
        "work_stakes": [[owners[1].address, 50]],
        "auditors": [owners[1].address],
        "mature_classes": ["cpu", '"*\\'],
        "protocol": [[0, 1], [500, 2]],
        "parameters": {"interval_ms": 250, "unbonding": [10, 20]},
    }  # fmt: skip


def genesis() -> dict[str, Any]:
    """From the document to chain id, first state, first header; documents that found nothing."""
    typed = _typed()
    found = genesis_from_document(typed)
    changes = genesis_changes(found)
    root = state_root(changes)
    header = first_header(chain_id(found), protocol_at(found, 0), found.time_ms, root)
    return {
        "rules": ["GEN-1", "GEN-2", "GEN-4", "GEN-5", "GEN-6", "GEN-7", "SIG-2"],
        "document": typed,
        "canonical": genesis_bytes(found).decode(),
        "chain_id": chain_id(found).hex(),
        "state": hexed(changes),
        "state_root": root.hex(),
        "header": plain(header),
        "header_bytes": encode(header).hex(),
        "hash": block_hash(header).hex(),
        "refused": _refused_genesis(typed),
    }


def _refused_genesis(typed: dict[str, Any]) -> list[dict[str, Any]]:
    owner, node = owner_key(0).address, node_key(0).address
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {
        "no validators": ("GEN-2", {"validators": []}),
        "a validator without stake": ("GEN-2", {"validators": [[owner, node, 0]]}),
        "an owner twice": ("GEN-2", {"accounts": [[owner, 1], [owner, 2]]}),
        "a negative balance": ("GEN-2", {"accounts": [[owner, -1]]}),
        "a fraction": ("GEN-1", {"accounts": [[owner, 0.5]]}),
        "no address": ("SIG-2", {"accounts": [["12D3KooW", 1]]}),
        "capitals in the name": ("GEN-2", {"chain": "Tdmld"}),
        "a time without its zone": ("GEN-2", {"time": "2026-01-01T00:00:00"}),
        "a protocol that begins later": ("GEN-2", {"protocol": [[1, 1]]}),
        "protocols that go back": ("GEN-2", {"protocol": [[0, 2], [9, 1]]}),
        "an unknown key": ("GEN-2", {"extra": 1}),
        "an unknown parameter": ("GEN-2", {"parameters": {"extra": 1}}),
        "a window of nothing": ("GEN-2", {"parameters": {"draw_delay": 0}}),
        "a node that is an owner": ("GEN-3", {"nodes": [[owner_key(1).address, owner]]}),
        "a node of two owners": ("GEN-3", {"nodes": [[owner_key(1).address, node]]}),
        "too much money": ("GEN-4", {"accounts": [[owner, 2**63 - 1]]}),
        "an auditor from nowhere": ("GEN-2", {"auditors": [owner_key(8).address]}),
        "the absent leader's time above the view's": (
            "GEN-5",
            {"parameters": {"leader_away_ms": 9000}},
        ),
    }
    return [
        {"name": name, "rules": [rule], "document": {**typed, **changes}}
        for name, (rule, changes) in rows.items()
    ]


# -- blocks


def blocks() -> dict[str, Any]:
    """A block, its parent, its votes and certificates, good and bad."""
    founded = make_genesis(nodes=4, validators=4)
    chain = chain_id(founded)
    keys = sorted((node_key(n) for n in range(4)), key=lambda key: key.public)
    committee = Committee.of(chain, [(v.node, v.stake) for v in validators(founded)])
    first = first_header(chain, 1, founded.time_ms, state_root(genesis_changes(founded)))
    body = [
        sign_transaction(owner_key(0), chain, Transfer(mark(n), n), nonce=n, fee=10)
        for n in range(3)
    ]
    leader = keys[committee.leader(2)]
    header = Header(
        protocol=1,
        height=1,
        view=2,
        parent_view=0,
        parent=block_hash(first),
        time_ms=founded.time_ms + 500,
        proposer=leader.public,
        proof=vrf.prove(leader.seed, beacon_input(chain, beacon_start(chain), 1)),
        tx_root=transactions_root(body),
        state_height=0,
        history_root=merkle.root([history.leaf(block_hash(first), ZERO_HASH)]),
        state_root=first.state_root,
        validators=mark("validators"),
        next_validators=mark("next validators"),
    )
    block = sign_block(leader, chain, header, body)
    return {
        "genesis": genesis_document(founded),
        "committee": [
            {"node": node.hex(), "stake": stake}
            for node, stake in zip(committee.nodes, committee.stakes, strict=True)
        ],
        "quorum": committee.quorum,
        "rules": ["BLK-1", "BLK-2", "BLK-5", "BLK-8", "BLK-9", "TX-1", "TX-2", "TX-3", "TX-4"],
        "leader": committee.leader(2),
        "header": plain(header),
        "header_bytes": encode(header).hex(),
        "hash": block_hash(header).hex(),
        "signature": block.signature.hex(),
        "block_bytes": encode(block).hex(),
        "transactions": [{"id": sha256(raw).hex(), "raw": raw.hex()} for raw in body],
        "mix": beacon_mix(chain, beacon_start(chain), header).hex(),
        "bodies": _bodies(block, founded),
        "children": _children(header),
        "votes": _votes(keys, committee, header),
        "certificates": _certificates(keys, committee, header),
    }


def _bodies(block: Block, founded: Genesis) -> list[dict[str, Any]]:
    """The rules of form that need no other block: what a voter refuses at once."""
    chain = chain_id(founded)
    keys = {node_key(n).public: node_key(n) for n in range(4)}
    leader = keys[block.header.proposer]
    other = next(key for public, key in keys.items() if public != leader.public)
    header, body = block.header, block.transactions

    def signed(key: KeyPair = leader, raws: Any = body, **changes: Any) -> Block:
        return sign_block(key, chain, msgspec.structs.replace(header, **changes), raws)

    rows = {
        "as it is": ("BLK-1", block),
        "another leader's turn": ("BLK-5", signed(other, proposer=other.public)),
        "signed by another": ("BLK-5", signed(other)),
        "a body that the header does not name": ("BLK-2", signed(raws=body[:2])),
        "transactions in another order": ("BLK-2", signed(raws=body[::-1])),
        "another protocol": ("BLK-3", signed(protocol=2)),
        "a view that is not after the parent's": ("BLK-4", signed(parent_view=2)),
        "a state of its own height": ("BLK-7", signed(state_height=1)),
    }
    return [
        {"name": name, "rules": [rule], "valid": found is block, "bytes": encode(found).hex()}
        for name, (rule, found) in rows.items()
    ]


def _children(header: Header) -> list[dict[str, Any]]:
    """Which headers may follow `header` (BLK-4, BLK-7)."""
    child = msgspec.structs.replace(
        header,
        height=2,
        view=3,
        parent_view=2,
        parent=block_hash(header),
        time_ms=header.time_ms + 1,
        tx_root=ZERO_HASH,
        state_height=1,
    )
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "the next one": ("BLK-4", {}),
        "a few views later": ("BLK-4", {"view": 9}),
        "the same time": ("BLK-4", {"time_ms": header.time_ms}),
        "a height left out": ("BLK-4", {"height": 3}),
        "another parent": ("BLK-4", {"parent": mark("x")}),
        "another view of the parent": ("BLK-4", {"parent_view": 1}),
        "an older state, but not older than the parent's": ("BLK-7", {"state_height": 0}),
    }
    good = {"the next one", "a few views later", "an older state, but not older than the parent's"}
    found = [
        {
            "name": name,
            "rules": [rule],
            "valid": name in good,
            "header": plain(msgspec.structs.replace(child, **changes)),
        }
        for name, (rule, changes) in rows.items()
    ]
    return [*found, *_edges(child)]


def _edges(child: Header) -> list[dict[str, Any]]:
    """The same where an epoch of 500 blocks ends: these rows have a parent of their own."""
    rows: dict[str, tuple[int, dict[str, int], bool]] = {
        "the first of an epoch": (500, {"view": EPOCH_VIEWS + 1}, True),
        "the first of an epoch, a few views later": (500, {"view": EPOCH_VIEWS + 9}, True),
        "the first of an epoch, in a view of the one before": (500, {"view": 9}, False),
        "the first of an epoch, in a view of the next": (500, {"view": 2 * EPOCH_VIEWS + 1}, False),
        "the last of an epoch": (499, {"view": 9}, True),
        "the last of an epoch, in a view of the next": (499, {"view": EPOCH_VIEWS + 1}, False),
    }
    found = []
    for name, (height, changes, valid) in rows.items():
        parent = msgspec.structs.replace(child, height=height, view=7, parent_view=6)
        header = msgspec.structs.replace(
            parent,
            height=height + 1,
            parent=block_hash(parent),
            parent_view=parent.view,
            time_ms=parent.time_ms + 1,
            **changes,
        )
        row = {"parent": plain(parent), "header": plain(header)}
        found.append({"name": name, "rules": ["EPOCH-1"], "valid": valid, **row})
    return found


def _votes(keys: list[KeyPair], committee: Committee, header: Header) -> list[dict[str, Any]]:
    chain, block = committee.chain_id, block_hash(header)
    good = sign_vote(keys[1], chain, Kind.NOTARIZE, 2, block, 1)
    rows = {
        "notarize": good,
        "nullify": sign_vote(keys[1], chain, Kind.NULLIFY, 2, ZERO_HASH, 1),
        "finalize": sign_vote(keys[1], chain, Kind.FINALIZE, 2, block, 1),
        "nullify with a block": sign_vote(keys[1], chain, Kind.NULLIFY, 2, block, 1),
        "notarize without a block": sign_vote(keys[1], chain, Kind.NOTARIZE, 2, ZERO_HASH, 1),
        "another's index": msgspec.structs.replace(good, voter=2),
        "an index beyond the committee": msgspec.structs.replace(good, voter=4),
        "another view": msgspec.structs.replace(good, view=3),
        "another kind": msgspec.structs.replace(good, kind=Kind.FINALIZE),
        "of another chain": sign_vote(keys[1], mark("x"), Kind.NOTARIZE, 2, block, 1),
    }
    return [
        {
            "name": name,
            "rules": ["BLK-10", "SIG-3"],
            "valid": verify_vote(committee, vote),
            "vote": plain(vote),
            "bytes": encode(vote).hex(),
        }
        for name, vote in rows.items()
    ]


def _certificates(
    keys: list[KeyPair], committee: Committee, header: Header
) -> list[dict[str, Any]]:
    chain, block = committee.chain_id, block_hash(header)

    def row(voter: int, kind: Kind = Kind.FINALIZE) -> tuple[int, bytes]:
        return voter, sign_vote(keys[voter], chain, kind, 2, block, voter).signature

    rows = {
        "three of four": tuple(row(n) for n in (0, 1, 2)),
        "other three": tuple(row(n) for n in (0, 2, 3)),
        "all four": tuple(row(n) for n in range(4)),
        "two": tuple(row(n) for n in (0, 1)),
        "none": (),
        "not ascending": tuple(row(n) for n in (1, 0, 2)),
        "one twice": tuple(row(n) for n in (0, 1, 1)),
        "a quorum and a bad one": (*(row(n) for n in (0, 1, 2)), (3, bytes(64))),
        "a vote of another kind": (row(0), row(1), row(2, Kind.NOTARIZE)),
        "beyond the committee": (row(0), row(1), (4, row(2)[1])),
    }
    found = []
    for name, signatures in rows.items():
        certificate = Certificate(Kind.FINALIZE, 2, block, signatures)
        found.append(
            {
                "name": name,
                "rules": ["BLK-11", "BLK-12"],
                "valid": verify_certificate(committee, certificate),
                "certificate": plain(certificate),
                "bytes": encode(certificate).hex(),
            }
        )
    return found
