"""Keys, addresses, signatures and the chain's hash.

An Ed25519 public key is an identity; its libp2p PeerId is how people and configuration spell it.
On the chain stands the key itself, 32 bytes. Every signature is made over

    "tdmld" 0 domain 0 chain-id message

so that nothing signed for one purpose or one chain means anything elsewhere. libsodium alone
verifies (cofactorless, strict about s < L): mixing libraries would be a consensus split.
"""

import hashlib

import base58
from nacl.bindings import (
    crypto_sign,
    crypto_sign_BYTES,
    crypto_sign_open,
    crypto_sign_seed_keypair,
)
from nacl.exceptions import CryptoError

from tdmld.chain.errors import DecodeError

_PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"
"""Identity multihash of a libp2p-key protobuf that holds an Ed25519 key."""


def sha256(*parts: bytes) -> bytes:
    """SHA-256 of the concatenated parts: ids, the state tree, the beacon."""
    return hashlib.sha256(b"".join(parts)).digest()


def address(public_key: bytes) -> str:
    """The PeerId string of a 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise ValueError(f"a public key has 32 bytes, not {len(public_key)}")
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode()


def public_key(text: str) -> bytes:
    """The public key inside a PeerId string; DecodeError when it is not one of an Ed25519 key."""
    if len(text) > 64:
        raise DecodeError(f"an address has at most 64 characters, not {len(text)}")
    try:
        raw = base58.b58decode(text)
    except ValueError as error:
        raise DecodeError(f"{text!r} is not base58: {error}") from error
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
        raise DecodeError(f"{text!r} is not the PeerId of an Ed25519 key (12D3Koo...)")
    return raw[6:]


def signing_bytes(domain: str, chain_id: bytes, message: bytes) -> bytes:
    """What is signed for `domain` on the chain `chain_id` (zeros where no chain is meant)."""
    return b"tdmld\0" + domain.encode("ascii") + b"\0" + chain_id + message


class KeyPair:
    """An Ed25519 key pair made from its 32-byte seed."""

    __slots__ = ("_secret", "public", "seed")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise ValueError(f"a seed has 32 bytes, not {len(seed)}")
        self.seed = seed
        self.public, self._secret = crypto_sign_seed_keypair(seed)

    @property
    def address(self) -> str:
        return address(self.public)

    def sign(self, domain: str, chain_id: bytes, message: bytes) -> bytes:
        """A 64-byte detached signature."""
        signed: bytes = crypto_sign(signing_bytes(domain, chain_id, message), self._secret)
        return signed[:crypto_sign_BYTES]

    def __repr__(self) -> str:
        return f"KeyPair({self.address})"


def verify(public: bytes, domain: str, chain_id: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` was made by the holder of `public`."""
    if len(signature) != 64 or len(public) != 32:
        return False
    try:
        crypto_sign_open(signature + signing_bytes(domain, chain_id, message), public)
    except CryptoError:
        return False
    return True
