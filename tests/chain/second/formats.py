"""The second ledger's bytes: records, keys, signatures, headers, payloads (sections 2, 3, 6, 9)."""

import hashlib
import json
from functools import lru_cache
from typing import Any

from nacl import bindings as sodium
from nacl.exceptions import CryptoError

ZERO = bytes(32)
LIMIT = 2**63
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
TRANSACTION_BYTES = 8192
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
    "return": "jailed",
    "vote_evidence": "node view first second",
    "proposal_evidence": "first first_signature second second_signature",
    "register": "node from_height proof",
    "offer": "spec_id spec_bytes stages lanes rounds segment_steps unsettled state_every tokens "
    "class_id privacy slot_price_max standby_price audit_rate audit_price audit_budget deadline "
    "source session ring lane_mode lane_weights",
    "fetched": "job",
    "ask": "session class_id memory price audit_capacity standby_slots until_height receipts",
    "accept": "job attempt slot session",
    "decline": "job attempt slot",
    "attest_genesis": "job slot shared lane data",
    "commit": "job epoch slot incarnation segment start_shared start_lane end_shared end_lane "
    "links seal loss contribution",
    "standby_proof": "job epoch slot incarnation segment keyed_hash",
    "audit_commit": f"job {ROLES} hash",
    "open": f"job {ROLES} salt steps",
    "audit_open": f"job {ROLES} list_root salt",
    "audit_fail": f"job {ROLES} missing",
    "attest_result": "job result",
    "attest_contributions": "job epoch slot round lanes",
    "leave": "job epoch slot incarnation reason",
    "stall": "job epoch slot incarnation number link seq",
    "present": "job epoch slot incarnation opened",
    "witness": "job epoch slot incarnation opened delivered",
}
ROWS = {
    "stages": ("parameters", "memory"),
    "links": ("link", "sent", "received"),
    "receipts": ("witness", "kind", "height", "signature"),
}
OWNERS = set(
    ["transfer", "bond", "unbond", "withdraw", "register", "nominate", "revoke", "offer", "fetched"]
)
EVIDENCE = {"vote_evidence", "proposal_evidence"}
NOTARIZE, NULLIFY, FINALIZE = range(3)
FINAL = {"closed", "refunded", "expired"}


class Refused(Exception):
    """The export is not what it claims to be; `str(error)` says where."""


def check(rule: bool, broken: str) -> None:
    if not rule:
        raise Refused(broken)


def H(*parts: bytes) -> bytes:  # as the specification writes it
    return hashlib.sha256(b"".join(parts)).digest()


def u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


# -- 2: encoding


def pack(value: Any) -> bytes:
    """The one spelling of numbers, truth, texts, bytes, arrays and nil (ENC-2, ENC-3)."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
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
    if len(value) < 1 << 16:
        return b"\xdc" + len(value).to_bytes(2, "big") + body
    return b"\xdd" + len(value).to_bytes(4, "big") + body


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
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], at
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


# -- 4, 6, 16: JSON


def canonical(value: object) -> bytes:
    """GEN-1."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def header_of(row: dict[str, Any]) -> list[Any]:
    check(sorted(row) == sorted(HEADER), "a header's fields")
    return [bytes.fromhex(row[n]) if isinstance(row[n], str) else row[n] for n in HEADER]


def spelt(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value
