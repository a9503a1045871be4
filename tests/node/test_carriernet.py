"""Whom a carrier keeps while direct paths are sought, and afterwards."""

from typing import Any, cast

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node import control
from tdmld.node.carriernet import CarrierNet, Relaying
from tdmld.p2p import PeerInfo

SEED = b"s" * 32
OTHER = KeyPair(b"o" * 32).address
ASKED = control.ConnectDirect(1, OTHER, ("/ip4/127.0.0.1/tcp/9",), 20.0)


class FakeHost:
    def __init__(self) -> None:
        self.kept: dict[str, tuple[str, ...]] = {}
        self.go_on = trio.Event()

    def add_peer(self, info: PeerInfo) -> None:
        self.kept[info.peer_id] = info.addresses

    def remove_peer(self, peer_id: str) -> None:
        self.kept.pop(peer_id, None)

    async def connect_direct(self, peer_id: str, seconds: float) -> bool:
        await self.go_on.wait()
        return peer_id in self.kept


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def net(host: FakeHost) -> CarrierNet:
    return CarrierNet(cast(Any, host), SEED, Relaying())


async def test_a_peer_that_a_job_needs_meanwhile_stays(host: FakeHost, net: CarrierNet) -> None:
    job: dict[str, tuple[str, ...]] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.carry_out, ASKED, lambda: job)
        await trio.testing.wait_all_tasks_blocked()
        job[OTHER] = ("/ip4/127.0.0.1/tcp/10",)
        host.add_peer(PeerInfo(OTHER, job[OTHER]))
        host.go_on.set()
    assert host.kept == job


async def test_who_seeks_the_same_path_is_not_disturbed(host: FakeHost, net: CarrierNet) -> None:
    """Both ends seek it at the same time: one for itself, one for the other's receipt."""
    found: list[control.Reply] = []

    async def seek() -> None:
        found.append(await net.carry_out(ASKED, lambda: {}))

    first = trio.CancelScope()

    async def give_up() -> None:
        with first:
            await seek()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        nursery.start_soon(seek)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        host.go_on.set()
    assert found == [control.Direct(1, True)]
    assert host.kept == {}
