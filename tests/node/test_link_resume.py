"""A link whose slot is opened again or goes to another machine (LINK-4, LINK-5, LINK-8, LINK-9)."""

from pathlib import Path

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.node.control import Link
from tdmld.node.errors import LinkMismatch, LinkRefused
from tdmld.node.link import Ack, Hello, LinkLog, LinkSigner, encode_small
from tdmld.node.linkserver import LinkServer
from tdmld.node.ring import SlotRing
from tdmld.train.digest import link_root
from tests.node.fake_stream import FakeStream, stream_pair
from tests.node.test_link import (
    AHEAD,
    CHAIN,
    FRAMES,
    JOB,
    LOWER,
    SEGMENT,
    UPPER,
    Make,
    log_pair,
    make_log,
    make_rig,  # noqa: F401 (a fixture)
    payload,
    value,
)


def digests(direction: str, numbers: range) -> list[bytes]:
    return [value(payload(seq, direction)) for seq in numbers]


def restored(start: int, first: int, sent: int, received: int) -> LinkLog:
    """The upper end, whose logs hold numbers from `first` up to `sent` and `received`."""
    log = make_log(UPPER, start=start)
    log.restore(first, digests("down", range(first, sent)), digests("up", range(first, received)))
    return log


def test_a_log_that_was_taken_up_wants_what_it_lacks_and_serves_what_it_has() -> None:
    upper = restored(1, 0, 9, 8)
    assert upper.hello().want == 8
    assert upper.hello().held == tuple(digests("up", range(8)))
    _, lower = log_pair()
    for seq in range(2):
        lower.consume(seq, value(payload(seq, "down")))
    assert upper.greeted(lower.hello()) == 2
    assert upper.roots(0)[0] == link_root(enumerate(digests("down", range(6))))


def test_what_a_worker_makes_again_is_compared_and_is_nothing_new() -> None:
    upper = restored(1, 0, 8, 8)
    assert upper.made == SEGMENT
    for seq in (6, 7):
        assert not upper.produce(seq, value(payload(seq, "down")))
    assert upper.produce(8, value(payload(8, "down")))
    assert (upper.made, upper.produced) == (9, 9)
    again = restored(1, 0, 8, 8)
    with pytest.raises(LinkMismatch, match="not reliable"):
        again.produce(6, value(b"another"))


def test_a_worker_must_begin_where_it_was_said_to() -> None:
    upper = restored(1, 0, 8, 8)
    with pytest.raises(ValueError, match="6 was due"):
        upper.produce(8, value(b"x"))


@pytest.mark.parametrize(("first", "sent", "received"), [(7, 8, 8), (0, 5, 8), (0, 8, 5)])
def test_logs_that_do_not_reach_the_worker_are_not_taken_up(
    first: int, sent: int, received: int
) -> None:
    with pytest.raises(ValueError, match="do not reach"):
        restored(1, first, sent, received)


def test_a_new_machine_has_nothing_below_the_boundary_where_it_begins() -> None:
    upper = make_log(UPPER, incarnation=1, start=1)
    assert (upper.hello().want, upper.hello().held) == (SEGMENT, ())
    with pytest.raises(LinkRefused, match="can be had"):
        upper.greeted(Hello(*LOWER, 0, SEGMENT - 1, ()))
    assert upper.greeted(Hello(*LOWER, 0, 9, tuple(digests("down", range(9))))) == 9
    # The other end has sent as far as the predecessor let it, and more than we ever answered.
    for seq in range(SEGMENT, 9 + AHEAD):
        assert upper.admits(seq, 5)
        upper.consume(seq, value(payload(seq, "up")))
    with pytest.raises(LinkRefused, match="ahead"):
        upper.admits(9 + AHEAD, 5)
    with pytest.raises(LinkMismatch):
        upper.produce(SEGMENT, value(b"another"))


def test_a_job_that_is_over_has_nothing_to_want() -> None:
    upper = make_log(UPPER, start=5)
    assert upper.complete
    assert upper.hello().want == FRAMES


