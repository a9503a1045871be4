"""Bans: who is kept out, for how long, and that it survives restarts and damage."""

from pathlib import Path

import msgspec
import pytest
import trio

from tdmld.chain.crypto import KeyPair
from tdmld.p2p import Limits, Offence, PeerInfo, open_host
from tdmld.p2p.accounting import (
    ADDRESS_HALF_LIFE_SECONDS,
    BAN_SCORE,
    PATIENCE,
    AddressScores,
    Score,
    network_of,
)
from tdmld.p2p.bans import (
    FIRST_SECONDS,
    FORGET_SECONDS,
    LAST_SECONDS,
    MAX_OPERATOR,
    MAX_OWN,
    Ban,
    Bans,
    load_bans,
    save_bans,
)
from tdmld.p2p.errors import AddressInvalid, BansFull, DialFailed
from tests.p2p.support import ECHO, connected_pair, hosts, info, says_hello, seed, until

PEER = KeyPair(seed(7)).address


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# The list


@pytest.mark.parametrize(
    ("subject", "inside", "outside"),
    [
        ("192.0.2.7", "192.0.2.7", "192.0.2.8"),
        ("192.0.2.0/24", "192.0.2.255", "192.0.3.1"),
        ("192.0.2.77/24", "192.0.2.1", "192.0.3.1"),
        ("192.0.2.7", "::ffff:192.0.2.7", "::ffff:192.0.2.8"),
        ("2001:db8::7", "2001:db8::ffff", "2001:db8:0:1::7"),
        ("2001:db8::/32", "2001:db8:9::1", "2001:db9::1"),
    ],
)
def test_an_address_is_kept_out_by_its_network(subject: str, inside: str, outside: str):
    """Of IPv6 a customer has 2**64 addresses: they are one."""
    bans = Bans()
    bans.add(subject)
    assert bans.address(inside) is not None
    assert bans.address(outside) is None
    assert bans.address("no address") is None


@pytest.mark.parametrize("text", ["", "x", "192.0.2.0/33", "192.0.2", "12D3KooW", "1" * 500])
def test_what_is_neither_a_peer_nor_a_network_is_refused(text: str):
    with pytest.raises(AddressInvalid):
        Bans().add(text)


def test_the_hosts_own_bans_last_twice_as_long_each_time_and_are_forgotten(clock: Clock):
    bans = Bans(now=clock)
    seconds = []
    for _ in range(12):
        until_ = bans.punish(PEER, "flood").until
        assert until_ is not None
        assert bans.punish(PEER, "again").until == until_  # it is out already
        seconds.append(until_ - clock.now)
        clock.now = until_
        assert bans.peer(PEER) is None
    doubled = [min(FIRST_SECONDS * 2**n, LAST_SECONDS) for n in range(12)]
    assert seconds == doubled
    clock.now += FORGET_SECONDS + 1
    assert bans.punish(PEER, "flood").times == 1


def test_a_ban_by_hand_ends_when_it_says_so_or_is_lifted(clock: Clock):
    bans = Bans(now=clock)
    bans.add(PEER, 60, "rude")
    clock.now += 59
    assert bans.peer(PEER) is not None
    clock.now += 1
    assert bans.peer(PEER) is None
    assert bans.lift(PEER) is None
    bans.add(PEER)
    clock.now += 1e9
    lifted = bans.lift(PEER)
    assert lifted is not None
    assert bans.peer(PEER) is None


