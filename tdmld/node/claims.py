"""What a validator says on the chain by itself: who contradicts itself, and that it is back.

Rules N8 and N9 of `validator`, which tells this what it sees. Transactions are signed with the node
key; the chain takes one accusation of a node an epoch, and one Return a jailing.
"""

import logging

import trio

from tdmld.chain.blocks import Header, Vote, block_hash
from tdmld.chain.crypto import KeyPair
from tdmld.chain.errors import ChainError
from tdmld.chain.slashing import from_votes, offender
from tdmld.chain.state import State
from tdmld.chain.transactions import Evidence, ProposalEvidence, Return, sign_transaction
from tdmld.node.admission import Admission
from tdmld.node.chainerrors import ServiceBusy
from tdmld.node.store import ChainStore

log = logging.getLogger(__name__)

RETURN_AGAIN = 20
"""Heights after which a Return that is not on the chain is said again (N9)."""


class Claims:
    """Those of one epoch. Only `run` and `say_next` wait."""

    def __init__(self, key: KeyPair, store: ChainStore, admission: Admission) -> None:
        self._key, self._store, self._admission = key, store, admission
        self._leaders: dict[int, tuple[Header, bytes]] = {}
        """View -> the first signed header that was seen in it."""
        self._accused: set[bytes] = set()
        self._returned = -RETURN_AGAIN
        """Height at which Return was said last."""
        self._waiting: list[Evidence | Return] = []
        self._news = trio.Event()

    @property
    def pending(self) -> bool:
        """Whether something is to be said."""
        return bool(self._waiting)

    # ---- N8 ----------------------------------------------------------------------------------

    def voted_twice(self, node: bytes, first: Vote, second: Vote) -> None:
        """Two votes of `node` in one view that exclude each other; their signatures are good."""
        log.error("validator %d signed twice: %s and %s", first.voter, first, second)
        self.accuse(from_votes(node, first, second))

    def led(self, header: Header, signature: bytes) -> None:
        """The leader of a view signed this; the signature is good."""
        first, first_signature = self._leaders.setdefault(header.view, (header, signature))
        if first != header:
            log.error("two blocks of one leader for view %d", header.view)
            self.accuse(ProposalEvidence(first, first_signature, header, signature))

    def contradicts(self, view: int, block: bytes) -> bool:
        """Whether the leader of a view showed us another block, and is not accused yet."""
        seen = self._leaders.get(view)
        return (
            seen is not None
            and block != block_hash(seen[0])
            and seen[0].proposer not in self._accused
        )

    def forget(self, view: int) -> None:
        """Views up to this one are final."""
        self._leaders = {seen: row for seen, row in self._leaders.items() if seen > view}

    def accuse(self, evidence: Evidence) -> None:
        """Once an epoch for each node, as the chain counts."""
        node = offender(evidence)[0]
        if node != self._key.public and node not in self._accused:
            self._accused.add(node)
            self._claim(evidence)

    # ---- N9 ----------------------------------------------------------------------------------

    def at_work(self) -> None:
        """This validator votes to finalize, and execution is not behind."""
        height = self._store.height
        if height < self._returned + RETURN_AGAIN:
            return
        node = State(self._store.get).node(self._key.public)
        if node is not None and node.jailed and not node.revoked and not node.convicted:
            log.warning("jailed at height %d for missing turns to lead: returning", node.jailed)
            self._returned = height
            self._claim(Return(node.jailed))

    # ---- saying it ---------------------------------------------------------------------------

    def _claim(self, claim: Evidence | Return) -> None:
        self._waiting.append(claim)
        self._news.set()

    async def run(self) -> None:
        """Say what there is, until cancelled."""
        while True:
            while not self._waiting:
                self._news = trio.Event()
                await self._news.wait()
            await self.say_next()

    async def say_next(self) -> None:
        """One of what waits."""
        claim = self._waiting.pop()
        raw = sign_transaction(self._key, self._store.chain_id, claim)
        try:
            await self._admission.submit(raw)
        except (ChainError, ServiceBusy) as error:
            log.info("%s is not needed: %s", type(claim).__name__, error)
