"""Sealed data: ciphertext at rest and on the way, keys for members, new ones after a change."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.chain.crypto import KeyPair
from tdmld.node import contentwire as wire
from tdmld.node import seal as sealing
from tdmld.node.control import Blob
from tdmld.node.errors import ContentError, ContentMismatch, ContentUnavailable
from tdmld.node.layout import Layout
from tdmld.node.machine import CarrierUp, Machine, SlotId, open_machine
from tdmld.node.seal import (
    ContentKeys,
    KeyName,
    key_box,
    key_name,
    seal,
    sealed_size,
    stored_names,
    unseal,
)
from tdmld.p2p import PeerInfo
from tdmld.train.digest import digest
from tdmld.train.spec import decode_spec, spec_id
from tests.node.contentkit import JOB, SPEC_ID, Node, Tap
from tests.train.support import TEXT, encode_document, spec_document

KEY, OTHER_KEY = b"k" * 32, b"K" * 32
CHAIN = b"c" * 32
LONG = b"The quality of mercy is not strained. " * 40_000
PATIENCE_SECONDS = 120


def sealed(data: bytes, key: bytes = KEY, spec: bytes = SPEC_ID, epoch: int = 0) -> bytes:
    return b"".join(seal(key, spec, epoch, digest(data), memoryview(data)))


# the container --------------------------------------------------------------------------------


@given(st.integers(0, 3), st.integers(-2, 2))
@settings(max_examples=20)
def test_what_is_sealed_opens_to_itself_and_is_as_long_as_said(chunks: int, more: int) -> None:
    data = os.urandom(1000) * (max(chunks * sealing.PLAIN_BYTES + more, 0) // 1000 + 1)
    data = data[: max(chunks * sealing.PLAIN_BYTES + more, 0)]
    closed = sealed(data)
    assert len(closed) == sealed_size(len(data))
    assert unseal(KEY, SPEC_ID, 0, digest(data), closed) == data
    assert data[:64] not in closed or len(data) < 8


@pytest.mark.parametrize(
    ("key", "spec", "epoch", "content"),
    [
        (OTHER_KEY, SPEC_ID, 0, LONG),
        (KEY, b"t" * 32, 0, LONG),
        (KEY, SPEC_ID, 1, LONG),
        (KEY, SPEC_ID, 0, LONG + b"."),
    ],
    ids=["key", "spec", "key epoch", "content"],
)
def test_it_opens_only_as_what_it_was_sealed_as(
    key: bytes, spec: bytes, epoch: int, content: bytes
) -> None:
    with pytest.raises(ContentMismatch, match="cannot be opened"):
        unseal(key, spec, epoch, digest(content), sealed(LONG))


def test_chunks_cannot_be_swapped_dropped_repeated_or_changed() -> None:
    data = LONG + LONG
    closed, size = sealed(data), wire.CHUNK_BYTES
    first, second, rest = closed[:size], closed[size : 2 * size], closed[2 * size :]
    assert rest
    wrongs = [second + first + rest, first + second, first + first + rest, closed[:-1], b""]
    wrongs.append(closed[:-1] + bytes([closed[-1] ^ 1]))
    wrongs += [closed[: size + length] for length in (1, 15, 16, 17)]
    wrongs += [bytes(length) for length in (1, 15, 16, 17)]
    for wrong in wrongs:
        with pytest.raises(ContentMismatch):
            unseal(KEY, SPEC_ID, 0, digest(data), wrong)


def test_another_content_than_its_name_says_is_refused() -> None:
    lie = b"".join(seal(KEY, SPEC_ID, 0, digest(LONG), memoryview(b"something else")))
    with pytest.raises(ContentMismatch, match="not the content"):
        unseal(KEY, SPEC_ID, 0, digest(LONG), lie)


def test_all_holders_have_the_same_bytes_and_no_two_chunks_share_a_nonce() -> None:
    assert sealed(LONG) == sealed(LONG)
    places = [(SPEC_ID, 0, 0), (SPEC_ID, 0, 1), (SPEC_ID, 1, 0), (b"t" * 32, 0, 0)]
    nonces = {sealing._bind(KEY, s, e, digest(LONG), i, 2)[1] for s, e, i in places}
    assert len(nonces) == len(places)
    assert sealing._bind(OTHER_KEY, SPEC_ID, 0, digest(LONG), 0, 2)[1] not in nonces


# keys -----------------------------------------------------------------------------------------


def test_a_key_rests_in_a_box_that_its_session_alone_opens(tmp_path: Path) -> None:
    mine, theirs = KeyPair(b"1" * 32), KeyPair(b"2" * 32)
    keys = ContentKeys(Layout(tmp_path), mine)
    assert keys.newest(SPEC_ID) is None
    name, key = keys.make(SPEC_ID, 0)
    assert name == key_name(0, key) != key_name(1, key) != key_name(0, KEY)
    assert (keys.newest(SPEC_ID), keys.get(SPEC_ID, name)) == ((name, key), key)
    assert keys.get(SPEC_ID, key_name(0, KEY)) is None
    path = Layout(tmp_path).content_key(SPEC_ID, *name)
    assert key not in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    stolen = path.read_bytes()
    with pytest.raises(ContentMismatch, match="not for this session"):
        ContentKeys(Layout(tmp_path), theirs).open(SPEC_ID, name, stolen)
    assert ContentKeys(Layout(tmp_path), theirs).newest(SPEC_ID) is None
    box = key_box(theirs.public, SPEC_ID, 0, key)
    assert ContentKeys(Layout(tmp_path), theirs).open(SPEC_ID, name, box) == key
    for wrong in (box[:-1], box[:-1] + bytes([box[-1] ^ 1]), b"", os.urandom(len(box))):
        with pytest.raises(ContentMismatch):
            ContentKeys(Layout(tmp_path), theirs).open(SPEC_ID, name, wrong)
    for other in (KeyName(1, name.id), key_name(0, KEY)):
        with pytest.raises(ContentMismatch, match="another key"):
            ContentKeys(Layout(tmp_path), theirs).open(SPEC_ID, other, box)
    with pytest.raises(ContentMismatch, match="no key"):
        key_box(bytes(32), SPEC_ID, 0, key)


def test_a_text_has_its_names_by_its_spec() -> None:
    spec = decode_spec(encode_document(spec_document(TEXT)))
    assert stored_names(spec) == {digest(TEXT)}
    raw = encode_document(spec_document(TEXT, privacy="sealed"))
    assert stored_names(decode_spec(raw)) == {spec_id(raw)} == {sealing.sealing(raw)}


# between carriers -----------------------------------------------------------------------------


class World:
    """A submitter that published LONG under SPEC_ID, two members, a stranger."""

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.submitter, self.worker, self.auditor, self.stranger = (
            Node(root, number, nursery) for number in (1, 2, 3, 4)
        )
        text = root / "text"
        text.write_bytes(LONG)
        self.shards = self.submitter.store.import_text(text, SPEC_ID)
        self.submitter.serve(self.worker, self.auditor, sealed=SPEC_ID)
        self.worker.serve(self.submitter, self.auditor, sealed=SPEC_ID)
        for node in (self.submitter, self.worker):
            self.stranger.host.routes[node.session] = node.server.handle  # type: ignore[assignment]

    async def bring(self, node: Node, *holders: Node) -> bytes:
        await node.client.fetch_data(JOB, SPEC_ID, self.shards, [h.session for h in holders])
        return b"".join(node.store.read(SPEC_ID, content) for content, _ in self.shards)

    @property
    def key(self) -> tuple[KeyName, bytes]:
        """The submitter's newest."""
        found = self.submitter.keys.newest(SPEC_ID)
        assert found is not None
        return found


