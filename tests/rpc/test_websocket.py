"""Subscriptions over the real WebSocket: order, ends, limits, slow readers, rude peers, goodbye."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio_websocket

from tdmld.rpc import limits
from tests.rpc.conftest import Running, serving
from tests.rpc.fake import JOB, FakeBackend

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: bKdPyn3u98cTfZJSh4TNeQ==\r\n"
)


@asynccontextmanager
async def connected(
    running: Running, token: str = "admin"
) -> AsyncIterator[trio_websocket.WebSocketConnection]:
    url = running.server.url.replace("http", "ws") + "/"
    headers = [("authorization", f"Bearer {token}")]
    async with trio_websocket.open_websocket_url(
        url, extra_headers=headers, disconnect_timeout=1
    ) as socket:
        yield socket


async def say(ws: trio_websocket.WebSocketConnection, method: str, *params: Any, id: int) -> None:
    await ws.send_message(
        json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
    )


async def hear(ws: trio_websocket.WebSocketConnection) -> Any:
    with trio.fail_after(10):
        return json.loads(await ws.get_message())


async def hear_for_ever(ws: trio_websocket.WebSocketConnection) -> None:
    while True:
        await hear(ws)


async def hear_answer(ws: trio_websocket.WebSocketConnection, id: int) -> Any:
    while (found := await hear(ws)).get("id") != id:
        pass
    return found


async def test_calls_work_over_a_websocket(running: Running) -> None:
    async with connected(running) as ws:
        await say(ws, "chain_head", id=1)
        assert (await hear(ws))["result"]["height"] == 3
        await ws.send_message(b'{"jsonrpc":"2.0","id":2,"method":"chain_head"}')
        assert (await hear(ws))["id"] == 2
        await ws.send_message("{x")
        assert (await hear(ws))["error"]["code"] == -32700


async def test_the_answer_comes_before_the_first_event_and_the_end_is_told() -> None:
    async with serving(FakeBackend(heads_limit=3)) as running, connected(running) as ws:
        await say(ws, "chain_subscribeHeads", id=1)
        answer, *events, end = [await hear(ws) for _ in range(5)]
    assert answer["result"] == "0x1"
    assert [one["params"]["result"]["height"] for one in events] == [3, 4, 5]
    assert end == {
        "jsonrpc": "2.0",
        "method": "rpc_subscription",
        "params": {"subscription": "0x1", "done": True},
    }


async def test_a_subscription_that_fails_says_why(running: Running) -> None:
    async with connected(running) as ws:
        await say(ws, "job_subscribe", "0" * 64, id=1)
        await hear(ws)
        error = (await hear(ws))["params"]["error"]
    assert error["code"] == -32001
    assert "no job" in error["message"]


async def test_a_bug_in_a_subscription_is_opaque() -> None:
    class Broken(FakeBackend):
        async def job_subscribe(self, id: str) -> AsyncIterator[Any]:
            yield 1
            raise RuntimeError("secret")

    async with serving(Broken()) as running, connected(running) as ws:
        await say(ws, "job_subscribe", JOB, id=1)
        _, event, end = [await hear(ws) for _ in range(3)]
        await say(ws, "chain_head", id=2)
        assert (await hear(ws))["id"] == 2
    assert event["params"]["result"] == 1
    assert end["params"]["error"]["code"] == -32603
    assert "secret" not in json.dumps(end)


async def test_unsubscribing_closes_the_generator() -> None:
    backend = FakeBackend(tick=trio.Event())
    async with serving(backend) as running, connected(running) as ws:
        await say(ws, "chain_subscribeHeads", id=1)
        await hear_answer(ws, 1)
        await say(ws, "rpc_unsubscribe", "0x1", id=2)
        assert (await hear_answer(ws, 2))["result"] is True
        await say(ws, "rpc_unsubscribe", "0x1", id=3)
        assert (await hear_answer(ws, 3))["result"] is False
        await say(ws, "rpc_unsubscribe", 7, id=4)
        assert (await hear_answer(ws, 4))["error"]["code"] == -32602
        assert backend.closed_generators == 1


async def test_leaving_closes_the_generators() -> None:
    backend = FakeBackend(tick=trio.Event())
    async with serving(backend) as running, connected(running) as ws:
        await say(ws, "chain_subscribeHeads", id=1)
        await hear_answer(ws, 1)
    assert backend.closed_generators == 1


async def test_subscriptions_are_limited() -> None:
    async with serving(FakeBackend(tick=trio.Event())) as running, connected(running) as ws:
        for n in range(limits.SUBSCRIPTIONS):
            await say(ws, "chain_subscribeHeads", id=n)
            assert "result" in await hear_answer(ws, n)
        await say(ws, "chain_subscribeHeads", id=99)
        assert (await hear_answer(ws, 99))["error"]["code"] == -32005


async def test_a_slow_subscriber_is_dropped_and_others_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.2)
    backend = FakeBackend()  # its heads come without end and without pause
    with trio.fail_after(20):
        async with serving(backend) as running:
            stream = await trio.open_tcp_stream("127.0.0.1", running.server.port)
            await stream.send_all(UPGRADE + b"Authorization: Bearer admin\r\n\r\n")
            assert b"101" in await stream.receive_some(1000)
            frame = b'{"jsonrpc":"2.0","id":1,"method":"chain_subscribeHeads"}'
            await stream.send_all(bytes([0x81, 0x80 | len(frame), 0, 0, 0, 0]) + frame)
            # It never reads again.
            while backend.closed_generators == 0:
                await trio.lowlevel.checkpoint()
            async with connected(running) as ws:
                await say(ws, "chain_head", id=1)
                assert (await hear(ws))["result"]["height"] == 3
            await stream.aclose()


async def test_a_peer_that_never_reads_does_not_delay_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SEND_SECONDS", 60)
    monkeypatch.setattr(limits, "STOP_SECONDS", 0.1)
    backend = FakeBackend()
    with trio.fail_after(10):
        async with serving(backend) as running:
            stream = await trio.open_tcp_stream("127.0.0.1", running.server.port)
            await stream.send_all(UPGRADE + b"Authorization: Bearer admin\r\n\r\n")
            await stream.receive_some(1000)
            frame = b'{"jsonrpc":"2.0","id":1,"method":"chain_subscribeHeads"}'
            await stream.send_all(bytes([0x81, 0x80 | len(frame), 0, 0, 0, 0]) + frame)
            while backend.closed_generators == 0:
                await trio.lowlevel.checkpoint()
        await stream.aclose()


async def test_stopping_says_goodbye_and_closes_generators() -> None:
    backend = FakeBackend(tick=trio.Event())
    async with serving(backend) as running, connected(running) as ws:
        await say(ws, "chain_subscribeHeads", id=1)
        await hear_answer(ws, 1)
        running.stop.set()
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            await hear_for_ever(ws)
        assert closed.value.reason.code == 1001
        with trio.fail_after(5):
            await running.done.wait()
    assert backend.closed_generators == 1


@pytest.mark.parametrize("token", ["wrong", ""])
async def test_a_websocket_without_the_token_is_refused(running: Running, token: str) -> None:
    with pytest.raises(trio_websocket.ConnectionRejected) as refused:
        async with connected(running, token or "-"):
            pass
    assert refused.value.status_code == 401


async def test_a_message_over_the_limit_ends_that_connection_only(running: Running) -> None:
    async with connected(running) as ws:
        await ws.send_message(" " * (limits.BODY_BYTES + 1))
        with pytest.raises(trio_websocket.ConnectionClosed):
            await hear_for_ever(ws)
    async with connected(running) as ws:
        await say(ws, "chain_head", id=1)
        assert (await hear(ws))["result"]["height"] == 3


@pytest.mark.parametrize(
    "garbage",
    [
        UPGRADE + b"\r\nx",
        UPGRADE + b"Authorization: Bearer admin\r\n\r\n" + bytes(200),
        UPGRADE + b"Authorization: Bearer admin\r\n\r\n" + b"\xff" * 200,
        UPGRADE.replace(b"13", b"99") + b"\r\n",
        UPGRADE.replace(b"Upgrade: websocket\r\n", b"") + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
        b"\x16\x03\x01\x02\x00" + bytes(100),
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%ff%fe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"A" * 100_000,
    ],
)
async def test_garbage_hurts_nobody_else(running: Running, garbage: bytes) -> None:
    def throw() -> None:
        with socket.create_connection(("127.0.0.1", running.server.port), timeout=5) as rude:
            rude.settimeout(0.2)
            try:
                rude.sendall(garbage)
                rude.recv(1000)
            except OSError:
                pass

    await trio.to_thread.run_sync(throw)
    async with connected(running) as ws:
        await say(ws, "chain_head", id=1)
        assert (await hear(ws))["result"]["height"] == 3


async def test_connections_are_limited(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 2)
    async with connected(running) as first, connected(running) as second:
        stream = await trio.open_tcp_stream("127.0.0.1", running.server.port)
        with trio.fail_after(5):
            with suppress(trio.BrokenResourceError):
                assert await stream.receive_some(10) == b""
        await say(second, "chain_head", id=1)
        assert (await hear(second))["result"]["height"] == 3
        assert first.closed is None
