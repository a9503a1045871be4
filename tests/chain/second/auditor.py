"""A ledger auditor, written from docs/spec/chain.md alone (its rules are cited). It shares no code
with the node: what it needs besides Python is Ed25519 (PyNaCl).

    python -m tests.chain.second.auditor FILE [CHAIN_ID]

It checks points 1 to 7 of section 17; `executor.replay` is point 8.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from nacl import bindings as sodium
from nacl.exceptions import CryptoError

ZERO = bytes(32)
LIMIT = 2**63
FINALIZE = 2
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
HEADER = [
    "protocol",
    "height",
    "view",
    "parent_view",
    "parent",
    "time_ms",
    "proposer",
    "proof",
    "tx_root",
    "state_height",
    "history_root",
    "state_root",
    "validators",
    "next_validators",
]
ROLES = "epoch slot segment"
PAYLOADS = {
    "transfer": "to amount",
    "bond": "bucket amount",
    "unbond": "bucket amount",
    "withdraw": "",
    "nominate": "node",
    "revoke": "node",
    "vote_evidence": "node view first second",
    "proposal_evidence": "first first_signature second second_signature",
    "register": "node from_height proof",
    "offer": "spec_id spec_bytes stages lanes rounds segment_steps unsettled state_every tokens "
    "class_id privacy slot_price_max standby_price audit_rate audit_price audit_budget deadline "
    "source session",
    "fetched": "job",
    "ask": "session class_id memory price audit_capacity standby_slots until_height",
    "accept": "job attempt slot session",
    "decline": "job attempt slot",
    "attest_genesis": "job slot shared lane data",
    "commit": "job epoch slot incarnation segment start_shared start_lane end_shared end_lane "
    "links seal loss",
    "standby_proof": "job epoch slot incarnation segment keyed_hash",
    "audit_commit": f"job {ROLES} hash",
    "open": f"job {ROLES} salt steps",
    "audit_open": f"job {ROLES} list_root salt",
    "audit_fail": f"job {ROLES} missing",
    "attest_result": "job result",
}
NESTED = {"stages": ("parameters", "memory"), "links": ("link", "sent", "received")}
OWNERS = set(
    ["transfer", "bond", "unbond", "withdraw", "register", "nominate", "revoke", "offer", "fetched"]
)
VIEWS = 1 << 32
FINAL = {"closed", "refunded", "expired"}
TRANSACTION_BYTES = 8192


class Refused(Exception):
    """The export is not what it claims to be; `str(error)` says where."""


@dataclass(frozen=True)
class Report:
    """What was found. `final`: the last height with a certificate of its own. `vouched`: whether a
    final header names the state that was exported."""

    chain_id: str
    height: int
    final: int
    vouched: bool
    transactions: int
    entries: int
    supply: dict[str, int]


def check(rule: bool, broken: str) -> None:
    if not rule:
        raise Refused(broken)


def H(*parts: bytes) -> bytes:  # as the specification writes it
    return hashlib.sha256(b"".join(parts)).digest()


def u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


# -- 2: encoding


def pack(value: Any) -> bytes:
    """The one spelling of integers, texts, bytes, arrays and nil (ENC-2, ENC-3)."""
    if value is None:
        return b"\xc0"
    if isinstance(value, int):
        check(0 <= value < LIMIT, f"the number {value}")
        if value < 128:
            return bytes((value,))
        size = next(size for size in (1, 2, 4, 8) if value < 1 << 8 * size)
        return bytes((0xCB + size.bit_length(),)) + value.to_bytes(size, "big")
    if isinstance(value, str):
        return _sized(value.encode(), 0xA0, 32, 0xD9)
    if isinstance(value, bytes):
        return _sized(value, 0, 0, 0xC4)
    body = b"".join(map(pack, value))
    if len(value) < 16:
        return bytes((0x90 + len(value),)) + body
    return (b"\xdc" + len(value).to_bytes(2, "big") if len(value) < 1 << 16 else b"") + body


def _sized(raw: bytes, fix: int, below: int, first: int) -> bytes:
    if len(raw) < below:
        return bytes((fix + len(raw),)) + raw
    row = next(row for row in (0, 1, 2) if len(raw) < 1 << (8 << row))
    return bytes((first + row,)) + len(raw).to_bytes(1 << row, "big") + raw


def unpack(raw: bytes) -> Any:
    """The value of a record; Refused unless it is spelt as `pack` spells it (ENC-4)."""
    try:
        value, end = _unpack(raw, 0)
    except (IndexError, UnicodeDecodeError, KeyError) as error:
        raise Refused(f"not MessagePack: {raw[:40].hex()}") from error
    check(end == len(raw) and pack(value) == raw, f"another spelling of {value!r}")
    return value


def _unpack(raw: bytes, at: int) -> tuple[Any, int]:
    kind, at = raw[at], at + 1
    if kind < 0x80:
        return kind, at
    if kind == 0xC0:
        return None, at
    if 0xCC <= kind <= 0xCF:
        size = 1 << kind - 0xCC
        return int.from_bytes(raw[at : at + size], "big"), at + size
    if 0xA0 <= kind < 0xC0:
        size, text, array = kind - 0xA0, True, False
    elif 0x90 <= kind < 0xA0:
        size, text, array = kind - 0x90, False, True
    else:
        width, text, array = {
            0xC4: (1, False, False), 0xC5: (2, False, False), 0xC6: (4, False, False),
            0xD9: (1, True, False), 0xDA: (2, True, False), 0xDB: (4, True, False),
            0xDC: (2, False, True), 0xDD: (4, False, True),
        }[kind]  # fmt: skip
        size, at = int.from_bytes(raw[at : at + width], "big"), at + width
    if array:
        items = []
        for _ in range(size):
            item, at = _unpack(raw, at)
            items.append(item)
        return items, at
    if at + size > len(raw):
        raise IndexError("cut short")
    part = raw[at : at + size]
    return (part.decode() if text else part), at + size


# -- 3: keys and signatures


def key_of(address: str) -> bytes:
    """SIG-2."""
    number = 0
    for letter in address:
        check(letter in BASE58, f"{address} is not base58")
        number = number * 58 + BASE58.index(letter)
    raw = bytes(len(address) - len(address.lstrip("1"))) + number.to_bytes(37, "big")
    check(len(raw) == 38 and raw[:6] == bytes.fromhex("002408011220"), f"{address} is no key")
    return raw[6:]


@lru_cache(maxsize=4096)
def signed(key: bytes, domain: str, chain: bytes, message: bytes, signature: bytes) -> bool:
    """SIG-3, SIG-4."""
    try:
        sodium.crypto_sign_open(
            signature + b"tdmld\0" + domain.encode() + b"\0" + chain + message, key
        )
    except CryptoError:
        return False
    return True


# -- 4: genesis


@dataclass(frozen=True)
class Genesis:
    chain: bytes
    document: dict[str, Any]
    sets: dict[int, bytes]
    """Epoch -> its encoded `ValidatorSet`: of genesis, and of the state that follows (EPOCH-1)."""

    @property
    def epoch_blocks(self) -> int:
        return int(self.document["parameters"]["epoch_blocks"])

    def validators(self, epoch: int) -> list[tuple[bytes, int]]:
        """(node, stake) in the committee's order (BLK-9)."""
        number, seats = unpack(self.sets[epoch])
        check(number == epoch, "a validator set of another epoch")
        return [(node, weight) for node, _, weight in seats]

    def protocol(self, height: int) -> int:
        return max((at, version) for at, version in self.document["protocol"] if at <= height)[1]


