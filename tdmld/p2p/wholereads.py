"""Large frames of foreign peers.

The library's Yamux gives a frame up after 101 reads, and a read of a secure session is at most one
record: of TLS 16 KiB, and less when little has come so far. So it took no frame above 1.6 MB (js
sends some of 4 MB), and on a slow link none above a few hundred KB: it lost its place in the
stream, and the connection with it. For it a read is all that was asked for, or the end.
"""

from typing import Any

from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.stream_muxer.yamux.yamux import Yamux


class _WholeReads:
    """A secure session whose `read(n)` returns fewer than `n` bytes only at the end."""

    def __init__(self, inner: ISecureConn) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def read(self, n: int | None = None) -> bytes:
        if n is None or n < 0:
            return await self._inner.read(n)
        parts: list[bytes] = []
        while n > 0 and (part := await self._inner.read(n)):
            parts.append(part)
            n -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def read_whole(muxed: IMuxedConn) -> None:
    """Call it before the connection starts."""
    if isinstance(muxed, Yamux):
        muxed.secured_conn = _WholeReads(muxed.secured_conn)  # type: ignore[assignment]