@pytest.fixture
def world(tmp_path: Path, nursery: trio.Nursery) -> World:
    return World(tmp_path, nursery)


def plain_files(node: Node) -> list[Path]:
    files = (path for path in node.layout.data_dir.rglob("*") if path.is_file())
    return [path for path in files if LONG[:38] in path.read_bytes()]


async def test_members_get_ciphertext_and_a_key_and_open_it(world: World) -> None:
    assert await world.bring(world.worker, world.submitter) == LONG
    assert plain_files(world.submitter) == plain_files(world.worker) == []


async def test_an_auditor_gets_everything_from_a_worker_when_the_submitter_is_away(
    world: World,
) -> None:
    await world.bring(world.worker, world.submitter)
    del world.auditor.host.routes[world.submitter.session]
    assert await world.bring(world.auditor, world.worker) == LONG


async def test_who_is_no_member_gets_neither_bytes_nor_key(world: World) -> None:
    with pytest.raises(ContentUnavailable, match="not a member"):
        await world.bring(world.stranger, world.submitter)
    ask = wire.AskKey(JOB, *world.key[0])
    with pytest.raises(ContentUnavailable, match="not a member"):
        await world.stranger.client._ask_once(world.submitter.session, ask)


async def test_a_member_of_another_job_cannot_have_the_key_of_this_one(world: World) -> None:
    other = b"o" * 32
    jobs = world.submitter.jobs
    jobs[other] = type(jobs[JOB])(frozenset({world.stranger.session}), b"t" * 32)
    for item in (Blob(other, content) for content, _ in world.shards):
        with pytest.raises(ContentUnavailable, match="not here"):
            await world.stranger.client._open(world.submitter.session, item)
    ask = wire.AskKey(other, *world.key[0])
    with pytest.raises(ContentUnavailable, match="not here"):
        await world.stranger.client._ask_once(world.submitter.session, ask)


