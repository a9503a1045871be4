"""net_*: what is told about peers, and where a ban goes: the host, the disk, the carrier."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import trio

from tdmld.chain.crypto import KeyPair, public_key
from tdmld.node import control, netapi
from tdmld.node.errors import CarrierUnavailable
from tdmld.node.netapi import NetApi
from tdmld.p2p import Ban, Host, open_host
from tdmld.rpc.errors import InvalidParams, NotFound, Refused
from tests.p2p.support import free_port, seed, until

OTHER, SESSION = KeyPair(seed(8)).address, KeyPair(seed(9)).address


class FakeMachine:
    def __init__(self) -> None:
        self.bans: Sequence[Ban] = ()
        self.down = False

    async def set_bans(self, bans: Sequence[Ban]) -> None:
        if self.down:
            raise CarrierUnavailable("restarting")
        self.bans = bans


class Rig:
    def __init__(self, host: Host, data_dir: Path) -> None:
        record = SimpleNamespace(
            node=public_key(OTHER), session=public_key(SESSION), addresses=("/ip4/127.0.0.1/tcp/1",)
        )
        self.machine = FakeMachine()
        self.api = NetApi(
            host,
            SimpleNamespace(book=SimpleNamespace(records=lambda: [record])),  # type: ignore[arg-type]
            SimpleNamespace(  # type: ignore[arg-type]
                state=lambda: SimpleNamespace(owner_of=lambda node: None),
                committee=SimpleNamespace(nodes=[public_key(OTHER)]),
            ),
            self.machine,  # type: ignore[arg-type]
            host.peer_id,
            data_dir,
        )


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_host(seed(1), gossip=False) as host, trio.open_nursery() as nursery:
        made = Rig(host, tmp_path)
        nursery.start_soon(made.api.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_a_ban_reaches_the_disk_the_carrier_and_the_session_of_the_node(
    rig: Rig, tmp_path: Path
) -> None:
    done = await rig.api.ban(OTHER, 3600, "rude")
    assert done.author == "operator"
    assert done.until
    await until(lambda: {ban.subject for ban in rig.machine.bans} == {OTHER, SESSION})
    await until(lambda: [ban.reason for ban in netapi.load(tmp_path)] == ["rude"])
    [row] = [row for row in await rig.api.peers() if row.node == OTHER]
    assert (row.banned, row.validator, row.connected) == (True, True, False)
    assert [ban.subject for ban in await rig.api.bans()] == [OTHER]
    await rig.api.unban(OTHER)
    await until(lambda: rig.machine.bans == ())
    await until(lambda: netapi.load(tmp_path) == ())
    with pytest.raises(NotFound, match="tdmld peers bans"):
        await rig.api.unban(OTHER)


async def test_a_carrier_that_is_away_and_a_full_disk_end_nothing(rig: Rig, tmp_path: Path) -> None:
    rig.machine.down = True
    (tmp_path / "bans.json").mkdir()
    await rig.api.ban("192.0.2.0/24")
    await trio.sleep(0.1)
    rig.machine.down = False
    await rig.api.ban("198.51.100.0/24")
    await until(lambda: len(rig.machine.bans) == 2)


def test_the_longest_list_fits_into_a_message() -> None:
    subject = "2001:db8:1111:2222:3333:4444:5555:6666/128"
    longest = control.Denied(subject, 1e10, "é" * control.MAX_REASON)
    raw = control.encode_message(control.SetBans(1 << 40, (longest,) * control.MAX_BANS))
    assert control.decode_to_carrier(raw)


async def test_what_cannot_be_banned_is_refused_with_its_reason(rig: Rig) -> None:
    with pytest.raises(Refused, match="own id"):
        await rig.api.ban(rig.api._me)
    for text in ("nonsense", "192.0.2.0/99"):
        with pytest.raises(InvalidParams, match="neither a PeerId nor"):
            await rig.api.ban(text)
        with pytest.raises(InvalidParams):
            await rig.api.unban(text)


async def test_connecting_keeps_the_peer_and_says_what_went_wrong(rig: Rig) -> None:
    port = free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    with pytest.raises(Refused, match=f"{address}: Connection refused"):
        await rig.api.connect(f"{address}/p2p/{OTHER}")
    [row] = [row for row in await rig.api.peers() if row.node == OTHER]
    assert (row.kept, row.connected) == (True, False)
    assert "Connection refused" in row.last_error
    async with open_host(seed(8), [address], gossip=False):
        made = await rig.api.connect(f"{address}/p2p/{OTHER}")
        assert (made.node, made.address, made.path) == (OTHER, address, "direct")
        [row] = [row for row in await rig.api.peers() if row.node == OTHER]
        assert (row.connected, row.direction, row.path) == (True, "outbound", "direct")
        assert row.bytes_in > 0
        assert msgspec.json.encode(row)
    await rig.api.ban(OTHER, reason="rude")
    with pytest.raises(Refused, match="is banned; tdmld peers unban"):
        await rig.api.connect(f"{address}/p2p/{OTHER}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/ip4/127.0.0.1/tcp/1",
        f"/p2p/{OTHER}",
        f"nonsense/p2p/{OTHER}",
        "/ip4/1.2.3.4/tcp/1/p2p/x",
    ],
)
async def test_an_address_that_nobody_could_dial_is_named(rig: Rig, text: str) -> None:
    with pytest.raises(InvalidParams):
        await rig.api.connect(text)
