"""What all attackers have: they follow the protocol to know what goes on, keep no record of what
they sign, and say what they like under their own name. They attack in the epochs that elect them.
"""

from collections.abc import Mapping, Sequence

import msgspec

from tdmld.chain.blocks import Block, Kind, Vote, block_hash, sign_block, sign_vote
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.consensus import MAX_CERTIFICATES
from tdmld.node.chainwire import Proposal
from tests.simulation.facts import CHAIN_ID
from tests.simulation.node import Node
from tests.simulation.parts import Eyes


class Attacker(Eyes):
    """A validator without scruples; by itself it behaves."""

    _made: Block | None = None
    _making = False

    def targets(self) -> list[Node]:
        return self.node.links.processes()

    def some(self) -> list[Node]:
        """A random half of the others, accomplices included."""
        rng = self.world.rng
        return [peer for peer in self.targets() if not peer.honest or rng.random() < 0.5]

    def sign(self, kind: Kind, view: int, block: bytes = ZERO_HASH) -> Vote:
        return sign_vote(self.key, CHAIN_ID, kind, view, block, self.me)

    def vote_to(self, targets: Sequence[Node], vote: Vote, hold: float = 0.0) -> None:
        """Say a vote to some, perhaps later."""
        self.world.watcher.sent(self.node, vote)
        self.tell(targets, vote, hold)

    def block_to(self, targets: Sequence[Node], block: Block, hold: float = 0.0) -> None:
        self.world.watcher.seen(block)
        parent = self.core.parent()
        why = parent.why[-MAX_CERTIFICATES:] if parent is not None else ()
        self.tell(targets, Proposal(block, why), hold)

    def tell(self, targets: Sequence[Node], message: object, hold: float = 0.0) -> None:
        for target in targets:
            self.world.transmit(self.node, target, message, hold)

    def _post(self, item: Vote | Block) -> None:
        if self._making and isinstance(item, Block):
            self._made = item
            return
        super()._post(item)

    def build(self, view: int) -> Block | None:
        """The block that an honest leader would make; its turn is over, and nobody is told."""
        self._made, self._making = None, True
        try:
            super()._propose(view)
        finally:
            self._making = False
        return self._made

    def forge(
        self, block: Block, changes: Mapping[str, object], body: Sequence[bytes] | None = None
    ) -> Block:
        """Another block like this one."""
        header = msgspec.structs.replace(block.header, **changes)
        return sign_block(self.key, CHAIN_ID, header, block.transactions if body is None else body)

    def endorse(self, block: Block, targets: Sequence[Node], hold: float = 0.0) -> None:
        """NOTARIZE and FINALIZE at once, whatever else was signed."""
        key = block_hash(block.header)
        for kind in (Kind.NOTARIZE, Kind.FINALIZE):
            self.vote_to(targets, self.sign(kind, block.header.view, key), hold)
