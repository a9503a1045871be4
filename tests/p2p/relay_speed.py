"""How fast bytes go through a relay: `python -m tests.p2p.relay_speed [MIB]`.

Three processes on one machine: two hosts that listen nowhere, and a relay without limits; beside it
the same two hosts with a direct connection. MB/s at the receiver, processor seconds for each GB.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

from tests.p2p.support import free_port

ROUNDS = 5
_NO_LIMIT = (1 << 40, 1 << 40)


class Node:
    def __init__(self, stack: ExitStack, *arguments: object) -> None:
        argv = [sys.executable, "-m", "tests.p2p.natnode", *map(str, arguments)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.enter_context(self._process)
        stack.callback(self._process.kill)
        self.peer_id = self._line()

    def ask(self, *order: object) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = self._line()
        assert "ok" in answer, answer
        return answer["ok"]

    def _line(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def processor_seconds(self) -> float:
        with open(f"/proc/{self._process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(size: int, relayed: bool) -> None:
    with ExitStack() as stack:
        address = f"/ip4/127.0.0.1/tcp/{free_port()}"
        relay = Node(stack, 3, address, *_NO_LIMIT)
        a = Node(stack, 1, "")
        if relayed:
            b = Node(stack, 2, "")
            b.ask("relays", [[relay.peer_id, [address]]])
            while not (addresses := b.ask("addresses")):
                pass
        else:
            addresses = [f"/ip4/127.0.0.1/tcp/{free_port()}"]
            b = Node(stack, 2, *addresses)
        a.ask("keep", b.peer_id, addresses)
        nodes = {"sender": a, "relay": relay, "receiver": b}
        for _ in range(ROUNDS):
            before = {name: node.processor_seconds() for name, node in nodes.items()}
            sent = a.ask("send", b.peer_id, size, "data")
            path = a.ask("path", b.peer_id)
            used = {
                name: round((node.processor_seconds() - before[name]) / size * 1e9, 2)
                for name, node in nodes.items()
            }
            print(
                json.dumps({"path": path, "mb_per_s": round(size / sent["seconds"] / 1e6)} | used)
            )


if __name__ == "__main__":
    mebibytes = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    for through_relay in (False, True):
        measure(mebibytes << 20, through_relay)