def test_who_is_at_the_other_end_changes_only_to_the_newer() -> None:
    upper, _ = log_pair()
    upper.greeted(Hello(*LOWER, 0, 4, ()))
    assert upper.set_peer(2)
    assert upper.peer_wanted == 0
    assert not upper.set_peer(1)
    with pytest.raises(LinkRefused, match="older"):
        upper.greeted(Hello(*LOWER, 1, 0, ()))
    assert upper.set_peer(2)
    assert upper.greeted(Hello(*LOWER, 2, 0, ())) == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "dials"),
    [
        ((0, 0, "down"), (0, 1, "up"), True),
        ((0, 1, "up"), (0, 0, "down"), False),
        ((0, 2, "down"), (0, 0, "up"), True),
        ((0, 1, "lane3"), (3, 1, "lane0"), True),
        ((3, 1, "lane0"), (0, 1, "lane3"), False),
    ],
)
def test_one_end_of_every_link_dials(
    tmp_path: Path, ours: tuple[int, int, str], theirs: tuple[int, int, str], dials: bool
) -> None:
    link = Link(ours[2], "peer", *theirs, 1, 1, 64, 1, 1)
    server = LinkServer(
        LinkLog(JOB, 0, ours[:2], 0, link, 0),
        SlotRing(tmp_path, [link]),
        LinkSigner(KeyPair(b"1" * 32), CHAIN),
        KeyPair(b"2" * 32).address,
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
    assert server.dials is dials


@pytest.mark.parametrize("forged", [False, True])
async def test_what_a_predecessor_was_acknowledged_for_is_compared_when_it_is_made_again(
    make_rig: Make,  # noqa: F811
    nursery: trio.Nursery,
    forged: bool,
) -> None:
    """Digests of the last frames alone are in a Hello: the root speaks for all of a segment."""
    rig = make_rig()
    made = [b"other" if forged and seq == 0 else payload(seq, "up") for seq in range(SEGMENT)]
    root = link_root((seq, value(data)) for seq, data in enumerate(made))
    signature = LinkSigner(rig.upper.key, CHAIN).sign_ack(LOWER, 0, root)
    evil, theirs = stream_pair(rig.upper.key.address, rig.lower.key.address)
    for message in (Hello(*UPPER, 0, SEGMENT, ()), Ack(0, root, signature)):
        await evil.send(encode_small(message))
    nursery.start_soon(rig.accept, theirs)
    await trio.testing.wait_all_tasks_blocked()
    assert rig.lower.server.acks == {}
    for seq in range(SEGMENT - 1):
        await rig.lower.server.produce(seq, memoryview(payload(seq, "up")))
    last = memoryview(payload(SEGMENT - 1, "up"))
    if forged:
        with pytest.raises(LinkMismatch, match="other bytes"):
            await rig.lower.server.produce(SEGMENT - 1, last)
    else:
        await rig.lower.server.produce(SEGMENT - 1, last)
        assert rig.lower.server.acks[0].root == root
    nursery.cancel_scope.cancel()


async def test_a_new_neighbour_takes_the_place_of_the_old_one(
    make_rig: Make,  # noqa: F811
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
) -> None:
    rig = make_rig()
    rig.host.nursery = nursery
    newcomer = KeyPair(b"9" * 32)
    dialled: list[str] = []

    async def accept(stream: FakeStream) -> None:
        dialled.append(stream.peer_id)
        await trio.sleep_forever()

    rig.host.routes[newcomer.address] = accept
    nursery.start_soon(rig.upper.server.keep, rig.host, "link")
    await trio.testing.wait_all_tasks_blocked()
    assert rig.upper.server.connected
    rig.upper.server.set_peer(newcomer.address, 1)
    await trio.sleep(0.01)
    assert dialled == [rig.upper.key.address]
    _, theirs = stream_pair(rig.lower.key.address, rig.upper.key.address)
    with pytest.raises(LinkRefused, match="not the other end"):
        await rig.upper.server.answer(theirs, Hello(*LOWER, 0, 0, ()))  # type: ignore[arg-type]
    rig.upper.server.set_peer(rig.lower.key.address, 0)
    assert rig.upper.server.peer == newcomer.address
    nursery.cancel_scope.cancel()
