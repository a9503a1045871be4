"""docs/spec/transport.md says the numbers of the code."""

from pathlib import Path

import pytest

from tdmld.node.link import FRAME_HEADER, HELD_DIGESTS, SMALL_MESSAGE_BYTES
from tdmld.p2p import muxstream, tcp, turns

PAGE = (Path(__file__).parents[2] / "docs" / "spec" / "transport.md").read_text()


@pytest.mark.parametrize(
    "number",
    [
        muxstream.FRAME_BYTES,
        muxstream.WINDOW_BYTES,
        muxstream.WINDOW_MAX_BYTES,
        muxstream.SMALL_BYTES,
        SMALL_MESSAGE_BYTES,
    ],
)
def test_a_limit_stands_on_the_page(number: int):
    assert f"{number:,}" in PAGE


def test_kinds_of_frames_have_their_numbers():
    for name in ("DATA", "OPEN", "CREDIT", "FIN", "RST", "PING", "PONG"):
        assert f"| {getattr(muxstream, name)} | {name} |" in PAGE


def test_what_is_advice_is_also_what_we_do():
    least, most = turns.FRAME_LEAST_BYTES // 1024, turns.FRAME_MOST_BYTES // 1024
    assert f"{least} KiB to {most} KiB" in PAGE
    assert f"at most {tcp._NOTSENT_BYTES // 1024} KiB that are not sent" in PAGE
    assert f"`SO_RCVBUF` {tcp._NEAR_BUFFER_BYTES // 1024} KiB" in PAGE
    assert f"After {turns._OVERTAKING} small frames" in PAGE


def test_links_are_described():
    assert f"at most {HELD_DIGESTS}" in PAGE
    assert FRAME_HEADER.size == 1 + 8 + 64
    for rule in range(1, 8):
        assert f"**LINK-{rule}.**" in PAGE
