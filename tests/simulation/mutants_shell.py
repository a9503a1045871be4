"""Mutants of the shell: each breaks one rule of N1 to N6, N8, N9 (or P8, which the shell keeps)."""

from typing import Any

from msgspec.structs import replace

from tdmld.chain.blocks import Block, Header, Vote, sign_block
from tdmld.chain.pending import BlockTree
from tdmld.chain.transactions import Evidence
from tdmld.node.chainlinks import Link
from tdmld.node.chainwire import ConsensusMessage, Proposal
from tdmld.node.claims import Claims
from tdmld.node.validator import MAX_FUTURE_MS, Batch
from tests.simulation.disk import Signed, Store
from tests.simulation.facts import CHAIN_ID
from tests.simulation.node import Node
from tests.simulation.parts import Eyes, WatchedBodies


class SendsUnstored(Eyes):
    """N1: a vote is sent when it is cast, and stored afterwards."""

    def _post(self, item: Vote | Block) -> None:
        if isinstance(item, Vote):
            self.links.broadcast(item)
        super()._post(item)


class SendsUnsynced(Eyes):
    """N1: sent after a write that was not synced."""

    def _record(self, batch: Batch) -> list[Vote]:
        disk = self.node.disk
        synced = disk.synced
        kept = super()._record(batch)
        disk.synced = synced
        return kept


class RestartSaysNothing(Node):
    """N2: stored votes and proposals are not told to new links."""

    def greet(self, process: Node) -> None:
        votes, bodies = self.store.votes, self.store.bodies
        store: Any = self.store
        store.votes = store.bodies = lambda: []
        super().greet(process)
        store.votes, store.bodies = votes, bodies


class Amnesiac(Store):
    """N2, S9: a restart forgets its votes."""

    def votes(self) -> list[Vote]:
        return []


class ProposesAgain(Node):
    """N2: a restart forgets its proposals."""

    def boot(self) -> None:
        rows = list(self.disk.rows)
        self.disk.rows = [
            Signed(row.votes, (), (), row.certificates) if isinstance(row, Signed) else row
            for row in rows
        ]
        try:
            super().boot()
        finally:
            self.disk.rows = rows


class JudgesByView(Eyes):
    """N3: the body of a view that has passed is thrown away."""

    async def receive(self, link: Link, message: ConsensusMessage) -> None:
        if isinstance(message, Proposal) and message.block.header.view < self.core.view:
            return
        await super().receive(link, message)


class AsksForNothing(Eyes):
    """N3: a missing body is not asked for."""

    def _ask(self, now: float) -> bool:
        return False


class TrustsState(WatchedBodies):
    """N4: a state that is not executed here yet is taken on trust."""

    def _verdict(self, header: Header) -> bytes | None:
        store: Any = self._store
        known, past = store.root_at, store.history_root
        store.root_at = lambda height: known(height) or header.state_root
        store.history_root = lambda height: past(height) or header.history_root
        try:
            found = super()._verdict(header)
        finally:
            store.root_at, store.history_root = known, past
        if found is not None:
            self.node.world.watcher.notarizable(self.node, header)
        return found


class TrustsClocks(WatchedBodies):
    """N4: any time goes."""

    def _verdict(self, header: Header) -> bytes | None:
        node = self.node
        skew, node.skew = node.skew, node.skew + 1e6
        try:
            found = super()._verdict(header)
        finally:
            node.skew = skew
        if found is not None:
            node.world.watcher.notarizable(node, header)
        return found


class RefusesTheFuture(Eyes):
    """N4: what is too early is thrown away instead of waiting."""

    async def _body(self, block: Block) -> None:
        if block.header.time_ms <= self.node.now_ms() + MAX_FUTURE_MS:
            await super()._body(block)


class NeverLooksAgain(Eyes):
    """N4: what waits is judged only when something else arrives."""

    ticking = False

    def _tick(self) -> float:
        self.ticking = True
        try:
            return super()._tick()
        finally:
            self.ticking = False

    def _propose(self, view: int) -> None:
        self.ticking = False
        super()._propose(view)
        self.ticking = True

    def _judge(self) -> None:
        if not self.ticking:
            super()._judge()