async def test_a_holder_that_gives_a_wrong_key_or_bytes_is_passed_over(world: World) -> None:
    await world.bring(world.worker, world.submitter)
    liar, (name, key) = world.worker, world.key
    path = liar.layout.content_key(SPEC_ID, *name)
    liar.keys.get = lambda spec, name: OTHER_KEY  # type: ignore[method-assign]
    assert await world.bring(world.auditor, liar, world.submitter) == LONG
    assert world.auditor.keys.newest(SPEC_ID) == (name, key)
    assert path.is_file()


async def test_a_made_up_key_that_opens_its_own_shards_does_not_close_those_of_others(
    world: World,
) -> None:
    liar, auditor = world.worker, world.auditor
    await world.bring(liar, world.submitter)
    content, size = world.shards[0]
    name = liar.keys.keep(SPEC_ID, 0, OTHER_KEY)
    for path in liar.layout.content.rglob(content.hex()):
        path.unlink()
    own = liar.layout.sealed_blob(SPEC_ID, *name, content)
    own.write_bytes(b"".join(seal(OTHER_KEY, SPEC_ID, 0, content, memoryview(LONG)[:size])))
    await auditor.client.fetch_data(JOB, SPEC_ID, world.shards[:1], [liar.session])
    assert auditor.keys.newest(SPEC_ID) == (name, OTHER_KEY)
    assert await world.bring(auditor, world.submitter) == LONG
    # And whoever asks the one who has both gets for each shard the key that opens it.
    auditor.serve(world.stranger, sealed=SPEC_ID)
    assert await world.bring(world.stranger, auditor) == LONG


async def test_a_key_that_an_earlier_session_kept_is_asked_for_again(world: World) -> None:
    await world.bring(world.worker, world.submitter)
    name, key = world.key
    world.worker.layout.content_key(SPEC_ID, *name).write_bytes(os.urandom(sealing.BOX_BYTES))
    with pytest.raises(ContentUnavailable, match="not here"):
        world.worker.store.read(SPEC_ID, world.shards[0][0])
    assert await world.bring(world.worker, world.submitter) == LONG
    assert world.worker.keys.get(SPEC_ID, name) == key


async def test_a_shard_that_the_disk_spoiled_is_fetched_or_imported_again(world: World) -> None:
    await world.bring(world.worker, world.submitter)
    content, _ = world.shards[1]
    for node in (world.worker, world.submitter):
        path = node.layout.sealed_blob(SPEC_ID, *world.key[0], content)
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(ContentMismatch, match="cannot be opened"):
            node.store.text_memory(SPEC_ID, world.shards)
        if node is world.submitter:
            text = node.layout.data_dir.parent / "text"
            assert node.store.import_text(text, SPEC_ID) == world.shards
            assert node.store.read(SPEC_ID, content) == LONG[1 << 20 :]
        else:
            assert await world.bring(node, world.submitter) == LONG


