"""One chain node as a process: p2p host, store, ChainService; JSON lines on stdin and stdout.

python chain_node.py DIRECTORY SEED_HEX GENESIS_FILE
"""

import json
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio
from msgspec.structs import replace

from tdmld.chain.blocks import Kind, Vote, sign_block, sign_vote, turn, view_epoch
from tdmld.chain.crypto import KeyPair, address, public_key, sha256
from tdmld.chain.errors import ChainError
from tdmld.chain.genesis import Genesis, load_genesis
from tdmld.chain.ledger import recount
from tdmld.node import stakes
from tdmld.node.chainerrors import ChainSideError
from tdmld.node.chainservice import ChainService
from tdmld.node.chainwire import Proposal
from tdmld.node.store import ChainStore
from tdmld.node.views import validators
from tdmld.p2p import Host, PeerInfo, open_host


class Control:
    """The commands of a test."""

    def __init__(self, host: Host, service: ChainService, key: KeyPair) -> None:
        self._host = host
        self._service = service
        self._key = key

    async def peers(self, rows: list[Any]) -> None:
        for peer_id, addresses in rows:
            self._host.add_peer(PeerInfo(peer_id, tuple(addresses)))

    async def submit(self, raw: str) -> str:
        return (await self._service.submit(bytes.fromhex(raw))).hex()

    async def submit_many(self, raws: list[str]) -> int:
        for raw in raws:
            await self._service.submit(bytes.fromhex(raw))
        return len(raws)

    async def wait(self, transaction: str) -> list[Any]:
        receipt = await self._service.wait_for(bytes.fromhex(transaction))
        return [receipt.ok, receipt.reason]

    async def balance(self, owner: str) -> int:
        return self._service.state().account(public_key(owner)).balance

    async def publish_spec(self, raw: str) -> str:
        return (await self._service.publish_spec(raw.encode())).hex()

    async def fetch_spec(self, spec: str) -> str:
        return (await self._service.fetch_spec(bytes.fromhex(spec))).decode()

    async def root_at(self, height: int) -> str:
        return (self._service.store.root_at(height) or b"").hex()

    async def voters(self, height: int) -> list[str]:
        """Who signed the finalization of a height, if it has one of its own."""
        block, certificate = self._service.store.block(height), None
        if block is not None:
            certificate = self._service.store.certificate(height)
        if certificate is None:
            return []
        committee = self._service.store.committee(view_epoch(certificate.view))
        assert committee is not None
        return [address(committee.nodes[voter]) for voter, _ in certificate.signatures]

    async def seats(self, _: None) -> list[list[Any]]:
        """Of the present epoch: node, whether it leads, since when it is jailed."""
        found = validators(self._service.state(), self._service.committee.epoch)
        return [[seat.node, seat.leads, seat.jailed] for seat in found]

    async def headers(self, first: int) -> list[list[Any]]:
        """From a height on: views that were passed over before the block, and its proposer."""
        store, found = self._service.store, []
        for height in range(first, store.height + 1):
            block = store.block(height)
            assert block is not None
            header = block.header
            same = view_epoch(header.parent_view) == view_epoch(header.view)
            before = turn(header.parent_view) if same else 0
            found.append([turn(header.view) - before - 1, address(header.proposer)])
        return found

    async def stake(self, owner: str) -> Any:
        """What the RPC says of an owner's stake."""
        store, key = self._service.store, public_key(owner)
        found = stakes.stake(
            self._service.state(),
            self._service.genesis,
            key,
            store.height,
            store.head.header.time_ms,
            store.state_items(stakes.offences_of(key)),
        )
        return msgspec.to_builtins(found)

    async def burned(self, _: None) -> int:
        """After counting all money; InvariantViolation when some is missing."""
        return recount(self._service.store.state_items()).burned

    async def vote_twice(self, _: None) -> None:
        """From now on notarize another block, too, in every view: one key on two machines."""
        links, key = self._service._links, self._key
        chain_id, broadcast = self._service.store.chain_id, links.broadcast

        def twice(message: object) -> None:
            broadcast(message)
            if isinstance(message, Vote) and message.kind is Kind.NOTARIZE:
                other = sha256(message.hash)
                broadcast(
                    sign_vote(key, chain_id, message.kind, message.view, other, message.voter)
                )

        links.broadcast = twice

    async def lead_twice(self, _: None) -> None:
        """From now on show another block to every second validator when leading."""
        links, key = self._service._links, self._key
        chain_id, broadcast = self._service.store.chain_id, links.broadcast

        def twice(message: object) -> None:
            if not isinstance(message, Proposal):
                broadcast(message)
                return
            block = message.block
            header = replace(block.header, time_ms=block.header.time_ms + 1)
            other = Proposal(sign_block(key, chain_id, header, block.transactions), message.why)
            for index in links.indices:
                links.get(index).tell((message, other)[index % 2])

        links.broadcast = twice

    async def status(self, _: None) -> dict[str, Any]:
        service = self._service
        return {
            "height": service.height,
            "view": service.view,
            "hash": service.head_hash.hex(),
            "root": service.store.state_root.hex(),
            "closed": service.store.closed,
            "links": service.linked_validators,
            "connected": len(self._host.connected()),
            "pool": service.pool_size,
            "validating": service.validating,
            "epoch": service.committee.epoch,
            "validators": [address(node) for node in service.committee.nodes],
        }


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def answer(number: int, work: Callable[[], Awaitable[object]]) -> None:
    try:
        say({"id": number, "result": await work()})
    except (ChainError, ChainSideError) as error:
        say({"id": number, "error": f"{type(error).__name__}: {error}"})


async def main(directory: Path, seed: bytes, genesis: Genesis) -> None:
    with ChainStore(directory / "chain", genesis) as store:
        async with open_host(seed) as host, trio.open_nursery() as nursery:
            service = ChainService(host, store, genesis, KeyPair(seed))
            await nursery.start(service.run)
            control = Control(host, service, KeyPair(seed))
            say({"ready": host.peer_id, "addresses": host.addresses})
            async with trio.wrap_file(sys.stdin) as lines:
                async for line in lines:
                    number, name, argument = json.loads(line)
                    method = getattr(control, name)
                    nursery.start_soon(answer, number, lambda m=method, a=argument: m(a))
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    document = load_genesis(Path(sys.argv[3]).read_bytes())
    trio.run(main, Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), document)