def canonical(value: object) -> bytes:
    """GEN-1."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def first_state(document: dict[str, Any]) -> dict[bytes, bytes]:
    """GEN-6, with GEN-3 and GEN-4."""
    balances = {key_of(owner): amount for owner, amount in document["accounts"]}
    votes = {key_of(owner): stake for owner, _, stake in document["validators"]}
    works = {key_of(owner): stake for owner, stake in document["work_stakes"]}
    nodes = {key_of(node): key_of(owner) for owner, node, _ in document["validators"]}
    nodes |= {key_of(node): key_of(owner) for owner, node in document["nodes"]}
    check(not set(nodes) & {*balances, *votes, *works, *nodes.values()}, "GEN-3")
    supply = sum(balances.values()) + sum(votes.values()) + sum(works.values())
    check(0 < supply < LIMIT, "GEN-4")
    state = {
        b"a" + key: pack([balances.get(key, 0), 0, votes.get(key, 0), works.get(key, 0)])
        for key in {*balances, *votes, *works}
    }
    state |= {b"n" + node: pack([owner, 0, 0, 0, 0, 0, 0]) for node, owner in nodes.items()}
    stakes = supply - sum(balances.values())
    state[b"S"] = pack([supply, supply - stakes, stakes, 0, 0, 0])
    moment = datetime.fromisoformat(document["time"])
    seats = sorted([key_of(n), key_of(o), stake] for o, n, stake in document["validators"])
    sets = {epoch: pack([epoch, seats]) for epoch in (0, 1)}
    state |= {b"v" + u64(epoch): raw for epoch, raw in sets.items()}
    state |= {b"w" + owner: pack([node]) for node, owner, _ in seats}
    for first in {owner[:1] for _, owner, _ in seats}:
        bucket = sorted(owner for _, owner, _ in seats if owner[:1] == first)
        state[b"iw" + first] = pack([bucket])
    state[b"e" + u64(0)] = pack([0, round(moment.timestamp() * 1000)])
    return state, sets


def read_genesis(line: dict[str, Any], known: str | None) -> tuple[Genesis, bytes]:
    """Point 1: the founded chain, and the id of header 0."""
    document = line["document"]
    chain = H(canonical(document))
    check(line["format"] == "tdmld-export-1", "another format")
    check(line["chain_id"] == chain.hex(), "genesis: the document has another chain id")
    check(known in (None, chain.hex()), f"this is the chain {chain.hex()}, not {known}")
    state, sets = first_state(document)
    root = state_root(state)
    check(line["state_root"] == root.hex(), "genesis: GEN-6 gives another state root")
    moment = datetime.fromisoformat(document["time"])
    time_ms = round(moment.timestamp() * 1000)
    version = max(row for row in document["protocol"] if row[0] == 0)[1]
    header = [version, 0, 0, 0, chain, time_ms, ZERO, b"", ZERO, 0, ZERO, root, ZERO, ZERO]
    check(header_of(line["header"]) == header, "genesis: GEN-7 gives another header")
    check(line["hash"] == H(pack(header)).hex(), "genesis: the header has another id")
    return Genesis(chain, document, sets), H(pack(header))


# -- 5: state


def state_root(state: dict[bytes, bytes]) -> bytes:
    """TREE-1, TREE-3."""
    return page([(H(key), H(value)) for key, value in state.items()], 0)


def page(leaves: Sequence[tuple[bytes, bytes]], depth: int) -> bytes:
    """TREE-2."""
    slots: list[list[tuple[bytes, bytes]]] = [[] for _ in range(16)]
    for key, value in leaves:
        byte = key[depth // 2]
        slots[byte & 15 if depth % 2 else byte >> 4].append((key, value))
    row = [ZERO if not slot else below(slot, depth) for slot in slots]
    while len(row) > 1:
        pairs = zip(row[::2], row[1::2], strict=True)
        row = [ZERO if left == right == ZERO else H(b"\1", left, right) for left, right in pairs]
    return row[0]


def below(leaves: list[tuple[bytes, bytes]], depth: int) -> bytes:
    return H(b"\0", *leaves[0]) if len(leaves) == 1 else page(leaves, depth + 1)


def money(state: dict[bytes, bytes]) -> dict[str, int]:
    """STATE-4, STATE-5: summed record by record."""
    recorded = unpack(state[b"S"])
    balances = stakes = unbonding = escrows = 0
    for key, value in state.items():
        if key[:1] == b"a":
            balance, _, vote, work = unpack(value)
            balances, stakes = balances + balance, stakes + vote + work
        elif key[:1] == b"b":
            unbonding += sum(amount for _, amount, _ in unpack(value)[0])
        elif key[:1] == b"j":
            escrows += sum(unpack(value)[20:24])
    counted = [balances, stakes, unbonding, escrows]
    check(recorded[1:5] == counted, "the chain recorded other sums")
    check(sum(counted) + recorded[5] == recorded[0], "money is not conserved")
    places = ("genesis", "balances", "stakes", "unbonding", "escrows", "burned")
    return dict(zip(places, recorded, strict=True))


def check_indexes(state: dict[bytes, bytes]) -> None:
    """STATE-2, STATE-3."""
    for name, wanted in (
        (b"k", {key[1:] for key in state if key[:1] == b"k"}),
        (b"w", {key[1:] for key in state if key[:1] == b"w"}),
        (b"j", {k[1:] for k, v in state.items() if k[:1] == b"j" and unpack(v)[25] not in FINAL}),
    ):
        found = set[bytes]()
        for key, value in state.items():
            if key[:2] == b"i" + name:
                (bucket,) = unpack(value)
                check(bucket == sorted(set(bucket)) != [], f"index {key.hex()}")
                check(all(entry[:1] == key[2:] for entry in bucket), f"index {key.hex()}")
                found |= set(bucket)
        check(found == wanted, f"the index {name.decode()} is not what it indexes")


# -- 6: blocks


def header_of(row: dict[str, Any]) -> list[Any]:
    check(sorted(row) == sorted(HEADER), "a header's fields")
    return [bytes.fromhex(row[n]) if isinstance(row[n], str) else row[n] for n in HEADER]


def merkle(leaves: Sequence[bytes]) -> bytes:
    """BLK-2."""
    row = [H(b"\0", leaf) for leaf in leaves]
    while len(row) > 1:
        odd = row[len(row) & ~1 :]
        row = [H(b"\1", row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)] + odd
    return row[0] if row else ZERO


class History:
    """HIST-1 to HIST-3, kept as the roots of complete trees, the largest first."""

    def __init__(self) -> None:
        self.trees: list[tuple[int, bytes]] = []

    def append(self, leaf: bytes) -> None:
        size, root = 1, H(b"\0", leaf)
        while self.trees and self.trees[-1][0] == size:
            size, root = 2 * size, H(b"\1", self.trees.pop()[1], root)
        self.trees.append((size, root))

    @property
    def root(self) -> bytes:
        *rest, (_, root) = self.trees
        for _, left in reversed(rest):
            root = H(b"\1", left, root)
        return root


def check_certificate(
    genesis: Genesis, row: dict[str, Any], header: list[Any], block: bytes
) -> None:
    """BLK-10 to BLK-12."""
    where = f"certificate of block {header[1]}"
    check(sorted(row) == ["hash", "kind", "signatures", "view"], where)
    check((row["kind"], row["hash"]) == (FINALIZE, block.hex()), where)
    view, last = row["view"], header[1] % genesis.epoch_blocks == 0
    check(view == header[2] or (last and view > header[2]), where)
    check(view // VIEWS == header[2] // VIEWS, where)
    voters = [voter for voter, _ in row["signatures"]]
    check(voters == sorted(set(voters)), f"{where}: voters must ascend")
    members = genesis.validators(header[2] // VIEWS)
    check(all(0 <= voter < len(members) for voter in voters), where)
    total = sum(stake for _, stake in members)
    check(sum(members[v][1] for v in voters) >= total * 2 // 3 + 1, f"{where}: no quorum")
    message = bytes((FINALIZE,)) + u64(view) + block
    for voter, signature in row["signatures"]:
        good = signed(members[voter][0], "vote", genesis.chain, message, bytes.fromhex(signature))
        check(good, f"{where}: signature of voter {voter}")


# -- 7: leaders


def rotation(stakes: Sequence[int]) -> list[int]:
    """LEAD-1, LEAD-2."""
    divisor = math.gcd(*stakes)
    seats = [stake // divisor for stake in stakes]
    total = sum(seats)
    if total > 4096:
        spare = max(0, 4096 - len(seats))
        rests = [seat * spare % total for seat in seats]
        seats = [1 + seat * spare // total for seat in seats]
        largest = sorted(range(len(seats)), key=lambda i: (-rests[i], i))
        for index in largest[: max(0, 4096 - sum(seats))]:
            seats[index] += 1
    table, priority = [], [0] * len(seats)
    for _ in range(sum(seats)):
        priority = [old + seat for old, seat in zip(priority, seats, strict=True)]
        leader = priority.index(max(priority))
        priority[leader] -= sum(seats)
        table.append(leader)
    return table


# -- 8: beacon (RFC 9381, ECVRF-EDWARDS25519-SHA512-TAI)


def sha512(*parts: bytes) -> bytes:
    return hashlib.sha512(b"".join(parts)).digest()


def eight_times(point: bytes) -> bytes:
    for _ in range(3):
        point = sodium.crypto_core_ed25519_add(point, point)
    return point


@lru_cache(maxsize=4096)
def vrf_output(key: bytes, alpha: bytes, proof: bytes) -> bytes:
    """BEACON-2, BEACON-4."""
    check(len(proof) == 80, "a proof has 80 bytes")
    gamma, challenge, s = proof[:32], proof[32:48], proof[48:]
    valid = sodium.crypto_core_ed25519_is_valid_point
    check(valid(gamma) and valid(key), "a proof's points")
    point = None
    for counter in range(256):
        candidate = sha512(b"\x03\x01", key, alpha, bytes((counter, 0)))[:32]
        if int.from_bytes(candidate, "little") % 2**255 >= 2**255 - 19:
            continue
        try:
            point = eight_times(candidate)
        except Exception:  # libsodium's word for "not on the curve"
            continue
        if point != b"\x01" + bytes(31):
            break
    assert point is not None
    wide = challenge + bytes(16)
    times, minus = sodium.crypto_scalarmult_ed25519_noclamp, sodium.crypto_core_ed25519_sub
    order = 2**252 + 27742317777372353535851937790883648493
    check(0 < int.from_bytes(s, "little") < order and any(challenge), "a proof's numbers")
    u = minus(sodium.crypto_scalarmult_ed25519_base_noclamp(s), times(wide, key))
    v = minus(times(s, point), times(wide, gamma))
    again = sha512(b"\x03\x02", key, point, gamma, u, v, b"\0")[:16]
    check(again == challenge, "a proof does not verify")
    return sha512(b"\x03\x03", eight_times(gamma), b"\0")


# -- 9: transactions


def check_transaction(genesis: Genesis, row: dict[str, Any]) -> bytes:
    """Point 3; the id."""
    raw = bytes.fromhex(row["raw"])
    check(row["id"] == H(raw).hex(), "a transaction has another id")
    where = f"transaction {row['id'][:16]}"
    check(64 < len(raw) <= TRANSACTION_BYTES, where)
    body = unpack(raw[64:])
    check(isinstance(body, list) and len(body) == 7 and body[0] == "tx", where)
    _, chain, signer, nonce, fee, expiry, payload = body
    check(chain == genesis.chain, f"{where}: of another chain")
    check(signed(signer, "transaction", chain, raw[64:], raw[:64]), f"{where}: signature")
    names = PAYLOADS[payload[0]].split()
    check(len(names) == len(payload) - 1, f"{where}: fields")
    inner = ["kind", "hash", "signature"] if payload[0] == "vote_evidence" else HEADER
    shown = {
        name: dict(zip(inner, map(spelt, value), strict=True))
        if name in ("first", "second")
        else [dict(zip(NESTED[name], map(spelt, row), strict=True)) for row in value]
        if name in NESTED
        else spelt(value)
        for name, value in zip(names, payload[1:], strict=True)
    }
    wanted = {
        "signer": signer.hex(), "nonce": nonce, "fee": fee, "expiry": expiry,
        "kind": payload[0], "payload": shown,
    }  # fmt: skip
    check(
        all(row[name] == value for name, value in wanted.items()), f"{where}: is shown as another"
    )
    check(row["ok"] is (row["reason"] == ""), f"{where}: its receipt contradicts itself")
    check(payload[0] in OWNERS or not row["ok"] or nonce == fee == 0, f"{where}: FEE-3")
    return H(raw)


def spelt(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


# -- 17: the audit


class Auditor:
    """Goes over the lines of one export."""

    def __init__(self, first: dict[str, Any], known: str | None) -> None:
        check(first["line"] == "genesis", "the first line is not genesis")
        self.genesis, self.parent = read_genesis(first, known)
        self.header = header_of(first["header"])
        self.roots = [first["state_root"]]
        self.history = History()
        self.history.append(self.parent + ZERO)
        self.histories = [self.history.root]
        self.mix = H(b"tdmld\0beacon\0", self.genesis.chain)
        self.epoch = -1
        self.members: list[tuple[bytes, int]] = []
        self.leaders: list[int] = []
        self.final = self.transactions = 0
        self.state: dict[bytes, bytes] = {}
        self.last = b""

    def block(self, row: dict[str, Any]) -> None:
        """Points 2 to 6."""
        header, before, chain = header_of(row["header"]), self.header, self.genesis.chain
        block = H(pack(header))
        height, view, proposer = header[1], header[2], header[6]
        where = f"block {height}"
        check(row["hash"] == block.hex() and row["height"] == height, f"{where}: its id")
        check(height == before[1] + 1 and header[4] == self.parent, f"{where}: its parent")
        check(header[3] == before[2] < view, f"{where}: its view")
        check(header[5] > before[5], f"{where}: its time")
        check(header[0] == self.genesis.protocol(height), f"{where}: its protocol")
        epoch = (height - 1) // self.genesis.epoch_blocks
        check(view // VIEWS == epoch, f"{where}: a view of another epoch")
        named = [H(self.genesis.sets[number]) for number in (epoch, epoch + 1)]
        check(header[12:] == named, f"{where}: its validators")
        if epoch != self.epoch:
            self.epoch, self.members = epoch, self.genesis.validators(epoch)
            self.leaders = rotation([weight for _, weight in self.members])
        leader = self.leaders[view % VIEWS % len(self.leaders)]
        check(self.members[leader][0] == proposer, f"{where}: out of turn")
        signature = bytes.fromhex(row["signature"])
        check(signed(proposer, "proposal", chain, block, signature), f"{where}: signature")
        ids = [check_transaction(self.genesis, one) for one in row["transactions"]]
        check(header[8] == merkle(ids), f"{where}: its transactions")
        rules = self.genesis.document["parameters"]
        size = sum(len(one["raw"]) // 2 for one in row["transactions"])
        check(size <= rules["block_bytes"], f"{where}: its size")
        check(len(ids) <= rules["block_transactions"], f"{where}: too many transactions")
        at = header[9]
        check(before[9] <= at < height, f"{where}: its state height")
        check(header[11].hex() == self.roots[at], f"{where}: the state of {at}")
        check(header[10] == self.histories[at], f"{where}: the history up to {at}")
        alpha = b"tdmld\0beacon\0" + chain + self.mix + u64(height)
        self.mix = H(self.mix, vrf_output(proposer, alpha, header[7]))
        if row["certificate"] is not None:
            check_certificate(self.genesis, row["certificate"], header, block)
            self.final = height
        count = len(ids).to_bytes(4, "big")
        outcomes = [
            tx + (b"\1" if one["ok"] else b"\0") + count
            for tx, one in zip(ids, row["transactions"], strict=True)
        ]
        self.history.append(block + merkle(outcomes))
        self.histories.append(self.history.root)
        self.header, self.parent = header, block
        self.roots.append(row["state_root"])
        self.transactions += len(ids)

    def entry(self, row: dict[str, Any]) -> None:
        key = bytes.fromhex(row["key"])
        check(key > self.last, "the state's keys must ascend")
        self.state[key], self.last = bytes.fromhex(row["value"]), key

    def end(self, row: dict[str, Any]) -> Report:
        """Point 7."""
        height = self.header[1]
        check(state_root(self.state).hex() == row["state_root"] == self.roots[height], "state root")
        check(row["hash"] == self.parent.hex() and row["height"] == height, "end: the last block")
        check(row["mix"] == self.mix.hex(), "end: the beacon")
        counts = (height, self.transactions, len(self.state))
        check((row["blocks"], row["transactions"], row["entries"]) == counts, "end: counts")
        supply = money(self.state)
        check(row["supply"] == supply, "end: supply")
        check_indexes(self.state)
        return Report(
            chain_id=self.genesis.chain.hex(),
            height=height,
            final=self.final,
            vouched=self.final == height and self.header[11].hex() == row["state_root"],
            transactions=self.transactions,
            entries=len(self.state),
            supply=supply,
        )


def audit(lines: Sequence[bytes], known: str | None = None) -> Report:
    """Check an export; Refused says what is wrong with it."""
    try:
        rows = [json.loads(line) for line in lines]
        for line, row in zip(lines, rows, strict=True):
            check(canonical(row) + b"\n" == line, "a line is not canonical JSON")
        check(rows[-1]["line"] == "end", "the last line is not the end")
        digest = hashlib.sha256(b"".join(lines[:-1])).hexdigest()
        check(rows[-1]["sha256"] == digest, "the bytes are not those that were written")
        auditor = Auditor(rows[0], known)
        for row in rows[1:-1]:
            if row["line"] == "state" and row["key"][:2] == b"v".hex():
                epoch = int.from_bytes(bytes.fromhex(row["key"])[1:], "big")
                auditor.genesis.sets.setdefault(epoch, bytes.fromhex(row["value"]))
        kinds = " ".join(row["line"] for row in rows)
        order = "genesis( block)*( state)+ end"
        check(re.fullmatch(order, kinds) is not None, "lines are missing or out of order")
        for row in rows[1:-1]:
            (auditor.block if row["line"] == "block" else auditor.entry)(row)
        return auditor.end(rows[-1])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise Refused(f"malformed: {error!r}") from error


def main() -> int:
    with Path(sys.argv[1]).open("rb") as file:
        lines = file.readlines()
    try:
        report = audit(lines, sys.argv[2] if len(sys.argv) > 2 else None)
    except Refused as error:
        print(f"refused: {error}")
        return 1
    print(report)
    from tests.chain.second.executor import replay

    try:
        replay(lines)
    except Refused as error:
        print(f"the signed blocks do not give this state: {error}")
        return 1
    print("executing the blocks gives the same states and the same receipts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
