"""The address book and its exchange: what strangers can put there, and what they cannot."""

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tdmld.chain.codec import encode
from tdmld.chain.crypto import KeyPair
from tdmld.chain.errors import DecodeError
from tdmld.node import neighbours, peers
from tdmld.node.peers import (
    PeerBook,
    PeerRecord,
    PeerService,
    Records,
    SignedRecord,
    load_book,
    save_book,
)
from tdmld.p2p import PeerInfo
from tdmld.p2p.errors import AddressInvalid, ProtocolRefused
from tests.node.fake_stream import FakeStream, stream_pair

CHAIN = bytes(32)
ME, FRIEND = KeyPair(b"0" * 32), KeyPair(b"1" * 32)
ADDRESS = "/ip4/127.0.0.1/tcp/4001"


def signed(key: KeyPair, sequence: int = 1, *addresses: str, signer: KeyPair | None = None) -> Any:
    record = PeerRecord(
        key.public, sequence, addresses or (ADDRESS,), key.public, (ADDRESS,), False
    )
    raw = encode(record)
    return SignedRecord(raw, (signer or key).sign("peer", CHAIN, raw))


def stranger(number: int) -> KeyPair:
    return KeyPair(number.to_bytes(32, "big"))


def test_a_newer_record_replaces_an_older_one_and_nothing_else_does() -> None:
    book = PeerBook(CHAIN)
    assert book.add(signed(FRIEND, 5)) is not None
    assert book.add(signed(FRIEND, 5)) is None
    assert book.add(signed(FRIEND, 4)) is None
    with pytest.raises(DecodeError, match="wrong signature"):
        book.add(signed(FRIEND, 6, signer=ME))
    newer = book.add(signed(FRIEND, 6, "/dns4/example.org/tcp/1"))
    assert book.records() == [newer]


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp/1/p2p/x",
        "/ip4/1.2.3.4/tcp/1\n",
        "/ip4/\x1b[2J/tcp/1",
        "/unix/a/tcp/1",
        "/p2p-circuit",
        f"{ADDRESS}/p2p/{FRIEND.address}",
        f"{ADDRESS}/p2p/{'0' * 52}/p2p-circuit",
        f"{ADDRESS}/p2p/{FRIEND.address}/p2p-circuit/p2p/{ME.address}",
    ],
)
def test_what_is_no_address_is_no_record(address: str) -> None:
    with pytest.raises(DecodeError):
        PeerBook(CHAIN).add(signed(FRIEND, 1, address))


def test_a_record_may_name_a_relay() -> None:
    relayed = f"/dns4/relay.example.org/tcp/4001/p2p/{FRIEND.address}/p2p-circuit"
    record = PeerBook(CHAIN).add(signed(FRIEND, 1, ADDRESS, relayed))
    assert record is not None
    assert record.addresses == (ADDRESS, relayed)


def test_the_largest_records_fit_into_messages_and_books(tmp_path: Path) -> None:
    longest = ["/dns/" + 243 * "x" + f"/tcp/{port}" for port in range(8)]
    large = [signed(stranger(number), 1, *longest) for number in range(1, 65)]
    assert len(encode(Records(tuple(large)))) <= peers.MAX_MESSAGE_BYTES
    assert 4096 * 4 * len(encode(large[0])) // 3 < peers.MAX_BOOK_BYTES
    save_book(tmp_path / "peers.json", large)
    assert len(load_book(tmp_path / "peers.json", CHAIN).records()) == 64


def test_strangers_cannot_keep_registered_nodes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_RECORDS", 4)
    monkeypatch.setattr(peers, "MAX_STRANGERS", 3)
    registered = {stranger(100 + number).public for number in range(5)}
    book = PeerBook(CHAIN, registered.__contains__)
    taken = [book.add(signed(stranger(number))) is not None for number in range(1, 6)]
    assert taken == [True, True, True, False, False]
    taken = [book.add(signed(stranger(100 + number))) is not None for number in range(5)]
    assert taken == [True, True, True, True, False]
    assert {record.node for record in book.records()} < registered
    assert book.add(signed(stranger(9))) is None


