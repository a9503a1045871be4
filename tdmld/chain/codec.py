"""The one door through which bytes become consensus objects.

Objects are msgspec array-like tagged Structs in MessagePack. MessagePack decoders accept several
spellings of one value, so `decode` encodes again and compares: what was hashed and signed is the
only spelling that exists. A kind evolves by a new tag, never by trailing fields.
"""

from functools import cache
from typing import Annotated, Any, TypeVar, cast

import msgspec

from tdmld.chain.errors import DecodeError

T = TypeVar("T")

Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
PublicKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
NATURAL_MAX = 2**63 - 1
"""A record with a greater number could be written and never be read again."""
Maybe32 = Annotated[bytes, msgspec.Meta(max_length=32)]
"""32 bytes, or none where the thing is not known, or not there."""
Natural = Annotated[int, msgspec.Meta(ge=0, le=NATURAL_MAX)]
"""Heights, views, counts, indices."""
Amount = Annotated[int, msgspec.Meta(ge=0, le=NATURAL_MAX)]
"""Money, in the smallest unit. Sums stay below the supply, which genesis bounds by 2**63."""

ZERO_HASH = bytes(32)


class Record(
    msgspec.Struct,
    array_like=True,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=False,
    gc=False,  # no record can be part of a cycle; the collector took a fifth of a block's time
):
    """Base of everything that is hashed, signed, stored or sent between nodes."""


_encode = msgspec.msgpack.Encoder().encode


@cache
def _decoder(kind: Any) -> "msgspec.msgpack.Decoder[Any]":
    return msgspec.msgpack.Decoder(kind)


def encode(record: object) -> bytes:
    """The canonical bytes of a record."""
    return _encode(record)


def decode(kind: type[T], raw: bytes | bytearray | memoryview, limit: int) -> T:
    """Decode `raw` as `kind`, or raise DecodeError.

    `limit` is the greatest size in bytes that the caller is willing to look at; the check comes
    before any parsing. `kind` may be a union of tagged Records.
    """
    if len(raw) > limit:
        raise DecodeError(f"{len(raw)} bytes where at most {limit} are allowed")
    try:
        value = _decoder(cast(Any, kind)).decode(raw)
        again = _encode(value)
    except (msgspec.MsgspecError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        raise DecodeError(f"not a {getattr(kind, '__name__', kind)}: {error}") from error
    if again != raw:
        raise DecodeError(f"not the canonical encoding of a {type(value).__name__}")
    return value  # type: ignore[no-any-return]
