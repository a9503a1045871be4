"""`tdmld run`"""

from tdmld.cli.common import DataDir, resolve_data_dir
from tdmld.cli.exits import Exit
from tdmld.config import load_config
from tdmld.errors import UserError


def run(
    *,
    data_dir: DataDir = None,
    listen: tuple[str, ...] | None = None,
    carrier_listen: str | None = None,
    announce: tuple[str, ...] | None = None,
    carrier_announce: tuple[str, ...] | None = None,
    mdns: bool | None = None,
    upnp: bool | None = None,
    relay: bool | None = None,
    rpc_listen: str | None = None,
    rpc_insecure: bool | None = None,
    peers: tuple[str, ...] | None = None,
    deny: tuple[str, ...] | None = None,
    launcher: str | None = None,
    worker_memory: int | None = None,
    sync: str | None = None,
    checkpoint: str | None = None,
    keep_blocks: int | None = None,
    log_level: str | None = None,
    ask_enabled: bool | None = None,
    ask_price: int | None = None,
    ask_memory: int | None = None,
    ask_audit_capacity: int | None = None,
    ask_standby_slots: int | None = None,
) -> int:
    """Run the node until it is told to stop (Ctrl-C or SIGTERM; a second one stops at once).

    What is not given here comes from TDMLD_* variables, then tdmld.toml, then defaults.

    Parameters
    ----------
    listen: Multiaddrs of the daemon, such as /ip4/0.0.0.0/tcp/4001.
    carrier_listen: Multiaddr for tensors and contents.
    announce: Multiaddrs at which others reach the daemon, such as a forwarded port.
    carrier_announce: The same for tensors and contents.
    mdns: Find other nodes on the local network.
    upnp: Ask the router to forward the ports.
    relay: Carry the connections of nodes that cannot be reached.
    rpc_listen: host:port of the JSON-RPC server.
    rpc_insecure: Allow an rpc_listen that other machines reach, without TLS.
    peers: Daemons to dial first: /ip4/.../tcp/.../p2p/<peer id>.
    deny: Peer ids and IP networks that may not connect: 192.0.2.0/24.
    launcher: Words put before the command line that workers come from, such as "nice -n 5".
    worker_memory: Bytes of private memory that a worker may have, 0 for no limit.
    sync: How an empty node begins: blocks or snapshot.
    checkpoint: HEIGHT:HASH of a block that you trust.
    keep_blocks: Blocks to keep, 0 for all.
    log_level: debug, info, warning or error.
    ask_enabled: Whether the node asks for work.
    ask_price: Smallest price: units for 10^6 parameters times 10^3 tokens.
    ask_memory: Bytes that a slot may use.
    ask_audit_capacity: Audits at a time.
    ask_standby_slots: Slots to stand by for at a time.
    """
    directory = resolve_data_dir(data_dir)
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {directory}",
            next=f"tdmld init --data-dir {directory} --genesis FILE",
            exit_code=Exit.USAGE,
        )
    flags: dict[str, object] = {
        "listen": listen,
        "carrier_listen": carrier_listen,
        "announce": announce,
        "carrier_announce": carrier_announce,
        "mdns": mdns,
        "upnp": upnp,
        "relay": relay,
        "rpc_listen": rpc_listen,
        "rpc_insecure": rpc_insecure,
        "peers": peers,
        "deny": deny,
        "launcher": launcher,
        "worker_memory": worker_memory,
        "sync": sync,
        "checkpoint": checkpoint,
        "keep_blocks": keep_blocks,
        "log_level": log_level,
        "ask.enabled": ask_enabled,
        "ask.price": ask_price,
        "ask.memory": ask_memory,
        "ask.audit_capacity": ask_audit_capacity,
        "ask.standby_slots": ask_standby_slots,
    }
    config = load_config(directory, flags)
    from tdmld.node import daemon

    return int(daemon.run(config))
