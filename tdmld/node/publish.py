"""Taking a job's content from its submitter: text, given weights, spec.

The text of a `split` job is cut and checked like any other, but sealed under a key that is given to
nobody: only this node's own worker of slot 0 gets it. Nor does what slot 0 begins with leave this
machine (`workers.shared_roots`).
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from tdmld.node.chainerrors import ServiceBusy, StoreError
from tdmld.node.chainservice import ChainService
from tdmld.node.errors import CarrierUnavailable, MachineError
from tdmld.node.machine import Machine
from tdmld.node.seal import sealing
from tdmld.rpc.errors import NotReady, Refused
from tdmld.rpc.types import Published
from tdmld.train.errors import SpecError, TrainError
from tdmld.train.pretrained import Pretrained
from tdmld.train.spec import Spec, decode_spec
from tdmld.train.specfields import GivenInit


def readable_spec(text: str) -> tuple[bytes, Spec]:
    """The bytes and the checked spec that an RPC brought; Refused."""
    try:
        raw = text.encode("ascii")
        return raw, decode_spec(raw)
    except (SpecError, UnicodeEncodeError) as error:
        raise Refused(f"the spec is malformed: {error}") from error


async def publish(
    machine: Machine,
    chain: ChainService,
    spec: str,
    text_path: str,
    given_path: str,
    scratch: Path,
) -> Published:
    """Keep a job's content for its members, and tell the network the spec. `scratch`: a directory
    on the disk that holds the node's content. NotReady, Refused."""
    raw, wanted = readable_spec(spec)
    try:
        if isinstance(wanted.init, GivenInit):
            await _publish_given(machine, wanted, given_path, scratch)
        shards = await machine.import_text(Path(text_path), sealing(raw))
    except CarrierUnavailable as error:
        raise NotReady(str(error)) from error
    except MachineError as error:
        raise Refused(f"{text_path}: {error}") from error
    if tuple(shards) != tuple(wanted.shards):
        raise Refused(f"{text_path} is not the text of the spec: it was changed meanwhile")
    try:
        spec_id = await chain.publish_spec(raw)
    except (StoreError, ServiceBusy) as error:
        raise NotReady(str(error)) from error
    size = sum(size for _, size in shards)
    return Published(spec_id=spec_id.hex(), shards=len(shards), size=size)


async def _publish_given(machine: Machine, spec: Spec, directory: str, scratch: Path) -> None:
    if not directory:
        raise Refused("the spec goes on from given weights: name their directory, given_path")
    with TemporaryDirectory(dir=scratch, prefix="given-") as aside:
        try:
            files = await trio.to_thread.run_sync(_cut, spec, Path(directory), Path(aside))
            await machine.publish_given(files)
        except (TrainError, OSError) as error:
            raise Refused(f"{directory}: {error}") from error


def _cut(spec: Spec, directory: Path, aside: Path) -> Mapping[bytes, Path]:
    return Pretrained(directory).write_all(spec, aside)
