"""The library gives a frame up after 101 reads, however small they are."""

import pytest
from libp2p.io.exceptions import IncompleteReadError
from libp2p.io.utils import read_exactly

from tdmld.p2p.wholereads import _WholeReads


class Trickle:
    """A secure session that has a record of ten bytes at a time."""

    def __init__(self, size: int) -> None:
        self.left = bytes(range(256)) * (size // 256 + 1)
        self.left = self.left[:size]

    async def read(self, n: int | None = None) -> bytes:
        part = self.left[: min(10, n if n is not None else 10)]
        self.left = self.left[len(part) :]
        return part


async def test_a_frame_in_many_records_is_read_whole():
    with pytest.raises(IncompleteReadError):
        await read_exactly(Trickle(5000), 5000)
    expected = Trickle(5000).left
    session = _WholeReads(Trickle(5000))
    assert await read_exactly(session, 12) == expected[:12]
    assert await read_exactly(session, 4900) == expected[12:4912]
    assert len(await session.read(None)) == 10


async def test_the_end_in_the_middle_of_a_frame_is_told():
    with pytest.raises(IncompleteReadError):
        await read_exactly(_WholeReads(Trickle(50)), 100)
    assert await _WholeReads(Trickle(0)).read(5) == b""
