"""Asking a router for a port, against a small one on loopback."""

import pytest
import trio

from tdmld.p2p import upnp
from tdmld.p2p.upnp import Mapping, PortMapper, UpnpFailed, add_mapping, remove_mappings
from tests.p2p.fake_igd import FakeRouter, open_router
from tests.p2p.support import until


async def ask(port: int = 4001) -> Mapping:
    return await add_mapping(port, interface="127.0.0.1", search_seconds=0.2)


async def test_a_port_is_forwarded_for_an_hour_and_taken_back() -> None:
    async with open_router(FakeRouter()) as router:
        mapping = await ask()
        assert mapping == Mapping("127.0.0.1", "198.41.0.4", 4001, "127.0.0.1")
        assert mapping.address == "/ip4/198.41.0.4/tcp/4001"
        assert mapping.public
        assert router.mapped == {4001: ("127.0.0.1", 4001, 3600)}
        await remove_mappings([4001], interface="127.0.0.1", search_seconds=0.2)
        assert router.mapped == {}


async def test_a_port_that_another_machine_has_is_not_taken_away() -> None:
    async with open_router(FakeRouter(taken={4001})) as router:
        mapping = await ask()
        assert mapping.external_port != 4001
        assert router.mapped == {mapping.external_port: ("127.0.0.1", 4001, 3600)}


async def test_a_router_without_leases_maps_until_it_is_told() -> None:
    async with open_router(FakeRouter(permanent_only=True)) as router:
        await ask()
        assert router.mapped[4001][2] == 0


async def test_a_router_behind_another_one_is_no_way_in() -> None:
    async with open_router(FakeRouter(external_ip="100.64.1.1")):
        assert not (await ask()).public


@pytest.mark.parametrize("said", ["", "1.2.3.4/tcp/1", "nonsense"])
async def test_a_router_without_an_address_is_of_no_use(said: str) -> None:
    async with open_router(FakeRouter(external_ip=said)):
        with pytest.raises(UpnpFailed):
            await ask()


async def test_a_router_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upnp, "_CALL_SECONDS", 1.0)
    async with open_router(FakeRouter(silent=True)):
        with trio.fail_after(5), pytest.raises(UpnpFailed, match="does not finish"):
            await ask()


async def test_an_endless_answer_costs_the_helper_only() -> None:
    async with open_router(FakeRouter(huge=True)):
        with trio.fail_after(20), pytest.raises(UpnpFailed):
            await ask()


async def test_cancelling_ends_the_helper_at_once() -> None:
    async with open_router(FakeRouter(silent=True)):
        begun = trio.current_time()
        with trio.move_on_after(0.5):
            await ask()
        assert trio.current_time() - begun < 2


async def test_the_mapper_renews_and_takes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upnp, "RENEW_SECONDS", 0.2)
    async with open_router(FakeRouter()) as router:
        mapper = PortMapper((4001, 4002), interface="127.0.0.1", search_seconds=0.2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mapper.run)
            await mapper.tried.wait()
            assert set(router.mapped) == set(mapper.state.mappings) == {4001, 4002}
            router.mapped.clear()  # it was switched off and on
            await until(lambda: set(router.mapped) == {4001, 4002})
            nursery.cancel_scope.cancel()
        assert router.mapped == {}


async def test_the_mapper_says_why_there_is_nothing() -> None:
    mapper = PortMapper((4001,), interface="127.0.0.1", search_seconds=0.1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mapper.run)
        with trio.fail_after(8):
            await mapper.tried.wait()
        assert "no router answers" in mapper.state.failure
        assert mapper.state.mappings == {}
        nursery.cancel_scope.cancel()
