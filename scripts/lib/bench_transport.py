"""How fast messages move between two processes: raw sockets, raw TLS, stock libp2p, ours.

Every stack has two processes of its own that stay up for the whole run; the stacks are measured in
turn, round after round, and ratios are taken inside a round. Parts (choose with --only):
  bulk     64 KiB, 1 MiB and 64 MiB messages, each answered: MB/s, CPU seconds a GB at both ends
  trips    a 1 KiB round trip on an open stream, alone and while 64 MiB messages flow
  wan      both over an emulated line (scripts/wan), by default 50 ms and 100 Mbit/s
  apart    what a link adds to the transport: log ring, digests, signatures
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import trio
from report import ROOT, Report, say

from tdmld.chain.crypto import KeyPair
from tdmld.node.control import Link
from tdmld.node.link import LinkSigner, Place
from tdmld.node.ring import SlotRing
from tdmld.train.digest import digest

LIB = Path(__file__).parent
PARTS = ("bulk", "trips", "wan", "apart")
STACKS = ("raw", "tls", "stock", "ours")
WAN_STACKS = ("raw", "stock", "ours")
COUNTS = {"64kib": (64 << 10, 400), "1mib": (1 << 20, 100), "64mib": (64 << 20, 4)}
LOAD = 64 << 20
TRIPS, WAN_TRIPS = 200, 20
WARM_SECONDS = 0.3
WAN_MESSAGE = 32 << 20
WAN_WARM_SECONDS = 1.0
"""Until a congestion window has opened on a line of 50 ms."""
FRAME_BYTES, FRAMES = 8 << 20, 16
"""What is logged, hashed and signed apart."""
SECONDS_PER_PHASE = 120.0


class Pair:
    """The two ends of one stack; the dialling one obeys."""

    def __init__(self, stack: str, listening: "Child", host: str, port: int, peer: str) -> None:
        self._listening = listening
        self._dialling = Child("transportpeer.py", stack, "dial", host, str(port), peer)
        self._dialling.line()

    def ask(self, command: str, **arguments: Any) -> dict[str, float]:
        self._dialling.say([command, arguments])
        answer: dict[str, float] = self._dialling.line()
        return answer

    def close(self) -> None:
        self._dialling.close()
        self._listening.close()


class Child:
    """A process that answers JSON lines."""

    def __init__(self, program: str, *arguments: str) -> None:
        self._name = " ".join((program, *arguments[:2]))
        self._process = subprocess.Popen(
            [sys.executable, str(LIB / program), *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def say(self, value: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchFailed(f"{self._name} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class BenchFailed(Exception):
    """A process of the measurement ended before its time."""


@contextmanager
def pair_of(stack: str, line: list[str] | None = None) -> Iterator[Pair]:
    """Both ends of a stack; `line`: options of the emulated link between them."""
    with ExitStack() as ends:
        listening = Child("transportpeer.py", stack, "listen")
        ends.callback(listening.close)
        host, port, peer = listening.line()
        if line is not None:
            host, port = ends.enter_context(wan_to(host, port, line))
        pair = Pair(stack, listening, host, port, peer)
        ends.callback(pair.close)
        yield pair


@contextmanager
def wan_to(host: str, port: int, line: list[str]) -> Iterator[tuple[str, int]]:
    command = [sys.executable, str(LIB / "wan.py"), "--to", f"{host}:{port}", *line]
    command += ["--seconds", "3600"]
    proxy = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert proxy.stderr is not None
        found = re.search(r"listening on (\S+):(\d+)", proxy.stderr.readline())
        if found is None:
            raise BenchFailed("the emulated link did not start")
        yield found[1], int(found[2])
    finally:
        proxy.kill()
        proxy.wait()
        proxy.stderr.close()


Samples = dict[str, list[float]]


def add(samples: Samples, name: str, value: float) -> None:
    samples.setdefault(name, []).append(value)


def bulk(pairs: dict[str, Pair], samples: Samples) -> None:
    for size, (length, count) in COUNTS.items():
        for stack, pair in pairs.items():
            for name, value in pair.ask("bulk", size=length, count=count).items():
                add(samples, f"{name} {stack} {size}", value)


def trips(pairs: dict[str, Pair], samples: Samples) -> None:
    for stack, pair in pairs.items():
        alone = pair.ask("trips", count=TRIPS, load=0)
        loaded = pair.ask("trips", count=TRIPS, load=LOAD, warm=WARM_SECONDS)
        keep_trips(samples, stack, alone, loaded)


def keep_trips(
    samples: Samples, name: str, alone: dict[str, float], loaded: dict[str, float]
) -> None:
    add(samples, f"rtt_idle_ms {name}", alone["p50_ms"])
    add(samples, f"rtt_loaded_ms {name}", loaded["p50_ms"])
    add(samples, f"rtt_loaded_p90_ms {name}", loaded["p90_ms"])
    add(samples, f"rtt_loaded_over_idle {name}", loaded["p50_ms"] / alone["p50_ms"])


def wan(pairs: dict[str, Pair], samples: Samples, megabits: float) -> None:
    for stack, pair in pairs.items():
        alone = pair.ask("trips", count=WAN_TRIPS, load=0)
        moved = pair.ask("bulk", size=WAN_MESSAGE, count=1)
        add(samples, f"wan_link_share {stack}", moved["mb_per_s"] * 8 / megabits)
        loaded = pair.ask("trips", count=WAN_TRIPS, load=WAN_MESSAGE, warm=WAN_WARM_SECONDS)
        keep_trips(samples, f"wan {stack}", alone, loaded)


async def _fill(ring: SlotRing, payload: memoryview) -> None:
    value = digest(payload)
    for seq in range(FRAMES):
        await ring.append("down", "sent", seq, bytes(64), payload, value)


def apart(samples: Samples) -> None:
    """Ring, digest and signatures of frames, in CPU seconds a GB and microseconds a frame."""
    key, place = KeyPair(bytes([7]) * 32), Place(bytes(32), 0, 0, 0, "down")
    signer, payload = LinkSigner(key, bytes(32)), memoryview(os.urandom(FRAME_BYTES))
    gigabytes = FRAME_BYTES * FRAMES / 1e9
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as directory:
        link = Link("down", "peer", 0, 1, "up", 1, FRAMES, FRAME_BYTES, 2, 6)
        ring = SlotRing(Path(directory), [link])
        began, wall = time.process_time(), time.perf_counter()
        trio.run(_fill, ring, payload)
        add(samples, "ring_cpu_s_per_gb", (time.process_time() - began) / gigabytes)
        add(samples, "ring_mb_per_s", 1000 * gigabytes / (time.perf_counter() - wall))
        ring.close()
    began = time.process_time()
    for _ in range(FRAMES):
        value = digest(payload)
    add(samples, "digest_cpu_s_per_gb", (time.process_time() - began) / gigabytes)
    rounds = 500
    began = time.process_time()
    for seq in range(rounds):
        signature = signer.sign_frame(place, seq, value)
    add(samples, "sign_us_per_frame", 1e6 * (time.process_time() - began) / rounds)
    began = time.process_time()
    for _ in range(rounds):
        signer.check_frame(key.public, place, rounds - 1, value, signature)
    add(samples, "check_us_per_frame", 1e6 * (time.process_time() - began) / rounds)


# ---- the document --------------------------------------------------------------------------------


def spread(document: dict[str, Any], name: str, values: list[float]) -> None:
    """Median, least and greatest of a figure that has targets."""
    document[name] = round(statistics.median(values), 4)
    document[f"{name}_min"], document[f"{name}_max"] = round(min(values), 4), round(max(values), 4)


def table(samples: Samples, name: str) -> dict[str, Any]:
    """Medians of `name`, nested by the rest of their names (stack, size)."""
    found: dict[str, Any] = {}
    for key, values in samples.items():
        first, *rest = key.split(" ")
        if first != name or not rest:
            continue
        at = found
        for word in rest[:-1]:
            at = at.setdefault(word, {})
        at[rest[-1]] = round(statistics.median(values), 4)
    return found


def conclude(document: dict[str, Any], samples: Samples) -> None:
    def ratio(size: str) -> list[float]:
        ours, raw = (samples[f"mb_per_s {stack} {size}"] for stack in ("ours", "raw"))
        return [ours / raw for ours, raw in zip(ours, raw, strict=True)]

    if "mb_per_s ours 64mib" in samples:
        for size in COUNTS:
            spread(document, f"ratio_to_raw_socket_{size}", ratio(size))
        for side in ("send", "recv"):
            spread(document, f"cpu_s_per_gb_{side}", samples[f"cpu_s_per_gb_{side} ours 64mib"])
    for name in ("rtt_idle_ms", "rtt_loaded_ms", "rtt_loaded_over_idle"):
        if f"{name} ours" in samples:
            spread(document, name, samples[f"{name} ours"])
    if "wan_link_share ours" in samples:
        spread(document, "wan_link_share", samples["wan_link_share ours"])
        for name in ("rtt_idle_ms", "rtt_loaded_ms"):
            spread(document, f"wan_{name}", samples[f"{name} wan ours"])
    for name in sorted({key.split(" ")[0] for key in samples if " " in key}):
        of_all = table(samples, name)
        document[name if name not in document else f"{name}_of_all"] = of_all
    for name in (key for key in samples if " " not in key):
        spread(document, name, samples[name])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench transport",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option = parser.add_argument
    add_option("--repeats", type=int, default=5)
    add_option("--only", default=",".join(PARTS), help="parts, with commas")
    add_option("--stacks", default=",".join(STACKS), help="with commas")
    add_option("--rtt-ms", type=float, default=50.0)
    add_option("--mbit", type=float, default=100.0)
    add_option("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.only, options.stacks = options.only.split(","), options.stacks.split(",")
    if unknown := [part for part in options.only if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return options


def run(options: argparse.Namespace, samples: Samples) -> None:
    parts: list[Callable[[], None]] = []
    line = ["--rtt-ms", str(options.rtt_ms), "--mbit", str(options.mbit)]
    with ExitStack() as open_pairs:

        def start(stacks: tuple[str, ...], line: list[str] | None) -> dict[str, Pair]:
            return {
                stack: open_pairs.enter_context(pair_of(stack, line))
                for stack in stacks
                if stack in options.stacks
            }

        if {"bulk", "trips"} & set(options.only):
            near = start(STACKS, None)
            if "bulk" in options.only:
                parts.append(lambda: bulk(near, samples))
            if "trips" in options.only:
                parts.append(lambda: trips(near, samples))
        if "wan" in options.only:
            far = start(WAN_STACKS, line)
            parts.append(lambda: wan(far, samples, options.mbit))
        if "apart" in options.only:
            parts.append(lambda: apart(samples))
        for repeat in range(options.repeats):
            say(f"round {repeat + 1} of {options.repeats}")
            for part in parts:
                part()


def main() -> int:
    options = _options()
    report, samples = Report("scripts/bench transport"), Samples()
    report.document["repeats"] = options.repeats
    try:
        run(options, samples)
    except BenchFailed as error:
        say(f"scripts/bench transport: {error}")
        return 1
    conclude(report.document, samples)
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
