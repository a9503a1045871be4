"""One node of `chaos_network`: a host with signed peer records, an address book and one topic.

It says something every few seconds, remembers what it hears, and answers its controller over a
socket, a line of JSON each way. It lives in a process that was forked from a warm one.
"""

import gc
import json
import logging
import os
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tdmld.chain.crypto import KeyPair, sha256
from tdmld.node.peers import PeerService
from tdmld.p2p import GossipMessage, Host, PeerInfo, open_host

TOPIC = "/tdmld/chaos/1"
CHAIN = sha256(b"chaos network")
REMEMBERED_SECONDS = 120.0
PAYLOAD_BYTES = 300
LINE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Settings:
    """What a node is told when it starts."""

    index: int
    port: int
    bootstrap: tuple[tuple[int, int], ...]
    """(index, port) of the nodes that everybody knows."""
    directory: Path
    period: float
    """Mean seconds between two messages of a node."""


def key_of(index: int) -> KeyPair:
    return KeyPair(sha256(b"chaos node %d" % index))


def listen_address(port: int) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}"


def count_tasks() -> int:
    root = trio.lowlevel.current_root_task()
    waiting = [root] if root is not None else []
    count = 0
    while waiting:
        task = waiting.pop()
        count += 1
        for nursery in task.child_nurseries:
            waiting += nursery.child_tasks
    return count


def resident_bytes() -> int:
    """What this process has in memory for itself; what it shares with the warm one not counted."""
    gc.collect()
    fields = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in fields if line.startswith("Private_"))


class Node:
    def __init__(self, settings: Settings, control: socket.socket) -> None:
        self._settings = settings
        self._control = trio.SocketStream(trio.socket.from_stdlib_socket(control))
        self._life = time.time_ns()
        self._heard: dict[str, float] = {}
        """Message -> when it was published, unix time. Ours too."""
        self._twice = 0

    async def run(self) -> None:
        settings = self._settings
        key = key_of(settings.index)
        bootstrap = [
            PeerInfo(key_of(index).address, (listen_address(port),))
            for index, port in settings.bootstrap
        ]
        async with (
            open_host(key.seed, [listen_address(settings.port)]) as host,
            trio.open_nursery() as nursery,
        ):
            channel = await host.subscribe(TOPIC, limit=1024, validate=lambda *_: True)
            peers = PeerService(host, key, CHAIN, settings.directory / "peers.json", bootstrap)
            nursery.start_soon(peers.run)
            nursery.start_soon(self._hear, channel)
            nursery.start_soon(self._talk, host)
            peers.announce(key.public, (), peers.now_ms())
            await self._say({"ready": os.getpid()})
            await self._obey(host, peers)
            nursery.cancel_scope.cancel()

    async def _talk(self, host: Host) -> None:
        number = 0
        while True:
            await trio.sleep(self._settings.period * random.uniform(0.5, 1.5))
            number += 1
            name = f"{self._settings.index}.{self._life}.{number}"
            said = time.time()
            self._heard[name] = said
            await host.publish(TOPIC, f"{name} {said!r}".encode().ljust(PAYLOAD_BYTES))

    async def _hear(self, channel: trio.MemoryReceiveChannel[GossipMessage]) -> None:
        async for message in channel:
            name, said = message.data.split()
            self._twice += name.decode() in self._heard
            self._heard[name.decode()] = float(said)

    async def _say(self, answer: Mapping[str, Any]) -> None:
        await self._control.send_all(json.dumps(answer).encode() + b"\n")

    async def _obey(self, host: Host, peers: PeerService) -> None:
        """Answer until the controller is gone or says stop."""
        rest = b""
        async for chunk in self._control:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line == b"stop":
                    return
                await self._say(self._status(host, peers, line == b"weigh"))

    def _status(self, host: Host, peers: PeerService, weigh: bool) -> dict[str, Any]:
        oldest = time.time() - REMEMBERED_SECONDS
        self._heard = {name: said for name, said in self._heard.items() if said > oldest}
        status: dict[str, Any] = {
            "heard": self._heard,
            "twice": self._twice,
            "dropped": host.gossip_dropped,
            "connected": sorted(host.connected()),
            "known": len(peers.book.records()),
        }
        if weigh:
            status |= {
                "bytes": resident_bytes(),
                "tasks": count_tasks(),
                "descriptors": len(os.listdir("/proc/self/fd")),
            }
        return status


def main(settings: Settings, control: socket.socket) -> None:
    """The life of one process."""
    logging.basicConfig(
        filename=settings.directory / "log",
        level=logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    random.seed()
    trio.run(Node(settings, control).run)
