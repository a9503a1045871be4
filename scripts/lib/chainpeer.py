"""One chain node as a process: the daemon's p2p host, RocksDB and ChainService, without the market,
the machine and the RPC. Length-prefixed MessagePack on stdin and stdout; ends when stdin does.

    python chainpeer.py DIRECTORY SEED_HEX GENESIS_FILE [--follow]

In:  [number, command, argument]
Out: ["answer", number, value] | ["ready", peer id, addresses]
     | ["block", height, hash, transactions, monotonic ns, sampled ids, failed]  when executed
"""

import os
import struct
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import trio

from tdmld.chain.blocks import Vote, block_hash, view_epoch
from tdmld.chain.crypto import KeyPair
from tdmld.chain.errors import ChainError, InvalidTransaction
from tdmld.chain.genesis import Genesis, load_genesis
from tdmld.node.chainerrors import ServiceBusy
from tdmld.node.chainlinks import Link
from tdmld.node.chainservice import ChainService
from tdmld.node.chainwire import ConsensusMessage, Proposal
from tdmld.node.store import ChainStore
from tdmld.p2p import Host, PeerInfo, open_host

SIGNED = struct.Struct("!BQI32s64s")
"""A line of `heard`: kind (3: proposal), view, voter's index, hash, signature."""
FULL = "pool is full"
SIZE = struct.Struct("!I")


class Control:
    """What the driver may ask."""

    def __init__(self, host: Host, service: ChainService, directory: Path) -> None:
        self._host, self._service = host, service
        self._directory = directory
        self._out = trio.lowlevel.FdStream(os.dup(sys.stdout.fileno()))
        self._saying = trio.Lock()
        self._mask = 255
        self._submit, self._submitted = trio.open_memory_channel[list[bytes]](10_000)
        self.refused = 0
        self.last_refusal = ""

    async def say(self, *message: object) -> None:
        raw = msgspec.msgpack.encode(message)
        async with self._saying:
            await self._out.send_all(SIZE.pack(len(raw)) + raw)

    async def answer(self, number: int, name: str, argument: Any) -> None:
        method = getattr(self, "do_" + name)
        await self.say("answer", number, await method(argument))

    # ---- commands ----------------------------------------------------------------------------

    async def do_peers(self, rows: list[Any]) -> None:
        for peer_id, addresses in rows:
            self._host.add_peer(PeerInfo(peer_id, tuple(addresses)))

    async def do_sample(self, mask: int) -> None:
        """Report the ids whose first byte has none of these bits."""
        self._mask = mask

    async def do_hear(self, _: None) -> None:
        """Write down every vote and proposal that comes in, for a check at the end."""
        validator = self._service._validator
        assert validator is not None
        links, store = validator.links, self._service.store
        log: BinaryIO = (self._directory / "heard").open("ab", buffering=0)
        inner = links._receive

        async def receive(link: Link, message: ConsensusMessage) -> None:
            match message:
                case Vote():
                    row = (int(message.kind), message.view, message.voter, message.hash)
                    log.write(SIGNED.pack(*row, message.signature))
                case Proposal(block, _):
                    header = block.header
                    committee = store.committee(view_epoch(header.view))
                    voter = None if committee is None else committee.index(header.proposer)
                    if voter is not None:
                        row = (3, header.view, voter, block_hash(header))
                        log.write(SIGNED.pack(*row, block.signature))
            await inner(link, message)

        links._receive = receive

    async def do_status(self, _: None) -> dict[str, Any]:
        service = self._service
        return {
            "height": service.height,
            "view": service.view,
            "hash": service.head_hash,
            "root": service.store.state_root,
            "closed": service.store.closed,
            "links": service.linked_validators,
            "pool": service.pool_size,
            "cpu": time.process_time(),
            "refused": self.refused,
            "last_refusal": self.last_refusal,
        }

    # ---- tasks -------------------------------------------------------------------------------

    async def submit(self) -> None:
        """Hand transactions over in order; a full pool is waited for."""
        async for raws in self._submitted:
            for raw in raws:
                while not await self._try(raw):  # noqa: ASYNC110  # as a client polls a full pool
                    await trio.sleep(0.01)

    async def _try(self, raw: bytes) -> bool:
        try:
            await self._service.submit(raw)
        except ServiceBusy:
            return False
        except InvalidTransaction as error:
            if FULL in str(error):
                return False
            self.refused, self.last_refusal = self.refused + 1, str(error)
        except ChainError as error:
            self.refused, self.last_refusal = self.refused + 1, str(error)
        return True

    async def blocks(self) -> None:
        async for applied in self._service.heads():
            now, mask = time.monotonic_ns(), self._mask
            ids = [receipt.id for receipt in applied.receipts if not receipt.id[0] & mask]
            failed = sum(not receipt.ok for receipt in applied.receipts)
            count = len(applied.receipts)
            await self.say("block", applied.height, applied.hash, count, now, ids, failed)

    async def listen(self, nursery: trio.Nursery) -> None:
        rest = bytearray()
        async for chunk in trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())):
            rest += chunk
            while len(rest) >= 4 and len(rest) >= 4 + (size := SIZE.unpack_from(rest)[0]):
                number, name, argument = msgspec.msgpack.decode(bytes(rest[4 : 4 + size]))
                del rest[: 4 + size]
                if name == "submit":
                    await self._submit.send(argument)
                else:
                    nursery.start_soon(self.answer, number, name, argument)


async def main(directory: Path, seed: bytes, genesis: Genesis, *, follow: bool) -> None:
    with ChainStore(directory / "chain", genesis) as store:
        async with open_host(seed) as host, trio.open_nursery() as nursery:
            service = ChainService(host, store, genesis, None if follow else KeyPair(seed))
            control = Control(host, service, directory)
            nursery.start_soon(control.blocks)
            await nursery.start(service.run)
            nursery.start_soon(control.submit)
            await control.say("ready", host.peer_id, list(host.addresses))
            await control.listen(nursery)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(
        lambda: main(
            Path(sys.argv[1]),
            bytes.fromhex(sys.argv[2]),
            load_genesis(Path(sys.argv[3]).read_bytes()),
            follow="--follow" in sys.argv,
        )
    )
