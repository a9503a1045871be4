"""Which dial receipts an ask may take."""

from tdmld.chain.limits import RECEIPTS
from tdmld.chain.transactions import DIAL_OPEN, DIAL_PAIR, DialReceipt
from tdmld.node.receipts import Receipts


class Chain:
    def __init__(self, height: int = 100) -> None:
        self.height = height
        self.known = [bytes([n]) * 32 for n in range(20)]
        self.receipts = Receipts(lambda: self.height, lambda w: w in self.known, 100)


def receipt(witness: int, kind: int = DIAL_OPEN, height: int = 100) -> DialReceipt:
    return DialReceipt(bytes([witness]) * 32, kind, height, bytes(64))


def test_they_come_as_an_ask_takes_them() -> None:
    chain = Chain()
    for n in (9, 3, 5, 1, 7, 2):
        chain.receipts.keep(receipt(n, DIAL_PAIR))
        chain.receipts.keep(receipt(n))
    found = [(r.kind, r.witness[0]) for r in chain.receipts.fresh()]
    assert found == [*((DIAL_OPEN, n) for n in (1, 2, 3, 5, 7, 9)), (DIAL_PAIR, 1), (DIAL_PAIR, 2)]
    assert len(found) == RECEIPTS


def test_one_that_replaces_what_is_too_old_is_news() -> None:
    """A chain at rest makes no block that would have the agent look."""
    chain = Chain()
    assert chain.receipts.keep(receipt(1))
    assert not chain.receipts.keep(receipt(1))
    chain.height = 195
    assert chain.receipts.fresh() == ()
    assert chain.receipts.keep(receipt(1, height=195))


def test_what_counts_nothing_is_not_kept_and_what_is_old_goes() -> None:
    chain = Chain()
    assert not chain.receipts.keep(receipt(99))
    assert not chain.receipts.fades(DIAL_OPEN, bytes([99]) * 32)
    chain.receipts.keep(receipt(1))
    chain.known.remove(bytes([1]) * 32)  # revoked
    assert chain.receipts.fresh() == ()
    chain.height = 300
    chain.receipts.keep(receipt(2, height=300))
    assert list(chain.receipts._held) == [(DIAL_OPEN, bytes([2]) * 32)]


def test_one_of_the_future_waits_until_the_chain_is_there() -> None:
    chain = Chain()
    chain.receipts.keep(receipt(1, height=102))
    assert chain.receipts.fresh() == ()
    chain.height = 102
    assert len(chain.receipts.fresh()) == 1


def test_neighbours_on_a_local_network_do_not_vouch_for_the_world() -> None:
    chain = Chain()
    for n in (1, 2):
        chain.receipts.keep(receipt(n), near=True)
    chain.receipts.keep(receipt(1, DIAL_PAIR))
    assert len(chain.receipts.fresh()) == 3  # a network of one house
    found = [(r.kind, r.witness[0]) for r in chain.receipts.fresh(outside=True)]
    assert found == [(DIAL_PAIR, 1)]
