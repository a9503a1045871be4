"""The whole chain of a stopped node as text: what an auditor needs, and nothing that is local.

The format stands in docs/spec/chain.md (section "Export"): JSON lines, each canonical JSON; first
genesis, then every block, then every record of the state, then one line that sums up. Two nodes at
the same height write the same bytes, but for certificates: a quorum has more than one spelling.
Everything is read and written a line at a time.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tdmld.chain.accounts import (
    Account,
    Supply,
    Unbondings,
)
from tdmld.chain.blocks import Block, block_hash, first_header
from tdmld.chain.codec import decode
from tdmld.chain.genesis import genesis_document, load_genesis, protocol_at
from tdmld.chain.limits import RECORD_BYTES
from tdmld.chain.records import (
    Job,
)
from tdmld.chain.state import SUPPLY_KEY
from tdmld.chain.transactions import decode_transaction
from tdmld.files import sync_directory
from tdmld.node.chainerrors import StoreCorrupt, StoreError
from tdmld.node.store import ChainStore

FORMAT = "tdmld-export-1"


@dataclass(frozen=True)
class Exported:
    """What was written. `counted`: money summed record by record, `recorded`: the chain's own
    sums; both in units, by place. `size`, `sha256`: of the whole file."""

    chain_id: bytes
    height: int
    state_root: bytes
    transactions: int
    entries: int
    counted: dict[str, int]
    recorded: dict[str, int]
    size: int
    sha256: bytes

    @property
    def conserved(self) -> bool:
        """Whether every unit of genesis is found, and the chain's own sums are the counted ones."""
        places = ("balances", "stakes", "unbonding", "escrows", "burned")
        total = sum(self.counted[place] for place in places)
        return self.counted == self.recorded and total == self.counted["genesis"]


def export_ledger(data_dir: Path, out: Path) -> Exported:
    """Write the chain of a stopped node to `out`, aside first: a failure leaves nothing.

    Raises StoreLocked while the node runs, StoreError when there is no chain or it cannot be read,
    GenesisError for a bad genesis.json, OSError where `out` cannot be written.
    """
    chain = data_dir / "chain"
    if not (chain / "CURRENT").is_file():
        raise StoreError(f"there is no chain in {data_dir}: its node has never run")
    genesis = load_genesis((data_dir / "genesis.json").read_bytes())
    aside = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        with ChainStore(chain, genesis) as store, aside.open("wb") as file:
            exported = write_export(store, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
        sync_directory(out.parent)
    finally:
        aside.unlink(missing_ok=True)
    return exported


def write_export(store: ChainStore, out: BinaryIO) -> Exported:
    """Write the chain in `store`, which nothing may change meanwhile. Raises as export_ledger."""
    digest, size, transactions, entries = hashlib.sha256(), 0, 0, 0

    def write(line: dict[str, object]) -> None:
        nonlocal size
        raw = json.dumps(line, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        out.write(raw)
        digest.update(raw)
        size += len(raw)

    write(_genesis_line(store))
    for height in range(1, store.height + 1):
        line, count = _block_line(store, height)
        transactions += count
        write(line)
    sums = _Sums()
    for key, value in store.state_items():
        sums.add(key, value)
        entries += 1
        write({"line": "state", "key": key.hex(), "value": value.hex()})
    head = store.head
    write(
        {
            "line": "end",
            "blocks": head.height,
            "entries": entries,
            "hash": head.hash.hex(),
            "height": head.height,
            "mix": head.mix.hex(),
            "sha256": digest.hexdigest(),
            "state_root": head.state_root.hex(),
            "supply": sums.counted,
            "transactions": transactions,
        }
    )
    return Exported(
        chain_id=store.chain_id,
        height=head.height,
        state_root=head.state_root,
        transactions=transactions,
        entries=entries,
        counted=sums.counted,
        recorded=sums.recorded,
        size=size,
        sha256=digest.digest(),
    )


class _Sums:
    """Money, record by record. What is burned has left every record: the chain's word is taken."""

    def __init__(self) -> None:
        self.counted = dict.fromkeys(Supply.__struct_fields__, 0)
        self.recorded = dict(self.counted)

    def add(self, key: bytes, value: bytes) -> None:
        if key[:1] == b"a":
            account = decode(Account, value, RECORD_BYTES)
            self.counted["balances"] += account.balance
            self.counted["stakes"] += account.vote_stake + account.work_stake
        elif key[:1] == b"b":
            self.counted["unbonding"] += decode(Unbondings, value, RECORD_BYTES).total
        elif key[:1] == b"j":
            self.counted["escrows"] += decode(Job, value, RECORD_BYTES).locked
        elif key == SUPPLY_KEY:
            self.recorded = msgspec.structs.asdict(decode(Supply, value, RECORD_BYTES))
            for place in ("genesis", "burned"):
                self.counted[place] = self.recorded[place]


def _genesis_line(store: ChainStore) -> dict[str, object]:
    header = first_header(
        store.chain_id, protocol_at(store.genesis, 0), store.genesis.time_ms, _root(store, 0)
    )
    return {
        "line": "genesis",
        "chain_id": store.chain_id.hex(),
        "document": genesis_document(store.genesis),
        "format": FORMAT,
        "hash": block_hash(header).hex(),
        "header": plain(header),
        "state_root": header.state_root.hex(),
    }


def _block_line(store: ChainStore, height: int) -> tuple[dict[str, object], int]:
    block = store.block(height)
    if block is None and height < store.lowest:
        raise StoreError(
            f"{store.path} has blocks from {store.lowest} on only: it began with a snapshot, or "
            "keep_blocks is set. Export the chain of a node that keeps all"
        )
    if block is None:
        raise StoreCorrupt(f"{store.path}: block {height} is missing: export another node's chain")
    return {
        "line": "block",
        "certificate": plain(store.certificate(height)),
        "hash": block_hash(block.header).hex(),
        "header": plain(block.header),
        "height": height,
        "signature": block.signature.hex(),
        "state_root": _root(store, height).hex(),
        "transactions": _transactions(store, height, block),
    }, len(block.transactions)


def _transactions(store: ChainStore, height: int, block: Block) -> list[dict[str, object]]:
    outcomes = store.outcomes(height) or ()
    if len(outcomes) != len(block.transactions):
        raise StoreCorrupt(
            f"{store.path}: what became of the transactions of block {height} is not stored: an "
            "older version wrote it; let a node fetch the chain anew and export that"
        )
    lines = []
    for raw, outcome in zip(block.transactions, outcomes, strict=True):
        transaction = decode_transaction(raw, store.chain_id)
        lines.append(
            {
                "id": transaction.id.hex(),
                "raw": raw.hex(),
                "kind": transaction.payload.__struct_config__.tag,
                "signer": transaction.signer.hex(),
                "nonce": transaction.nonce,
                "fee": transaction.fee,
                "expiry": transaction.expiry,
                "payload": plain(transaction.payload),
                "ok": outcome.ok,
                "reason": outcome.reason,
            }
        )
    return lines


def _root(store: ChainStore, height: int) -> bytes:
    root = store.root_at(height)
    if root is None:
        raise StoreCorrupt(f"{store.path}: the state root of height {height} is missing")
    return root


def plain(value: Any) -> Any:
    """A record as JSON knows it: objects by field name, bytes as hex, tuples as lists."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value
