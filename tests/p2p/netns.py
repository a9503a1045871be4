"""Small internets for tests: a public segment, routers that translate addresses, hosts behind them.

Made of network namespaces inside one user namespace, without privileges. A namespace lives as long
as a process that sits in it, so each has a sleeping holder; links are moved to it by the holder's
process number (`ip netns` would need mounts). Leaving `internet` ends the holders, and with them
everything that was made.

    with internet() as net:
        net.public("relay", "203.0.113.10")
        net.router("home", "203.0.113.2", "10.0.1", random_ports=False)
        net.behind("home", "node", "10.0.1.2")
        process = net.popen("node", [sys.executable, "-m", "tdmld", ...])
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TOOLS = ("unshare", "nsenter", "ip", "nft", "sysctl", "sleep")
_SEGMENT = "segment"
_NAT = """
table ip nat {{
    chain leave {{
        type nat hook postrouting priority 100;
        oifname "wan" masquerade {ports}
    }}
}}
table ip filter {{
    chain pass {{
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "lan" accept
    }}
    chain enter {{
        type filter hook input priority 0; policy drop;
        ct state established,related accept
        iifname "lan" accept
    }}
}}
"""
_FIREWALL = """
table ip filter {
    chain enter {
        type filter hook input priority 0; policy drop;
        iifname "lo" accept
        ct state established,related accept
    }
}
"""


def forbidden() -> str | None:
    """Why there can be no namespaces here; None when there can."""
    path = _environment()["PATH"]
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    veth, bridge = "name wan type veth peer name lan", "name hub type bridge"
    script = f"ip link add {veth} && ip link add {bridge} && nft -f -"
    tried = subprocess.run(
        ["unshare", "-Urn", "sh", "-c", script],
        input=_NAT.format(ports=""),
        capture_output=True,
        text=True,
        env=_environment(),
    )
    if tried.returncode:
        return f"forbidden here: {tried.stderr.strip().splitlines()[0]}"
    return None


class Internet:
    """Namespaces by name. The public segment is 203.0.113.0/24 (RFC 5737)."""

    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self._links = 0

    def public(self, name: str, address: str, *, firewall: bool = False) -> None:
        """A host on the public segment; with `firewall` it lets in only answers."""
        self._attach(name, "wan", address)
        if firewall:
            self.run(name, ["nft", "-f", "-"], stdin=_FIREWALL)

    def router(self, name: str, address: str, inside: str, *, random_ports: bool = False) -> None:
        """A home router: translates the network `inside`.0/24 to one public address and lets in
        only answers. With `random_ports` each connection gets a port that nobody can foresee."""
        self._attach(name, "wan", address)
        self.run(name, ["ip", "link", "add", "name", "lan", "type", "bridge"])
        self.run(name, ["ip", "link", "set", "lan", "up"])
        self.run(name, ["ip", "address", "add", f"{inside}.1/24", "dev", "lan"])
        self.run(name, ["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        rules = _NAT.format(ports="fully-random" if random_ports else "")
        self.run(name, ["nft", "-f", "-"], stdin=rules)

    def behind(self, router: str, name: str, address: str) -> None:
        """A host in a router's network."""
        self._add(name)
        self._join(name, "eth", router, "lan")
        self.run(name, ["ip", "address", "add", f"{address}/24", "dev", "eth"])
        gateway = address.rsplit(".", 1)[0] + ".1"
        self.run(name, ["ip", "route", "add", "default", "via", gateway])

    def run(self, name: str, argv: Sequence[str], *, stdin: str = "") -> str:
        """Run a command in a namespace to its end and return what it printed; AssertionError."""
        done = subprocess.run(
            self.argv(name, argv), input=stdin, capture_output=True, text=True, env=_environment()
        )
        assert done.returncode == 0, f"{' '.join(argv)} in {name}: {done.stderr}"
        return done.stdout

    def popen(self, name: str, argv: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a program in a namespace; the caller ends it."""
        return subprocess.Popen(self.argv(name, argv), **options)

    def argv(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` in a namespace."""
        holder = str(self._holders[name].pid)
        return ["nsenter", "-t", holder, "-U", "-n", "--preserve-credentials", "--", *argv]

    def close(self) -> None:
        for holder in self._holders.values():
            holder.kill()
        for holder in self._holders.values():
            holder.wait()
            assert holder.stdout is not None
            holder.stdout.close()

    def _add(self, name: str) -> None:
        """An empty namespace; the first one makes the user namespace of all."""
        if not self._holders and name != _SEGMENT:
            self._add(_SEGMENT)
            self.run(_SEGMENT, ["ip", "link", "add", "name", "bridge", "type", "bridge"])
            self.run(_SEGMENT, ["ip", "link", "set", "bridge", "up"])
        hold = ["sh", "-c", "echo held && exec sleep 1800"]
        argv = (
            self.argv(_SEGMENT, ["unshare", "-n", *hold])
            if self._holders
            else ["unshare", "-Urn", *hold]
        )
        holder = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=_environment())
        self._holders[name] = holder
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        self.run(name, ["ip", "link", "set", "lo", "up"])

    def _attach(self, name: str, link: str, address: str) -> None:
        self._add(name)
        self._join(name, link, _SEGMENT, "bridge")
        self.run(name, ["ip", "address", "add", f"{address}/24", "dev", link])

    def _join(self, name: str, link: str, other: str, bridge: str) -> None:
        """A link from a namespace to the bridge of another."""
        self._links += 1
        port = f"p{self._links}"
        self.run(
            other, ["ip", "link", "add", "name", port, "type", "veth", "peer", "name", f"{port}x"]
        )
        pid = str(self._holders[name].pid)
        self.run(other, ["ip", "link", "set", f"{port}x", "netns", pid])
        self.run(other, ["ip", "link", "set", port, "master", bridge, "up"])
        self.run(name, ["ip", "link", "set", f"{port}x", "name", link, "up"])


@contextmanager
def internet() -> Iterator[Internet]:
    """An empty internet; ask `forbidden` first."""
    net = Internet()
    try:
        yield net
    finally:
        net.close()


def _environment() -> dict[str, str]:
    """The administrator's tools may not be on everybody's path."""
    return {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def root() -> Path:
    """The repository, for `python -m` in a namespace."""
    return Path(__file__).parents[2]
