"""Streams as the library gives them, for libp2p's own protocols, which do not speak our messages:
negotiation, and protobuf messages behind a varint length."""

from contextlib import suppress
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError, Message
from libp2p.abc import IMuxedConn, INetConn, INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited

from tdmld.p2p.errors import StreamBroken
from tdmld.p2p.shield import shielded

MESSAGE_BYTES = 4096
"""Largest message of these protocols: two PeerIds, some addresses, a voucher (DCUtR asks for this
very bound)."""
_RESET_SECONDS = 1.0

M = TypeVar("M", bound=Message)


def is_relayed(conn: IMuxedConn) -> bool:
    """Whether the connection's bytes pass a relay."""
    return conn.get_connection_type() == ConnectionType.RELAYED


async def negotiate(conn: INetConn, protocol: TProtocol) -> INetStream:
    """A stream on which the peer has agreed to `protocol`; errors of the library otherwise."""
    stream = await conn.new_stream()
    agreed = False
    try:
        client, communicator = MultiselectClient(), MultiselectCommunicator(stream)
        await client.handshake(communicator)
        await client.try_select(communicator, protocol)
        stream.set_protocol(protocol)
        agreed = True
        return stream
    finally:
        if not agreed:
            await reset(stream)


async def reset(stream: INetStream) -> None:
    """Drop the stream, also when cancelled; never raises anything else."""
    with shielded(_RESET_SECONDS), suppress(BaseLibp2pError, trio.ClosedResourceError):
        await stream.reset()


async def send(stream: INetStream, message: Message) -> None:
    """StreamBroken when the stream is gone."""
    try:
        await stream.write(encode_varint_prefixed(message.SerializeToString()))
    except BaseLibp2pError as error:
        raise StreamBroken(f"the stream broke: {error or type(error).__name__}") from error


async def receive(stream: INetStream, kind: type[M], limit: int = MESSAGE_BYTES) -> M:
    """One message, and not a byte more; StreamBroken when none comes or it is none."""
    try:
        body = await read_varint_prefixed_bytes_limited(stream, limit)
        message = kind()
        message.ParseFromString(body)
    except (BaseLibp2pError, ValueError) as error:
        raise StreamBroken(f"no message came: {error or type(error).__name__}") from error
    except DecodeError as error:
        raise StreamBroken(f"not a {kind.__name__}: {error}") from error
    return message
