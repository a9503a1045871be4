"""Scenes and cases of the ledger's vectors: one state, and what blocks make of it."""

from collections.abc import Iterable, Mapping
from typing import Any

from tdmld.chain.blocks import EPOCH_VIEWS, epoch_of
from tdmld.chain.crypto import sha256
from tdmld.chain.genesis import genesis_document
from tdmld.chain.ledger import BlockContext, apply_block, recount
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import Payload, decode_transaction, verify_transaction
from tdmld.chain.tree import Tree
from tests.chain.world import World, make_genesis, mark, node_key

START_MS = 1_767_225_600_000


def hexed(records: Mapping[bytes, bytes | None]) -> dict[str, str | None]:
    return {key.hex(): None if value is None else value.hex() for key, value in records.items()}


def state_root(records: Mapping[bytes, bytes]) -> bytes:
    """The root of a whole state, from nothing."""
    return Tree({}.get).update(
        sorted((sha256(key), sha256(value)) for key, value in records.items())
    )


NODES = 6


class Scene:
    """The world as it stands now, and cases that each start from it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self._pre = dict(world.store)
        self.height, self._view = world.height, world.view
        self._cases: list[dict[str, Any]] = []

    def case(
        self,
        name: str,
        rules: str,
        *raws: bytes,
        height: int | None = None,
        tainted: bool = False,
        passed: int = 0,
        beacon: bytes | None = None,
        time_ms: int | None = None,
    ) -> None:
        """One block over the scene's state; `rules` are names with blanks between. `passed`: views
        that were passed over before it, at least one when it is `tainted`."""
        mix = beacon or mark("beacon of", self.name, name)
        context = self._context(height, passed or int(tainted), mix, time_ms)
        transactions = [decode_transaction(raw, self.world.chain_id) for raw in raws]
        assert all(verify_transaction(found, self.world.chain_id) for found in transactions)
        result = apply_block(self._pre.get, self.world.genesis, context, transactions)
        post = {**self._pre, **result.changes}
        after = {key: value for key, value in post.items() if value is not None}
        recount(after.items())
        self._cases.append(
            {
                "name": name,
                "rules": rules.split(),
                "context": {
                    "height": context.height,
                    "view": context.view,
                    "parent_view": context.parent_view,
                    "time_ms": context.time_ms,
                    "proposer": context.proposer.hex(),
                    "beacon": context.beacon.hex(),
                },
                "transactions": [raw.hex() for raw in raws],
                "receipts": [
                    {"ok": receipt.ok, "reason": receipt.reason} for receipt in result.receipts
                ],
                "changes": hexed(result.changes),
                "root": state_root(after).hex(),
            }
        )

    def since(self, base: "Scene | None") -> dict[bytes, bytes | None]:
        """What differs from another scene's state; None: absent."""
        old = {} if base is None else base._pre
        gone: dict[bytes, bytes | None] = {key: None for key in old if key not in self._pre}
        return gone | {key: raw for key, raw in self._pre.items() if old.get(key) != raw}

    def document(self, base: "Scene | None") -> dict[str, Any]:
        return {
            "name": self.name,
            "chain_id": self.world.chain_id.hex(),
            "from": None if base is None else base.name,
            "pre": hexed(self.since(base)),
            "root": state_root(self._pre).hex(),
            "cases": self._cases,
        }

    def _context(
        self, height: int | None, passed: int, beacon: bytes, time_ms: int | None
    ) -> BlockContext:
        at = self.height + 1 if height is None else height
        start = epoch_of(at, self.world.parameters.epoch_blocks) * EPOCH_VIEWS
        return BlockContext(
            height=at,
            view=max(self._view, start) + 1 + passed,
            parent_view=self._view,
            time_ms=START_MS + 500 * at if time_ms is None else time_ms,
            proposer=node_key(0).public,
            beacon=beacon,
        )


def ledger_file(scenes: Iterable[Scene]) -> dict[str, Any]:
    """A file of scenes; each names its genesis by chain id, and the earlier scene that its state
    differs least from: states are long and much alike."""
    found = list(scenes)
    groups = []
    for number, scene in enumerate(found):
        bases = [
            None,
            *(one for one in found[:number] if one.world.chain_id == scene.world.chain_id),
        ]
        groups.append(scene.document(min(bases, key=lambda base: len(str(scene.since(base))))))
    return {
        "geneses": {
            scene.world.chain_id.hex(): genesis_document(scene.world.genesis) for scene in found
        },
        "groups": groups,
    }


ALL = {"audit_rate": 1_000_000}
NONE: dict[str, Any] = {"audit_rate": 0, "audit_budget": 0}


def moves(world: World, job: bytes, kind: type[Payload] | None = None) -> list[bytes]:
    """What the members of a job would send now, signed."""
    return [
        world.sign(world.keys[node], payload)
        for node, payload in world.moves(job)
        if kind is None or isinstance(payload, kind)
    ]


def active(world: World, **offer: Any) -> bytes:
    """A new job, played until it is active; its id."""
    job = world.submit(**offer)
    world.play_until(job, JobStatus.ACTIVE)
    return job


def worker(world: World, job: bytes, slot: int) -> bytes:
    found = world.state.slot(job, slot)
    assert found is not None
    return found.worker.node


def standby(world: World, job: bytes) -> bytes:
    found = world.job(job).standby
    assert found is not None
    return found.node


def fresh(nodes: int = 5, **parameters: int) -> World:
    """A world in which everybody asks. Node 0 is the submitter's and works for others only."""
    world = World(make_genesis(nodes, validators=1, **parameters))
    world.all_ask(nodes)
    return world


def by_worker(world: World, job: bytes, slot: int, payload: Payload) -> bytes:
    """Signed by the worker of a slot."""
    return world.sign(world.keys[worker(world, job, slot)], payload)
