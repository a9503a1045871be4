"""A host for `RemoteHost`: `python -m tests.p2p.remote SEED PORT` echoes until it is killed."""

import sys

import trio

from tdmld.p2p import open_host
from tests.p2p.support import ECHO, echo, seed


async def main(number: int, port: int) -> None:
    async with open_host(seed(number), [f"/ip4/127.0.0.1/tcp/{port}"], gossip=False) as host:
        host.set_handler(ECHO, echo)
        print("ready", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), int(sys.argv[2]))
