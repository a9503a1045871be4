"""What carriers say to each other about content, and the limits of it.

One stream `/tdmld/<n>/content/1` serves one item at a time; requests may be sent ahead:

    Locate(item)             Located(content, size, epoch, key, digests of the first chunks)
    MoreDigests(first)       those from chunk `first` on
    Want(chunk)              the chunk's bytes
    ListFiles(job)           Files([(name, size)])
    AskKey(job, epoch, key)  KeyBox(the content key, boxed to the asking session)

An item is cut into chunks of CHUNK_BYTES, the last one shorter. `content` is the BLAKE3 of the
chunks' BLAKE3 digests behind domain and size: who has the list checks every chunk by itself, and
holders that give one `content` have the same bytes. An answer begins with a byte that says whether
bytes follow or a message; any request may be answered by Refuse. Only members of a job are
answered.
"""

import struct
from typing import Annotated

import msgspec
from blake3 import blake3

from tdmld.node.control import Blob, Count, FileName, GivenFile, Id32, Item, ResultFile, Size
from tdmld.node.errors import ContentMismatch, ContentUnavailable

CHUNK_BYTES = 1 << 20
DIGEST_BYTES = 32
LIST_CHUNKS = 2048
"""Digests in one message: 64 KiB, of 2 GiB of content."""
REQUEST_BYTES = 4096
REPLY_BYTES = LIST_CHUNKS * DIGEST_BYTES + 1024
CHUNK_MESSAGE_BYTES = CHUNK_BYTES + 1
MAX_RESULT_FILES = 32
KEY_ID_BYTES = 16
BOX_LIMIT = 256
IDLE_SECONDS = 30.0
"""For a request, and for an answer that is no chunk."""
CHUNK_SECONDS = 120.0
"""For one chunk: a megabit a second is shared by four downloads. Who is dead is noticed sooner by
the connection, and whoever else has the chunk is asked after a second."""
BYTES, MESSAGE = b"\x00", b"\x01"
_DOMAIN = struct.Struct("!14sQ")
KeyId = Annotated[bytes, msgspec.Meta(max_length=KEY_ID_BYTES)]


class _Request(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of what is asked."""


class Locate(_Request, frozen=True):
    """Is the item there? Later requests on this stream speak of it."""

    item: Item


class MoreDigests(_Request, frozen=True):
    """Digests of chunks from `first` on, LIST_CHUNKS of them at most."""

    first: Count


class Want(_Request, frozen=True):
    """A chunk of the item that was located."""

    chunk: Count


class ListFiles(_Request, frozen=True):
    """The files of a job's result."""

    job: Id32


class AskKey(_Request, frozen=True):
    """The content key of a sealed job that `Located` named."""

    job: Id32
    epoch: Count
    key: KeyId


class _Reply(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of what is answered."""


class Located(_Reply, frozen=True):
    """The item is here. `epoch`, `key`: key epoch and key id of sealed data, else 0 and nothing."""

    content: Id32
    size: Size
    epoch: Count
    key: KeyId
    digests: Annotated[bytes, msgspec.Meta(max_length=LIST_CHUNKS * DIGEST_BYTES)]


class Files(_Reply, frozen=True):
    """Names and sizes."""

    files: Annotated[tuple[tuple[FileName, Size], ...], msgspec.Meta(max_length=MAX_RESULT_FILES)]


class KeyBox(_Reply, frozen=True):
    """A content key that the asker alone can take out."""

    box: Annotated[bytes, msgspec.Meta(max_length=BOX_LIMIT)]


class Refuse(_Reply, frozen=True):
    """It is not here, or not for you."""

    reason: Annotated[str, msgspec.Meta(max_length=300)]


Request = Locate | MoreDigests | Want | ListFiles | AskKey
Reply = Located | Files | KeyBox | Refuse
_request = msgspec.msgpack.Decoder(Request)
_reply = msgspec.msgpack.Decoder(Reply)
_encoder = msgspec.msgpack.Encoder()


def encode_request(request: Request) -> bytes:
    """The bytes of a request."""
    return _encoder.encode(request)


def decode_request(raw: bytes) -> Request:
    """What a peer asks; msgspec.MsgspecError when it is malformed."""
    return _request.decode(raw)  # type: ignore[no-any-return]


def encode_reply(reply: Reply) -> bytes:
    """The bytes of an answer."""
    return MESSAGE + _encoder.encode(reply)


def decode_reply(raw: bytes) -> Located | Files | KeyBox:
    """An answer; ContentUnavailable when it is a refusal or malformed."""
    if raw[:1] != MESSAGE:
        raise ContentUnavailable("bytes where an answer was due")
    try:
        reply = _reply.decode(memoryview(raw)[1:])
    except msgspec.MsgspecError as error:
        raise ContentUnavailable(f"malformed answer: {error}") from error
    if isinstance(reply, Refuse):
        raise ContentUnavailable(reply.reason)
    return reply  # type: ignore[no-any-return]


def decode_bytes(raw: bytes) -> memoryview:
    """The bytes of a chunk or of a list of digests; ContentUnavailable when refused."""
    if raw[:1] != BYTES:
        decode_reply(raw)
        raise ContentUnavailable("an answer to something else")
    return memoryview(raw)[1:]


def job_of(item: Item) -> bytes:
    """The job that an item belongs to."""
    return item.job if isinstance(item, Blob | ResultFile | GivenFile) else item.slot.job


def chunk_count(size: int) -> int:
    """Chunks of `size` bytes."""
    return -(-size // CHUNK_BYTES)


def chunk_size(size: int, chunk: int) -> int:
    """Bytes of one chunk of content of `size` bytes."""
    return min(CHUNK_BYTES, size - chunk * CHUNK_BYTES)


def content_of(size: int, digests: bytes) -> bytes:
    """The identity of content with these chunk digests."""
    return blake3(_DOMAIN.pack(b"tdmld chunks 1", size) + digests).digest()


def check_digests(located: Located, digests: bytes) -> None:
    """ContentMismatch unless `digests` are all of what was located."""
    whole = len(digests) == chunk_count(located.size) * DIGEST_BYTES
    if not whole or content_of(located.size, digests) != located.content:
        raise ContentMismatch("its list of chunks does not have the announced hash")
