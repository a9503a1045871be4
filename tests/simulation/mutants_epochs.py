"""Mutants of the edge of an epoch: EPOCH-1, EPOCH-5, EPOCH-6, N7, links and early messages."""

from collections.abc import Sequence
from typing import Any

from tdmld.chain.blocks import (
    Block,
    Certificate,
    Committee,
    Header,
    Kind,
    ends_epoch,
    verify_certificate,
    view_epoch,
)
from tdmld.chain.consensus import Certified, Effect, Finalized
from tdmld.node.chainlinks import Link
from tdmld.node.chainwire import Blocks, ConsensusMessage
from tdmld.node.sync import BadAnswer, check_blocks
from tests.simulation.node import Node
from tests.simulation.parts import Eyes, Terms, WatchedBodies, Wires
from tests.simulation.plan import NO_EPOCHS


class ViewsGoOn(Node):
    """EPOCH-1: the views of an epoch follow those of the one before."""

    @staticmethod
    def start_view(_height: int, view: int, _blocks: int) -> int:
        return view


class TakesAnyEpoch(Node):
    """EPOCH-1: a certificate is good in whatever epoch its view is."""

    class AnyEpoch(Eyes):
        def certificate(self, certificate: Certificate) -> None:
            epoch = view_epoch(certificate.view)
            seats = self._committee
            same = Committee(seats.chain_id, seats.nodes, seats.stakes, epoch, seats.leads)
            if self.core.wants_certificate(certificate) and verify_certificate(same, certificate):
                self._act(self.core.add_certificate(certificate))

    class Straight(Terms):
        async def receive(self, link: Link, message: ConsensusMessage) -> None:
            if isinstance(message, Certificate) and self.validator is not None:
                await self.validator.receive(link, message)
            else:
                await super().receive(link, message)

    validator_type, succession_type = AnyEpoch, Straight


class TakesChildren(WatchedBodies):
    """EPOCH-1, EPOCH-6: a height need not be of its view's epoch (0 here), so the last block may
    have a child in its own."""

    def _verdict(self, header: Header) -> bytes | None:
        blocks = self._epoch_blocks
        if not view_epoch(header.view):
            self._epoch_blocks = NO_EPOCHS
        try:
            return super()._verdict(header)
        finally:
            self._epoch_blocks = blocks


class TrustsSets(WatchedBodies):
    """EPOCH-2: a header may name whatever validators it likes."""

    def _verdict(self, header: Header) -> bytes | None:
        sets, self._sets = self._sets, (header.validators, header.next_validators)
        try:
            return super()._verdict(header)
        finally:
            self._sets = sets


class CountsTheEdgeAsFailure(Node):
    """EPOCH-5: the first block of an epoch is tainted, for its view is not the next number."""

    @staticmethod
    def follows(parent_view: int, view: int) -> bool:
        return view == parent_view + 1


class ForgivesTheEdge(Node):
    """EPOCH-5: no block after an edge is ever tainted."""

    @staticmethod
    def follows(parent_view: int, view: int) -> bool:
        return view == parent_view + 1 or view_epoch(parent_view) < view_epoch(view)


class BeginsUnfinal(Eyes):
    """EPOCH-6: the next epoch begins when the last block is notarized."""

    def _act(self, effects: Sequence[Effect]) -> None:
        super()._act(effects)
        for effect in effects:
            if isinstance(effect, Certified) and effect.certificate.kind is Kind.NOTARIZE:
                view, key = effect.certificate.view, effect.certificate.hash
                header = self._bodies.header(key)
                if header is not None and ends_epoch(header.height, self._epoch_blocks):
                    self._want = Finalized(view, key)
                    self.core._certificates.setdefault((Kind.FINALIZE, view), effect.certificate)
                    self._finish()


class NeverAgain(Eyes):
    """N7: a last block that cannot be finalized in its own view never is."""

    def _again(self) -> None:
        """Once is enough."""


class OnceAgain(Eyes):
    """N7: it is voted on again in the next view only, as if its leader could propose it later."""

    def _again(self) -> None:
        tip = self.core.parent()
        header = None if tip is None else self._bodies.header(tip.hash)
        if tip is not None and header is not None and tip.view == header.view:
            super()._again()


class TicksOn(Eyes):
    """N7: when its epoch is over a validator that was woken looks once more what is due (the first
    version, which took the places of the new validators for its own, and died)."""

    def close(self) -> None:
        super().close()
        self._over = False


class ProposesOnTheLast(Eyes):
    """N7: a child is made of the last block."""

    def _propose(self, view: int) -> None:
        blocks, self._epoch_blocks = self._epoch_blocks, NO_EPOCHS
        try:
            super()._propose(view)
        finally:
            self._epoch_blocks = blocks


class WantsTheViewOfTheBlock(Node):
    """EPOCH-6: catch-up refuses a last block that a later view made final."""

    @staticmethod
    def check_blocks(
        committee: Committee, epoch_blocks: int, height: int, head: bytes, answer: Blocks
    ) -> tuple[list[Block], Certificate] | None:
        found = check_blocks(committee, epoch_blocks, height, head, answer)
        if found is not None and found[1].view != found[0][-1].header.view:
            raise BadAnswer("the finalization is of another view")
        return found


class KeepsEverything(Terms):
    """Early messages: no bound."""

    def _keep_early(self, link: Link, message: ConsensusMessage) -> None:
        self._early.setdefault(link.peer_id, []).append((link, message))


class KeepsEveryBlock(Terms):
    """Early messages: blocks are bounded like votes."""

    def _keep_early(self, link: Link, message: ConsensusMessage) -> None:
        kept = self._early.setdefault(link.peer_id, [])
        if len(kept) < 256:
            kept.append((link, message))


class KeepsNothing(Terms):
    """Early messages: thrown away."""

    def _keep_early(self, link: Link, message: ConsensusMessage) -> None:
        """Say it again when I am ready."""


class LinksTooLate(Wires):
    """Links: begun when the epoch begins."""

    def seat(self, committee: Committee, following: Any, former: Any) -> None:
        super().seat(committee, None, former)


class LeavesAtOnce(Wires):
    """Links: ended when the epoch ends (the first version)."""

    def seat(self, committee: Committee, following: Any, former: Any) -> None:
        super().seat(committee, following, None)


class IgnoresTheLate(Terms):
    """Messages of an epoch that is over are not answered."""

    async def receive(self, link: Link, message: ConsensusMessage) -> None:
        view = getattr(message, "view", None)
        if view is None or view_epoch(view) >= self.committee.epoch:
            await super().receive(link, message)
