"""What `tdmld doctor` looks at: in the node's directory, and in what the node says of itself.

Each function gives the checks of one subject. A check is ok, warn (it works, but not well), fail
(it does not work) or skip (something before it must be mended first).
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from tdmld import keys
from tdmld.chain.errors import ChainError
from tdmld.chain.genesis import GENESIS_BYTES_MAX, load_genesis
from tdmld.cli.text import short, size
from tdmld.config import Config
from tdmld.errors import UserError
from tdmld.files import FileTooLarge, read_file
from tdmld.rpc.reachtypes import NetReachability, ProcessReach, TrialInfo
from tdmld.rpc.types import NodeStatus

State = Literal["ok", "warn", "fail", "skip"]

FREE_BYTES_NEEDED = 256 << 20
"""A node does not start with less."""
FREE_BYTES_COMFORTABLE = 4 << 30
"""States and logs of a job need some."""
CLOCK_WARN_MS, CLOCK_FAIL_MS = 1_000, 30_000
"""A validator's clock that is farther off makes its blocks late or refused."""
_LOOPBACK = ("127.", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Check:
    what: str
    state: State
    why: str = ""
    next: str = ""
    """What to type, or to do."""


# In the directory ---------------------------------------------------------------------------------


def directory(path: Path) -> Iterator[Check]:
    """Files and keys."""
    if not path.is_dir():
        yield Check(
            "data directory",
            "fail",
            f"there is no directory {path}",
            f"tdmld init --data-dir {path} --genesis FILE",
        )
        return
    if not os.access(path, os.W_OK | os.X_OK):
        yield Check(
            "data directory",
            "fail",
            f"{path} cannot be written",
            f"as its owner: chmod u+rwx {path}",
        )
    else:
        yield Check("data directory", "ok", str(path))
    yield _genesis(path / "genesis.json")
    yield _node_key(path / "keys" / "node.key")
    yield disk(shutil.disk_usage(path).free, path)


def disk(free: int, path: Path) -> Check:
    """Free bytes on the disk of `path`."""
    if free < FREE_BYTES_NEEDED:
        state, why = "fail", f"a node does not start with less than {size(FREE_BYTES_NEEDED)}"
    elif free < FREE_BYTES_COMFORTABLE:
        state, why = "warn", "a job's states and logs may not find room"
    else:
        return Check("disk space", "ok", f"{size(free)} free")
    remedy = f"free some space on the disk of {path}"
    return Check("disk space", state, f"{size(free)} free: {why}", remedy)  # type: ignore[arg-type]


def _genesis(path: Path) -> Check:
    try:
        found = load_genesis(read_file(path, GENESIS_BYTES_MAX))
    except (OSError, FileTooLarge, ChainError) as error:
        remedy = f"copy the network's genesis.json to {path}"
        return Check("genesis", "fail", f"{path}: {error}", remedy)
    return Check("genesis", "ok", f"chain {found.chain}")


def _node_key(path: Path) -> Check:
    try:
        key = keys.load_node_key(path)
    except UserError as error:
        why = f"{error.what}: {error.why}" if error.why else error.what
        return Check("node key", "fail", why, error.next)
    return Check("node key", "ok", key.address)


def listening(config: Config) -> Iterator[Check]:
    """Whether the configured addresses can be reached at all."""
    for what, setting, port, addresses in (
        ("daemon listens", "listen", 4001, config.listen),
        ("carrier listens", "carrier_listen", 4002, (config.carrier_listen,)),
    ):
        shown = ", ".join(addresses)
        wanted = f'"/ip4/0.0.0.0/tcp/{port}"'
        line = f"{setting} = {f'[{wanted}]' if setting == 'listen' else wanted}"
        remedy = f"in {config.data_dir / 'tdmld.toml'}: {line}"
        if all(_host(text).startswith(_LOOPBACK) for text in addresses):
            yield Check(what, "warn", f"{shown}: only from this machine", remedy)
        elif any(_port(text) == 0 for text in addresses):
            why = f"{shown}: another port at every start, which no router can forward"
            yield Check(what, "warn", why, remedy)
        else:
            yield Check(what, "ok", shown)


def ports(config: Config) -> Iterator[Check]:
    """Ports that another program has; only while the daemon does not run."""
    host, _, number = config.rpc_listen.rpartition(":")
    rpc = f"/{'ip6' if ':' in host else 'ip4'}/{host.strip('[]')}/tcp/{number}"
    for setting, text in [
        *(("listen", text) for text in config.listen),
        ("carrier_listen", config.carrier_listen),
        ("rpc_listen", rpc),
    ]:
        why = _cannot_bind(_host(text), _port(text))
        if why:
            yield Check(
                f"port {_port(text)}",
                "fail",
                f"{setting} {text}: {why}",
                f"ss -ltnp 'sport = :{_port(text)}' shows who has it; or change {setting}",
            )


def _cannot_bind(host: str, port: int) -> str:
    """Why nobody could listen there now; empty when one can, or when it cannot be said."""
    if port == 0:
        return ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except socket.gaierror:
            return ""
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "another program listens there"
            return os.strerror(error.errno) if error.errno else str(error)
    return ""


def _host(address: str) -> str:
    return address.split("/")[2]


def _port(address: str) -> int:
    return int(address.rpartition("/")[2])


def holder(path: Path) -> str | None:
    """The process that runs a node in this directory, as it names itself; None: there is none."""
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.read(descriptor, 32).decode("ascii", "replace").strip() or "?"
    finally:
        os.close(descriptor)
    return None


# What the node says -------------------------------------------------------------------------------


def standing(status: NodeStatus, bootstrap: bool) -> Iterator[Check]:
    """Chain and peers."""
    if status.syncing:
        why = f"catching up, at height {status.height:,}"
        yield Check("chain", "warn", why, "wait; tdmld status shows how it goes on")
    else:
        yield Check("chain", "ok", f"{status.chain} at height {status.height:,}")
    if status.peers:
        yield Check("peers", "ok", f"{status.peers} connected")
    elif bootstrap:
        why = "none connected: the configured ones are away, or this machine has no way out"
        yield Check("peers", "fail", why, "tdmld peers list")
    else:
        why = "none connected, and none configured"
        remedy = 'in tdmld.toml: peers = ["/ip4/.../tcp/4001/p2p/12D3KooW..."]'
        yield Check("peers", "fail", why, remedy)


def clock(found: NetReachability) -> Check:
    """Our clock against that of the witnesses."""
    offsets = [w.clock_ms for w in found.witnesses if w.clock_ms is not None]
    if not offsets:
        return Check("clock", "skip", "nobody to compare with")
    behind = median(offsets)
    why = (
        f"{abs(behind) / 1000:.1f} s {'behind' if behind > 0 else 'ahead of'} {len(offsets)} peers"
    )
    if abs(behind) < CLOCK_WARN_MS:
        return Check("clock", "ok", f"within {CLOCK_WARN_MS / 1000:g} s of {len(offsets)} peers")
    state: State = "fail" if abs(behind) >= CLOCK_FAIL_MS else "warn"
    return Check("clock", state, why, "timedatectl set-ntp true")


def reach(found: NetReachability) -> Iterator[Check]:
    """Who can be dialled, through what, and what follows."""
    seen = sorted({w.seen_at for w in found.witnesses if w.seen_at})
    yield _seen(found, seen)
    yield _router(found)
    for name, process in (("daemon", found.daemon), ("carrier", found.carrier)):
        yield _process(name, process, found)
        for witness in found.witnesses:
            trial = witness.daemon if name == "daemon" else witness.carrier
            yield _trial(name, short(witness.node), trial, witness.failure)
    yield from _relays(found)
    yield _paths(found)
    yield _receipts(found)
    if found.local is not None:
        shown = ", ".join(found.local)
        yield (
            Check("local network", "ok", f"looked for on {shown}")
            if found.local
            else Check("local network", "warn", "no interface takes multicast")
        )


def _seen(found: NetReachability, seen: list[str]) -> Check:
    if not found.witnesses:
        return Check("seen from outside", "skip", "no connected peer to ask", "tdmld peers list")
    if not seen:
        return Check("seen from outside", "warn", "no peer says at which address it sees us")
    foreign = [ip for ip in seen if ip not in found.own and not ip.startswith(_LOOPBACK)]
    if foreign:
        why = (
            f"{', '.join(foreign)}, which is no address of this machine: there is a router between"
        )
        return Check("seen from outside", "ok", why)
    return Check("seen from outside", "ok", f"{', '.join(seen)}: no address translation")


def _router(found: NetReachability) -> Check:
    router = found.router
    match router.state:
        case "off":
            return Check("router (UPnP)", "skip", "not asked: off, or nothing for it to forward")
        case "asking":
            return Check("router (UPnP)", "skip", "being asked", "tdmld doctor, in a moment")
        case "failed":
            needed = found.carrier.state == "closed" or found.daemon.state == "closed"
            remedy = "forward the ports in the router by hand: docs/networking.md" if needed else ""
            return Check("router (UPnP)", "warn" if needed else "ok", router.why, remedy)
    shown = ", ".join(router.addresses)
    if not router.public:
        why = f"forwards {shown}, but is itself behind another router, or the provider's"
        return Check("router (UPnP)", "warn", why, "ask the provider for a public address, or IPv6")
    return Check("router (UPnP)", "ok", f"forwards {shown}")


def _process(name: str, process: ProcessReach, found: NetReachability) -> Check:
    what = f"{name} can be dialled"
    announced = ", ".join(process.announced) or "nothing"
    if process.state == "open":
        return Check(what, "ok", f"announces {announced}")
    if process.state == "unknown":
        why = "nobody has tried yet" if found.witnesses else "nobody to try"
        return Check(what, "warn", why, "tdmld doctor, once peers are connected")
    ports = sorted({text.rpartition("/")[2] for text in process.listening})
    return Check(
        what,
        "warn",
        "no: a router or firewall does not let others in",
        f"let TCP port {', '.join(ports)} in: docs/networking.md",
    )


def _trial(name: str, witness: str, trial: TrialInfo, failure: str) -> Check:
    what = f"  {name} from {witness}"
    if failure:
        return Check(what, "skip", failure)
    if trial.reached:
        return Check(what, "ok", f"reached at {trial.address}")
    return Check(what, "skip" if trial.reached is None else "warn", trial.why)


def _relays(found: NetReachability) -> Iterator[Check]:
    if "closed" in (found.daemon.state, found.carrier.state):
        held = {text.split("/p2p/")[1] for text in (*found.carrier.relayed, *found.daemon.relayed)}
        if held:
            yield Check("reached through relays", "ok", ", ".join(sorted(map(_relay, held))))
        else:
            why = "none is held: no known node relays, or all their places are taken"
            yield Check("reached through relays", "warn", why, "tdmld peers list")
    if found.relaying.on:
        use = found.relaying
        why = (
            f"{use.reservations} places taken, {use.circuits} circuits, {size(use.carried)} carried"
        )
        yield Check("relays for others", "ok", why)


def _relay(part: str) -> str:
    """The relay in what follows /p2p/ in a relayed address."""
    return short(part.partition("/")[0])


def _paths(found: NetReachability) -> Check:
    relayed = found.daemons_relayed + found.carriers_relayed
    total = found.daemons + found.carriers
    why = f"{total - relayed} of {total} connections are direct"
    if found.punched:
        why += f", {found.punched} holes were punched"
    if found.carriers_relayed:
        return Check("direct paths", "warn", f"{why}; holes to the others are not punched yet")
    return Check("direct paths", "ok", why)


def _receipts(found: NetReachability) -> Check:
    wanted, why = found.wanted_receipts, f"{found.open_receipts} owners dialled the carrier"
    if found.pair_receipts:
        why += f", {found.pair_receipts} direct paths are proved"
    if not wanted:
        return Check("receipts for work", "ok", f"{why}; this chain wants none")
    why += f"; this chain wants {wanted}"
    if found.open_receipts >= wanted:
        return Check("receipts for work", "ok", why)
    if found.pair_receipts:
        return Check("receipts for work", "warn", f"{why}: only beside nodes with a proved path")
    return Check(
        "receipts for work",
        "warn",
        f"{why}: slots beside open nodes, standby and audits only",
        "" if found.settled else "tdmld doctor, in a minute",
    )
