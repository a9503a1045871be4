"""Sealing of a job's data: what lies in content stores and travels is ciphertext.

A published spec has a content key for each key epoch: 32 random bytes, made by the submitter's
carrier. Its name is epoch and id (a hash of the key): a spec that was published twice, or a member
that makes up a key, gives the same epoch another key, and neither stands in the other's way. Data
is sealed in chunks with XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03; libsodium):

    chunk       CHUNK_BYTES - 16 bytes of plaintext, the last one shorter, each followed by its tag
    data bound  "tdmld sealed 1" ‖ spec id ‖ key epoch u32 ‖ content id ‖ chunk u32 ‖ chunks u32
    nonce       the first 24 bytes of BLAKE3(data bound), keyed with a key derived from the content
                key: the same nonce for the same plaintext only, and the same bytes at every holder

The content id is the BLAKE3 of the plaintext, so what was opened is checked against the spec.

A content key is given away, and rests on disk, only in a box that one session alone can open: an
X25519 sealed box (libsodium crypto_box_seal) to the Curve25519 form of its Ed25519 key, around
spec id, key epoch and key. Who gave it is known from the connection that it came through.

Nothing here logs, and no error text holds a byte of data or key.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from blake3 import blake3
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_ABYTES,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_KEYBYTES,
    crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
    crypto_box_seal,
    crypto_box_seal_open,
    crypto_box_SEALBYTES,
    crypto_sign_ed25519_pk_to_curve25519,
    crypto_sign_ed25519_sk_to_curve25519,
)
from nacl.exceptions import CryptoError
from nacl.utils import random

from tdmld.chain.crypto import KeyPair
from tdmld.files import FileTooLarge, read_file, write_file
from tdmld.node.contentwire import CHUNK_BYTES, KEY_ID_BYTES
from tdmld.node.errors import ContentMismatch
from tdmld.node.layout import Layout
from tdmld.train.digest import digest
from tdmld.train.spec import Spec, decode_spec, spec_bytes, spec_id

KEY_BYTES = crypto_aead_xchacha20poly1305_ietf_KEYBYTES
TAG_BYTES = crypto_aead_xchacha20poly1305_ietf_ABYTES
PLAIN_BYTES = CHUNK_BYTES - TAG_BYTES
"""Of a chunk: with its tag it is what travels as one chunk."""
_DOMAIN = b"tdmld sealed 1"
_NONCE_CONTEXT = "tdmld 1 nonces of sealed chunks"
_KEY_ID_CONTEXT = "tdmld 1 id of a content key"
_BOUND = struct.Struct("!14s32sI32sII")
_BOXED = struct.Struct("!14s32sI32s")
BOX_BYTES = _BOXED.size + crypto_box_SEALBYTES


class KeyName(NamedTuple):
    """Which content key of a spec; the newest is the greatest."""

    epoch: int
    id: bytes


def key_name(epoch: int, key: bytes) -> KeyName:
    """The name of a key. Its id tells nothing about the key, and no other key has it."""
    return KeyName(epoch, blake3(key, derive_key_context=_KEY_ID_CONTEXT).digest(KEY_ID_BYTES))


def sealing(raw: bytes) -> bytes | None:
    """The spec id under which a job's data is sealed; None when its spec (bytes) says `open`. That
    of a `split` one is, too, though it is given to nobody: so it does not rest readable."""
    return None if decode_spec(raw).privacy == "open" else spec_id(raw)


def stored_names(spec: Spec) -> frozenset[bytes]:
    """Under which names the content store keeps a job's text: for `Machine.drop_data`."""
    if spec.privacy != "open":
        return frozenset({spec_id(spec_bytes(spec))})
    return frozenset(content for content, _ in spec.shards)


def sealed_size(size: int) -> int:
    """Bytes of `size` bytes of plaintext when they are sealed."""
    return size + TAG_BYTES * _chunks(size, PLAIN_BYTES)


def seal(key: bytes, spec: bytes, epoch: int, content: bytes, data: memoryview) -> Iterator[bytes]:
    """The sealed chunks of `data`, whose BLAKE3 is `content`."""
    places = range(0, len(data), PLAIN_BYTES)
    for index, at in enumerate(places):
        bound, nonce = _bind(key, spec, epoch, content, index, len(places))
        piece = bytes(data[at : at + PLAIN_BYTES])
        yield crypto_aead_xchacha20poly1305_ietf_encrypt(piece, bound, nonce, key)


