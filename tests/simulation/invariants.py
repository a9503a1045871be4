"""What must hold, seen from above: the watcher knows every vote of everybody, in every epoch.

agreement     no two honest nodes finalize different blocks at a height
validity      a final block was proposed by the leader of its view, follows its parent, names a
              state and validator sets that are so, is notarized by a quorum and not nullified, and
              every view of its epoch between it and its parent is nullified
one word      nobody honest signs two things of a kind in a view, or FINALIZE with NULLIFY,
              in all its lives together; NOTARIZE and NULLIFY only in its current view (S2, S5)
epochs        nobody honest votes in an epoch before the last block of the one before is final
              (EPOCH-6), outside its own committee, for a block of another epoch (EPOCH-1), for a
              child of an epoch's last block in that epoch (EPOCH-6), or in an epoch that it has
              left
durable       nothing leaves, and nothing counts, before it is on disk (N1, S9)
fair          nobody honest finds an honest proposal invalid, or is accused (N8); leaders name
              what they executed
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from tdmld.chain.accounts import (
    ValidatorSet,
)
from tdmld.chain.blocks import (
    EPOCH_VIEWS,
    Block,
    Certificate,
    Committee,
    Header,
    Kind,
    Vote,
    block_hash,
    ends_epoch,
    epoch_of,
    transactions_root,
    verify_vote,
    view_epoch,
)
from tdmld.chain.codec import ZERO_HASH
from tdmld.chain.epochs import set_id
from tdmld.chain.slashing import _check_proposals, _check_votes, offender
from tdmld.chain.transactions import ProposalEvidence, VoteEvidence
from tdmld.node.store import Head
from tdmld.node.validator import MAX_BACKLOG, MAX_FUTURE_MS
from tests.simulation.disk import PROPOSAL
from tests.simulation.elections import total, weight
from tests.simulation.facts import CHAIN_ID, FIRST, next_root, number_of

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.parts import Eyes
    from tests.simulation.world import World

Said = tuple[int, int, bytes]
"""(kind, view, block) of a vote."""


class Violation(AssertionError):
    """Safety is broken."""


class Stuck(AssertionError):
    """Liveness is broken: no progress in bounded virtual time."""


class Watcher:
    """Fed by the nodes; raises Violation."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._epoch_blocks = world.plan.epoch_blocks
        self.sets: list[ValidatorSet] = list(world.elections.first)
        """By epoch, as the agreed chain decides them."""
        self.agreed: list[Header] = []
        self.ids: list[bytes] = []
        self.roots: list[bytes] = [ZERO_HASH]
        self._signed: dict[tuple[int, int, int], bytes] = {}
        self._voters: dict[Said, set[int]] = defaultdict(set)
        self._weights: dict[Said, int] = defaultdict(int)
        self._variants: dict[int, set[bytes]] = defaultdict(set)
        self._headers: dict[bytes, Header] = {}
        self._epochs: dict[int, int] = defaultdict(int)
        """Process -> the last epoch in which it voted."""
        self._again: dict[bytes, set[int]] = defaultdict(set)
        """Last block of an epoch -> views in which it is notarized."""
        self.nullified: set[int] = set()
        self.notarized: dict[int, bytes] = {}
        self.finalized: set[bytes] = {block_hash(FIRST)}
        self.accusations = 0
        self._accused: set[tuple[int, int, bytes, int]] = set()
        self.returns: list[int] = []
        """Processes that said Return (N9)."""

    # ---- what happened ---------------------------------------------------------------------

    @property
    def double_notarizations(self) -> int:
        """Views in which two blocks or more were voted for."""
        return sum(len(blocks) > 1 for blocks in self._variants.values())

    @property
    def edges(self) -> int:
        """Epochs that ended, with a block after them."""
        return epoch_of(len(self.ids), self._epoch_blocks) if self.ids else 0

    @property
    def set_changes(self) -> int:
        """Of them, those where the next epoch has other validators or weights."""
        sets = self.sets
        return sum(sets[e].seats != sets[e + 1].seats for e in range(self.edges))

    @property
    def later_views(self) -> int:
        """Views in which the last block of an epoch was notarized again (N7)."""
        return sum(len(views) - 1 for views in self._again.values())

    @property
    def attacker_stake(self) -> float:
        """Their part of a set, on average over the epochs."""
        attackers = frozenset(number for number, _ in self._world.plan.attackers)
        sets = self.sets[: self.edges + 1]
        return sum(weight(s.seats, attackers) / total(s.seats) for s in sets) / len(sets)

    def committee(self, epoch: int) -> Committee:
        """Who votes in an epoch that is decided."""
        return self._world.elections.committee(self.sets[epoch])

    def _ends(self, header: Header) -> bool:
        return ends_epoch(header.height, self._epoch_blocks)

    def holds_back(self, message: object, views: int) -> bool:
        """Whether the plan loses this: a vote that finalizes the last block of an epoch, which is
        notarized in few views yet."""
        if not isinstance(message, Vote) or message.kind is not Kind.FINALIZE:
            return False
        header = self._headers.get(message.hash)
        late = len(self._again.get(message.hash, ())) > views
        return header is not None and self._ends(header) and not late

    # ---- votes -----------------------------------------------------------------------------

    def voted(self, vote: Vote) -> None:
        """A vote exists: stored by an honest node, or said by anybody."""
        key = (vote.kind, vote.view, vote.hash)
        epoch = view_epoch(vote.view)
        voters = self._voters[key]
        if vote.voter in voters or epoch >= len(self.sets):
            return
        committee = self.committee(epoch)
        if vote.voter >= len(committee.nodes) or not verify_vote(committee, vote):
            return  # an attacker's, said in an epoch that knows its index by another name
        voters.add(vote.voter)
        self._weights[key] += committee.stakes[vote.voter]
        if vote.kind is Kind.NOTARIZE:
            self._variants[vote.view].add(vote.hash)
        if self._weights[key] >= committee.quorum:
            self._certify(vote.kind, vote.view, vote.hash)

    def _certify(self, kind: Kind, view: int, block: bytes) -> None:
        if kind is Kind.NULLIFY:
            self.nullified.add(view)
        elif kind is Kind.FINALIZE:
            self.finalized.add(block)
        else:
            known = self.notarized.setdefault(view, block)
            if known != block:
                raise Violation(f"two blocks notarized in view {view}")
            header = self._headers.get(block)
            if header is not None and self._ends(header):
                self._again[block].add(view)
                if len(self._again[block]) == 1:
                    self._world.edge()

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
            self._in_epoch(node, vote)
        self.voted(vote)

    def _in_epoch(self, node: "Node", vote: Vote) -> None:
        """EPOCH-1, EPOCH-6."""
        epoch, who = view_epoch(vote.view), f"node {node.name}, view {vote.view}"
        if epoch < self._epochs[node.name]:
            raise Violation(f"{who}: votes in an epoch that it has left")
        self._epochs[node.name] = epoch
        if epoch >= len(self.sets) or self.committee(epoch).nodes[vote.voter] != node.key.public:
            raise Violation(f"{who}: votes where it is not elected")
        if epoch * self._epoch_blocks > len(self.ids):
            raise Violation(f"{who}: votes before the epoch begins")
        if epoch and self.ids[epoch * self._epoch_blocks - 1] not in self.finalized:
            raise Violation(f"{who}: the epoch before has no final block")
        header = self._headers.get(vote.hash)
        if header is None:
            return
        if epoch_of(header.height, self._epoch_blocks) != view_epoch(header.view):
            raise Violation(f"{who}: votes for a block of another epoch than its view")
        parent = self._headers.get(header.parent)
        if (
            parent is not None
            and self._ends(parent)
            and view_epoch(parent.view) == view_epoch(header.view)
        ):
            raise Violation(f"{who}: votes for a child of its epoch's last block")
        if header.view != vote.view and not (self._ends(header) and header.view < vote.view):
            raise Violation(f"{who}: votes for a block of another view")

    def cast(self, node: "Node", validator: "Eyes", kind: Kind, view: int) -> None:
        """The core asks for a vote."""
        core = validator.core
        if not node.honest:
            return
        if kind is not Kind.FINALIZE and view != core.view:
            raise Violation(f"node {node.name} votes in view {view}, being in {core.view}")
        if kind is Kind.NOTARIZE and core.cast(Kind.NULLIFY, view):
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
        view = certificate.view
        voters = {voter for voter, _ in certificate.signatures}
        committee = self.committee(view_epoch(view))
        if not voters <= self._voters[certificate.kind, view, certificate.hash]:
            raise Violation(f"view {view}: a vote counts that was never stored or said")
        if committee.weight(voters) < committee.quorum:
            raise Violation(f"view {view}: a certificate without a quorum")

    # ---- blocks ----------------------------------------------------------------------------

    def seen(self, block: Block) -> None:
        """There is such a block."""
        self._headers.setdefault(block_hash(block.header), block.header)

    def proposed(self, node: "Node", block: Block) -> None:
        """A proposal is durable."""
        self.seen(block)
        if node.honest:
            view, made = block.header.view, block_hash(block.header)
            if self._signed.setdefault((node.name, PROPOSAL, view), made) != made:
                raise Violation(f"double sign: node {node.name} proposes twice in view {view}")

    def proposing(self, node: "Node", block: Block) -> None:
        """A leader makes a block (N5, P8; N7)."""
        header = block.header
        if not node.honest:
            return
        if header.state_height != node.store.height or node.finality.backlog > MAX_BACKLOG:
            raise Violation(f"node {node.name} proposes while its execution lags")
        if epoch_of(header.height, self._epoch_blocks) != view_epoch(header.view):
            raise Violation(f"node {node.name} proposes on the last block of its epoch")

    def rejected(self, node: "Node", header: Header, reason: str) -> None:
        """A node finds a block invalid for good."""
        if node.honest and self._world.is_honest(number_of(header.proposer)):
            raise Violation(f"node {node.name} rejects an honest block: {reason}")

    def notarizable(self, node: "Node", header: Header) -> None:
        """A node finds a block valid (N4)."""
        if node.honest and node.store.root_at(header.state_height) != header.state_root:
            raise Violation(f"node {node.name} accepts a state that it did not execute")
        if node.honest and header.time_ms > node.now_ms() + MAX_FUTURE_MS:
            raise Violation(f"node {node.name} accepts a block from the future")

    def accused(self, node: "Node", evidence: VoteEvidence | ProposalEvidence) -> None:
        """N8: a validator accuses another."""
        self.accusations += 1
        about = node.name, node.life, *offender(evidence)
        if about in self._accused:
            raise Violation(f"node {node.name} accuses twice for one offence")
        self._accused.add(about)
        if isinstance(evidence, VoteEvidence):
            _check_votes(evidence, CHAIN_ID)
        else:
            _check_proposals(evidence, CHAIN_ID)
        if node.honest and self._world.is_honest(number_of(offender(evidence)[0])):
            raise Violation(f"node {node.name} accuses an honest one")

    def applying(self, node: "Node", block: Block, head: Head, sets: tuple[bytes, bytes]) -> None:
        """A node is about to execute a block: the store would refuse to otherwise."""
        header = block.header
        if node.honest and (
            header.parent != head.hash
            or header.height != head.height + 1
            or view_epoch(header.view) != epoch_of(header.height, self._epoch_blocks)
            or (header.validators, header.next_validators) != sets
        ):
            raise Violation(f"node {node.name} executes a block that does not follow")

    def final(self, node: "Node", block: Block) -> None:
        """A node has the final block of a height."""
        if not node.honest:
            return
        key, height = block_hash(block.header), block.header.height
        if height <= len(self.ids):
            if self.ids[height - 1] != key:
                raise Violation(f"disagreement: two blocks final at height {height}")
            return
        self._validate(height, key, block)
        self.ids.append(key)
        self.agreed.append(block.header)
        self.roots.append(next_root(self.roots[-1], key, block.transactions))
        if self._ends(block.header):
            begins = self.sets[epoch_of(height + 1, self._epoch_blocks)]
            self.sets.append(self._world.elections.after(begins, key))

    def _validate(self, height: int, key: bytes, block: Block) -> None:
        header = block.header
        parent = self.agreed[-1] if self.agreed else FIRST
        view, epoch = header.view, epoch_of(height, self._epoch_blocks)
        committee = self.committee(epoch)
        first = max(parent.view, epoch * EPOCH_VIEWS) + 1
        named = set_id(self.sets[epoch]), set_id(self.sets[epoch + 1])
        wrong = {
            "skips heights": height != len(self.ids) + 1,
            "has another parent": header.parent != block_hash(parent),
            "names another parent view": header.parent_view != parent.view or view <= parent.view,
            "has a view of another epoch": view_epoch(view) != epoch,
            "is not its leader's": header.proposer != committee.nodes[committee.leader(view)],
            "has another body": header.tx_root != transactions_root(block.transactions),
            "names no state": header.state_height >= height
            or header.state_root != self.roots[header.state_height],
            "goes back in state": header.state_height < parent.state_height,
            "goes back in time": header.time_ms <= parent.time_ms,
            "names other validators": (header.validators, header.next_validators) != named,
            "is not notarized": self.notarized.get(view) != key,
            "is nullified": view in self.nullified and self._finalized(view, key),
            "skips a view": any(v not in self.nullified for v in range(first, view)),
            "is tainted or not (EPOCH-5)": self._world.follows(parent.view, view)
            != (view == first),
        }
        for what, broken in wrong.items():
            if broken:
                raise Violation(f"invalid: the final block of height {height} {what}")

    def _finalized(self, view: int, key: bytes) -> bool:
        quorum = self.committee(view_epoch(view)).quorum
        return self._weights[Kind.FINALIZE, view, key] >= quorum
