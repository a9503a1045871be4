"""What this node knows of jobs besides the ledger's records: specs, what offers locked, names."""

import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from tdmld import files
from tdmld.chain.genesis import Genesis, chain_id
from tdmld.chain.offers import lock_of
from tdmld.chain.records import Job
from tdmld.chain.transactions import Offer, decode_transaction
from tdmld.node.store import ChainStore
from tdmld.train.errors import TrainError
from tdmld.train.spec import Spec, decode_spec

log = logging.getLogger(__name__)

CACHED = 512
"""Specs and offers kept decoded."""
NAMES_BYTES = 1 << 20


class JobBook:
    """Looks things up in the store and keeps what it decoded."""

    def __init__(self, store: ChainStore, genesis: Genesis, data_dir: Path) -> None:
        self._store, self._genesis = store, genesis
        self._chain_id = chain_id(genesis)
        self._path = data_dir / "names.json"
        self._names = _load_names(self._path)
        self._specs: dict[bytes, Spec] = {}
        self._offers: dict[bytes, Offer] = {}

    def spec(self, job: Job) -> Spec | None:
        """The job's spec when it is here."""
        if job.spec_id not in self._specs:
            raw = self._store.get_spec(job.spec_id)
            if raw is None:
                return None
            try:
                _make_room(self._specs)
                self._specs[job.spec_id] = decode_spec(raw)
            except TrainError:
                return None
        return self._specs[job.spec_id]

    def lock(self, job: Job) -> tuple[int, int]:
        """What the offer locked besides the deposit, and the deposit."""
        if job.id not in self._offers:
            _make_room(self._offers)
            block = self._store.block(job.offered)
            for raw in block.transactions if block is not None else ():
                tx = decode_transaction(raw, self._chain_id)
                if tx.id == job.id and isinstance(tx.payload, Offer):
                    self._offers[job.id] = tx.payload
        offer = self._offers.get(job.id)
        if offer is None:
            return job.locked, 0
        lock = lock_of(offer, self._genesis.parameters)
        return lock.total - lock.deposit, lock.deposit

    def name(self, job: Job) -> str:
        """What its submitter called it here; empty for a job of others."""
        return self._names.get(job.spec_id.hex(), "")

    def remember_name(self, spec_id: str, name: str) -> None:
        """Names are for this node's lists alone: the newest ones that fit are kept."""
        self._names.pop(spec_id, None)
        self._names[spec_id] = name
        while len(raw := json.dumps(self._names).encode()) > NAMES_BYTES:
            del self._names[next(iter(self._names))]
        try:
            files.write_file(self._path, raw)
        except OSError as error:
            log.warning("the name of a job will not outlive this run: %s", error)


def _load_names(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(files.read_file(path, NAMES_BYTES), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("names of jobs are lost: %s", error)
        return {}


def _make_room(cache: dict[bytes, Any]) -> None:
    """Forget what was decoded first."""
    while len(cache) >= CACHED:
        del cache[next(iter(cache))]
