"""Vectors of hashes, signatures, rotation, beacon and the formulas that draw."""

from typing import Any

import msgspec
from blake3 import blake3

from scripts.lib.vectors_case import hexed, state_root
from tdmld.chain import history, vrf
from tdmld.chain.accounts import (
    Facts,
)
from tdmld.chain.audits import auditor_commitment, is_drawn
from tdmld.chain.blocks import (
    EPOCH_VIEWS,
    beacon_input,
    beacon_mix,
    beacon_start,
    first_header,
    follows,
)
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.crypto import KeyPair, sha256, signing_bytes
from tdmld.chain.leader import Rotation
from tdmld.chain.merkle import root as merkle_root
from tdmld.chain.records import (
    Job,
)
from tdmld.chain.reputation import reputation
from tdmld.chain.segments import audit_list_root, seal
from tdmld.chain.state import u32, u64
from tdmld.chain.transactions import (
    registration_bytes,
    sign_registration,
)
from tdmld.node.export import plain
from tests.chain.world import World, make_genesis, mark, node_key, owner_key


def crypto() -> dict[str, Any]:
    """Signatures, trees, rotation, beacon, the formulas of draws and reputation."""
    return {
        "addresses": [
            {"rules": ["SIG-2"], "key": key.public.hex(), "address": key.address}
            for key in (owner_key(0), node_key(0))
        ],
        "signatures": _signatures(),
        "merkle": [
            {
                "rules": ["BLK-2"],
                "leaves": [mark(n).hex() for n in range(count)],
                "root": merkle_root([mark(n) for n in range(count)]).hex(),
            }
            for count in (0, 1, 2, 3, 5, 8)
        ],
        "state_trees": _trees(),
        "rotations": _rotations(),
        "views": _views(),
        "histories": _histories(),
        "beacon": _beacon(),
        "vrf": _vrf(),
        "digests": _digests(),
        "draws": _draws(),
        "reputations": [
            {"rules": ["REP-1"], "facts": plain(facts), "reputation": reputation(facts)}
            for facts in (
                Facts(),
                Facts(segments=1),
                Facts(100, 20, 30),
                Facts(100, 20, 30, faults=10),
                Facts(100, 20, 30, mismatches=1),
                Facts(10**6, 0, 0, 3, 2, 10**9),
            )
        ],
    }


def _signatures() -> list[dict[str, Any]]:
    chain, node, owner = mark("chain"), node_key(0), owner_key(0)
    proof = sign_registration(node, chain, owner.public, 9)
    message = registration_bytes(owner.public, 9)
    order = 2**252 + 27742317777372353535851937790883648493
    loose = proof[:32] + (int.from_bytes(proof[32:], "little") + order).to_bytes(32, "little")
    rows = [
        ("a registration", "register", message, proof, True),
        ("another domain", "transaction", message, proof, False),
        ("another height", "register", registration_bytes(owner.public, 8), proof, False),
        ("s is not below the group order", "register", message, loose, False),
    ]
    return [
        {
            "name": name,
            "rules": ["SIG-1", "SIG-3", "SIG-4"],
            "key": node.public.hex(),
            "domain": domain,
            "chain_id": chain.hex(),
            "message": text.hex(),
            "signed": signing_bytes(domain, chain, text).hex(),
            "signature": signature.hex(),
            "valid": valid,
        }
        for name, domain, text, signature, valid in rows
    ]


def _trees() -> list[dict[str, Any]]:
    """Whole states: what counts is what is there, so a tree needs no history."""
    near = next(
        (a, b)
        for a in (b"a" + u32(n) for n in range(2000))
        for b in (b"b" + u32(n) for n in range(2000))
        if sha256(a)[:2] == sha256(b)[:2]
    )
    rows: dict[str, dict[bytes, bytes]] = {
        "nothing": {},
        "one": {b"S": b"x"},
        "three": {b"S": b"x", b"L": b"y", b"a": b""},
        "two that share four nibbles": {near[0]: b"1", near[1]: b"2"},
        "those and others": {near[0]: b"1", near[1]: b"2", **{u32(n): u64(n) for n in range(40)}},
    }
    return [
        {
            "name": name,
            "rules": ["TREE-1", "TREE-2", "TREE-3"],
            "state": hexed(rows[name]),
            "root": state_root(rows[name]).hex(),
        }
        for name in rows
    ]


def _rotations() -> list[dict[str, Any]]:
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((1,), ()),
        ((10, 10, 10, 10), ()),
        ((1000, 2000, 3000), ()),
        ((5, 1, 1), ()),
        ((100_000_000, 1, 99_999_999), ()),
        ((10**15, 3, 10**9, 7), ()),
        ((10, 10, 10, 10), (2,)),
        ((6, 9, 2, 12), (2,)),
        ((100_000_000, 1, 99_999_999, 7), (0, 3)),
    ]
    found = []
    for stakes, idle in rows:
        leads = [index not in idle for index in range(len(stakes))]
        rotation = Rotation(stakes, leads)
        found.append(
            {
                "rules": ["LEAD-1", "LEAD-2", "LEAD-3"],
                "stakes": list(stakes),
                "leads": leads,
                "seats": list(rotation.turns),
                "period": rotation.period,
                "leaders_from_view_1": [rotation.leader(view) for view in range(1, 41)],
                "leader_of_view_1000000": rotation.leader(1_000_000),
            }
        )
    return found


