"""JSON-RPC over HTTP against the real server: answers, errors, batches, tokens, limits."""

import json
import logging
from contextlib import suppress
from typing import Any

import httpx
import msgspec
import pytest
import trio

from tdmld.rpc import limits
from tdmld.rpc.server import ListenFailed, Server
from tests.rpc.conftest import Running, serving
from tests.rpc.fake import JOB, FakeBackend


def request(method: str, params: Any = None, id: Any = 1) -> dict[str, Any]:
    found: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    if params is not None:
        found["params"] = params
    if id is not None:
        found["id"] = id
    return found


async def post(running: Running, body: Any, token: str = "admin", **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with running.http(token) as http:
        return await http.post("/", content=content, headers=headers)


async def answer(running: Running, body: Any, token: str = "admin") -> Any:
    response = await post(running, body, token)
    assert response.status_code == 200, response.text
    return response.json()


async def code(running: Running, body: Any, token: str = "admin") -> int:
    found = await answer(running, body, token)
    return int(found["error"]["code"])


async def test_params_may_be_positional_or_named(running: Running) -> None:
    by_place = await answer(running, request("chain_block", [2]))
    by_name = await answer(running, request("chain_block", {"height": 2}, id="x"))
    assert by_place["result"]["height"] == 2
    assert by_name["result"] == by_place["result"]
    assert (by_place["id"], by_name["id"]) == (1, "x")


async def test_a_default_may_be_left_out(running: Running) -> None:
    found = await answer(running, request("job_publish", ["{}", "/tmp/text"]))
    assert found["result"]["shards"] == 2
    assert running.backend.published == [("{}", "/tmp/text", "")]


async def test_a_notification_runs_and_is_not_answered(running: Running) -> None:
    response = await post(running, request("admin_stop", id=None))
    assert (response.status_code, response.content) == (204, b"")
    assert running.backend.stopped


async def test_a_batch_keeps_its_order_and_skips_notifications(running: Running) -> None:
    body = [request("chain_block", [n], id=n) for n in (3, 1, 2)]
    body.insert(1, request("chain_head", id=None))
    found = await answer(running, body)
    assert [one["id"] for one in found] == [3, 1, 2]
    assert [one["result"]["height"] for one in found] == [3, 1, 2]


async def test_members_of_a_batch_run_side_by_side() -> None:
    class Meeting(FakeBackend):
        async def chain_head(self) -> Any:
            arrived.append(1)
            if len(arrived) == 3:
                all_here.set()
            with trio.fail_after(5):
                await all_here.wait()
            return await super().chain_head()

    arrived: list[int] = []
    all_here = trio.Event()
    async with serving(Meeting()) as running:
        found = await answer(running, [request("chain_head", id=n) for n in range(3)])
    assert [one["result"]["height"] for one in found] == [3, 3, 3]


async def test_a_batch_of_notifications_is_not_answered(running: Running) -> None:
    response = await post(running, [request("chain_head", id=None)])
    assert response.status_code == 204


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{x", -32700),
        (b"", -32700),
        (b"\xff\xfe", -32700),
        (b"[" * 100_000, -32700),
        (b'{"jsonrpc":"2.0","id":' + b"9" * 10_000 + b',"method":"chain_head"}', -32700),
        (b"[]", -32600),
        (b"1", -32600),
        (b'{"id":1,"method":"chain_head"}', -32600),
        (b'{"jsonrpc":"1.0","id":1,"method":"chain_head"}', -32600),
        (b'{"jsonrpc":"2.0","id":true,"method":"chain_head"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"nope"}', -32601),
        (b'{"jsonrpc":"2.0","id":1,"method":"__class__"}', -32601),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_block"}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_block","params":["x"]}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_block","params":[-1]}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_block","params":[1,2]}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_block","params":{"height":1,"z":2}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"job_status","params":["ABC"]}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_submit","params":["zz"]}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_block","params":[9]}', -32001),
        (b'{"jsonrpc":"2.0","id":1,"method":"chain_subscribeHeads"}', -32600),
    ],
)
async def test_bad_input_has_its_code(running: Running, body: bytes, expected: int) -> None:
    assert await code(running, body) == expected


async def test_a_junk_member_of_a_batch_spoils_only_itself(running: Running) -> None:
    found = await answer(running, [1, request("chain_head", id=2)])
    assert found[0]["error"]["code"] == -32600
    assert found[0]["id"] is None
    assert found[1]["result"]["height"] == 3


async def test_a_batch_is_limited(running: Running) -> None:
    body = [request("chain_head", id=n) for n in range(limits.BATCH_CALLS + 1)]
    assert await code(running, body) == -32005


async def test_the_text_of_an_error_names_the_parameter(running: Running) -> None:
    found = await answer(running, request("chain_block", ["x"]))
    assert "height" in found["error"]["message"]


async def test_a_bug_of_the_backend_is_opaque_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(FakeBackend):
        async def chain_head(self) -> Any:
            raise RuntimeError("secret detail")

    async with serving(Broken()) as running:
        with caplog.at_level(logging.ERROR, "tdmld.rpc.dispatch"):
            response = await post(running, request("chain_head"))
            assert (await answer(running, request("node_status")))["result"]["peers"] == 6
    error = response.json()["error"]
    assert error["code"] == -32603
    assert "secret" not in response.text
    assert [r.correlation for r in caplog.records] == [error["data"]["correlation"]]  # type: ignore[attr-defined]