class NamesTheUnexecuted(Eyes):
    """N5: names the final height with the state of the executed one."""

    def _post(self, item: Vote | Block) -> None:
        if isinstance(item, Block):
            header = replace(item.header, state_height=self._finality.height)
            item = sign_block(self.key, CHAIN_ID, header, item.transactions)
        super()._post(item)


class ProposesWhileLagging(Eyes):
    """N5, P8: proposes however far execution lags."""

    def _may_propose(self) -> bool:
        return self.core.may_propose() and self.core.view not in self._proposed


class SpeaksAtOnce(Node):
    """N6: an empty directory votes like any other."""

    def boot(self) -> None:
        self.disk.signer = True
        super().boot()


class SpeaksWhenGreeted(Eyes):
    """N6: greeted by a quorum, it votes in the view that it hears of."""

    def _speak_when_greeted(self) -> None:
        newborn = self._newborn
        super()._speak_when_greeted()
        if newborn and not self._newborn:
            self._act(self.core.silence(0))


class AbstainsWhenItJoins(Eyes):
    """N6: a validator that joins abstains like one that lost its directory (the first version)."""

    def start(self) -> None:
        self._joins = self.epoch == 0
        super().start()


class SpeaksAtEveryEdge(Eyes):
    """N6: who was a validator before speaks at once in a new epoch, like one that joins."""

    def start(self) -> None:
        self._joins = True
        super().start()


class SleepsWhenGreeted(Eyes):
    """N6: greeted by a quorum, it waits for something else before it looks what is due."""

    def _speak_when_greeted(self) -> None:
        before = self._wake
        super()._speak_when_greeted()
        if self._wake is before and before.is_set():
            self._wake = type(before)()


class NeverSpeaks(Eyes):
    """N6: silent for ever once it was empty on a running chain."""

    def _speak_although_silent(self) -> None:
        """Not even when the chain stands still."""


class SwallowsTimeOut(Eyes):
    """N6: a time-out that fell into the silence is not made up for (the first version of N6)."""

    def _tick(self) -> float:
        core: Any = self.core
        out, self.said = core.time_out, getattr(self, "said", 0)

        def once(view: int) -> list[object]:
            if view == self.said:
                return []
            self.said = view
            return out(view)  # type: ignore[no-any-return]

        core.time_out = once
        try:
            return super()._tick()
        finally:
            del core.time_out


class _SaysOtherwise(Eyes):
    """With claims of its own."""

    claims: type[Claims]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._claims = self.claims(self.key, self._store, self._admission)


class AccusesNobody(_SaysOtherwise):
    """N8: evidence is seen, and nothing said."""

    class claims(Claims):
        def accuse(self, evidence: Evidence) -> None:
            """Not me."""


class ComparesNothing(Eyes):
    """N8: a vote for another block than one was shown is no reason to ask for it."""

    def _compare(self, link: Link, vote: Vote) -> None:
        """One block a view is enough for me."""


class AccusesAgain(_SaysOtherwise):
    """N8: every contradiction is an accusation, not one an epoch."""

    class claims(Claims):
        def accuse(self, evidence: Evidence) -> None:
            self._accused.clear()
            super().accuse(evidence)


class StaysInJail(_SaysOtherwise):
    """N9: never asks for its turns."""

    class claims(Claims):
        def at_work(self) -> None:
            """I have time."""


class ReturnsAgainAndAgain(_SaysOtherwise):
    """N9: says Return with every vote that finalizes."""

    class claims(Claims):
        def at_work(self) -> None:
            self._returned = -1000
            super().at_work()


class LastBlockOnly(BlockTree):
    """S10: a finalization brings only its own block, not the ancestors."""

    def path(self, block: bytes) -> list[Block] | None:
        way = super().path(block)
        return way[-1:] if way else way


class EndlessVariants(BlockTree):
    """S8: an equivocating leader's blocks are all kept."""

    def add(self, block: Block, *, wanted: bool = False) -> bool:
        return super().add(block, wanted=True)
