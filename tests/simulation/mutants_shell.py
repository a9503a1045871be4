"""Mutants of the shell: each breaks one rule of N1 to N6 (or P8, which the shell keeps)."""

from collections.abc import Sequence

from tdmld.chain.blocks import Block, Certificate, Header, Vote
from tdmld.chain.pending import BlockTree
from tdmld.node.validator import MAX_FUTURE_MS
from tests.simulation.disk import Signed
from tests.simulation.node import Node


class SendsUnstored(Node):
    """N1: a vote is sent when it is cast, and stored afterwards."""

    def post(self, item: Vote | Block) -> None:
        if isinstance(item, Vote):
            self.say_vote(item)
        super().post(item)


class SendsUnsynced(Node):
    """N1: sent after a write that was not synced."""

    def record(self, signed: Signed) -> Sequence[Vote]:
        synced = self.disk.synced
        kept = super().record(signed)
        self.disk.synced = synced
        return kept


class RestartSaysNothing(Node):
    """N2: stored votes and proposals are not told to new links."""

    def linked(self, peer: Node) -> None:
        disk, self.disk = self.disk, type(self.disk)()
        super().linked(peer)
        self.disk = disk


class Amnesiac(Node):
    """N2, S9: a restart forgets its votes."""

    def stored_votes(self) -> list[Vote]:
        return []


class ProposesAgain(Node):
    """N2: a restart forgets its proposals."""

    def boot(self) -> None:
        rows = list(self.disk.rows)
        bare = [
            Signed(row.votes, (), (), row.certificates) if isinstance(row, Signed) else row
            for row in rows
        ]
        self.disk.rows = bare
        try:
            super().boot()
        finally:
            self.disk.rows = rows


class JudgesByView(Node):
    """N3: the body of a view that has passed is thrown away."""

    def on_proposal(self, source: int, data: tuple[Block, tuple[Certificate, ...]]) -> None:
        if data[0].header.view >= self.core.view:
            super().on_proposal(source, data)


class AsksForNothing(Node):
    """N3: a missing body is not asked for."""

    def ask(self, now: float) -> bool:
        return False


class TrustsState(Node):
    """N4: a state that is not executed here yet is taken on trust."""

    def root_at(self, height: int) -> bytes | None:
        known = super().root_at(height)
        return self._named if known is None else known

    def verdict(self, header: Header) -> bool:
        self._named = header.state_root
        return super().verdict(header)


class TrustsClocks(Node):
    """N4: any time goes."""

    def verdict(self, header: Header) -> bool:
        skew, self._skew = self._skew, self._skew + 1e6
        try:
            return super().verdict(header)
        finally:
            self._skew = skew


class RefusesTheFuture(Node):
    """N4: what is too early is thrown away instead of waiting."""

    def keep(self, block: Block, wanted: bool) -> bool:
        if block.header.time_ms > self.now_ms() + MAX_FUTURE_MS:
            return False
        return super().keep(block, wanted)


class NeverLooksAgain(Node):
    """N4: what waits is judged only when something else arrives."""

    def tick(self) -> float:
        waiting, self.undecided = self.undecided, {}
        try:
            return super().tick()
        finally:
            self.undecided = waiting | self.undecided


class NamesTheUnexecuted(Node):
    """N5: names the final height with the state of the executed one."""

    def make(self, view: int, parent: Header, parent_hash: bytes, body: tuple[bytes, ...]) -> Block:
        executed, self.executed = self.executed, self.height
        try:
            return super().make(view, parent, parent_hash, body)
        finally:
            self.executed = executed


class ProposesWhileLagging(Node):
    """N5, P8: proposes however far execution lags."""

    def may_propose(self) -> bool:
        return self.core.may_propose() and self.core.view not in self.proposed


class SpeaksAtOnce(Node):
    """N6: an empty directory votes like any other."""

    def boot(self) -> None:
        self.disk.signer = True
        super().boot()


class SpeaksWhenGreeted(Node):
    """N6: greeted by a quorum, it votes in the view that it hears of."""

    def speak_when_greeted(self) -> None:
        newborn = self.newborn
        super().speak_when_greeted()
        if newborn and not self.newborn:
            self.act(self.core.silence(0))


class NeverSpeaks(Node):
    """N6: silent for ever once it was empty on a running chain."""

    def speak_although_silent(self) -> None:
        """Not even when the chain stands still."""


class SwallowsTimeOut(Node):
    """N6: a time-out that fell into the silence is not made up for (the first version of N6)."""

    def make_up(self, view: int) -> None:
        """Not here."""


class LastBlockOnly(BlockTree):
    """S10: a finalization brings only its own block, not the ancestors."""

    def path(self, block: bytes) -> list[Block] | None:
        way = super().path(block)
        return way[-1:] if way else way


class EndlessVariants(BlockTree):
    """S8: an equivocating leader's blocks are all kept."""

    def add(self, block: Block, *, wanted: bool = False) -> bool:
        return super().add(block, wanted=True)
