"""The dial receipts that a node has: which of them an ask may take. No network."""

from collections.abc import Callable
from itertools import islice

from tdmld.chain.limits import RECEIPTS
from tdmld.chain.transactions import DIAL_OPEN, DialReceipt


class Receipts:
    """`height()` is final; `counts(witness)` says whether the chain takes the word of a node for
    us; `blocks` is the age at which it takes a receipt no more."""

    def __init__(
        self, height: Callable[[], int], counts: Callable[[bytes], bool], blocks: int
    ) -> None:
        self._height = height
        self._counts = counts
        self._blocks = blocks
        self._held: dict[tuple[int, bytes], DialReceipt] = {}
        self._near: set[bytes] = set()
        """Witnesses that dialled us on a local network."""

    def keep(self, receipt: DialReceipt, *, near: bool = False) -> bool:
        """Take a receipt; whether it says something that was not known. What does not count would
        only grow old here."""
        key = (receipt.kind, receipt.witness)
        if not self._counts(receipt.witness):
            return False
        news = not self.has(*key)
        self._held = {k: r for k, r in self._held.items() if self._age(r) <= self._blocks}
        self._held[key] = receipt
        if receipt.kind == DIAL_OPEN:
            (self._near.add if near else self._near.discard)(receipt.witness)
        return news

    def drop(self, kind: int, witness: bytes) -> None:
        """It is true no more."""
        self._held.pop((kind, witness), None)

    def has(self, kind: int, witness: bytes, part: float = 0.9) -> bool:
        """Whether there is one that the chain takes for some time to come."""
        receipt = self._held.get((kind, witness))
        return receipt is not None and self._takes(receipt, part)

    def fades(self, kind: int, witness: bytes) -> bool:
        """Whether there is one that should be replaced."""
        return (kind, witness) in self._held and not self.has(kind, witness, 0.5)

    def of_kind(self, kind: int) -> bool:
        """Whether there is any, fresh or not."""
        return any(held == kind for held, _ in self._held)

    def fresh(self, *, outside: bool = False) -> tuple[DialReceipt, ...]:
        """As an ask takes them: of the chain's present, sorted by kind and witness; those of kind 1
        first, and not more than an ask holds. `outside`: somebody on the Internet tried to dial us;
        then what neighbours on a local network could do says nothing."""
        found = sorted(
            (receipt for receipt in self._held.values() if self._takes(receipt)),
            key=lambda receipt: (receipt.kind, receipt.witness),
        )
        if outside:
            found = [r for r in found if r.kind != DIAL_OPEN or r.witness not in self._near]
        return tuple(islice(found, RECEIPTS))

    def _takes(self, receipt: DialReceipt, part: float = 0.9) -> bool:
        return 0 <= self._age(receipt) <= part * self._blocks and self._counts(receipt.witness)

    def _age(self, receipt: DialReceipt) -> int:
        return self._height() - receipt.height
