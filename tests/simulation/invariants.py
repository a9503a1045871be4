"""What must hold, seen from above: the watcher knows every vote of everybody.

agreement     no two honest nodes finalize different blocks at a height
validity      a final block was proposed by the leader of its view, follows its parent, names a
              state that is so, is notarized by a quorum and not nullified, and every view
              between it and its parent is nullified
one word      nobody honest signs two things of a kind in a view, or FINALIZE with NULLIFY,
              in all its lives together; NOTARIZE and NULLIFY only in its current view (S2, S5)
durable       nothing leaves, and nothing counts, before it is on disk (N1, S9)
fair          nobody honest finds an honest proposal invalid; leaders name what they executed
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdmld.chain.blocks import Block, Certificate, Header, Kind, Vote, block_hash, quorum
from tdmld.chain.codec import ZERO_HASH
from tdmld.node.validator import MAX_BACKLOG, MAX_FUTURE_MS
from tests.simulation.disk import PROPOSAL
from tests.simulation.facts import body_root, next_root

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.world import World


class Violation(AssertionError):
    """Safety is broken."""


class Stuck(AssertionError):
    """Liveness is broken: no progress in bounded virtual time."""


class Watcher:
    """Fed by the nodes; raises Violation."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.agreed: list[Header] = []
        self.ids: list[bytes] = []
        self.roots: list[bytes] = [ZERO_HASH]
        self._signed: dict[tuple[int, int, int], bytes] = {}
        self._voters: dict[tuple[int, int, bytes], set[int]] = defaultdict(set)
        self._weights: dict[tuple[int, int, bytes], int] = defaultdict(int)
        self._variants: dict[int, set[bytes]] = defaultdict(set)
        self.nullified: set[int] = set()
        self.notarized: dict[int, bytes] = {}

    @property
    def double_notarizations(self) -> int:
        """Views in which two blocks or more were voted for."""
        return sum(len(blocks) > 1 for blocks in self._variants.values())

    # ---- votes -----------------------------------------------------------------------------

    def voted(self, vote: Vote) -> None:
        """A vote exists: stored by an honest node, or said by anybody."""
        key = (vote.kind, vote.view, vote.hash)
        voters = self._voters[key]
        if vote.voter in voters:
            return
        voters.add(vote.voter)
        stakes = self._world.committee().stakes
        self._weights[key] += stakes[vote.voter]
        if vote.kind is Kind.NOTARIZE:
            self._variants[vote.view].add(vote.hash)
        if self._weights[key] >= quorum(stakes):
            if vote.kind is Kind.NULLIFY:
                self.nullified.add(vote.view)
            elif vote.kind is Kind.NOTARIZE:
                known = self.notarized.setdefault(vote.view, vote.hash)
                if known != vote.hash:
                    raise Violation(f"two blocks notarized in view {vote.view}")

    def stored(self, node: "Node", vote: Vote) -> None:
        """A vote is durable."""
        if node.honest:
            known = self._signed.setdefault((node.name, vote.kind, vote.view), vote.hash)
            signed = self._signed
            both = (node.name, Kind.NULLIFY, vote.view), (node.name, Kind.FINALIZE, vote.view)
            if known != vote.hash or (both[0] in signed and both[1] in signed):
                raise Violation(f"double sign: node {node.name} in view {vote.view}")
            if vote.kind is Kind.FINALIZE and self.notarized.get(vote.view) != vote.hash:
                raise Violation(f"node {node.name} finalizes view {vote.view}, not notarized")
        self.voted(vote)

    def cast(self, node: "Node", kind: Kind, view: int) -> None:
        """The core asks for a vote."""
        if not node.honest:
            return
        if kind is not Kind.FINALIZE and view != node.core.view:
            raise Violation(f"node {node.name} votes in view {view}, being in {node.core.view}")
        if kind is Kind.NOTARIZE and node.core.cast(Kind.NULLIFY, view):
            raise Violation(f"node {node.name} notarizes in view {view} after its nullify")

    def sent(self, node: "Node", vote: Vote) -> None:
        """A vote leaves its node."""
        if node.honest and self._signed.get((node.name, vote.kind, vote.view)) != vote.hash:
            raise Violation(f"node {node.name} sends a vote of view {vote.view} unstored")
        self.voted(vote)

    def certified(self, node: "Node", certificate: Certificate) -> None:
        """A node accepts a certificate: a quorum stored or said those votes."""
        if not node.honest:
            return
        key = (certificate.kind, certificate.view, certificate.hash)
        voters = {voter for voter, _ in certificate.signatures}
        stakes = self._world.committee().stakes
        if not voters <= self._voters[key]:
            raise Violation(f"view {certificate.view}: a vote counts that was never stored or said")
        if sum(stakes[voter] for voter in voters) < quorum(stakes):
            raise Violation(f"view {certificate.view}: a certificate without a quorum")

    # ---- blocks ----------------------------------------------------------------------------

    def proposed(self, node: "Node", block: Block) -> None:
        """A proposal is durable."""
        if node.honest:
            view, made = block.header.view, block_hash(block.header)
            if self._signed.setdefault((node.name, PROPOSAL, view), made) != made:
                raise Violation(f"double sign: node {node.name} proposes twice in view {view}")

    def proposing(self, node: "Node", block: Block) -> None:
        """A leader makes a block (N5, P8)."""
        header = block.header
        if node.honest and (header.state_height != node.executed or node.backlog > MAX_BACKLOG):
            raise Violation(f"node {node.name} proposes while its execution lags")

    def rejected(self, node: "Node", header: Header, reason: str) -> None:
        """A node finds a block invalid for good."""
        proposer = int.from_bytes(header.proposer, "big")
        if node.honest and self._world.is_honest(proposer):
            raise Violation(f"node {node.name} rejects an honest block: {reason}")

    def notarizable(self, node: "Node", header: Header) -> None:
        """A node finds a block valid (N4)."""
        if node.honest and (
            header.state_height > node.executed
            or node.roots[header.state_height] != header.state_root
        ):
            raise Violation(f"node {node.name} accepts a state that it did not execute")
        if node.honest and header.time_ms > node.now_ms() + MAX_FUTURE_MS:
            raise Violation(f"node {node.name} accepts a block from the future")

    def final(self, node: "Node", height: int, block: Block) -> None:
        """A node has the final block of a height."""
        if not node.honest:
            return
        key = block_hash(block.header)
        if height <= len(self.ids):
            if self.ids[height - 1] != key:
                raise Violation(f"disagreement: two blocks final at height {height}")
            return
        self._validate(height, key, block)
        self.ids.append(key)
        self.agreed.append(block.header)
        self.roots.append(next_root(self.roots[-1], key, block.transactions))

    def _validate(self, height: int, key: bytes, block: Block) -> None:
        header = block.header
        parent = self.agreed[-1] if self.agreed else None
        view, parent_view = header.view, parent.view if parent else 0
        leader = self._world.committee(height).rotation.leader(view)
        gap: Sequence[int] = range(parent_view + 1, view)
        wrong = {
            "skips heights": height != len(self.ids) + 1 or header.height != height,
            "has another parent": header.parent != (self.ids[-1] if self.ids else ZERO_HASH),
            "names another parent view": header.parent_view != parent_view or view <= parent_view,
            "is not its leader's": int.from_bytes(header.proposer, "big") != leader,
            "has another body": header.tx_root != body_root(block.transactions),
            "names no state": header.state_height >= height
            or header.state_root != self.roots[header.state_height],
            "goes back in state": parent is not None and header.state_height < parent.state_height,
            "goes back in time": parent is not None and header.time_ms <= parent.time_ms,
            "is not notarized": self.notarized.get(view) != key,
            "is nullified": view in self.nullified and self._finalized(view, key),
            "skips a view": any(between not in self.nullified for between in gap),
        }
        for what, broken in wrong.items():
            if broken:
                raise Violation(f"invalid: the final block of height {height} {what}")

    def _finalized(self, view: int, key: bytes) -> bool:
        stakes = self._world.committee().stakes
        return self._weights[Kind.FINALIZE, view, key] >= quorum(stakes)