def unseal(key: bytes, spec: bytes, epoch: int, content: bytes, sealed: bytes) -> bytes:
    """The plaintext with the BLAKE3 `content`; ContentMismatch when it was not sealed so."""
    view, pieces = memoryview(sealed), []
    places = range(0, len(view), CHUNK_BYTES)
    for index, at in enumerate(places):
        bound, nonce = _bind(key, spec, epoch, content, index, len(places))
        piece = bytes(view[at : at + CHUNK_BYTES])
        try:
            if len(piece) < TAG_BYTES:
                raise CryptoError  # the binding would fail otherwise
            pieces.append(crypto_aead_xchacha20poly1305_ietf_decrypt(piece, bound, nonce, key))
        except CryptoError as error:
            raise ContentMismatch(
                f"chunk {index} of sealed content cannot be opened with the key of epoch {epoch}"
            ) from error
    data = b"".join(pieces)
    if digest(data) != content:
        raise ContentMismatch("what was sealed is not the content that the spec names")
    return data


def _bind(
    key: bytes, spec: bytes, epoch: int, content: bytes, index: int, count: int
) -> tuple[bytes, bytes]:
    """(associated data, nonce) of a chunk."""
    bound = _BOUND.pack(_DOMAIN, spec, epoch, content, index, count)
    nonces = blake3(key, derive_key_context=_NONCE_CONTEXT).digest()
    return bound, blake3(bound, key=nonces).digest(crypto_aead_xchacha20poly1305_ietf_NPUBBYTES)


def _chunks(size: int, each: int) -> int:
    return -(-size // each)


class ContentKeys:
    """The content keys that this session holds, each in its own box below content/sealed/.

    Methods block (small files): call them in a thread.
    """

    def __init__(self, layout: Layout, session: KeyPair) -> None:
        self._layout = layout
        self._public = crypto_sign_ed25519_pk_to_curve25519(session.public)
        self._secret = crypto_sign_ed25519_sk_to_curve25519(session.seed + session.public)

    def names(self, spec: bytes) -> list[KeyName]:
        """The keys under which something of a spec is here, newest first."""
        found = []
        for path in self._layout.sealed(spec).glob("*.*"):
            epoch, _, name = path.name.partition(".")
            with suppress(ValueError):
                found.append(KeyName(int(epoch), bytes.fromhex(name)))
        return sorted(found, reverse=True)

    def newest(self, spec: bytes) -> tuple[KeyName, bytes] | None:
        """The newest key of a spec that is here."""
        for name in self.names(spec):
            if (key := self.get(spec, name)) is not None:
                return name, key
        return None

    def get(self, spec: bytes, name: KeyName) -> bytes | None:
        """A key; None when it is not here, or its file is damaged or an earlier session's: then it
        has to be asked for again."""
        try:
            box = read_file(self._layout.content_key(spec, *name), BOX_BYTES)
            return self.open(spec, name, box)
        except (FileNotFoundError, FileTooLarge, ContentMismatch):
            return None

    def make(self, spec: bytes, epoch: int) -> tuple[KeyName, bytes]:
        """A new key, kept. Whoever calls it publishes the spec."""
        key: bytes = random(KEY_BYTES)
        return self.keep(spec, epoch, key), key

    def keep(self, spec: bytes, epoch: int, key: bytes) -> KeyName:
        """Keep a key that opened what it should."""
        name = key_name(epoch, key)
        path = self._layout.content_key(spec, *name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, _box(self._public, spec, epoch, key), mode=0o600)
        return name

    def open(self, spec: bytes, name: KeyName, box: bytes) -> bytes:
        """The key in a box that was made for this session; ContentMismatch."""
        try:
            inner = crypto_box_seal_open(box, self._public, self._secret)
            domain, for_spec, for_epoch, key = _BOXED.unpack(inner)
        except (CryptoError, struct.error, TypeError) as error:
            raise ContentMismatch("the box is not for this session") from error
        if (domain, for_spec, key_name(for_epoch, key)) != (_DOMAIN, spec, name):
            raise ContentMismatch("the box holds another key, of another spec or key epoch perhaps")
        return bytes(key)


def key_box(session: bytes, spec: bytes, epoch: int, key: bytes) -> bytes:
    """A box around a content key for `session` (32-byte Ed25519 key); ContentMismatch when that is
    no point of the curve."""
    try:
        public = crypto_sign_ed25519_pk_to_curve25519(session)
    except (CryptoError, RuntimeError) as error:
        raise ContentMismatch("that session key is no key at all") from error
    return _box(public, spec, epoch, key)


def _box(public: bytes, spec: bytes, epoch: int, key: bytes) -> bytes:
    sealed: bytes = crypto_box_seal(_BOXED.pack(_DOMAIN, spec, epoch, key), public)
    return sealed
