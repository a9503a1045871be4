"""A host in a process of its own, told what to do by lines of JSON: `python -m tests.p2p.natnode
SEED LISTEN [QUOTA]`; with a quota (bytes a second and in all for each circuit) it relays."""

import contextlib
import json
import sys
from typing import Any

import trio

from tdmld.p2p import CircuitQuota, Host, PeerInfo, RelayPolicy, Stream, open_host
from tdmld.p2p.errors import P2PError
from tests.p2p.support import ECHO, echo, seed

SINK = "/test/count/1"
_PIECE = 1 << 18


async def count(stream: Stream) -> None:
    """Take what comes until an empty message, then say how much it was."""
    total = 0
    while piece := await stream.receive(_PIECE):
        total += len(piece)
    await stream.send(str(total).encode())


async def send(host: Host, peer_id: str, size: int, text: str) -> dict[str, Any]:
    """Send `size` bytes that repeat `text`; the receiver's count and the seconds it took."""
    piece = (text.encode() * (_PIECE // len(text) + 1))[:_PIECE]
    begun = trio.current_time()
    stream = await host.open_stream(peer_id, SINK)
    async with stream:
        for start in range(0, size, _PIECE):
            await stream.send(piece[: size - start])
        await stream.send(b"")
        arrived = int(await stream.receive(100))
    return {"arrived": arrived, "seconds": trio.current_time() - begun}


async def obey(host: Host, order: list[Any]) -> Any:
    name, *args = order
    if name == "relays":
        host.set_relays([PeerInfo(peer, tuple(addresses)) for peer, addresses in args[0]])
    elif name == "keep":
        host.add_peer(PeerInfo(args[0], tuple(args[1])))
    elif name == "drop":
        host.remove_peer(args[0])
        await host.disconnect(args[0])
    elif name == "addresses":
        return list(host.addresses)
    elif name == "path":
        return next((p.path for p in host.peers() if p.peer_id == args[0]), None)
    elif name == "direct":
        return await host.connect_direct(args[0], args[1])
    elif name == "send":
        return await send(host, *args)
    elif name == "use":
        return host.relay_use and [host.relay_use.reservations, host.relay_use.circuits]
    else:
        raise ValueError(f"no such order: {name}")
    return None


async def main(number: int, listen: str, quota: list[int]) -> None:
    policy = None
    if quota:
        granted = CircuitQuota(bytes=quota[1], seconds=600.0, bytes_per_second=quota[0])
        policy = RelayPolicy(strangers=granted, bytes_per_second=max(32 << 20, quota[0]))
    addresses = [listen] if listen else []
    async with open_host(seed(number), addresses, gossip=False, relay=policy) as host:
        host.set_handler(ECHO, echo)
        host.set_handler(SINK, count)
        print(json.dumps(host.peer_id), flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            try:
                answer = {"ok": await obey(host, json.loads(line))}
            except P2PError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(main, int(sys.argv[1]), sys.argv[2], [int(text) for text in sys.argv[3:]])
