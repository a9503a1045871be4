"""kill -9 of real nodes of the network, each twice at random times, and a check of what is left.

Every node is a process: a host, signed peer records, an address book on disk, one gossip topic, on
which it says something every few seconds. All know two bootstrap nodes, which are killed like the
others; one more node, the observer, is never killed. After the last restart:

    component_s         seconds until the connections of all nodes make one component
    messages_s          seconds until every node has every message of the minute before that
    messages_missing    those of the last minute that a node lacks then, summed over all nodes.
                        Counted is what was published 5 s ago or more by anybody, killed since or
                        not, and is known to one node that lives. A node has what it said itself
    links               connections of the node that has fewest
    rss_slope           private memory, MB a minute, the most of all nodes, and tasks_growth,
                        descriptors_growth: between two quiet moments under the same load
    observer            the same since before the first kill, of the node that saw all of them

Fails when after 30 s there is not one component or a message is missing, or when tasks, descriptors
or memory are not flat (tolerances: TASKS, DESCRIPTORS, RSS_MB_PER_MINUTE, OBSERVER_MB).
"""

import argparse
import json
import multiprocessing
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import netpeer
import trio
from report import Report, say

ALLOWED_SECONDS = 30.0
MINUTE = 60.0
FRESH_SECONDS = 5.0
"""What was said so lately may still be on its way."""
TASKS, DESCRIPTORS = 4, 4
"""Exchanges that just go on."""
RSS_MB_PER_MINUTE = 2.0
OBSERVER_MB = 8.0
"""Its store of recent gossip fills, and the allocator keeps what a storm of reconnecting took."""
FILLED_SECONDS = 95.0
"""From the last restart: by then every store of recent gossip drops as much as it takes."""
SAMPLES = 8
STABLE = 5
START_SECONDS = 60.0
DOWN_SECONDS = (0.0, 3.0)
PORTS = range(21_000, 31_000)
"""Below those that systems give to outgoing connections: a killed node's port stays free."""


class ChaosFailed(Exception):
    """A check did not hold, or a node did not come up."""


def free_port(taken: set[int], rng: random.Random) -> int:
    while True:
        port = rng.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in taken:
            taken.add(port)
            return port


