"""The client, under both event loops, against the real server."""

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from tdmld.rpc.access import (
    Access,
    clear_access,
    find_access,
    parse_access,
    read_access,
    write_access,
)
from tdmld.rpc.client import Client
from tdmld.rpc.errors import Forbidden, InternalError, NotFound, Unauthorized, Unreachable
from tdmld.rpc.types import BlockInfo, Head, JobEvent, NodeStatus, PeerInfo, Submitted
from tests.rpc.conftest import Running, serving, serving_in_a_thread
from tests.rpc.fake import JOB, FakeBackend


async def events_of(client: Client, job: str) -> list[JobEvent]:
    async with client.subscribe("job_subscribe", {"id": job}, JobEvent) as events:
        return [event async for event in events]


async def test_results_are_typed(running: Running) -> None:
    async with Client(running.access()) as client:
        status = await client.call("node_status", {}, NodeStatus)
        peers = await client.call("net_peers", {}, tuple[PeerInfo, ...])
        block = await client.call("chain_block", {"height": 2}, BlockInfo)
    assert status == running.backend.status
    assert [peer.connected for peer in peers] == [True, False]
    assert block.height == 2


async def test_errors_of_the_node_keep_their_kind(running: Running) -> None:
    async with Client(running.access()) as client:
        with pytest.raises(NotFound, match="there is no block 9"):
            await client.call("chain_block", {"height": 9}, BlockInfo)
    async with Client(running.access("reader")) as client:
        with pytest.raises(Forbidden, match="needs scope write"):
            await client.call("chain_submit", {"raw": "00"}, Submitted)


async def test_an_unexpected_answer_is_an_error_not_a_wrong_value(running: Running) -> None:
    async with Client(running.access()) as client:
        with pytest.raises(Unreachable, match="not what a node of this version says"):
            await client.call("chain_head", {}, NodeStatus)


async def test_a_wrong_token_says_where_the_right_one_is(running: Running) -> None:
    async with Client(running.access("wrong")) as client:
        with pytest.raises(Unauthorized, match="--data-dir"):
            await client.call("chain_head", {}, Head)
        with pytest.raises(Unauthorized, match="--data-dir"):
            async with client.subscribe("chain_subscribeHeads", {}, Head):
                pass


async def test_no_node_says_what_to_type() -> None:
    async with Client(Access("http://127.0.0.1:9", "x")) as client:
        with pytest.raises(Unreachable, match="tdmld run"):
            await client.call("chain_head", {}, Head)
        with pytest.raises(Unreachable, match="tdmld run"):
            async with client.subscribe("chain_subscribeHeads", {}, Head):
                pass


async def test_a_subscription_is_an_iterator_that_ends(running: Running) -> None:
    async with Client(running.access()) as client:
        assert [event.segment for event in await events_of(client, JOB)] == [0, 1, 2]


async def test_a_failed_subscription_raises_the_reason(running: Running) -> None:
    async with Client(running.access()) as client:
        with pytest.raises(NotFound, match="no job"):
            await events_of(client, "0" * 64)


async def test_an_error_of_the_block_is_not_wrapped(running: Running) -> None:
    async with Client(running.access()) as client:
        with pytest.raises(KeyError):
            async with client.subscribe("job_subscribe", {"id": JOB}, JobEvent):
                raise KeyError


async def test_a_server_that_stops_ends_the_subscription(running: Running) -> None:
    running.backend.tick = trio.Event()
    async with (
        Client(running.access()) as client,
        client.subscribe("chain_subscribeHeads", {}, Head) as heads,
    ):
        await anext(heads)
        running.stop.set()
        with pytest.raises(Unreachable, match="broke"), trio.fail_after(5):
            await anext(heads)


async def test_cancellation_passes_through_a_subscription(running: Running) -> None:
    running.backend.tick = trio.Event()
    async with Client(running.access()) as client:
        with trio.move_on_after(0.2) as scope:
            async with client.subscribe("chain_subscribeHeads", {}, Head) as heads:
                async for _ in heads:
                    pass
    assert scope.cancelled_caught


def test_the_same_client_works_under_asyncio() -> None:
    async def main(access: Access) -> list[int | None]:
        async with Client(access) as client:
            head = await client.call("chain_head", {}, Head)
            assert head.height == 3
            with pytest.raises(NotFound):
                await client.call("job_status", {"id": "0" * 64}, Any)
            async with client.subscribe("job_subscribe", {"id": JOB}, JobEvent) as events:
                return [event.segment async for event in events]

    with serving_in_a_thread(FakeBackend()) as running:
        assert asyncio.run(main(running.access())) == [0, 1, 2]


async def test_a_lone_bug_reaches_the_client_as_internal_error() -> None:
    class Broken(FakeBackend):
        async def chain_head(self) -> Any:
            raise ZeroDivisionError

    async with serving(Broken()) as running, Client(running.access()) as client:
        with pytest.raises(InternalError, match="internal error") as caught:
            await client.call("chain_head", {}, Head)
        assert len(caught.value.data["correlation"]) == 12


def test_access_files_are_private_and_new_at_each_start(tmp_path: Path) -> None:
    first = write_access(tmp_path, "http://127.0.0.1:1")
    second = write_access(tmp_path, "http://127.0.0.1:2")
    assert first != second
    assert read_access(tmp_path) == Access("http://127.0.0.1:2", second)
    assert stat.S_IMODE((tmp_path / "rpc.token").stat().st_mode) == 0o600
    assert second not in repr(read_access(tmp_path))
    clear_access(tmp_path)
    with pytest.raises(Unreachable, match=f"tdmld run --data-dir {tmp_path}"):
        read_access(tmp_path)


def test_a_directory_that_is_not_there_says_init(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="tdmld init"):
        read_access(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_token_of_another_user_says_so(tmp_path: Path) -> None:
    write_access(tmp_path, "http://127.0.0.1:1")
    (tmp_path / "rpc.token").chmod(0)
    with pytest.raises(Unauthorized, match="only the user"):
        read_access(tmp_path)


def test_the_environment_names_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = write_access(tmp_path, "http://127.0.0.1:2")
    monkeypatch.setenv("TDMLD_API_INFO", "abc:http://10.0.0.1:7717")
    assert find_access(None, tmp_path) == Access("http://10.0.0.1:7717", "abc")
    assert find_access(tmp_path, tmp_path) == Access("http://127.0.0.1:2", token)
    monkeypatch.delenv("TDMLD_API_INFO")
    assert find_access(None, tmp_path).token == token
    with pytest.raises(Unreachable, match="token:url"):
        parse_access("http://127.0.0.1:7717")
