"""A ledger without a network: blocks one by one, and actors that do what the state asks of them.

Training is a table of hashes here: everybody who is honest finds the same ones. Misbehaviour has
names (`Vice`), so that a test reads as what somebody did.
"""

from tdmld.chain.blocks import start_view, view_epoch
from tdmld.chain.crypto import KeyPair
from tdmld.chain.epochs import committee
from tdmld.chain.genesis import (
    Genesis,
    Parameters,
    chain_id,
    genesis_document,
    genesis_from_document,
)
from tdmld.chain.ledger import (
    BlockContext,
    BlockResult,
    Receipt,
    apply_block,
    genesis_changes,
    next_due,
    recount,
)
from tdmld.chain.limits import LANES
from tdmld.chain.records import Job, Member
from tdmld.chain.state import State
from tdmld.chain.transactions import (
    OWNER_KINDS,
    Ask,
    LaneMode,
    Offer,
    Payload,
    Stage,
    decode_transaction,
    sign_transaction,
    verify_transaction,
)
from tests.chain.actors import Actors, Vice, mark, node_key, owner_key

FEE = 10
BALANCE = 10_000_000
STAKE = 50_000
GIB = 1 << 30


def make_genesis(nodes: int = 7, validators: int = 4, **parameters: object) -> Genesis:
    """`nodes` owners with a node, a balance and work stake each; the first few validate."""
    owners = [owner_key(i) for i in range(nodes)]
    keys = [node_key(i) for i in range(nodes)]
    return genesis_from_document(
        {
            "chain": "tdmld-world-1",
            "time": "2026-01-01T00:00:00Z",
            "accounts": [[owner.address, BALANCE] for owner in owners],
            "validators": [
                [owners[i].address, keys[i].address, 1000 + i]
                for i in range(min(validators, nodes))
            ],
            "work_stakes": [[owner.address, STAKE] for owner in owners],
            "nodes": [[o.address, n.address] for o, n in zip(owners, keys, strict=True)],
            "mature_classes": ["*"],
            "parameters": parameters,
        }
    )


def with_parameters(genesis: Genesis, **parameters: int) -> Genesis:
    document = genesis_document(genesis)
    old = document["parameters"]
    assert isinstance(old, dict)
    return genesis_from_document({**document, "parameters": {**old, **parameters}})


