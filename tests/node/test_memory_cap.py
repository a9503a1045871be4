"""A model that no single machine's workers could hold trains on three of them."""

import re
from pathlib import Path

import pytest
import trio

from tdmld.node.errors import FailureCause, WorkerFailed
from tdmld.node.machine import (
    LinkPeer,
    Machine,
    SegmentDone,
    SlotAssignment,
    SlotFailed,
    SlotId,
    open_machine,
)
from tdmld.p2p import PeerInfo
from tdmld.train.spec import decode_spec, stage_parameters
from tests.train.support import TEXT, encode_document, spec_document

pytestmark = [pytest.mark.slow]

JOB, CHAIN = b"m" * 32, b"c" * 32
CAP = 768 << 20
"""What a worker may have of private memory, Python and torch included."""
BYTES_A_VALUE = 16
"""Weight, gradient and two moments."""
CONFIG = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 256,
    "max_position_embeddings": 16,
}
STAGES = [0, 5, 11, 16]
PATIENCE_SECONDS = 600.0
SAMPLE_SECONDS = 0.1


def spec_of(cuts: list[int]) -> bytes:
    """The spec of this model, 52 million parameters, cut so."""
    from tdmld.train.families import FAMILIES

    config = FAMILIES["llama"].canonical(CONFIG)
    return encode_document(spec_document(config=config, pipeline__cuts=cuts))


def unique_bytes(pid: int) -> int:
    """Memory that is this process's alone; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def assignment(spec: bytes, stage: int, machines: list[Machine]) -> SlotAssignment:
    program = decode_spec(spec)
    links = [
        LinkPeer(link, machines[program.other_end(0, stage, link)[1]].session)
        for link in program.links(0, stage)
    ]
    everybody = frozenset(machine.session for machine in machines)
    return SlotAssignment(JOB, spec, SlotId(0, stage), 0, 0, tuple(links), everybody)


async def prepared(machine: Machine, text: Path, machines: list[Machine]) -> None:
    await machine.import_text(text)
    others = [m for m in machines if m is not machine]
    await machine.set_peers([PeerInfo(m.session, m.addresses) for m in others])


async def test_the_whole_model_does_not_fit_into_one_worker(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    spec = spec_of([0, 16])
    assert stage_parameters(decode_spec(spec), 0) * BYTES_A_VALUE > CAP
    with trio.fail_after(PATIENCE_SECONDS):
        async with open_machine(tmp_path / "0", chain_id=CHAIN, worker_memory=CAP) as machine:
            await prepared(machine, text, [machine])
            try:
                await machine.open_slot(assignment(spec, 0, [machine]))
            except WorkerFailed as error:
                assert "memory" in str(error)  # noqa: PT017 - it may also come a little later
                return
            # Moments and gradients have no memory before they are written.
            await machine.grant(JOB, SlotId(0, 0), 1)
            async for event in machine.events:
                assert not isinstance(event, SegmentDone)
                if isinstance(event, SlotFailed):
                    assert event.cause is FailureCause.OUT_OF_MEMORY
                    return


async def test_three_capped_workers_train_it(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    spec = spec_of(STAGES)
    program = decode_spec(spec)
    peaks: dict[int, int] = {}
    done: dict[int, int] = {}

    async def sample(machines: list[Machine]) -> None:
        while True:
            for stage, machine in enumerate(machines):
                pid = machine.worker_pid(JOB, SlotId(0, stage))
                if pid is not None:
                    peaks[stage] = max(peaks.get(stage, 0), unique_bytes(pid))
            await trio.sleep(SAMPLE_SECONDS)

    async def follow(machine: Machine, stage: int) -> None:
        async for event in machine.events:
            assert not isinstance(event, SlotFailed), event
            if isinstance(event, SegmentDone):
                done[stage] = event.record.segment + 1
                if done[stage] == program.rounds:
                    return

    with trio.fail_after(PATIENCE_SECONDS):
        async with (
            open_machine(tmp_path / "0", chain_id=CHAIN, worker_memory=CAP) as first,
            open_machine(tmp_path / "1", chain_id=CHAIN, worker_memory=CAP) as second,
            open_machine(tmp_path / "2", chain_id=CHAIN, worker_memory=CAP) as third,
        ):
            machines = [first, second, third]
            for machine in machines:
                await prepared(machine, text, machines)
            async with trio.open_nursery() as watching:
                watching.start_soon(sample, machines)
                async with trio.open_nursery() as nursery:
                    for stage, machine in enumerate(machines):
                        nursery.start_soon(machine.open_slot, assignment(spec, stage, machines))
                async with trio.open_nursery() as nursery:
                    for stage, machine in enumerate(machines):
                        nursery.start_soon(follow, machine, stage)
                        await machine.grant(JOB, SlotId(0, stage), program.rounds)
                watching.cancel_scope.cancel()
    assert done == dict.fromkeys(range(3), program.rounds)
    whole = sum(stage_parameters(program, stage) for stage in range(3)) * BYTES_A_VALUE
    assert max(peaks.values()) < CAP < whole
    for stage, peak in peaks.items():
        assert peak > stage_parameters(program, stage) * BYTES_A_VALUE * 0.9, (stage, peaks)
