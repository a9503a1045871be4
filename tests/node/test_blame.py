"""Who sends a service what no honest peer sends is blamed for it, over real sockets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tdmld.chain.crypto import KeyPair
from tdmld.node.chainlinks import Links
from tdmld.node.contentserver import ContentServer, JobContent
from tdmld.node.peers import PeerService
from tdmld.node.sync import SyncServer
from tdmld.p2p import Host, open_host
from tests.p2p.support import drain, info, seed, until

PROTOCOL = "/test/served/1"
US, PEER = KeyPair(seed(1)), KeyPair(seed(2))


@asynccontextmanager
async def served(serve: Any) -> AsyncIterator[tuple[Host, Host]]:
    async with open_host(seed(1), gossip=False) as us, open_host(seed(2), gossip=False) as peer:
        us.set_handler(PROTOCOL, serve(us))
        peer.add_peer(info(us))
        await until(lambda: bool(us.connected()))
        yield us, peer


def sync(_: Host) -> Any:
    return SyncServer(cast(Any, None), cast(Any, None), lambda _: None).accept


def links(host: Host) -> Any:
    async def receive(*_: object) -> None:
        raise AssertionError("it is no message")

    made = Links(
        host,
        PROTOCOL,
        US.public,
        1000,
        greet=lambda: (),
        receive=cast(Any, receive),
        changed=lambda: None,
    )
    made._nodes = {PEER.address: PEER.public}
    made._me = max(US.public, PEER.public)  # so that it is the peer's part to open
    made._nodes[PEER.address] = min(US.public, PEER.public)
    return made.accept


def records(host: Host) -> Any:
    return PeerService(host, US, bytes(32), Path("unused"), [])._exchange


def content(_: Host) -> Any:
    nothing = cast(Any, SimpleNamespace())
    jobs = {bytes(32): JobContent(frozenset({PEER.address}), None)}  # others are not listened to
    return ContentServer(nothing, nothing, jobs, lambda item: False).handle


@pytest.mark.parametrize("serve", [sync, links, records, content])
@pytest.mark.parametrize(
    "garbage", [b"", b"\xc1" * 100, bytes(200)], ids=["nothing", "malformed", "zeros"]
)
async def test_garbage_is_blamed_on_its_sender(serve: Any, garbage: bytes) -> None:
    async with served(serve) as (us, peer):
        stream = await peer.open_stream(us.peer_id, PROTOCOL)
        await stream.send(garbage)
        await drain(stream)
        await until(lambda: us.peers()[0].score > 0)
        assert us.peers()[0].connected
