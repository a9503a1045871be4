"""What carriers give each other of jobs with rounds, given weights, witnesses, private parts."""

import os
from pathlib import Path

import pytest
import trio

from tdmld.chain.crypto import KeyPair
from tdmld.node import contentwire as wire
from tdmld.node.contentserver import JobContent
from tdmld.node.control import (
    ContributionFile,
    FrameFile,
    FramesFile,
    GivenFile,
    Item,
    ResultFile,
    Slot,
    StateFile,
)
from tdmld.node.errors import ContentMismatch, ContentUnavailable
from tdmld.node.link import LinkSigner, Place
from tdmld.train.digest import digest
from tdmld.train.framelog import FrameEntry, FrameLogWriter
from tests.node.contentkit import JOB, Node

SLOT = Slot(JOB, 1, 2)
DELTA = os.urandom(3 << 20)
ROUND = ContributionFile(SLOT, 4, digest(DELTA))


@pytest.fixture
def holder(tmp_path: Path, nursery: trio.Nursery) -> Node:
    return Node(tmp_path, 2, nursery)


@pytest.fixture
def asker(tmp_path: Path, nursery: trio.Nursery, holder: Node) -> Node:
    node = Node(tmp_path, 1, nursery)
    holder.serve(node)
    return node


@pytest.mark.parametrize("owner", ["slot-1.2", "slot-0.2", "standby-3.2"])
async def test_a_contribution_comes_from_whoever_holds_it_for_a_slot_of_its_stage(
    asker: Node, holder: Node, owner: str
) -> None:
    holder.put(f"{owner}/contribution/4.1", DELTA)
    assert await asker.fetch(ROUND, [holder]) == DELTA


@pytest.mark.parametrize("place", ["slot-1.1/contribution/4.1", "slot-1.2/contribution/3.1"])
async def test_a_contribution_of_another_stage_or_round_is_not_given(
    asker: Node, holder: Node, place: str
) -> None:
    holder.put(place, DELTA)
    with pytest.raises(ContentUnavailable, match="not here"):
        await asker.fetch(ROUND, [holder])


async def test_a_contribution_with_other_bytes_leaves_the_place_to_an_honest_holder(
    asker: Node, holder: Node, tmp_path: Path, nursery: trio.Nursery
) -> None:
    liar = Node(tmp_path, 3, nursery)
    liar.serve(asker)
    liar.put("slot-1.2/contribution/4.1", DELTA[::-1])
    with pytest.raises(ContentUnavailable, match="another contribution"):
        await asker.fetch(ROUND, [liar])
    holder.put("slot-0.2/contribution/4.1", DELTA)
    assert await asker.fetch(ROUND, [liar, holder]) == DELTA
    assert asker.had == (holder.session,)


async def test_a_copy_on_this_machine_is_checked_as_well(asker: Node) -> None:
    asker.put("slot-0.2/contribution/4.1", DELTA[::-1])
    with pytest.raises(ContentUnavailable, match="another contribution"):
        await asker.fetch(ROUND, [asker])


async def test_given_weights_go_to_the_jobs_that_they_are_given_to(
    asker: Node, holder: Node
) -> None:
    """Their roots stand on the chain: a member of another job must not get them by its own."""
    root, other = os.urandom(32), b"k" * 32
    path = holder.layout.given(root)
    path.parent.mkdir(parents=True)
    path.write_bytes(DELTA)
    members = frozenset([asker.session])
    holder.jobs[JOB] = JobContent(members, given=frozenset([root]))
    holder.jobs[other] = JobContent(members)
    assert await asker.fetch(GivenFile(JOB, root), [holder]) == DELTA
    with pytest.raises(ContentUnavailable, match="not given to this job"):
        await asker.fetch(GivenFile(other, root), [holder])


