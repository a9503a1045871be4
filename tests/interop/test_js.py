"""A js-libp2p node is an ordinary peer, over Noise and over TLS: it dials us and we dial it,
identify, ping and gossip both ways, 10 MB byte by byte; one that offers plaintext is refused.

Needs Node.js 20 or later and npm, and the packages of `package-lock.json`, which npm fetches once
into a cache outside of the tree. Skipped, with the reason, where something of it is not there.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tdmld.p2p import Host, Limits, PeerInfo, open_host
from tests.p2p.support import ECHO, MOST, echo, seed, until

HERE = Path(__file__).parent
LEAST_NODE = 20
INSTALL_SECONDS = 90
TOPIC = "/test/gossip/1"
LARGE = 100_000
TEN_MB = 10_000_000
STEP_SECONDS = 30
LIMITS = Limits(keepalive_seconds=1.0)
SECURITY = {"noise": "/noise", "tls": "/tls/1.0.0"}


def run(*command: str, cwd: Path = HERE, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
    )


def install(target: Path) -> None:
    """Skips when npm cannot get the packages."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, place)
        try:
            done = run(
                *("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"),
                *("--fetch-retries=0", "--fetch-timeout=20000", "--loglevel=error"),
                cwd=Path(place),
                seconds=INSTALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm ci took more than {INSTALL_SECONDS} s")
        if done.returncode:
            pytest.skip(f"npm ci failed: {done.stderr.strip()[-500:]}")
        try:
            Path(place).rename(target)
        except OSError:
            assert target.exists()  # another run was faster
        else:
            Path(place).mkdir()


@pytest.fixture(scope="module")
def modules() -> Path:
    """A folder with js-libp2p and our script, to run Node.js in."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    version = run("node", "--version").stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < LEAST_NODE:
        pytest.skip(f"Node.js is {version}, js-libp2p needs {LEAST_NODE} or later")
    lock = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "tdmld" / "interop" / lock
    if not target.exists():
        install(target)
    for script in ("node.mjs", "polyfill.mjs"):
        shutil.copy(HERE / script, target)
    return target


class Js:
    """A running js-libp2p node."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    async def hear(self, step: str) -> dict[str, Any]:
        """The next thing that it says, which must be this."""
        assert self._process.stdout is not None
        with trio.fail_after(STEP_SECONDS):
            while b"\n" not in self._rest:
                chunk = await self._process.stdout.receive_some()
                assert chunk, f"node ended before it said {step!r}"
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        assert said.pop("step") == step, said
        return said


@asynccontextmanager
async def js_node(modules: Path, security: str, target: str = "") -> AsyncIterator[Js]:
    process = await trio.lowlevel.open_process(
        ["node", "--import", "./polyfill.mjs", "node.mjs", security, *([target] if target else [])],
        cwd=modules,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Js(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def full_address(host: Host) -> str:
    return f"{host.addresses[0]}/p2p/{host.peer_id}"


async def check_echo(host: Host, peer_id: str, size: int) -> None:
    payload = os.urandom(size)
    with trio.fail_after(STEP_SECONDS):
        async with await host.open_stream(peer_id, ECHO) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, payload)
            assert await stream.receive(MOST) == payload


@pytest.mark.parametrize("security", SECURITY)
async def test_a_js_node_dials_us_and_does_everything(modules: Path, security: str) -> None:
    async with open_host(seed(1), limits=LIMITS) as host:
        host.set_handler(ECHO, echo)
        channel = await host.subscribe(TOPIC, limit=LARGE, validate=lambda *_: True)
        async with js_node(modules, security, full_address(host)) as js:
            peer_id = (await js.hear("listening"))["peer"]
            dialled = await js.hear("dial")
            assert dialled == {"security": SECURITY[security], "muxer": "/yamux/1.0.0"}
            identified = await js.hear("identify")
            assert ECHO in identified["protocols"]
            assert identified["addresses"] == list(host.addresses)
            assert 0 <= (await js.hear("ping"))["ms"] < 5000
            for size in (1000, TEN_MB):
                assert await js.hear("echo") == {"got": size, "wrong": 0}

            await js.hear("subscribed")
            await until(lambda: TOPIC in host._gossip._pubsub.peer_topics)
            for number in range(5):
                await host.publish(TOPIC, b"from us %d" % number)
            await host.publish(TOPIC, bytes(LARGE))
            sizes = [len(b"from us 0")] * 5 + [LARGE]
            heard = (await js.hear("gossip"))["heard"]
            assert sorted(row["size"] for row in heard) == sizes
            assert {row["from"] for row in heard} == {host.peer_id}
            with trio.fail_after(STEP_SECONDS):
                messages = [await channel.receive() for _ in sizes]
            assert {message.source for message in messages} == {peer_id}
            assert {message.data for message in messages} == {
                *(b"from js %d" % number for number in range(5)),
                bytes([7]) * LARGE,
            }

            await check_echo(host, peer_id, TEN_MB)
            (status,) = host.peers()
            assert status.direction == "inbound"
            await until(lambda: host.peers()[0].latency is not None)


@pytest.mark.parametrize("security", SECURITY)
async def test_we_dial_a_js_node(modules: Path, security: str) -> None:
    async with js_node(modules, security) as js, open_host(seed(1), limits=LIMITS) as host:
        said = await js.hear("listening")
        host.add_peer(PeerInfo(said["peer"], (said["address"].split("/p2p/")[0],)))
        await until(lambda: said["peer"] in host.connected())
        assert host.peers()[0].transport == f"{SECURITY[security]} /yamux/1.0.0"
        await check_echo(host, said["peer"], TEN_MB)
        await until(lambda: host.peers()[0].latency is not None)


async def test_a_js_node_that_offers_plaintext_is_refused(modules: Path) -> None:
    async with open_host(seed(1), limits=LIMITS) as host:
        async with js_node(modules, "plaintext", full_address(host)) as js:
            await js.hear("listening")
            assert (await js.hear("failed"))["error"]
        assert not host.connected()