def test_the_lists_are_bounded(clock: Clock):
    bans = Bans(now=clock)
    bans.add("198.51.100.1")
    for number in range(MAX_OWN + 5):
        clock.now += 0.01
        bans.punish(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32", "flood")
    assert len(bans.all()) == MAX_OWN + 1
    assert bans.address("10.0.0.0") is None  # it would have ended first
    assert bans.address("198.51.100.1") is not None
    for number in range(MAX_OPERATOR - 1):
        bans.add(f"11.0.{number >> 8}.{number & 255}")
    with pytest.raises(BansFull, match="lift some"):
        bans.add("192.0.2.1")


def test_what_the_configuration_denies_is_denied_whatever_else_comes(clock: Clock):
    bans = Bans([PEER, "192.0.2.0/24"], now=clock)
    assert bans.add(PEER, 5).author == "configuration"
    bans.punish(PEER, "flood")
    bans.replace([Ban(PEER, 5.0)])
    clock.now += 1e9
    assert bans.peer(PEER) is not None
    assert bans.address("192.0.2.9") is not None
    with pytest.raises(AddressInvalid):
        Bans(["nonsense"])


# On disk


def test_bans_survive_a_restart_and_their_count_too(tmp_path: Path, clock: Clock):
    bans = Bans(["203.0.113.0/24"], now=clock)
    bans.add("192.0.2.0/24", None, "known")
    until_ = bans.punish(PEER, "flood").until
    assert until_ is not None
    save_bans(tmp_path / "bans.json", bans.all())
    again = Bans(now=clock)
    again.restore(load_bans(tmp_path / "bans.json"))
    assert {ban.subject for ban in again.holding()} == {PEER, "192.0.2.0/24"}
    clock.now = until_ + 1
    assert again.punish(PEER, "flood").times == 2
    clock.now += FORGET_SECONDS + 2 * FIRST_SECONDS
    late = Bans(now=clock)
    late.restore(load_bans(tmp_path / "bans.json"))
    assert [ban.subject for ban in late.all()] == ["192.0.2.0/24"]


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        (b"", 0),
        (b"not json", 0),
        (b'{"a": 1}', 0),
        (b"[" * 10_000, 0),
        (b'["' + b"\xff" * 9 + b'"]', 0),
        (b'[{"subject": "nonsense", "until": null}, {"subject": "192.0.2.7", "until": null}]', 1),
        (b'[{"subject": 7}, {"subject": "192.0.2.7", "until": 1e300}, 5, null]', 0),
        (b'[{"subject": "192.0.2.7", "until": null, "times": 0}]', 0),
    ],
)
def test_a_damaged_file_costs_what_is_damaged(tmp_path: Path, raw: bytes, left: int):
    path = tmp_path / "bans.json"
    path.write_bytes(raw)
    bans = Bans()
    bans.restore(load_bans(path))
    assert len(bans.all()) == left
    save_bans(path, bans.all())
    assert len(msgspec.json.decode(path.read_bytes())) == left


# Scores


def test_a_score_halves_in_its_time_and_is_not_moved_by_a_clock_that_goes_back():
    score = Score(60.0)
    score.add(100, 1000.0)
    assert score.now(1060.0) == 50
    assert score.now(900.0) == 100


def test_an_address_is_banned_for_what_comes_quickly(clock: Clock):
    scores, network = AddressScores(clock), network_of("192.0.2.7")
    needed = int(BAN_SCORE / Offence.GARBAGE.weight)
    assert [scores.add(network, Offence.GARBAGE) for _ in range(needed)][-2:] == [False, True]
    for _ in range(needed * 5):
        clock.now += ADDRESS_HALF_LIFE_SECONDS / 10
        assert not scores.add(network, Offence.GARBAGE)


@pytest.mark.parametrize("offence", [Offence.CROWDING, Offence.SILENCE])
def test_what_honest_peers_may_do_never_adds_up_to_a_ban(offence: Offence, clock: Clock):
    """One that redials as often as it can: each try fails at once, or when its time is over."""
    every = {
        Offence.CROWDING: Limits().redial_last_seconds / 2,
        Offence.SILENCE: Limits().handshake_seconds,
    }[offence]
    scores = AddressScores(clock)
    for _ in range(10_000):
        clock.now += every
        assert not scores.add(network_of("192.0.2.7"), offence)


# In a host


async def test_a_banned_peer_is_disconnected_refused_and_not_dialled_until_it_is_let_in():
    async with connected_pair() as (a, b):
        b.ban(a.peer_id, reason="rude")
        await until(lambda: not b.connected())
        changes, refused = b.changes(), b._connector.refused
        with pytest.raises(DialFailed):
            await a.open_stream(b.peer_id, ECHO)
        await until(lambda: b._connector.refused > refused)
        with pytest.raises(trio.WouldBlock):
            changes.receive_nowait()
        b.add_peer(info(a))
        with pytest.raises(DialFailed, match="is banned: rude"):
            await b.open_stream(a.peer_id, ECHO)
        assert not b.connected()
        assert b.unban(a.peer_id) is not None
        await until(lambda: a.peer_id in b.connected())


async def test_a_network_that_is_denied_is_disconnected_and_not_dialled():
    async with connected_pair() as (a, b):
        b.add_peer(info(a))
        b.ban("127.0.0.0/8")
        await until(lambda: not b.connected())
        with pytest.raises(DialFailed, match="no address of"):
            await b.open_stream(a.peer_id, ECHO)
        b.unban("127.0.0.0/8")
        await until(lambda: a.peer_id in b.connected())