def _views() -> list[dict[str, Any]]:
    """Whether a height follows its parent without a failed view."""
    return [
        {
            "rules": ["BEACON-5", "EPOCH-1", "EPOCH-5"],
            "parent_view": parent,
            "view": view,
            "tainted": not follows(parent, view),
        }
        for parent, view in (
            (0, 1),
            (0, 2),
            (7, 8),
            (7, 9),
            (7, EPOCH_VIEWS + 1),
            (7, EPOCH_VIEWS + 2),
            (EPOCH_VIEWS + 1, EPOCH_VIEWS + 2),
            (EPOCH_VIEWS + 2, EPOCH_VIEWS + 4),
            (EPOCH_VIEWS + 9, 2 * EPOCH_VIEWS + 1),
        )
    ]


def _histories() -> list[dict[str, Any]]:
    """The root after each height: blocks of none, one and three transactions."""
    leaves, rows = list[bytes](), []
    for height, count in enumerate((0, 1, 3, 0, 2)):
        outcomes = [(mark("transaction", height, n), n != 1) for n in range(count)]
        block, outcomes_root = mark("block", height), history.outcomes_root(outcomes)
        leaves.append(history.leaf(block, outcomes_root))
        rows.append(
            {
                "rules": ["HIST-1", "HIST-2", "HIST-3"],
                "height": height,
                "block": block.hex(),
                "transactions": [{"id": raw.hex(), "ok": ok} for raw, ok in outcomes],
                "outcomes_root": outcomes_root.hex(),
                "history_root": merkle_root(leaves).hex(),
            }
        )
    return rows


def _beacon() -> dict[str, Any]:
    chain, key = mark("chain"), node_key(0)
    mix, rows = beacon_start(chain), []
    for height in (1, 2, 3):
        alpha = beacon_input(chain, mix, height)
        proof = vrf.prove(key.seed, alpha)
        header = msgspec.structs.replace(
            first_header(chain, 1, 0, ZERO_HASH), height=height, proposer=key.public, proof=proof
        )
        mix = beacon_mix(chain, mix, header)
        row = {"height": height, "input": alpha.hex(), "proof": proof.hex(), "mix": mix.hex()}
        rows.append(row)
    return {
        "rules": ["BEACON-1", "BEACON-2", "BEACON-3"],
        "chain_id": chain.hex(),
        "proposer": key.public.hex(),
        "mix_0": beacon_start(chain).hex(),
        "heights": rows,
    }


def _vrf() -> list[dict[str, Any]]:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key, alpha = KeyPair(seed), b""
    proof = vrf.prove(seed, alpha)
    rows = {
        "RFC 9381, example 16": (alpha, proof),
        "another input": (b"r", proof),
        "a flipped bit in gamma": (alpha, bytes((proof[0] ^ 1,)) + proof[1:]),
        "a flipped bit in the challenge": (
            alpha,
            proof[:40] + bytes((proof[40] ^ 1,)) + proof[41:],
        ),
        "a flipped bit in s": (alpha, proof[:50] + bytes((proof[50] ^ 1,)) + proof[51:]),
        "s is zero": (alpha, proof[:48] + bytes(32)),
        "s is the group order": (
            alpha,
            proof[:48] + (2**252 + 27742317777372353535851937790883648493).to_bytes(32, "little"),
        ),
        "gamma is the identity": (alpha, b"\x01" + bytes(31) + proof[32:]),
    }
    found = []
    for name, (text, shown) in rows.items():
        output = vrf.verify(key.public, text, shown)
        found.append(
            {
                "name": name,
                "rules": ["BEACON-2", "BEACON-4"],
                "key": key.public.hex(),
                "input": text.hex(),
                "proof": shown.hex(),
                "output": None if output is None else output.hex(),
            }
        )
    return found


def _draws() -> list[dict[str, Any]]:
    found = []
    for rate in (0, 1, 250_000, 999_999, 1_000_000):
        job = _job(rate)
        for slot in (0, 1):
            for tainted in (False, True):
                found.append(
                    {
                        "rules": ["AUDIT-1", "BEACON-5"],
                        "mix": mark("beacon").hex(),
                        "job": job.id.hex(),
                        "audit_rate": rate,
                        "slot": slot,
                        "segment": 7,
                        "tainted": tainted,
                        "drawn": is_drawn(mark("beacon"), tainted, job, slot, 7),
                    }
                )
    return found


def _job(rate: int) -> Job:
    """The job of an offer of two stages, as the ledger makes it."""
    world = World(make_genesis(nodes=1, validators=1))
    offer = world.offer(audit_rate=rate, lanes=2, rounds=8, audit_budget=400_000, audit_price=100)
    (receipt,) = world.block(world.sign(owner_key(0), offer)).receipts
    assert receipt.ok, receipt.reason
    return world.job(receipt.id)


def _digests() -> dict[str, Any]:
    """BLAKE3 on the chain: list root, seal, an auditor's commitment."""
    world = World()
    world.all_ask()
    job_id = world.submit(lanes=2)
    while world.state.segment(job_id, 2, 0) is None:
        world.play(job_id)
    segment, job, steps = world.state.segment(job_id, 2, 0), world.job(job_id), mark("steps")
    assert segment is not None
    root = audit_list_root(job, 2, 0, segment, steps)
    return {
        "rules": ["SEG-3", "AUDIT-10"],
        "job": job_id.hex(),
        "stages": 2,
        "slot": 2,
        "segment": 0,
        "record": plain(segment),
        "steps_root": steps.hex(),
        "list_root": root.hex(),
        "salt": mark("salt").hex(),
        "seal": seal(mark("salt"), steps).hex(),
        "auditor": node_key(5).public.hex(),
        "auditor_commitment": auditor_commitment(root, mark("salt"), node_key(5).public).hex(),
        "blake3_of_nothing": blake3(b"").hexdigest(),
    }
