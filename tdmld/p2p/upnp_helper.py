"""A process of its own that talks to the router: `python -I upnp_helper.py REQUEST`, JSON in and
out. Started by `upnp`; it imports nothing of the package, so it is there in some ten milliseconds.

The library (miniupnpc) parses in C what any device on the local network sends, and cannot be
interrupted. Here it has 256 MiB, a deadline, and none of the node's keys, files or sockets.

    {"do": "map", "port": 4001, "prefer": 4001, "lease": 3600, "interface": "", "wait_ms": 1000}
        -> {"gateway": "192.168.1.1", "external_ip": "...", "external_port": 4001, "inside": "..."}
    {"do": "unmap", "external_ports": [4001], "interface": "", "wait_ms": 1000}
        -> {}

A failure is {"error": "..."}, in words for people.
"""

import contextlib
import json
import random
import resource
import signal
import sys
from typing import Any
from urllib.parse import urlsplit

import miniupnpc  # type: ignore[import-not-found]  # publishes no types

DEADLINE_SECONDS = 20
MEMORY_BYTES = 256 << 20
OTHER_PORTS = 4
"""Tries with another external port, when somebody on this network has ours already."""


class Refused(Exception):
    """The gateway does not do what we ask; the text says what and why."""


def main(request: dict[str, Any]) -> dict[str, Any]:
    signal.alarm(DEADLINE_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    gateway = miniupnpc.UPnP(
        discoverdelay=request["wait_ms"], multicastif=request["interface"] or None
    )
    try:
        gateway.discover()
    except Exception as error:  # the library's way to say that nobody answered
        raise Refused("no router answers to UPnP on this network") from error
    url = gateway.selectigd()
    if request["do"] == "unmap":
        for external in request["external_ports"]:
            with contextlib.suppress(Exception):  # gone already: that is what we want
                gateway.deleteportmapping(external, "TCP")
        return {}
    return {
        "gateway": urlsplit(url).hostname or "",
        "external_ip": gateway.externalipaddress(),
        "external_port": _map(gateway, request),
        "inside": gateway.lanaddr,
    }


def _map(gateway: Any, request: dict[str, Any]) -> int:
    """Map the port, if need be to another one outside than preferred; gives the external port."""
    port, lease = request["port"], request["lease"]
    refusal: Exception | None = None
    tried = [request["prefer"], *(random.randrange(20000, 60000) for _ in range(OTHER_PORTS))]
    for external in tried:
        existing = gateway.getspecificportmapping(external, "TCP")
        if existing and existing[:2] != (gateway.lanaddr, port):
            continue  # another machine's
        # 725 OnlyPermanentLeasesSupported (WANIPConnection:1): then until we take it back.
        for seconds in (lease, 0):
            try:
                gateway.addportmapping(external, "TCP", gateway.lanaddr, port, "tdmld", "", seconds)
                return int(external)
            except Exception as error:  # the library raises nothing more special
                refusal = error
    raise Refused(f"the router refuses to forward port {port}: {refusal or 'the port is taken'}")


if __name__ == "__main__":
    try:
        answer = main(json.loads(sys.argv[1]))
    except Refused as error:
        answer = {"error": str(error)}
    except Exception as error:
        # Boundary: whatever the library makes of a strange device is an answer, too.
        answer = {"error": f"the router's UPnP does not work: {error}"}
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer), flush=True)