async def test_a_rekey_is_not_kept_from_its_end_by_a_shard_that_is_spoiled(world: World) -> None:
    (first, _), (second, _) = world.shards
    world.submitter.layout.sealed_blob(SPEC_ID, *world.key[0], first).write_bytes(b"spoiled")
    assert world.submitter.store.rekey(SPEC_ID) == 1
    (only,) = world.submitter.layout.sealed(SPEC_ID).iterdir()
    assert sorted(path.name for path in only.iterdir()) == sorted(["key", second.hex()])


async def test_a_submitter_with_a_new_session_publishes_under_a_new_key(world: World) -> None:
    (name, _), text = world.key, world.submitter.layout.data_dir.parent / "text"
    world.submitter.layout.content_key(SPEC_ID, *name).write_bytes(b"")
    assert world.submitter.store.import_text(text, SPEC_ID) == world.shards
    assert world.key[0] != name
    assert world.submitter.store.read(SPEC_ID, world.shards[1][0]) == LONG[1 << 20 :]


async def test_a_holder_of_less_than_a_tag_is_passed_over(world: World) -> None:
    await world.bring(world.worker, world.submitter)
    for content, _ in world.shards:
        world.worker.layout.sealed_blob(SPEC_ID, *world.key[0], content).write_bytes(b"short")
    with pytest.raises(ContentUnavailable, match="cannot be opened"):
        await world.bring(world.auditor, world.worker)
    assert await world.bring(world.auditor, world.worker, world.submitter) == LONG


async def test_what_does_not_open_is_not_kept(world: World) -> None:
    for content, _ in world.shards:
        path = world.submitter.layout.sealed_blob(SPEC_ID, *world.key[0], content)
        raw = bytearray(path.read_bytes())
        raw[100] ^= 1
        path.write_bytes(raw)
    with pytest.raises(ContentUnavailable, match="cannot be opened"):
        await world.bring(world.worker, world.submitter)
    assert world.worker.keys.newest(SPEC_ID) is None
    assert [p for p in world.worker.layout.content.rglob("*") if p.is_file()] == []


async def test_after_a_rekey_who_was_removed_opens_nothing_new(world: World) -> None:
    await world.bring(world.worker, world.submitter)
    _, before = world.key
    world.submitter.serve(world.auditor, sealed=SPEC_ID)
    assert world.submitter.store.rekey(SPEC_ID) == 1
    with pytest.raises(ContentUnavailable, match="not a member"):
        await world.worker.client._ask_once(
            world.submitter.session, wire.AskKey(JOB, *world.key[0])
        )
    assert await world.bring(world.auditor, world.submitter) == LONG
    assert world.auditor.keys.newest(SPEC_ID) == world.key
    assert world.key[0].epoch == 1
    # Even with the bytes in hand.
    content, _ = world.shards[0]
    new = world.submitter.layout.sealed_blob(SPEC_ID, *world.key[0], content).read_bytes()
    for epoch in (0, 1):
        with pytest.raises(ContentMismatch):
            unseal(before, SPEC_ID, epoch, content, new)
    # What is published from now on is under the new key as well.
    more = world.submitter.layout.data_dir / "more"
    more.write_bytes(b"a later text")
    world.submitter.store.import_text(more, SPEC_ID)
    later = digest(b"a later text")
    assert world.submitter.layout.sealed_blob(SPEC_ID, *world.key[0], later).is_file()
    with pytest.raises(ContentUnavailable, match="no content key"):
        world.stranger.store.rekey(SPEC_ID)


