"""What surrounds the product's validator in a simulated process: a pool for `Admission`, links
without streams, and eyes on the bodies and the validator itself.

`Eyes` is the product's `Validator`, every decision its own; it tells the watcher what it does, and
is where a process may die. Attackers and mutants of the shell are subclasses of it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tdmld.node.bodies
import tdmld.node.validator
from tdmld.chain.blocks import Block, Certificate, Committee, Header, Kind, Vote, verify_proposal
from tdmld.chain.consensus import Certified, Effect, EnterView
from tdmld.chain.crypto import sha256
from tdmld.chain.errors import InvalidBlock, InvalidTransaction
from tdmld.chain.slashing import offender
from tdmld.chain.transactions import (
    ProposalEvidence,
    Transaction,
    VoteEvidence,
    decode_transaction,
)
from tdmld.node.bodies import Bodies
from tdmld.node.chainlinks import Link, Links
from tdmld.node.chainwire import Transactions
from tdmld.node.store import AppliedBlock
from tdmld.node.succession import Succession
from tdmld.node.validator import Batch, Validator
from tests.simulation.facts import CHAIN_ID, Key, peer_of
from tests.simulation.invariants import Violation

if TYPE_CHECKING:
    from tests.simulation.node import Node

EVIDENCE = (VoteEvidence, ProposalEvidence)
PLAIN = 64
"""No transaction of users is longer; evidence is."""
Offence = tuple[bytes, int]
"""(node, epoch): all that a node does in one epoch is one."""


class Waiting:
    """A transaction in a pool."""

    __slots__ = ("id", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw, self.id = raw, sha256(raw)


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


class Pool:
    """What validators ask of `Admission`. All transactions are good; evidence is looked at."""

    pool = _Everything()
    """Bodies are not decoded: every transaction is known."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._held: dict[bytes, Waiting] = {}
        self._evidence: dict[bytes, Offence] = {}
        self._proven: set[Offence] = set()

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        self._held.clear()

    def convicted(self, node: bytes) -> bool:
        """Whether evidence against a node is executed."""
        return any(known == node for known, _ in self._proven)

    def take(self, raw: bytes) -> bool:
        """Whether it is new here."""
        waiting = Waiting(raw)
        store = self._node.store
        if waiting.id in store.done or waiting.id in self._held:
            return False
        offence = _offence(raw)
        if offence is not None:
            if offence in self._proven:
                return False
            self._evidence[waiting.id] = offence
        self._held[waiting.id] = waiting
        return True

    def enqueue(self, raws: Sequence[bytes], _: object) -> None:
        fresh = [raw for raw in raws if self.take(raw)]
        if fresh:
            self._node.wake()

    async def submit(self, raw: bytes) -> bytes:
        """What the validator says by itself (N8, N9)."""
        claim = payload(raw)
        if isinstance(claim, EVIDENCE):
            self._node.world.watcher.accused(self._node, claim)
            if offender(claim) in self._proven:
                raise InvalidTransaction("this offence is proven already")
        else:
            self._node.world.watcher.returns.append(self._node.name)
        if self.take(raw):
            self._node.wake()
            self._node.links.broadcast(Transactions((raw,)))
        return sha256(raw)

    async def verified(self, unknown: Sequence[Transaction]) -> list[bool]:
        return [True] * len(unknown)

    def select(self, held: Collection[bytes]) -> list[Waiting]:
        limbo = self._node.finality.limbo
        return [w for w in self._held.values() if w.id not in held and w.id not in limbo]

    def waiting(self, held: Collection[bytes]) -> bool:
        limbo = self._node.finality.limbo
        return any(key not in held and key not in limbo for key in self._held)

    def executed(self, applied: AppliedBlock) -> None:
        for receipt in applied.receipts:
            self._held.pop(receipt.id, None)
        for offence in map(_offence, applied.block.transactions):
            if offence is not None:
                self._proven.add(offence)
        for key, offence in list(self._evidence.items()):
            if offence in self._proven:
                del self._evidence[key]
                self._held.pop(key, None)


def payload(raw: bytes) -> object:
    """What a validator said by itself; None for a user's transaction."""
    return decode_transaction(raw, CHAIN_ID).payload if len(raw) > PLAIN else None


def _offence(raw: bytes) -> Offence | None:
    claim = payload(raw)
    return offender(claim) if isinstance(claim, EVIDENCE) else None


# ---- links -----------------------------------------------------------------------------------


