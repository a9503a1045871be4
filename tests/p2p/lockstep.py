"""Raw connections in memory that take bytes only when the other side reads: back-pressure."""

import trio
import trio.testing
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection


class _End(ReadWriteCloser):
    def __init__(self, stream: trio.StapledStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


def raw_pair() -> tuple[RawConnection, RawConnection]:
    """The dialler's and the listener's end."""
    client, server = trio.testing.lockstep_stream_pair()
    return RawConnection(_End(client), True), RawConnection(_End(server), False)
