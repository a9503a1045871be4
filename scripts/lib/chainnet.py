"""A network of real chain nodes, each a process (`chainpeer.py`), driven from here."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio
from chainpeer import SIZE

from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.genesis import Genesis, chain_id, genesis_bytes, genesis_from_document
from tdmld.chain.transactions import Transfer, sign_transaction

PEER = Path(__file__).with_name("chainpeer.py")
START_BALANCE = 1_000_000_000


def key_of(name: str, index: int) -> KeyPair:
    return KeyPair(sha256(f"{name} {index}".encode()))


def owner_keys(count: int) -> list[KeyPair]:
    return [key_of("owner", index) for index in range(count)]


def make_genesis(accounts: Sequence[KeyPair], validators: int, **parameters: int) -> Genesis:
    """Default parameters, but for those given; every validator has the same stake."""
    rows = [[accounts[i].address, key_of("node", i).address, 100] for i in range(validators)]
    return genesis_from_document(
        {
            "chain": "bench",
            "time": "2026-01-01T00:00:00Z",
            "accounts": [[owner.address, START_BALANCE] for owner in accounts],
            "validators": rows,
            "parameters": parameters,
        }
    )


@dataclass(frozen=True, slots=True)
class BlockSeen:
    """A node executed a block."""

    node: int
    height: int
    hash: bytes
    transactions: int
    time_ns: int
    ids: list[bytes]
    failed: int


class Peer:
    """One node; it may be killed and started again."""

    def __init__(
        self, index: int, home: Path, genesis: Path, saw: Callable[[BlockSeen], None], follow: bool
    ) -> None:
        self.index, self.key, self._follow = index, key_of("node", index), follow
        self.directory = home / f"n{index}"
        self._genesis, self._saw = genesis, saw
        self._number = 0
        self._answers: dict[int, Any] = {}
        self._lock = trio.Lock()
        self.alive = False
        self.addresses: list[str] = []
        self.process: trio.Process

    async def start(self, nursery: trio.Nursery) -> None:
        self.directory.mkdir(exist_ok=True)
        with (self.directory / "stderr").open("ab") as errors:
            self.process = await trio.lowlevel.open_process(
                [
                    sys.executable,
                    str(PEER),
                    str(self.directory),
                    self.key.seed.hex(),
                    str(self._genesis),
                    *(["--follow"] if self._follow else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._ready, self._news = trio.Event(), trio.Event()  # the old reader sets no new event
        nursery.start_soon(self._read, self.process)

    async def ready(self) -> bool:
        """Whether it came up (False: it ended first)."""
        await self._ready.wait()
        return self.alive

    async def _read(self, process: trio.Process) -> None:
        rest = bytearray()
        assert process.stdout is not None
        try:
            async for chunk in process.stdout:
                rest += chunk
                start = 0
                while len(rest) >= start + 4:
                    end = start + 4 + SIZE.unpack_from(rest, start)[0]
                    if len(rest) < end:
                        break
                    self._hear(msgspec.msgpack.decode(bytes(rest[start + 4 : end])))
                    start = end
                del rest[:start]
        except trio.BrokenResourceError:
            pass
        if self.process is process:  # it may have been started again
            self.alive = False
            self._ready.set()
            self._news.set()

    def _hear(self, message: list[Any]) -> None:
        match message:
            case ["block", height, key, count, now, ids, failed]:
                self._saw(BlockSeen(self.index, height, key, count, now, ids, failed))
            case ["answer", number, value]:
                self._answers[number] = value
                self._news.set()
            case ["ready", _, addresses]:
                self.addresses, self.alive = addresses, True
                self._ready.set()

    async def tell(self, name: str, argument: object) -> int:
        """Send without waiting. A node that is gone hears nothing."""
        self._number += 1
        number = self._number
        raw = msgspec.msgpack.encode([number, name, argument])
        assert self.process.stdin is not None
        async with self._lock:
            try:
                await self.process.stdin.send_all(SIZE.pack(len(raw)) + raw)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.alive = False
        return number

    async def ask(self, name: str, argument: object = None) -> Any:
        """The answer, or None from a node that is gone."""
        number = await self.tell(name, argument)
        while number not in self._answers:
            if not self.alive:
                return None
            self._news = trio.Event()
            await self._news.wait()
        return self._answers.pop(number)

    def kill(self) -> None:
        self.alive = False
        self.process.send_signal(signal.SIGKILL)

    async def stop(self) -> None:
        """End it orderly."""
        assert self.process.stdin is not None
        await self.process.stdin.aclose()
        with trio.move_on_after(20):
            await self.process.wait()

    def complaints(self) -> str:
        path = self.directory / "stderr"
        return path.read_text() if path.exists() else ""


class Network:
    """All nodes, and who must hear of their blocks."""

    def __init__(self, home: Path, nursery: trio.Nursery, genesis: Genesis) -> None:
        self.home, self._nursery, self.genesis = home, nursery, genesis
        self.chain_id = chain_id(genesis)
        self._file = home / "genesis.json"
        self._file.write_bytes(genesis_bytes(genesis))
        self.peers: list[Peer] = []
        self.on_block: Callable[[BlockSeen], None] = lambda _: None

    async def start(self, count: int, *, follow: bool = False) -> list[Peer]:
        """Start so many more nodes and introduce them to all."""
        first = len(self.peers)
        for index in range(first, first + count):
            peer = Peer(index, self.home, self._file, lambda seen: self.on_block(seen), follow)
            self.peers.append(peer)
            await peer.start(self._nursery)
        for peer in self.peers[first:]:
            if not await peer.ready():
                raise RuntimeError(f"node {peer.index} did not start: {peer.complaints()}")
        for peer in self.peers[first:]:
            await self.introduce(peer)
        return self.peers[first:]

    async def restart(self, peer: Peer) -> None:
        """Start a node that has ended; `ready` and `introduce` are for the caller."""
        await peer.start(self._nursery)

    async def introduce(self, peer: Peer) -> None:
        """Tell a node where the others are, and them where it is."""
        others = [other for other in self.peers if other is not peer and other.alive]
        await peer.ask("peers", [[o.key.address, o.addresses] for o in others])
        for other in others:
            await other.tell("peers", [[peer.key.address, peer.addresses]])

    async def statuses(self) -> list[dict[str, Any]]:
        found = [await peer.ask("status") for peer in self.peers if peer.alive]
        return [row for row in found if row is not None]

    async def linked(self) -> None:
        """Wait for a full mesh of validators."""
        while True:
            rows = await self.statuses()
            if all(row["links"] == len(self.peers) - 1 for row in rows):
                return
            await trio.sleep(0.1)

    async def rest(self) -> list[dict[str, Any]]:
        """Wait until all nodes rest on one head whose header commits its state."""
        while True:
            rows = await self.statuses()
            heads = {row["hash"] for row in rows}
            if len(heads) == 1 and all(row["closed"] and not row["pool"] for row in rows):
                return rows
            await trio.sleep(0.05)


class Wallets:
    """Owners with their next nonces; transfers between them."""

    def __init__(self, keys: Sequence[KeyPair], chain: bytes, others: Sequence[bytes] = ()) -> None:
        self.keys, self._chain = keys, chain
        self._to = others or [key.public for key in keys]
        self._nonces = [0] * len(keys)

    def transfer(self, sender: int) -> bytes:
        nonce = self._nonces[sender]
        self._nonces[sender] += 1
        to = self._to[(sender * 7919 + nonce * 104729 + 1) % len(self._to)]
        payload = Transfer(to, 1 + nonce % 1000)
        return sign_transaction(self.keys[sender], self._chain, payload, nonce=nonce, fee=10)


@asynccontextmanager
async def network(genesis: Genesis, home: Path | None = None) -> AsyncIterator[Network]:
    """A place for nodes; all of them are ended at the end."""
    with tempfile.TemporaryDirectory(prefix="tdmld-chain-") as temporary:
        async with trio.open_nursery() as nursery:
            net = Network(home or Path(temporary), nursery, genesis)
            try:
                yield net
            finally:
                for peer in net.peers:
                    if hasattr(peer, "process"):
                        peer.process.kill()
                nursery.cancel_scope.cancel()


def now_ns() -> int:
    return time.monotonic_ns()