async def test_what_travels_is_the_sealed_text(world: World) -> None:
    seen: list[bytes] = []
    tap = Tap(world.worker, world.submitter)

    class Recorded:
        def __init__(self, stream: object) -> None:
            self.inner = stream
            self.peer_id = world.worker.session

        async def receive(self, limit: int) -> bytes:
            raw = await self.inner.receive(limit)  # type: ignore[attr-defined]
            seen.append(raw)
            return bytes(raw)

        async def send(self, *parts: bytes) -> None:
            seen.extend(bytes(part) for part in parts)
            await self.inner.send(*parts)  # type: ignore[attr-defined]

    async def handle(stream: object) -> None:
        await tap.holder.server.handle(Recorded(stream))  # type: ignore[arg-type]

    world.worker.host.routes[world.submitter.session] = handle  # type: ignore[assignment]
    assert await world.bring(world.worker, world.submitter) == LONG
    _, key = world.key
    everything = b"".join(seen)
    assert len(everything) > len(LONG)
    assert LONG[:38] not in everything
    assert key not in everything


# real carriers --------------------------------------------------------------------------------

SEALED = encode_document(spec_document(privacy="sealed", pipeline__cuts=[0, 4]))
SEALED_ID = spec_id(SEALED)


def nowhere_in_files(directory: Path, but: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file() and path != but]
    assert len(files) > 10
    assert [path for path in files if TEXT[:64] in path.read_bytes()] == []


async def test_real_carriers_train_on_sealed_data_and_refuse_who_was_removed(
    tmp_path: Path,
) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    with trio.fail_after(PATIENCE_SECONDS):
        async with (
            open_machine(tmp_path / "0", chain_id=CHAIN) as submitter,
            open_machine(tmp_path / "1", chain_id=CHAIN) as removed,
            open_machine(tmp_path / "2", chain_id=CHAIN) as member,
        ):
            everybody = [submitter, removed, member]
            for machine in everybody:
                others = [m for m in everybody if m is not machine]
                await machine.set_peers([PeerInfo(m.session, m.addresses) for m in others])
            await submitter.import_text(text, SEALED_ID)
            sessions = frozenset(machine.session for machine in everybody)
            for machine in everybody:
                await machine.set_members(JOB, sessions, SEALED_ID)

            async def roots(machine: Machine) -> object:
                return await machine.genesis_roots(JOB, SEALED, SlotId(0, 0))

            with pytest.raises(ContentUnavailable, match="fetch_data"):
                await roots(removed)
            await removed.fetch_data(JOB, SEALED, [submitter.session])
            assert await roots(removed) is not None

            await submitter.rekey(JOB, sessions - {removed.session}, SEALED_ID)
            # Even with the new bytes in its own store.
            ours, theirs = (Layout(tmp_path / name).sealed(SEALED_ID) for name in ("1", "0"))
            (old,), (new,) = ours.iterdir(), theirs.iterdir()
            assert (old.name[:2], new.name[:2]) == ("0.", "1.")
            held = {path.name: path.read_bytes() for path in old.iterdir()}
            for path in old.iterdir():
                path.write_bytes((new / path.name).read_bytes())
            shutil.copytree(new, ours / new.name)
            with pytest.raises(ContentUnavailable, match="not here"):
                await roots(removed)
            for place in (old, ours / new.name):
                (place / "key").write_bytes(held["key"])
            with pytest.raises(ContentMismatch, match="cannot be opened"):
                await roots(removed)
            await removed.drop_data({SEALED_ID})
            with pytest.raises(ContentError, match="not a member"):
                await removed.fetch_data(JOB, SEALED, [submitter.session])
            # A restarted carrier knows who belongs to a sealed job, and holds its keys.
            assert submitter.carrier_pid is not None
            os.kill(submitter.carrier_pid, signal.SIGKILL)
            async for event in submitter.events:
                if isinstance(event, CarrierUp):
                    break
            with pytest.raises(ContentError, match="not a member"):
                await removed.fetch_data(JOB, SEALED, [submitter.session])
            await member.fetch_data(JOB, SEALED, [submitter.session])
            assert await roots(member) is not None
            (only,) = Layout(tmp_path / "2").sealed(SEALED_ID).iterdir()
            assert only.name == new.name
            assert (only / "key").is_file()
    nowhere_in_files(tmp_path, but=text)