def test_the_book_on_disk_survives_and_a_damaged_one_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    assert load_book(path, CHAIN).records() == []
    save_book(path, [signed(FRIEND), signed(ME, 1, signer=FRIEND)])
    assert [record.node for record in load_book(path, CHAIN).records()] == [FRIEND.public]
    path.write_bytes(b"[[")
    assert load_book(path, CHAIN).records() == []


class FakeHost:
    """Knows no address that ends in 0."""

    peer_id = ME.address
    addresses = (ADDRESS,)

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.infos: dict[str, PeerInfo] = {}
        self.near: set[str] = set()
        self.worked: dict[str, float] = {}
        self.opened = self.refusals = 0

    def set_handler(self, protocol: str, handler: object) -> None: ...

    def spent(self, peer_id: str, seconds: float) -> None:
        self.worked[peer_id] = self.worked.get(peer_id, 0.0) + seconds

    def changes(self) -> trio.MemoryReceiveChannel[object]:
        self._send, receive = trio.open_memory_channel[object](1)
        return receive

    def connected(self) -> frozenset[str]:
        return frozenset(self.near)

    async def open_stream(self, peer_id: str, protocol: str) -> FakeStream:
        self.opened += 1
        if self.opened <= self.refusals:
            raise ProtocolRefused("it is just starting")
        self.far, near = stream_pair(peer_id, ME.address)
        return near

    def add_peer(self, info: PeerInfo, *, patient: bool = False) -> None:
        if any(address.endswith("0") for address in info.addresses):
            raise AddressInvalid("nobody could dial that")
        self.infos[info.peer_id] = info
        if info.peer_id not in self.kept:
            self.kept.append(info.peer_id)

    def remove_peer(self, peer_id: str) -> None:
        self.kept.remove(peer_id)


class Rig:
    def __init__(self, path: Path, bootstrap: list[PeerInfo] | None = None, **options: Any) -> None:
        self.host = FakeHost()
        self.path = path
        self.service = PeerService(
            self.host,  # type: ignore[arg-type]
            ME,
            CHAIN,
            path,
            bootstrap or [],
            **options,
        )
        self.far, self.near = stream_pair(FRIEND.address, ME.address)

    async def say(self, *records: SignedRecord) -> None:
        await self.far.send(encode(Records(records)))
        await trio.testing.wait_all_tasks_blocked()

    @property
    def known(self) -> set[bytes]:
        return {record.node for record in self.service.book.records()}


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> Rig:
    made = Rig(tmp_path / "peers.json")
    nursery.start_soon(made.service.run)
    nursery.start_soon(_serve, made.service, made.near)
    return made


async def _serve(service: PeerService, stream: FakeStream) -> None:
    await service._exchange(stream)  # type: ignore[arg-type]