class World(Actors):
    """The chain, block after block, and who misbehaves on it."""

    def __init__(self, genesis: Genesis | None = None, seed: int = 0) -> None:
        self.genesis = make_genesis() if genesis is None else genesis
        self.chain_id = chain_id(self.genesis)
        self.store: dict[bytes, bytes] = dict(genesis_changes(self.genesis))
        self.height = 0
        self.view = 0
        self.beacon = mark("beacon", seed)
        self.keys = {node_key(i).public: node_key(i) for i in range(20)}
        self.vices: dict[bytes, frozenset[Vice]] = {}
        self.stop_before: dict[bytes, int] = {}
        """Node -> first segment that it does not commit any more."""
        self.away = frozenset[bytes]()
        """Nodes that do not lead their views: these are passed over."""
        self.bad_segment = 0
        """First segment that a cheat is made in."""
        self.workers = set[tuple[tuple[bytes, int], Member]]()
        """Who ever worked where."""
        self.hasty = set[bytes]()
        """Accusations and attestations of the last block: what comes before them may decide."""
        self.events: list[object] = []
        self.receipts: list[Receipt] = []

    @property
    def parameters(self) -> Parameters:
        return self.genesis.parameters

    @property
    def state(self) -> State:
        return State(self.store.get)

    def balance(self, index: int) -> int:
        return self.state.account(owner_key(index).public).balance

    def job(self, job: bytes) -> Job:
        found = self.state.job(job)
        assert found is not None
        return found

    def has(self, node: bytes, vice: Vice) -> bool:
        return vice in self.vices.get(node, ())

    # -- blocks

    def sign(self, key: KeyPair, payload: Payload, **header: int) -> bytes:
        """Signed with the header that its family asks for; `header` overrides."""
        if isinstance(payload, OWNER_KINDS):
            header = {"nonce": self.state.account(key.public).nonce, "fee": FEE, **header}
        return sign_transaction(key, self.chain_id, payload, **header)

    def block(self, *raws: bytes, tainted: bool = False, passed: int = 0) -> BlockResult:
        """Apply the next block, count all money, keep the result. `passed`: views passed over."""
        transactions = [decode_transaction(raw, self.chain_id) for raw in raws]
        assert all(verify_transaction(t, self.chain_id) for t in transactions)
        self.height += 1
        parent = self.view
        self.view = 1 + start_view(self.height - 1, parent, self.parameters.epoch_blocks)
        self.view += passed or int(tainted)
        while self.away and self.leader(self.view) in self.away:
            self.view += 1
        self.beacon = mark(self.beacon, self.height)
        context = BlockContext(
            height=self.height,
            view=self.view,
            parent_view=parent,
            time_ms=self.height * 500,
            proposer=node_key(0).public,
            beacon=self.beacon,
        )
        result = apply_block(self.store.get, self.genesis, context, transactions)
        for key, value in result.changes.items():
            if value is None:
                self.store.pop(key, None)
            else:
                self.store[key] = value
        recount(self.store.items())
        self._remember_workers()
        self.events.extend(result.events)
        self.receipts.extend(result.receipts)
        return result

    def _remember_workers(self) -> None:
        for job_id in self.state.active_jobs():
            for slot in range(self.job(job_id).slots):
                state = self.state.slot(job_id, slot)
                if state is not None and state.worker.accepted:
                    self.workers.add(((job_id, slot), state.worker))

    def leader(self, view: int) -> bytes:
        """The node that leads a view of an epoch whose set is known."""
        chosen = self.state.validator_set(view_epoch(view))
        assert chosen is not None
        members = committee(self.chain_id, chosen)
        return members.nodes[members.leader(view)]

    def do(self, key: KeyPair, payload: Payload, **header: int) -> bytes:
        """One transaction in a block of its own, which must succeed; its id."""
        (receipt,) = self.block(self.sign(key, payload, **header)).receipts
        assert receipt.ok, receipt.reason
        return receipt.id

    def refused(self, key: KeyPair, payload: Payload, **header: int) -> str:
        """One transaction in a block of its own, which must fail; the reason."""
        (receipt,) = self.block(self.sign(key, payload, **header)).receipts
        assert not receipt.ok
        return receipt.reason

    def wait(self, blocks: int) -> None:
        for _ in range(blocks):
            self.block()

    def next_due(self) -> int | None:
        return next_due(self.store.get)

    # -- the market

    def ask(self, index: int, **changes: object) -> bytes:
        """Node `index` asks; returns the signed transaction."""
        fields: dict[str, object] = {
            "session": mark("session", index),
            "class_id": "cpu",
            "memory": 4 * GIB,
            "price": 1000,
            "audit_capacity": 4,
            "standby_slots": 4,
            "until_height": self.height + 900,
        }
        return self.sign(node_key(index), Ask(**{**fields, **changes}))  # type: ignore[arg-type]

    def all_ask(self, nodes: int = 7) -> None:
        result = self.block(*(self.ask(index) for index in range(nodes)))
        assert all(receipt.ok for receipt in result.receipts)

    def offer(self, **changes: object) -> Offer:
        """A job of two stages and four rounds, every second segment audited."""
        fields: dict[str, object] = {
            "spec_id": mark("spec"),
            "spec_bytes": 900,
            "stages": (Stage(1_000_000, GIB), Stage(1_000_000, GIB)),
            "lanes": 1,
            "rounds": 4,
            "segment_steps": 5,
            "unsettled": 4,
            "state_every": 2,
            "tokens": 10_000,
            "class_id": "any",
            "privacy": "open",
            "slot_price_max": 20_000,
            "standby_price": 500,
            "audit_rate": 500_000,
            "audit_price": 7_000,
            "audit_budget": 200_000,
            "deadline": self.height + 3000,
            "source": node_key(0).public,
            "session": mark("session", 0),
        }
        fields.update(changes)
        lanes = fields["lanes"]
        assert isinstance(lanes, int)
        if lanes > 1:
            fields = {
                "lane_mode": LaneMode.SYNC,
                "lane_weights": (1,) * min(lanes, LANES),
                **fields,
            }
        return Offer(**fields)  # type: ignore[arg-type]

    def submit(self, **changes: object) -> bytes:
        """Owner 0 offers a job; its id."""
        return self.do(owner_key(0), self.offer(**changes))