async def test_where_a_kept_peer_lives_it_comes_in_although_the_address_is_banned():
    async with hosts(3) as (a, kept, stranger):
        a.add_peer(PeerInfo(kept.peer_id, ("/ip4/127.0.0.1/tcp/1",)))
        a.bans.punish("127.0.0.1/32", "flood")
        for host in (kept, stranger):
            host.add_peer(info(a))
        assert await says_hello(kept, a.peer_id)
        with pytest.raises(DialFailed):
            await stream_of(stranger, a)
        assert a.connected() == {kept.peer_id}


async def stream_of(one, other):
    return await one.open_stream(other.peer_id, ECHO)


async def test_an_address_ban_by_the_host_leaves_those_who_are_connected():
    async with connected_pair() as (a, b):
        b.bans.punish("127.0.0.1/32", "flood")
        b._peers.enforce()
        assert await says_hello(a, b.peer_id)


async def test_a_kept_peer_has_more_patience_but_no_immunity():
    async with connected_pair() as (a, b):
        times = int(BAN_SCORE / Offence.MALFORMED.weight) + 1
        for _ in range(times):  # a keeps b
            a.misbehaved(b.peer_id, Offence.MALFORMED, "test")
        assert a.bans.peer(b.peer_id) is None
        for _ in range(int(times * PATIENCE)):
            a.misbehaved(b.peer_id, Offence.MALFORMED, "test")
        assert a.bans.peer(b.peer_id) is not None
        await until(lambda: not a.connected())


async def test_a_score_survives_a_reconnection_and_shows_in_the_status():
    async with connected_pair() as (a, b):
        b.misbehaved(a.peer_id, Offence.MALFORMED, "test")
        b.spent(a.peer_id, 1.5)
        await b.disconnect(a.peer_id)
        await until(lambda: a.peer_id in b.connected())
        [status] = b.peers()
        assert status.score == pytest.approx(Offence.MALFORMED.weight, rel=0.01)
        assert status.spent_seconds == 1.5


async def test_one_address_takes_no_more_than_its_share_of_places():
    limits = Limits(connections=100, connections_per_address=2)
    async with open_host(seed(9), gossip=False, limits=limits) as full, hosts(4) as (a, b, c, d):
        for host in (a, b):
            host.add_peer(info(full))
        await until(lambda: len(full.connected()) == 2)
        c.add_peer(info(full))
        with pytest.raises(DialFailed):
            await stream_of(c, full)
        full.add_peer(PeerInfo(d.peer_id))
        d.add_peer(info(full))
        await until(lambda: d.peer_id in full.connected())


async def test_another_hosts_bans_are_replaced_and_its_own_stay():
    async with hosts(1) as (a,):
        a.bans.punish("192.0.2.1/32", "flood")
        a.set_bans([Ban(PEER, None), Ban("192.0.2.2/32", None, author="node")])
        assert {ban.subject for ban in a.bans.holding()} == {PEER, "192.0.2.1/32", "192.0.2.2/32"}
        a.set_bans([])
        assert {ban.subject for ban in a.bans.holding()} == {"192.0.2.1/32"}


@pytest.mark.parametrize(
    ("sent", "close", "offence"),
    [
        (b"", False, Offence.SILENCE),
        (b"\x13/multistream/1.0.0\n", False, Offence.SILENCE),
        (b"\x13" + b"garbage" * 10, False, Offence.GARBAGE),
        (b"\x13/multistream/1.0.0\n", True, Offence.CROWDING),
    ],
)
async def test_what_happens_before_an_identity_counts_against_the_address(
    sent: bytes, close: bool, offence: Offence
):
    async with open_host(seed(1), gossip=False, limits=Limits(handshake_seconds=0.3)) as host:
        port = int(host.addresses[0].rsplit("/", 1)[1])
        scores = host._peers._address_scores._scores
        async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
            if sent:
                await stranger.send_all(sent)
            if close:
                await stranger.send_eof()
            await until(lambda: bool(scores))
        assert scores[network_of("127.0.0.1")].value == offence.weight


async def test_from_a_banned_address_nothing_is_read():
    async with hosts(1) as (a,):
        a.bans.punish("127.0.0.1/32", "flood")
        port = int(a.addresses[0].rsplit("/", 1)[1])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
            with trio.fail_after(5):  # the time for a handshake is 10 s
                assert await stranger.receive_some() == b""