async def test_an_address_that_cannot_be_dialled_ends_neither_the_exchange_nor_the_next_start(
    rig: Rig,
) -> None:
    await rig.say(signed(stranger(1), 1, "/ip4/127.0.0.1/tcp/0"), signed(stranger(2)))
    await rig.say(signed(stranger(3)))
    assert rig.known == {stranger(n).public for n in (1, 2, 3)}
    assert rig.host.kept == [stranger(2).address, stranger(3).address]
    await trio.sleep(2 * peers.SAVE_SECONDS)
    again = Rig(rig.path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.service.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert again.host.kept == rig.host.kept


async def test_many_new_records_are_written_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(peers, "save_book", lambda path, records: saved.append(len(list(records))))
    for number in range(1, 20):
        await rig.say(signed(stranger(number)))
    await trio.sleep(2 * peers.SAVE_SECONDS)
    assert saved == [19]


async def test_a_full_disk_does_not_end_the_service(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, records: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(peers, "save_book", full)
        await rig.say(signed(stranger(1)))
        await trio.sleep(2 * peers.SAVE_SECONDS)
    await rig.say(signed(stranger(2)))
    await trio.sleep(2 * peers.SAVE_SECONDS)
    assert len(load_book(rig.path, CHAIN).records()) == 2


async def test_a_node_that_signs_new_records_without_end_is_heard_now_and_then(rig: Rig) -> None:
    for sequence in range(1, 100):
        await rig.say(signed(FRIEND, sequence))
    (record,) = rig.service.book.records()
    assert record.sequence < 2 * peers.UPDATE_BURST
    await trio.sleep(2 * peers.UPDATE_SECONDS)
    await rig.say(signed(FRIEND, 100))
    (record,) = rig.service.book.records()
    assert record.sequence == 100


async def test_validators_are_kept_however_many_others_came_first(tmp_path: Path) -> None:
    validator, elected = stranger(200), stranger(201)
    validators = {validator.public}
    rig = Rig(
        tmp_path / "peers.json",
        registered={validator.public}.__contains__,
        validates=validators.__contains__,
    )
    for number in range(1, 60):
        rig.service._learn("", Records((signed(stranger(number)),)))
    assert len(rig.host.kept) == peers.MAX_KEPT_STRANGERS
    rig.service._learn("", Records((signed(validator),)))
    assert rig.host.worked[""] > 0
    assert rig.host.kept[-1] == validator.address
    rig.service._learn("", Records((signed(elected),)))
    rig.service.validators_changed()
    assert elected.address not in rig.host.kept
    validators.add(elected.public)
    rig.service.validators_changed()
    assert rig.host.kept[-1] == elected.address


async def test_who_is_away_gives_its_place_to_others_and_is_tried_again(
    tmp_path: Path,
    nursery: trio.Nursery,
    mock_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def review(times: int) -> None:
        for _ in range(times):
            mock_clock.jump(peers.REVIEW_SECONDS)
            await trio.testing.wait_all_tasks_blocked()

    monkeypatch.setattr(peers, "MAX_KEPT_PEERS", 10)
    rig = Rig(tmp_path / "peers.json")
    nursery.start_soon(rig.service.run)
    await trio.testing.wait_all_tasks_blocked()
    nodes = [stranger(number) for number in range(1, 40)]
    rig.service._learn("", Records(tuple(signed(node) for node in nodes)))
    first = set(rig.host.kept)
    assert len(first) == 10
    rig.host.near = {node.address for node in nodes} - first
    await review(4)
    assert len(set(rig.host.kept) & rig.host.near) == 10 - neighbours.PROBES
    assert len(rig.host.kept) == 10
    tried: set[str] = set()
    for _ in range(20):
        await review(1)
        tried |= first & set(rig.host.kept)
    assert tried == first
    rig.host.near = {node.address for node in nodes}
    await review(2)
    assert set(rig.host.kept) == first


async def test_a_bootstrap_node_is_dialled_where_the_configuration_says_too(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    rig = Rig(tmp_path / "peers.json", bootstrap=[PeerInfo(FRIEND.address, (ADDRESS,))])
    elsewhere = "/ip4/10.0.0.1/tcp/4001"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.service.run)
        await trio.testing.wait_all_tasks_blocked()
        rig.service._learn("", Records((signed(FRIEND, 1, elsewhere),)))
        assert rig.host.infos[FRIEND.address].addresses == (ADDRESS, elsewhere)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_is_just_starting_is_asked_again_and_a_broken_exchange_renewed(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    friend = max((stranger(n) for n in range(1, 9)), key=lambda key: key.address)
    assert friend.address > ME.address
    rig = Rig(tmp_path / "peers.json")
    rig.host.near, rig.host.refusals = {friend.address}, 2
    nursery.start_soon(rig.service.run)
    await trio.sleep(10)
    assert rig.host.opened == 3
    await rig.host.far.send(encode(Records((signed(friend),))))
    await trio.testing.wait_all_tasks_blocked()
    assert rig.known == {friend.public}
    await rig.host.far.close()
    await trio.sleep(2 * peers.GREET_LAST_SECONDS)
    assert rig.host.opened == 4
    rig.host.near = set()
    await rig.host.far.close()
    await trio.sleep(5 * peers.GREET_LAST_SECONDS)
    assert rig.host.opened == 4
