"""Five real validator processes and a follower: transfers, kill -9, catch-up."""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tdmld.chain.crypto import KeyPair
from tdmld.chain.genesis import Genesis, chain_id, genesis_bytes, genesis_from_document
from tdmld.chain.transactions import (
    Bond,
    Nominate,
    Payload,
    Register,
    Transfer,
    Unbond,
    Withdraw,
    sign_registration,
    sign_transaction,
)

pytestmark = pytest.mark.e2e

NODE = Path(__file__).with_name("chain_node.py")
OWNERS = [KeyPair(bytes([10 + i]) * 32) for i in range(6)]
NODES = [KeyPair(bytes([50 + i]) * 32) for i in range(6)]
START = 1_000_000


def make_genesis(validators: int = 5, interval_ms: int = 100, **parameters: object) -> Genesis:
    return genesis_from_document(
        {
            "chain": "chain-live-test",
            "time": "2026-01-01T00:00:00Z",
            "accounts": [[owner.address, START] for owner in OWNERS],
            "validators": [
                [OWNERS[i].address, NODES[i].address, 100 + i] for i in range(validators)
            ],
            "parameters": {"interval_ms": interval_ms, **parameters},
        }
    )


class NodeProcess:
    """A child process and its JSON lines."""

    def __init__(self, directory: Path, key: KeyPair, genesis: Path) -> None:
        self.key, self._directory, self._genesis = key, directory, genesis
        self._answers: dict[int, dict[str, Any]] = {}
        self._news = trio.Event()
        self._number = 0
        self._sending = trio.Lock()
        self.process: trio.Process

    async def start(self, nursery: trio.Nursery) -> None:
        self._directory.mkdir(exist_ok=True)
        with (self._directory / "stderr").open("ab") as errors:
            self.process = await trio.lowlevel.open_process(
                [
                    sys.executable,
                    str(NODE),
                    str(self._directory),
                    self.key.seed.hex(),
                    str(self._genesis),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._ready = trio.Event()
        nursery.start_soon(self._read)
        await self._ready.wait()

    async def _read(self) -> None:
        rest = b""
        assert self.process.stdout is not None
        async for chunk in self.process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "ready" in message:
                    self.addresses = message["addresses"]
                    self._ready.set()
                else:
                    self._answers[message["id"]] = message
            self._news.set()
            self._news = trio.Event()

    async def ask(self, name: str, argument: object = None) -> Any:
        self._number += 1
        number = self._number
        assert self.process.stdin is not None
        line = json.dumps([number, name, argument]).encode() + b"\n"
        async with self._sending:
            await self.process.stdin.send_all(line)
        while number not in self._answers:
            await self._news.wait()
        message = self._answers.pop(number)
        if "error" in message:
            raise RuntimeError(message["error"])
        return message["result"]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def complaints(self) -> str:
        return (self._directory / "stderr").read_text()


class Network:
    def __init__(self, path: Path, nursery: trio.Nursery, genesis: Genesis) -> None:
        self.genesis = genesis
        self.chain_id = chain_id(self.genesis)
        self._path, self._nursery = path, nursery
        self._file = path / "genesis.json"
        self._file.write_bytes(genesis_bytes(self.genesis))
        self.nodes: list[NodeProcess] = []
        self.nonces = [0] * len(OWNERS)

    async def start(self, count: int) -> None:
        first = len(self.nodes)
        for index in range(first, first + count):
            self.nodes.append(NodeProcess(self._path / f"n{index}", NODES[index], self._file))
        async with trio.open_nursery() as nursery:
            for node in self.nodes[first:]:
                nursery.start_soon(node.start, self._nursery)
        for node in self.nodes[first:]:
            await self.introduce(node)

    async def introduce(self, node: NodeProcess) -> None:
        """Tell a started node where everybody else is."""
        rows = [[other.key.address, other.addresses] for other in self.nodes if other is not node]
        await node.ask("peers", rows)

    async def restart(self, node: NodeProcess) -> None:
        await node.process.wait()
        await node.start(self._nursery)
        await self.introduce(node)
        for other in self.nodes:
            if other is not node:
                await other.ask("peers", [[node.key.address, node.addresses]])

    def transfer(self, sender: int, to: int, amount: int = 7) -> str:
        return self.sign(sender, Transfer(OWNERS[to].public, amount))

    def sign(self, sender: int, payload: Payload) -> str:
        nonce = self.nonces[sender]
        raw = sign_transaction(OWNERS[sender], self.chain_id, payload, nonce=nonce, fee=10)
        self.nonces[sender] += 1
        return raw.hex()

    async def do(self, node: NodeProcess, sender: int, payload: Payload) -> None:
        """A transaction that must succeed."""
        transaction = await node.ask("submit", self.sign(sender, payload))
        assert await node.ask("wait", transaction) == [True, ""]

    async def until(self, name: str, what: Any, nodes: list[NodeProcess]) -> list[Any]:
        """Poll status until `what(statuses)` holds."""
        while True:
            statuses = [await node.ask("status") for node in nodes]
            if what(statuses):
                return statuses
            await trio.sleep(0.05)

    async def agree(self, nodes: list[NodeProcess]) -> list[Any]:
        """Wait until the nodes rest on one head that commits its state."""
        return await self.until(
            "agree",
            lambda rows: len({row["hash"] for row in rows}) == 1 and all(r["closed"] for r in rows),
            nodes,
        )


@asynccontextmanager
async def network(
    path: Path, seconds: float = 60, genesis: Genesis | None = None
) -> AsyncIterator[Network]:
    with trio.fail_after(seconds):
        async with trio.open_nursery() as nursery:
            net = Network(path, nursery, genesis or make_genesis())
            try:
                await net.start(5)
                await net.until(
                    "linked", lambda rows: all(row["links"] == 4 for row in rows), net.nodes
                )
                yield net
            finally:
                for node in net.nodes:
                    node.kill()
                nursery.cancel_scope.cancel()


async def test_transfers_are_final_everywhere_and_the_chain_rests(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        for index, node in enumerate(net.nodes):
            transaction = await node.ask("submit", net.transfer(index, 5))
            assert await node.ask("wait", transaction) == [True, ""]
        rows = await net.agree(net.nodes)
        assert len({row["root"] for row in rows}) == 1
        for node in net.nodes:
            assert await node.ask("balance", OWNERS[5].address) == START + 5 * 7
        await trio.sleep(0.5)  # several intervals: nothing may be made in them
        assert [row["height"] for row in await net.agree(net.nodes)] == [rows[0]["height"]] * 5
        assert not [node.complaints() for node in net.nodes if node.complaints()]


async def test_a_killed_validator_rejoins_and_never_signs_twice(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        victim, others = net.nodes[2], [node for node in net.nodes if node is not net.nodes[2]]
        stop = trio.Event()
        sent: list[str] = []

        async def load() -> None:
            while not stop.is_set():
                for sender in (0, 1):
                    node = others[sender]
                    transaction = await node.ask("submit", net.transfer(sender, 5, 1))
                    sent.append(transaction)
                    await node.ask("wait", transaction)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await net.until("moving", lambda rows: rows[0]["height"] >= 3, others)
            victim.kill()
            await net.restart(victim)
            behind = (await others[0].ask("status"))["height"]
            await net.until("caught up", lambda rows: rows[0]["height"] > behind, [victim])
            stop.set()
        rows = await net.agree(net.nodes)
        assert len({row["root"] for row in rows}) == 1
        assert await victim.ask("balance", OWNERS[5].address) == START + len(sent)
        for node in net.nodes:
            assert "signed twice" not in node.complaints()
            assert "Error" not in node.complaints()


async def test_a_sixth_node_follows_and_its_transactions_count(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        for sender in range(3):
            transaction = await net.nodes[0].ask("submit", net.transfer(sender, 5))
            await net.nodes[0].ask("wait", transaction)
        await net.start(1)
        follower = net.nodes[5]
        await net.agree(net.nodes)
        assert await follower.ask("balance", OWNERS[5].address) == START + 3 * 7
        transaction = await follower.ask("submit", net.transfer(4, 5))
        assert await follower.ask("wait", transaction) == [True, ""]
        rows = await net.agree(net.nodes)
        assert len({row["root"] for row in rows}) == 1
        spec = await follower.ask("publish_spec", "{}")
        assert await net.nodes[1].ask("fetch_spec", spec) == "{}"


async def test_validators_change_while_the_chain_runs(tmp_path: Path) -> None:
    """One unbonds and leaves, a sixth bonds and joins; nobody is started again."""
    genesis = make_genesis(interval_ms=20, epoch_blocks=5, unbonding=[3, 1])
    leaver, joiner = 4, 5
    async with network(tmp_path, 90, genesis) as net:
        await net.start(1)
        nodes, new = net.nodes, net.nodes[joiner]
        stop = trio.Event()

        async def load() -> None:
            """Blocks are made on demand: epochs need some."""
            while not stop.is_set():
                await net.do(nodes[1], 1, Transfer(OWNERS[0].public, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            height = (await nodes[0].ask("status"))["height"] + 30
            key, owner = NODES[joiner], OWNERS[joiner]
            proof = sign_registration(key, net.chain_id, owner.public, height)
            await net.do(new, joiner, Register(key.public, height, proof))
            await net.do(new, joiner, Bond("vote", 105))
            await net.do(new, joiner, Nominate(key.public))
            await net.do(nodes[leaver], leaver, Unbond("vote", 104))
            await net.until("joined", lambda rows: rows[0]["validating"], [new])
            await net.until("left", lambda rows: not rows[0]["validating"], [nodes[leaver]])
            found: list[str] = []
            while key.address not in found:
                found = await new.ask("voters", (await new.ask("status"))["height"])
                await trio.sleep(0.02)
            nodes[0].kill()  # now the new validator's vote is needed
            others = nodes[1:]
            after = (await nodes[1].ask("status"))["height"] + 12
            await net.until("goes on", lambda rows: min(r["height"] for r in rows) > after, others)
            stop.set()
        before = await nodes[1].ask("balance", OWNERS[leaver].address)
        await net.do(nodes[leaver], leaver, Withdraw())
        assert await nodes[leaver].ask("balance", OWNERS[leaver].address) == before + 104 - 10
        rows = await net.agree(others)
        assert len({row["root"] for row in rows}) == 1
        expected = sorted(NODES[i].address for i in (0, 1, 2, 3, joiner))
        assert all(sorted(row["validators"]) == expected for row in rows)
        assert all("Error" not in node.complaints() for node in others)
