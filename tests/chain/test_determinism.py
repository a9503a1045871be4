"""The same blocks give the same bytes in every process, whatever surrounds it (EXEC-2).

Two chains are made once: one of jobs, one of epochs whose validators change. Processes that differ
in what must not matter replay their blocks: seed of the hashes, locale, time zone, optimisation,
and whether everything is read anew from disk before each block.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdmld.chain.genesis import genesis_bytes
from tests.chain.chainworld import (
    EPOCH,
    ChainWorld,
    epochs_genesis,
    live_through_a_job,
    live_through_epochs,
)

ROOT = Path(__file__).resolve().parents[2]

_REPLAY = """
import functools, gc, hashlib, json, sys
from pathlib import Path
from tdmld.chain import blocks
from tdmld.chain.codec import decode, encode
from tdmld.chain.genesis import load_genesis
from tdmld.node.export import write_export
from tdmld.node.store import ChainStore

Cached = type(functools.lru_cache(print))

class Digest:
    def __init__(self): self.found = hashlib.sha256()
    def write(self, raw): self.found.update(raw)

source, place, cold = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "cold"
genesis = load_genesis((source / "genesis.json").read_bytes())
store, said = ChainStore(place, genesis), []
for line in (source / "blocks").read_text().split():
    if cold:
        store.close()
        for found in [found for found in gc.get_objects() if isinstance(found, Cached)]:
            found.cache_clear()
        store = ChainStore(place, load_genesis((source / "genesis.json").read_bytes()))
    applied = store.apply(decode(blocks.Block, bytes.fromhex(line), 1 << 24), None)
    events = hashlib.sha256(encode(applied.events)).hexdigest()
    outcomes = hashlib.sha256(encode(store.outcomes(applied.height))).hexdigest()
    sets = [key.hex() for key in store.set_ids(store.epoch)]
    root, mix = store.state_root.hex(), store.head.mix.hex()
    said.append([applied.height, root, mix, events, outcomes, store.epoch, sets])
whole = Digest()
write_export(store, whole)
store.close()
print(json.dumps([said, whole.found.hexdigest()]))
"""

SURROUNDINGS = {
    "plain": {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC"},
    "turkish": {"PYTHONHASHSEED": "1", "LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"},
    "optimised": {"PYTHONHASHSEED": "4711", "LC_ALL": "C.UTF-8", "PYTHONOPTIMIZE": "2"},
    "cold": {"PYTHONHASHSEED": "random", "LC_ALL": "de_DE.UTF-8", "PYTHONMALLOC": "debug"},
}


@pytest.fixture(scope="module", params=["jobs", "epochs"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """genesis.json, and the blocks of a chain in hex, a line each."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "jobs":
        world = ChainWorld(directory / "chain")
        live_through_a_job(world)
    else:
        world = ChainWorld(directory / "chain", epochs_genesis())
        live_through_epochs(world)
    raws = [world.chain._read(b"b" + n.to_bytes(8, "big")) for n in range(1, world.height + 1)]
    world.close()
    (directory / "genesis.json").write_bytes(genesis_bytes(world.genesis))
    (directory / "blocks").write_text("\n".join((raw or b"").hex() for raw in raws))
    return directory


def test_the_same_blocks_give_the_same_roots_everywhere(source: Path, tmp_path: Path) -> None:
    answers = {}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", _REPLAY, str(source), str(tmp_path / name), name],
            cwd=ROOT,
            env={**os.environ, **changes, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, changes in SURROUNDINGS.items()
    }
    for name, process in running.items():
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {errors}"
        answers[name] = json.loads(out)
    steps, _ = answers["plain"]
    assert len(steps) > 25
    roots, sets = {row[1] for row in steps}, {tuple(row[-1]) for row in steps}
    assert len(roots) > 15
    if source.name.startswith("epochs"):
        assert [row[-2] for row in steps] == [row[0] // EPOCH for row in steps]
        assert len(sets) == 5, "validators changed"
    for name, answer in answers.items():
        for mine, others in zip(steps, answer[0], strict=True):
            assert others == mine, f"{name}, height {mine[0]}"
        assert answer == answers["plain"], name
