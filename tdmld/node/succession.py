"""One epoch's validator after the other, and what other validators say out of time.

When the last block of an epoch is executed, the validators of the next are seated: a node that is
among them then votes, one that is not any more follows. Links are begun an epoch early and kept an
epoch longer; messages that come from the next epoch too soon wait in a small store, and whoever is
still in an epoch that is over is told how high the chain is.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import trio

from tdmld.chain.blocks import Block, Certificate, Committee, Vote, epoch_of, view_epoch
from tdmld.chain.crypto import KeyPair, address
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.pacing import Times
from tdmld.node.admission import Admission
from tdmld.node.chainlinks import Link, Links
from tdmld.node.chainwire import ConsensusMessage, Hello, Proposal, Transactions
from tdmld.node.finality import Finality
from tdmld.node.validator import ANSWER_PAUSE, Validator

log = logging.getLogger(__name__)

MAX_EARLY, MAX_EARLY_PROPOSALS = 256, 2
"""Messages of the next epoch that are kept for one link until it begins here."""


class Succession:
    """Who validates after the head, and our own part in it. Without a `key` we only follow.

    `hint` asks for catch-up, from a peer or from anybody; `now_ms` is the wall clock, `now` the
    monotonic one. Only `run` waits.
    """

    def __init__(
        self,
        key: KeyPair | None,
        finality: Finality,
        admission: Admission,
        times: Times,
        *,
        now_ms: Callable[[], int],
        hint: Callable[[str | None], None],
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self._key, self._finality, self._admission = key, finality, admission
        self._times, self._now_ms, self._hint, self._now = times, now_ms, hint, now
        self._epoch_blocks = finality.store.genesis.parameters.epoch_blocks
        self._links: Links | None = None
        self._early: dict[str, list[tuple[Link, ConsensusMessage]]] = {}
        self._scope = trio.CancelScope()
        self.validator: Validator | None = None
        """Our part in the present epoch, if we are elected."""
        self.committee: Committee

    # ---- epochs ------------------------------------------------------------------------------

    def seat(self, links: Links | None) -> None:
        """The validators of the epoch that begins after the head. Once, before anything else."""
        self._links = links
        self._seat()

    def _seat(self) -> None:
        store = self._finality.store
        epoch = store.epoch
        committee = store.committee(epoch)
        if committee is None:
            raise InvariantViolation(f"nobody is known to validate in epoch {epoch}")
        if self.validator is not None:
            self.validator.close()
            self.validator = None
        if self._links is not None and self._key is not None:
            former = store.committee(epoch - 1) if epoch else None
            self._links.seat(committee, store.committee(epoch + 1), former)
            if committee.index(self._key.public) is not None:
                self.validator = self._elected(self._key, committee)
                self.validator.links = self._links
        self.committee = committee

    def _elected(self, key: KeyPair, committee: Committee) -> Validator:
        return Validator(
            key,
            committee,
            self._finality,
            self._admission,
            self._times,
            now_ms=self._now_ms,
            hint_sync=self._hint_validator,
            now=self._now,
        )

    def start(self) -> None:
        """Draw the conclusions of what is stored. Once, before the first message comes."""
        if self.validator is not None:
            self.validator.start()

    def turn(self) -> None:
        """The last block of an epoch is executed."""
        before = self.validator is not None
        self._seat()
        log.info("epoch %d begins: %d validators", self.committee.epoch, len(self.committee.nodes))
        if before != (self.validator is not None):
            log.warning(
                "this node %s in epoch %d",
                "validates no more" if before else "validates",
                self.committee.epoch,
            )
        self.start()
        self._scope.cancel()

    async def run(self) -> None:
        """One epoch's validator after the other for ever; none where we are not elected."""
        while True:
            validator = self.validator
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    if validator is not None:
                        nursery.start_soon(validator.run)
                    await self.open()
                    await trio.sleep_forever()

    async def open(self) -> None:
        """The epoch has begun here: tell the others, and hear what they said too soon."""
        early, self._early = self._early, {}
        if self._links is None:
            return
        self._links.greet_all()
        for rows in early.values():
            for link, message in rows:
                if self._links.holds(link):
                    await self.receive(link, message)

    # ---- messages ----------------------------------------------------------------------------

    def greet(self) -> Iterator[object]:
        """What a new link is told."""
        if self.validator is not None:
            yield from self.validator.greet()
        else:
            yield Hello(self._finality.height, ())

    async def receive(self, link: Link, message: ConsensusMessage) -> None:
        """A validator's message, for this epoch, the next, or one that is over."""
        now = epoch = self.committee.epoch
        match message:
            case Transactions(raws):
                self._admission.enqueue(raws, link.peer_id)
                return
            case Vote() | Certificate():
                epoch = view_epoch(message.view)
            case Proposal(block):
                epoch = view_epoch(block.header.view)
            case Hello(height):
                epoch = epoch_of(height + 1, self._epoch_blocks)
            case _:
                pass
        if epoch > now:
            self._keep_early(link, message)
            self._hint(link.peer_id)
        elif epoch < now and not isinstance(message, Hello):
            if self._now() >= link.answered + ANSWER_PAUSE:
                link.answered = self._now()
                link.tell(Hello(self._finality.height, ()))
        elif self.validator is not None and link.index is not None:
            await self.validator.receive(link, message)
        elif isinstance(message, Hello) and message.height > self._finality.height:
            self._hint(link.peer_id)

    def _keep_early(self, link: Link, message: ConsensusMessage) -> None:
        kept = self._early.setdefault(link.peer_id, [])
        proposals = sum(isinstance(known, Proposal) for _, known in kept)
        if len(kept) < MAX_EARLY and (
            not isinstance(message, Proposal) or proposals < MAX_EARLY_PROPOSALS
        ):
            kept.append((link, message))

    def certificate(self, certificate: Certificate) -> None:
        """One of the present epoch, from anybody."""
        if self.validator is not None:
            self.validator.certificate(certificate)

    def adopt(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        """Final blocks that follow the final head, of one epoch: the present one."""
        if self.validator is not None:
            self.validator.adopt(blocks, certificate)
        else:
            self._finality.advance(blocks, certificate)

    def _hint_validator(self, index: int | None) -> None:
        self._hint(None if index is None else address(self.committee.nodes[index]))
