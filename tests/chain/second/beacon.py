"""The second ledger's beacon (section 8; RFC 9381, ECVRF-EDWARDS25519-SHA512-TAI)."""

import hashlib
from functools import lru_cache

from nacl import bindings as sodium

from tests.chain.second.formats import H, check, u64


def first_mix(chain: bytes) -> bytes:
    """BEACON-1."""
    return H(b"tdmld\0beacon\0", chain)


def next_mix(chain: bytes, mix: bytes, height: int, proposer: bytes, proof: bytes) -> bytes:
    """BEACON-2, BEACON-3."""
    return H(mix, vrf_output(proposer, b"tdmld\0beacon\0" + chain + mix + u64(height), proof))


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