@pytest.mark.parametrize(
    ("item", "place", "given"),
    [
        (StateFile(Slot(JOB, 0, 0), 1, "shared"), "slot-0.0/state/1/shared.safetensors", False),
        (StateFile(Slot(JOB, 0, 1), 1, "shared"), "slot-0.1/state/1/shared.safetensors", True),
        (ContributionFile(Slot(JOB, 0, 0), 1, digest(b"x")), "slot-0.0/contribution/1.0", False),
        (ResultFile(JOB, "config.json"), "result/config.json", False),
        (FramesFile(Slot(JOB, 0, 0), 1, "down"), "slot-0.0/ring/1.down.sent", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Item) else str(value),
)
async def test_of_a_private_job_the_first_stage_and_the_result_stay_where_they_are(
    asker: Node, holder: Node, item: Item, place: str, given: bool
) -> None:
    holder.put(place, b"x")
    holder.jobs[JOB] = JobContent(frozenset([asker.session]), private=True)
    if given:
        assert await asker.fetch(item, [holder]) == b"x"
    else:
        with pytest.raises(ContentUnavailable, match="to itself"):
            await asker.fetch(item, [holder])


async def test_the_result_of_a_private_job_is_not_listed(asker: Node, holder: Node) -> None:
    holder.put("result/config.json", b"x")
    holder.jobs[JOB] = JobContent(frozenset([asker.session]), private=True)
    with pytest.raises(ContentUnavailable, match="to itself"):
        await asker.client.list_result(JOB, [holder.session])


# --- one frame, for a witness

KEY, CHAIN = KeyPair(b"2" * 32), b"c" * 32
SENDER = Place(JOB, 3, 1, 2, "down")
LIMIT = 3 << 20


def keep(holder: Node, numbers: range, size: int = 10, epoch: int = 3) -> FrameLogWriter:
    """A log that its slot still has open."""
    path = holder.put(f"slot-1.2/ring/{numbers.start // 4}.down.sent", b"")
    log = FrameLogWriter(path, LIMIT)
    signer = LinkSigner(KEY, CHAIN)
    for seq in numbers:
        data = bytes([seq]) * size
        signature = signer.sign_frame(SENDER._replace(epoch=epoch), seq, digest(data))
        log.append(seq, signature, data)
    return log


async def probe(asker: Node, holder: Node, seq: int, limit: int = LIMIT) -> FrameEntry:
    found: list[FrameEntry] = []
    item = FrameFile(SLOT, "down", seq)
    await asker.client.probe(item, limit, holder.session, found.append)
    (frame,) = found
    return frame


@pytest.mark.parametrize("size", [1, 10, 2 << 20, LIMIT])
async def test_a_frame_of_a_log_that_still_grows_is_given_to_a_witness(
    asker: Node, holder: Node, size: int
) -> None:
    keep(holder, range(3)).close()
    log = keep(holder, range(4, 7), size)
    holder.growing.add(FramesFile(SLOT, 1, "down"))
    frame = await probe(asker, holder, 5)
    assert (frame.seq, frame.length, frame.digest) == (5, size, digest(bytes([5]) * size))
    signer = LinkSigner(KEY, CHAIN)
    assert signer.check_kept(KEY.public, SENDER, 5, frame.digest, frame.signature)
    with pytest.raises(ContentUnavailable, match="was not sent"):
        await probe(asker, holder, 7)
    log.append(7, bytes(64), b"now")
    assert (await probe(asker, holder, 7)).length == 3
    log.close()


async def test_a_frame_of_an_earlier_epoch_is_known_by_its_signature(
    asker: Node, holder: Node
) -> None:
    keep(holder, range(4), epoch=1).close()
    frame = await probe(asker, holder, 2)
    signer, other = LinkSigner(KEY, CHAIN), KeyPair(b"3" * 32)
    for epoch, known in ((0, False), (1, True), (3, True)):
        sender = SENDER._replace(epoch=epoch)
        assert signer.check_kept(KEY.public, sender, 2, frame.digest, frame.signature) is known
    assert not signer.check_kept(other.public, SENDER, 2, frame.digest, frame.signature)
    assert not signer.check_kept(KEY.public, SENDER, 3, frame.digest, frame.signature)


async def test_a_record_that_is_no_frame_of_the_link_is_refused(asker: Node, holder: Node) -> None:
    keep(holder, range(4), 100).close()
    with pytest.raises(ContentMismatch, match="no frame of this link"):
        await probe(asker, holder, 2, limit=99)


async def test_another_frame_than_was_asked_for_is_refused(
    asker: Node, holder: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(holder, range(4), 100).close()
    frame = holder.store.frame
    monkeypatch.setattr(
        holder.store, "frame", lambda item: frame(FrameFile(item.slot, item.link, 1))
    )
    with pytest.raises(ContentMismatch, match="frame 1 instead of 2"):
        await probe(asker, holder, 2)


async def test_a_stranger_gets_no_frame(asker: Node, holder: Node) -> None:
    keep(holder, range(4)).close()
    holder.jobs[JOB] = JobContent(frozenset([KeyPair(b"4" * 32).address]))
    with pytest.raises(ContentUnavailable, match="member"):
        await probe(asker, holder, 2)


@pytest.mark.parametrize(
    "item",
    [ROUND, GivenFile(JOB, bytes(32)), FrameFile(SLOT, "lane3", 5)],
    ids=lambda item: type(item).__name__,
)
def test_every_item_survives_the_way_and_names_its_job(item: Item) -> None:
    assert wire.decode_request(wire.encode_request(wire.Locate(item))) == wire.Locate(item)
    assert wire.job_of(item) == JOB
