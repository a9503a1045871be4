"""What a node takes from a submitter, and what of it others may have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from tdmld.node.chainservice import ChainService
from tdmld.node.errors import CarrierUnavailable, ContentRefused
from tdmld.node.machine import Machine
from tdmld.node.machine_types import SlotId
from tdmld.node.publish import publish
from tdmld.node.seal import sealing
from tdmld.node.workers import given_parts, given_roots, shared_roots
from tdmld.rpc.errors import NotReady, Refused
from tdmld.train.family import by_name
from tdmld.train.pretrained import Pretrained
from tdmld.train.spec import Spec, decode_spec, spec_bytes, spec_id
from tdmld.train.statefile import TensorData, write_safetensors
from tests.train.support import family_spec


class Fake:
    """A machine and a chain that remember what they were given."""

    def __init__(self, spec: Spec) -> None:
        self.shards = [tuple(shard) for shard in spec.shards]
        self.sealed: bytes | None = b"not asked"
        self.given: dict[bytes, int] = {}
        self.specs: list[bytes] = []
        self.error: Exception | None = None

    async def import_text(self, path: Path, sealed: bytes | None) -> list[tuple[bytes, int]]:
        if self.error is not None:
            raise self.error
        self.sealed = sealed
        return self.shards  # type: ignore[return-value]

    async def publish_given(self, files: Mapping[bytes, Path]) -> None:
        self.given = {root: path.stat().st_size for root, path in files.items()}

    async def publish_spec(self, raw: bytes) -> bytes:
        self.specs.append(raw)
        return spec_id(raw)


async def published(fake: Fake, spec: Spec, given: str, scratch: Path) -> str:
    text = spec_bytes(spec).decode()
    machine, chain = cast(Machine, fake), cast(ChainService, fake)
    return (await publish(machine, chain, text, "/text", given, scratch)).spec_id


def given_spec(directory: Path, **changes: object) -> Spec:
    """A spec that goes on from weights in `directory`, which is made here: all zeros."""
    base = family_spec("llama", 2, **changes)
    weights = [weight for stage in range(2) for weight in base.weights(stage)]
    directory.mkdir()
    write_safetensors(
        directory / "model.safetensors",
        [TensorData(w.name, w.dtype, w.shape, bytes(4 * w.count)) for w in by_name(weights)],
    )
    roots = Pretrained(directory).roots(base)
    document = json.loads(spec_bytes(base))
    document["init"] = {"kind": "given", "roots": list(roots)}
    return decode_spec(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


async def test_the_text_of_an_open_job_is_kept_open_and_others_under_a_key(tmp_path: Path) -> None:
    for privacy in ("open", "sealed", "split"):
        spec = family_spec("llama", 2, privacy=privacy)
        fake = Fake(spec)
        id = await published(fake, spec, "", tmp_path)
        raw = spec_bytes(spec)
        assert bytes.fromhex(id) == spec_id(raw)
        assert fake.specs == [raw]
        assert fake.sealed == sealing(raw) == (None if privacy == "open" else spec_id(raw))


async def test_another_text_a_malformed_spec_and_no_carrier_are_refused(tmp_path: Path) -> None:
    spec = family_spec("llama", 2)
    fake = Fake(spec)
    fake.shards = [(bytes(32), 1)]
    with pytest.raises(Refused, match="was changed meanwhile"):
        await published(fake, spec, "", tmp_path)
    assert fake.specs == []
    with pytest.raises(Refused, match="malformed"):
        await publish(cast(Machine, fake), cast(ChainService, fake), "{", "/t", "", tmp_path)
    fake.error = CarrierUnavailable("it starts")
    with pytest.raises(NotReady, match="it starts"):
        await published(fake, spec, "", tmp_path)
    fake.error = ContentRefused("no room")
    with pytest.raises(Refused, match="no room"):
        await published(fake, spec, "", tmp_path)


async def test_given_weights_are_cut_and_kept_by_their_roots(tmp_path: Path) -> None:
    spec = given_spec(tmp_path / "weights")
    fake, scratch = Fake(spec), tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(Refused, match="given_path"):
        await published(fake, spec, "", scratch)
    with pytest.raises(Refused, match="safetensors files"):
        await published(fake, spec, str(tmp_path / "elsewhere"), scratch)
    await published(fake, spec, str(tmp_path / "weights"), scratch)
    assert set(fake.given) == set(given_roots(spec))
    assert all(size > 0 for size in fake.given.values())
    assert list(scratch.iterdir()) == [], "what was cut is here once"


def test_what_the_first_stage_of_a_split_job_begins_with_is_not_for_others(tmp_path: Path) -> None:
    open_spec = given_spec(tmp_path / "open")
    assert shared_roots(open_spec) == given_roots(open_spec)
    split = given_spec(tmp_path / "split", privacy="split")
    ((_, own),) = given_parts(split, SlotId(0, 0))
    assert own not in shared_roots(split)
    assert {own, *shared_roots(split)} == set(given_roots(split))