class _Scope:
    """Stands for the task that serves a link."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Wire(Link):
    """A link without a stream: messages go to every process that runs with the peer's key (twins
    are two)."""

    def __init__(self, node: "Node", number: int, index: int | None) -> None:
        self.index, self.peer_id, self.number = index, peer_of(number), number
        self.answered = -1.0
        self.scope = _Scope()  # type: ignore[assignment]
        self.processes: list[Node] = []
        self._node = node

    def tell(self, message: object) -> None:
        for process in self.processes:
            self._node.world.transmit(self._node, process, message)


class Wires(Links):
    """Who may be linked is the product's decision; that both sides want it, the world's."""

    _links: dict[str, Wire]  # type: ignore[assignment]

    def __init__(self, node: "Node") -> None:
        super().__init__(
            None,  # type: ignore[arg-type]
            "",
            node.key.public,
            0,
            greet=lambda: node.succession.greet(),
            receive=lambda link, message: node.succession.receive(link, message),
            changed=node.wake,
        )
        self._node = node

    def seat(self, committee: Committee, *others: Any) -> None:
        super().seat(committee, *others)
        self._node.world.unsettled = True

    def wants(self, peer: str) -> bool:
        return peer in self._nodes

    def of(self, number: int) -> Wire | None:
        """The link with a node."""
        return self._links.get(peer_of(number))

    def reach(self, processes: "dict[int, list[Node]]") -> None:
        """These are linked now: nobody else."""
        for link in list(self._links.values()):
            if link.scope.cancelled or link.number not in processes:  # type: ignore[attr-defined]
                del self._links[link.peer_id]
        for number, found in processes.items():
            link = self._links.get(peer_of(number))
            if link is None:
                peer = peer_of(number)
                link = self._links[peer] = Wire(self._node, number, self._indices.get(peer))
            link.processes = found

    def processes(self) -> "list[Node]":
        """All that are linked."""
        return [process for link in self._links.values() for process in link.processes]

    def broadcast(self, message: object) -> None:
        node, world = self._node, self._node.world
        if isinstance(message, Vote):
            world.watcher.sent(node, message)
        for process in self.processes():
            if world.doomed:
                world.point(node, "sending")
            world.transmit(node, process, message)


# ---- the validator ---------------------------------------------------------------------------


class WatchedBodies(Bodies):
    """Tells what was found good or bad."""

    @property
    def node(self) -> "Node":
        return self._store.node  # type: ignore[attr-defined,no-any-return]

    def check(self, block: Block, known: Any, *, wanted: bool = False) -> list[Transaction]:
        try:
            return super().check(block, known, wanted=wanted)
        except InvalidBlock as error:
            header = block.header
            if verify_proposal(CHAIN_ID, header, block.signature) and "enough" not in str(error):
                self.node.world.watcher.rejected(self.node, header, str(error))
            raise

    def _verdict(self, header: Header) -> bytes | None:
        try:
            found = super()._verdict(header)
        except InvalidBlock as error:
            self.node.world.watcher.rejected(self.node, header, str(error))
            raise
        if found is not None:
            self.node.world.watcher.notarizable(self.node, header)
        return found


class Eyes(Validator):
    """The product's validator, watched."""

    def __init__(self, node: "Node", key: Key, committee: Committee) -> None:
        self.node, self.world = node, node.world
        with _parts(node):
            super().__init__(
                key,  # type: ignore[arg-type]
                committee,
                node.finality,
                node.pool,  # type: ignore[arg-type]
                node.world.plan.times,
                now_ms=node.now_ms,
                hint_sync=self._hinted,
                now=node.clock,
            )

    def _hinted(self, index: int | None) -> None:
        self.node.succession._hint_validator(index)

    @property
    def me(self) -> int:
        """Our place in the committee."""
        return self._me

    @property
    def committee(self) -> Committee:
        return self._committee

    def _act(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Certified):
                self.world.watcher.certified(self.node, effect.certificate)
        super()._act(effects)

    def _adopt(self, blocks: Sequence[Block], certificate: Certificate) -> None:
        if blocks[0].header.parent != self._finality.hash:
            raise Violation(f"node {self.node.name}: final blocks that do not follow the head")
        super()._adopt(blocks, certificate)

    def _post(self, item: Vote | Block) -> None:
        watcher = self.world.watcher
        if isinstance(item, Vote):
            watcher.cast(self.node, self, item.kind, item.view)
        else:
            watcher.proposing(self.node, item)
            self.world.blocks_made += 1
        super()._post(item)

    def _tick(self) -> float:
        late = self._late_since
        deadline = super()._tick()
        self.world.timeouts += self._late_since != late
        return deadline

    def _publish(self, batch: Batch, kept: Sequence[Vote]) -> None:
        self.world.point(self.node, "send")
        super()._publish(batch, kept)

    def _count(self, kept: Sequence[Vote]) -> None:
        self.world.point(self.node, "count")
        super()._count(kept)


class Terms(Succession):
    """The product's succession, whose validators are the node's."""

    def __init__(self, node: "Node") -> None:
        super().__init__(
            node.key,  # type: ignore[arg-type]
            node.finality,
            node.pool,  # type: ignore[arg-type]
            node.world.plan.times,
            now_ms=node.now_ms,
            hint=node.hint,
            now=node.clock,
        )
        self.node = node

    def _elected(self, key: Any, committee: Committee) -> Validator:
        return self.node.validator_type(self.node, key, committee)


@contextmanager
def _parts(node: "Node") -> "Iterator[None]":
    """A validator that is made within it is made of the node's parts."""
    shell: Any = tdmld.node.validator
    bodies: Any = tdmld.node.bodies
    before = shell.Simplex, shell.Pacing, shell.Bodies, shell.start_view, bodies.BlockTree
    shell.Simplex, shell.Pacing, shell.Bodies = node.simplex, node.pacing_type, node.bodies_type
    shell.start_view, bodies.BlockTree = node.start_view, node.tree_type
    try:
        yield
    finally:
        shell.Simplex, shell.Pacing, shell.Bodies, shell.start_view, bodies.BlockTree = before


def is_kind(message: object, kind: Kind) -> bool:
    """Whether a message is a vote of that kind."""
    return isinstance(message, Vote) and message.kind is kind


def entered(effects: Sequence[Effect]) -> list[int]:
    """The views that these effects enter."""
    return [effect.view for effect in effects if isinstance(effect, EnterView)]
