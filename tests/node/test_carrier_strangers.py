"""What strangers send to a carrier's link protocol is refused, and fills no log."""

import logging
import socket
from pathlib import Path

import pytest

from tdmld.chain.crypto import KeyPair
from tdmld.node.carrier import Carrier, protocols
from tdmld.node.carriernet import Relaying
from tdmld.node.control import Configure
from tdmld.node.controlsocket import ControlSocket
from tdmld.node.link import Hello, encode_small
from tdmld.p2p.errors import StreamError
from tests.p2p.support import hosts, info, seed

CHAIN = bytes(32)
NOWHERE = Hello(bytes(32), 0, 0, 1, "up", 0, 0, ())


@pytest.mark.parametrize("message", [encode_small(NOWHERE), b"B", b"?", b""])
async def test_a_link_that_nobody_expects_is_refused_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, message: bytes
) -> None:
    caplog.set_level(logging.INFO, "tdmld")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    config = Configure(str(tmp_path), CHAIN, (), 1 << 20)
    with theirs:
        async with hosts(2) as (host, stranger):
            sock = ControlSocket(ours)
            Carrier(config, KeyPair(seed(1)), host, Relaying(), sock)
            stranger.add_peer(info(host))
            link, _ = protocols(CHAIN)
            stream = await stranger.open_stream(host.peer_id, link)
            await stream.send(message)
            with pytest.raises(StreamError):
                await stream.receive(1024)
            sock.close()
    assert not [record for record in caplog.records if record.exc_info]