async def test_an_answer_of_the_wrong_type_is_an_opaque_error() -> None:
    class Odd(FakeBackend):
        async def chain_head(self) -> Any:
            return object()

    async with serving(Odd()) as running:
        assert await code(running, request("chain_head")) == -32603


@pytest.mark.parametrize(
    ("token", "method", "params", "allowed"),
    [
        ("reader", "chain_head", [], True),
        ("reader", "chain_submit", ["00"], False),
        ("writer", "chain_submit", ["00"], True),
        ("writer", "admin_stop", [], False),
        ("admin", "chain_submit", ["00"], True),
        ("admin", "admin_stop", [], True),
    ],
)
async def test_a_scope_includes_those_before_it(
    running: Running, token: str, method: str, params: list[str], allowed: bool
) -> None:
    found = await answer(running, request(method, params), token)
    assert ("result" in found) is allowed
    if not allowed:
        assert found["error"]["code"] == -32003
        assert not running.backend.submitted
        assert not running.backend.stopped


@pytest.mark.parametrize("token", ["-", "wrong", "readerx", "reade", "écrit"])
async def test_an_unknown_token_is_401(running: Running, token: str) -> None:
    async with running.http() as http:
        raw = f"Bearer {token}".encode()
        response = await http.post("/", json=request("chain_head"), headers={b"authorization": raw})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


async def test_a_missing_token_is_401(running: Running) -> None:
    async with running.http() as http:
        del http.headers["authorization"]
        assert (await http.post("/", json=request("chain_head"))).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example:80"}, {"origin": "http://evil"}],
)
async def test_browsers_and_foreign_hosts_are_403(
    running: Running, headers: dict[str, str]
) -> None:
    assert (await post(running, request("chain_head"), **headers)).status_code == 403


async def test_a_body_over_the_limit_is_413_and_the_server_lives(running: Running) -> None:
    async with running.http() as http:
        for _ in range(3):
            response = await http.post("/", content=b" " * (limits.BODY_BYTES + 1))
            assert response.status_code == 413
            fine = await http.post("/", json=request("chain_head"))
            assert fine.json()["result"]["height"] == 3


async def test_other_paths_and_verbs_are_refused(running: Running) -> None:
    async with running.http() as http:
        assert (await http.get("/")).status_code == 405
        assert (await http.post("/rpc", json=request("chain_head"))).status_code == 404


async def test_health_needs_no_token(running: Running) -> None:
    async with running.http("unknown") as http:
        assert (await http.get("/healthz")).text == "ok\n"
        assert (await http.get("/readyz")).status_code == 200


async def test_a_syncing_node_is_alive_but_not_ready(running: Running) -> None:
    running.backend.status = msgspec.structs.replace(running.backend.status, syncing=True)
    async with running.http("unknown") as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 503


async def test_discovery_lists_every_method_with_its_scope(running: Running) -> None:
    found = (await answer(running, request("rpc.discover"), "reader"))["result"]
    scopes = {one["name"]: one["x-scope"] for one in found["methods"]}
    assert scopes["chain_submit"] == "write"
    assert scopes["job_subscribe"] == "read"
    assert len(scopes) == 26
    assert "JobDetail" in found["components"]["schemas"]


async def test_a_caller_that_hangs_up_cancels_its_call() -> None:
    class Slow(FakeBackend):
        async def job_fetch(self, id: str, out_dir: str) -> Any:
            begun.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

    begun, cancelled = trio.Event(), trio.Event()
    async with serving(Slow()) as running, trio.open_nursery() as nursery:
        nursery.start_soon(post, running, request("job_fetch", [JOB, "/tmp/x"]))
        await begun.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(5):
        await cancelled.wait()


async def test_stopping_does_not_wait_for_a_call_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hanging(FakeBackend):
        async def chain_head(self) -> Any:
            begun.set()
            await trio.sleep_forever()

    async def call() -> None:
        with suppress(httpx.HTTPError):
            await post(running, request("chain_head"))

    monkeypatch.setattr(limits, "STOP_SECONDS", 0.05)
    begun = trio.Event()
    async with trio.open_nursery() as nursery, serving(Hanging()) as running:
        nursery.start_soon(call)
        await begun.wait()


async def test_a_port_in_use_is_a_clear_error(running: Running) -> None:
    with pytest.raises(ListenFailed, match="is another node running there"):
        Server(f"127.0.0.1:{running.server.port}", {})


@pytest.mark.parametrize(
    "listen", ["", "7717", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":7"]
)
async def test_a_malformed_listen_address_is_a_clear_error(listen: str) -> None:
    with pytest.raises(ListenFailed, match="is not host:port"):
        Server(listen, {})


async def test_a_public_address_needs_an_explicit_word() -> None:
    with pytest.raises(ListenFailed, match="--rpc-insecure"):
        Server("0.0.0.0:0", {})
    Server("0.0.0.0:0", {}, insecure=True).close()
