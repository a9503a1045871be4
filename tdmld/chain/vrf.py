"""ECVRF-EDWARDS25519-SHA512-TAI of RFC 9381, on libsodium's group operations.

A leader proves over what its block must not choose; the 64-byte output is unique for (key, input),
so the only freedom left to it is to withhold the block, which costs it its turn. Ed25519
signatures will not do: a signer picks their nonce and can grind.

Stricter than the RFC in one place: a proof's Gamma must lie in the prime-order subgroup, as every
honest one does. There is one implementation on a chain, so this cannot split it.
"""

import hashlib

from nacl.bindings import (
    crypto_core_ed25519_add,
    crypto_core_ed25519_is_valid_point,
    crypto_core_ed25519_scalar_add,
    crypto_core_ed25519_scalar_mul,
    crypto_core_ed25519_scalar_reduce,
    crypto_core_ed25519_sub,
    crypto_scalarmult_ed25519_base_noclamp,
    crypto_scalarmult_ed25519_noclamp,
    crypto_sign_seed_keypair,
)
from nacl.exceptions import CryptoError
from nacl.exceptions import RuntimeError as SodiumError
from nacl.exceptions import TypeError as SodiumTypeError
from nacl.exceptions import ValueError as SodiumValueError

PROOF_BYTES = 80
OUTPUT_BYTES = 64

_SUITE = b"\x03"
_FIELD = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_IDENTITY = b"\x01" + bytes(31)
_REFUSED = (CryptoError, SodiumError, SodiumTypeError, SodiumValueError)
"""What PyNaCl raises when libsodium refuses a point, a scalar or a result."""


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha512(b"".join(parts)).digest()


def _times_cofactor(point: bytes) -> bytes:
    """Eight times a point. Three doublings: libsodium's multiplication refuses points outside the
    main subgroup, its addition refuses only what is not on the curve."""
    for _ in range(3):
        point = crypto_core_ed25519_add(point, point)
    return point


def _scalar(seed: bytes) -> tuple[bytes, bytes]:
    """The secret scalar modulo the group order, and the key's nonce prefix (RFC 8032, 5.1.5)."""
    digest = hashlib.sha512(seed).digest()
    clamped = bytearray(digest[:32])
    clamped[0] &= 248
    clamped[31] = clamped[31] & 127 | 64
    return crypto_core_ed25519_scalar_reduce(bytes(clamped) + bytes(32)), digest[32:]


def _to_curve(public: bytes, alpha: bytes) -> bytes:
    """RFC 9381, 5.4.1.1: try and increment."""
    for counter in range(256):
        candidate = _hash(_SUITE, b"\x01", public, alpha, bytes((counter, 0)))[:32]
        if int.from_bytes(candidate, "little") & (2**255 - 1) >= _FIELD:
            continue
        try:
            point = _times_cofactor(candidate)
        except _REFUSED:
            continue
        if point != _IDENTITY:
            return point
    raise ValueError("no point for this input: chance 2^-256")


def _challenge(*points: bytes) -> bytes:
    return _hash(_SUITE, b"\x02", *points, b"\x00")[:16]


def _output(gamma: bytes) -> bytes:
    return _hash(_SUITE, b"\x03", _times_cofactor(gamma), b"\x00")


def prove(seed: bytes, alpha: bytes) -> bytes:
    """The 80-byte proof of the holder of `seed` (32 bytes) over `alpha`. Deterministic."""
    public = crypto_sign_seed_keypair(seed)[0]
    secret, prefix = _scalar(seed)
    point = _to_curve(public, alpha)
    gamma = crypto_scalarmult_ed25519_noclamp(secret, point)
    nonce = crypto_core_ed25519_scalar_reduce(_hash(prefix, point))
    challenge = _challenge(
        public,
        point,
        gamma,
        crypto_scalarmult_ed25519_base_noclamp(nonce),
        crypto_scalarmult_ed25519_noclamp(nonce, point),
    )
    product = crypto_core_ed25519_scalar_mul(challenge + bytes(16), secret)
    return bytes(gamma + challenge + crypto_core_ed25519_scalar_add(nonce, product))


def verify(public: bytes, alpha: bytes, proof: bytes) -> bytes | None:
    """The 64-byte output that `proof` shows for (public, alpha), or None when it shows nothing.

    Never raises on hostile bytes.
    """
    if len(proof) != PROOF_BYTES or len(public) != 32:
        return None
    gamma, challenge, response = proof[:32], proof[32:48], proof[48:]
    if int.from_bytes(response, "little") >= _ORDER:
        return None
    if not crypto_core_ed25519_is_valid_point(public):
        return None
    if not crypto_core_ed25519_is_valid_point(gamma):
        return None
    wide = challenge + bytes(16)
    try:
        point = _to_curve(public, alpha)
        u = crypto_core_ed25519_sub(
            crypto_scalarmult_ed25519_base_noclamp(response),
            crypto_scalarmult_ed25519_noclamp(wide, public),
        )
        v = crypto_core_ed25519_sub(
            crypto_scalarmult_ed25519_noclamp(response, point),
            crypto_scalarmult_ed25519_noclamp(wide, gamma),
        )
    except _REFUSED:  # a zero scalar: only a forger sends one
        return None
    if _challenge(public, point, gamma, u, v) != challenge:
        return None
    return _output(gamma)