class Peer:
    """One node; it may be killed and started again."""

    def __init__(self, settings: netpeer.Settings, context: Any) -> None:
        self.settings = settings
        self.address = netpeer.key_of(settings.index).address
        self._context = context
        self._rest = b""
        self._stream: trio.SocketStream
        self._process: Any

    async def start(self) -> None:
        """Returns when it listens."""
        self.settings.directory.mkdir(exist_ok=True)
        ours, theirs = socket.socketpair()
        process = self._context.Process(
            target=netpeer.main, args=(self.settings, theirs), daemon=True
        )
        await trio.to_thread.run_sync(process.start)
        theirs.close()
        self._process, self._rest = process, b""
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with trio.move_on_after(START_SECONDS):
            await self._line()
            return
        raise ChaosFailed(f"node {self.settings.index} did not start: {self.log()}")

    async def kill(self) -> None:
        """kill -9; returns when the process is gone, and with it its sockets."""
        self._process.kill()
        await trio.lowlevel.wait_readable(self._process.sentinel)
        self._process.join()
        await self._stream.aclose()

    async def ask(self, question: str) -> dict[str, Any]:
        await self._stream.send_all(question.encode() + b"\n")
        with trio.move_on_after(START_SECONDS):
            return dict(json.loads(await self._line()))
        raise ChaosFailed(f"node {self.settings.index} does not answer: {self.log()}")

    async def _line(self) -> bytes:
        while b"\n" not in self._rest:
            chunk = await self._stream.receive_some(1 << 16)
            if not chunk:
                raise ChaosFailed(f"node {self.settings.index} has ended: {self.log()}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def log(self) -> str:
        path = self.settings.directory / "log"
        return path.read_text()[-3000:] if path.exists() else "it wrote no log"


# ---- the checks ----------------------------------------------------------------------------------


def components(links: Mapping[str, Sequence[str]]) -> int:
    """How many parts the graph of nodes and their connections has. One that only one end knows of
    is none."""
    count, seen = 0, set[str]()
    for start in links:
        if start in seen:
            continue
        count += 1
        waiting = [start]
        seen.add(start)
        while waiting:
            here = waiting.pop()
            for other in links[here]:
                if other not in seen and here in links.get(other, ()):
                    seen.add(other)
                    waiting.append(other)
    return count


def missing(heard: Mapping[int, Mapping[str, float]], since: float, until: float) -> list[str]:
    """What somebody has of what was said in this time, and somebody else has not: "node: message".
    A message's name begins with the index of its author."""
    everything = {
        name for has in heard.values() for name, said in has.items() if since <= said <= until
    }
    return [
        f"{index}: {name}"
        for index, has in heard.items()
        for name in sorted(everything - has.keys())
        if int(name.split(".")[0]) != index
    ]


class Network:
    """The nodes, and what is asked of all of them."""

    def __init__(self, options: argparse.Namespace, home: Path, rng: random.Random) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        # Not `netpeer`: the server does not look into the directory of this script.
        context.set_forkserver_preload(["tdmld.node.peers"])
        count = options.nodes + 1
        taken: set[int] = set()
        ports = [free_port(taken, rng) for _ in range(count)]
        bootstrap = tuple(enumerate(ports[:2]))
        self.peers = [
            Peer(
                netpeer.Settings(
                    index, ports[index], bootstrap, home / f"n{index}", options.period
                ),
                context,
            )
            for index in range(count)
        ]
        self.kills: Counter[str] = Counter()
        self._rng = rng

    async def start(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self.peers:
                nursery.start_soon(peer.start)

    async def stop(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self.peers:
                nursery.start_soon(peer.kill)

    async def ask(self, question: str = "status") -> dict[int, dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}

        async def one(peer: Peer) -> None:
            answers[peer.settings.index] = await peer.ask(question)

        async with trio.open_nursery() as nursery:
            for peer in self.peers:
                nursery.start_soon(one, peer)
        return answers

    def parts(self, answers: Mapping[int, Mapping[str, Any]]) -> int:
        return components({p.address: answers[p.settings.index]["connected"] for p in self.peers})

    async def weigh(self) -> dict[int, dict[str, float]]:
        """The least of some looks: what goes on at one moment does not count."""
        least: dict[int, dict[str, float]] = {}
        for _ in range(SAMPLES):
            for index, answer in (await self.ask("weigh")).items():
                seen = least.setdefault(index, {})
                weights = {name: answer[name] for name in ("bytes", "tasks", "descriptors")}
                weights["links"] = len(answer["connected"])
                for name, value in weights.items():
                    seen[name] = min(seen.get(name, float("inf")), value)
            await trio.sleep(1)
        return least

    async def torment(self, peer: Peer, kills: int, seconds: float) -> None:
        """Kill one node so many times in this time."""
        moments = sorted(self._rng.uniform(0, seconds) for _ in range(kills))
        began = trio.current_time()
        for moment in moments:
            await trio.sleep_until(began + moment)
            await peer.kill()
            self.kills["bootstrap" if peer.settings.index < 2 else "node"] += 1
            await trio.sleep(self._rng.uniform(*DOWN_SECONDS))
            await peer.start()


async def settle(net: Network) -> None:
    """Until all are one component, and the number of connections stays as it is."""
    counts: list[int] = []
    parts = 0
    with trio.move_on_after(2 * ALLOWED_SECONDS):
        while len(counts) < STABLE or len(set(counts[-STABLE:])) > 1 or parts > 1:
            await trio.sleep(1)
            answers = await net.ask()
            parts = net.parts(answers)
            counts.append(sum(len(answer["connected"]) for answer in answers.values()))
        return
    raise ChaosFailed(f"the nodes did not come to rest: {parts} parts, connections {counts}")


async def watch(net: Network, found: dict[str, Any]) -> None:
    """Look until everything holds, for at most 30 s from the last restart."""
    began, restarted = trio.current_time(), time.time()
    found |= {"component_s": None, "messages_s": None}
    while True:
        answers = await net.ask()
        now, passed = time.time(), trio.current_time() - began
        heard = {index: answer["heard"] for index, answer in answers.items()}
        parts = net.parts(answers)
        if parts == 1 and found["component_s"] is None:
            found["component_s"] = round(passed, 1)
        if found["messages_s"] is None and not missing(heard, restarted - MINUTE, restarted):
            found["messages_s"] = round(passed, 1)
        lacking = missing(heard, now - MINUTE, now - FRESH_SECONDS)
        holds = parts == 1 and found["messages_s"] is not None and not lacking
        if holds or passed >= ALLOWED_SECONDS:
            break
        await trio.sleep(min(1.0, ALLOWED_SECONDS - passed))
    for text in lacking[:20]:
        say(f"missing at node {text}")
    everything = {
        name
        for has in heard.values()
        for name, said in has.items()
        if now - MINUTE <= said <= now - FRESH_SECONDS
    }
    found |= {
        "components": parts,
        "messages_missing": len(lacking),
        "messages_checked": len(everything),
        "delivered_twice": sum(answer["twice"] for answer in answers.values()),
        "dropped": sum(answer["dropped"] for answer in answers.values()),
    }


def growth(
    before: Mapping[int, Mapping[str, float]], after: Mapping[int, Mapping[str, float]], name: str
) -> float:
    """The most of all nodes."""
    return max(after[index][name] - before[index][name] for index in before)


async def run(options: argparse.Namespace, home: Path, found: dict[str, Any]) -> None:
    rng = random.Random(options.seed)
    net = Network(options, home, rng)
    observer = len(net.peers) - 1
    began = time.monotonic()
    await net.start()
    try:
        found["start_s"] = round(time.monotonic() - began, 1)
        await settle(net)
        say(f"{len(net.peers)} nodes are one component")
        await trio.sleep(options.quiet / 2)
        at_first = await net.weigh()
        async with trio.open_nursery() as nursery:
            for peer in net.peers[:observer]:
                nursery.start_soon(net.torment, peer, options.kills, options.spread)
        say(f"{net.kills.total()} kills")
        last = trio.current_time()
        found |= {"kills": net.kills.total(), "faults": dict(net.kills)}
        await watch(net, found)
        say(f"one component after {found['component_s']} s, messages {found['messages_s']} s")
        if options.quiet:
            await trio.sleep_until(last + FILLED_SECONDS)
        before = await net.weigh()
        await trio.sleep(options.quiet)
        after = await net.weigh()
    finally:
        with trio.CancelScope(shield=True):
            await net.stop()
    minutes = (options.quiet + SAMPLES) / 60
    found |= {
        "links": min(row["links"] for row in after.values()),
        "rss_mb": round(sum(row["bytes"] for row in after.values()) / len(after) / 1e6, 1),
        "rss_slope": round(growth(before, after, "bytes") / 1e6 / minutes, 2),
        "tasks": max(row["tasks"] for row in after.values()),
        "tasks_growth": growth(before, after, "tasks"),
        "descriptors": max(row["descriptors"] for row in after.values()),
        "descriptors_growth": growth(before, after, "descriptors"),
        "observer": {
            "rss_growth_mb": round(
                (after[observer]["bytes"] - at_first[observer]["bytes"]) / 1e6, 2
            ),
            "tasks_growth": after[observer]["tasks"] - at_first[observer]["tasks"],
            "descriptors_growth": after[observer]["descriptors"]
            - at_first[observer]["descriptors"],
        },
    }
    check(found, weighed=options.quiet > 0)


def check(found: Mapping[str, Any], *, weighed: bool) -> None:
    """Raise ChaosFailed for what does not hold. `weighed`: the moments were far enough apart."""
    observer = found["observer"]
    claims = {
        "one component within 30 s": found["component_s"] is not None and found["components"] == 1,
        "no message missing": found["messages_missing"] == 0 and found["messages_checked"] > 0,
        "tasks flat": found["tasks_growth"] <= TASKS,
        "descriptors flat": found["descriptors_growth"] <= DESCRIPTORS,
        "the observer's tasks flat": observer["tasks_growth"] <= TASKS,
        "the observer's descriptors flat": observer["descriptors_growth"] <= DESCRIPTORS,
        "memory flat": not weighed or found["rss_slope"] <= RSS_MB_PER_MINUTE,
        "the observer's memory flat": not weighed or observer["rss_growth_mb"] <= OBSERVER_MB,
    }
    broken = [claim for claim, holds in claims.items() if not holds]
    if broken:
        raise ChaosFailed("; ".join(broken))


def leaves(group: BaseExceptionGroup[ChaosFailed]) -> list[BaseException]:
    """The exceptions in a group of groups."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="of each node")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spread", type=float, default=60.0, help="seconds for all kills")
    parser.add_argument("--period", type=float, default=8.0, help="seconds between its messages")
    parser.add_argument(
        "--quiet", type=float, default=60.0, help="seconds between the two quiet moments"
    )
    options = parser.parse_args(arguments)
    report = Report("scripts/chaos network")
    found: dict[str, Any] = {"seed": options.seed, "nodes": options.nodes}
    failed = False
    with tempfile.TemporaryDirectory(prefix="tdmld-chaos-") as home:
        try:
            trio.run(run, options, Path(home), found)
        except* ChaosFailed as group:
            for error in leaves(group):
                say(f"FAILED: {error}")
            failed = True
    report.document |= found
    report.finish(options.json)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
