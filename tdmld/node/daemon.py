"""`tdmld run`: puts one node together and takes it apart again.

Everything of the node lives in one nursery: the chain service, the peer service, the machine with
its carrier, the market agent and the RPC server. SIGTERM and SIGINT (or `admin_stop`) set one
event; then the RPC says goodbye, the others are cancelled, children end, the database is closed. A
second signal cancels at once. Nothing depends on this: kill -9 loses nothing that was final.
"""

import errno
import fcntl
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from tdmld import keys, logs
from tdmld.chain.crypto import KeyPair, public_key
from tdmld.chain.errors import ChainError
from tdmld.chain.genesis import GENESIS_BYTES_MAX, Genesis, chain_id, load_genesis
from tdmld.chain.state import State
from tdmld.config import Config
from tdmld.errors import UserError
from tdmld.files import FileTooLarge, read_file
from tdmld.node import netapi
from tdmld.node.agent import Agent, AskPolicy
from tdmld.node.api import Api
from tdmld.node.chainerrors import ChainSideError
from tdmld.node.chainservice import ChainService
from tdmld.node.chainwire import Protocols
from tdmld.node.errors import MachineError
from tdmld.node.machine import Machine, open_machine
from tdmld.node.machineclass import machine_class
from tdmld.node.peers import PeerService
from tdmld.node.reach import Reachability, ReachPolicy
from tdmld.node.reachapi import ReachApi
from tdmld.node.snapshot import SnapshotClient
from tdmld.node.store import ChainStore
from tdmld.p2p import Bans, Host, PeerInfo, open_host
from tdmld.p2p.errors import P2PError
from tdmld.rpc.access import Scope, clear_access, write_access
from tdmld.rpc.server import ListenFailed, Server

log = logging.getLogger(__name__)

FREE_BYTES_MIN = 256 << 20
"""A node does not start with less free disk: a chain that cannot write cannot vote."""
ANNOUNCE_SECONDS = 600.0
"""The own peer record is signed anew this often, for nodes that lost it."""


def run(config: Config) -> int:
    """Run a node until it is told to stop; the exit code. UserError when it cannot start."""
    if not config.data_dir.is_dir():
        raise UserError(
            f"there is no node in {config.data_dir}",
            next=f"make one: tdmld init --data-dir {config.data_dir} --genesis FILE",
        )
    with _locked(config.data_dir):
        logs.configure(
            config.log_level,
            file=config.data_dir / "logs" / "daemon.jsonl",
            console=sys.stderr.isatty(),
            process="daemon",
        )
        genesis = _genesis(config.data_dir / "genesis.json")
        key = keys.load_node_key(config.data_dir / "keys" / "node.key")
        _check_disk(config.data_dir)
        tokens: dict[str, Scope] = {}
        try:
            server = Server(config.rpc_listen, tokens, insecure=config.rpc_insecure)
        except ListenFailed as error:
            raise UserError(
                f"the RPC server cannot listen on {config.rpc_listen}",
                why=str(error),
                next="stop what uses the port, or choose another: tdmld run --rpc-listen HOST:PORT",
            ) from error
        node = _Node(config, genesis, key, server, tokens)
        try:
            trio.run(node.main)
        except* (P2PError, MachineError, ChainSideError, ChainError) as group:
            cause = _first(group)
            log.critical("stopped: %s", cause)
            raise UserError(
                "the node stopped",
                why=str(cause),
                next=f"its log says what led to it: {config.data_dir / 'logs' / 'daemon.jsonl'}",
            ) from cause
        except* Exception:
            log.critical("stopped by a defect", exc_info=True)
            raise
        finally:
            server.close()
    return 0


class _Node:
    """One run of a node."""

    def __init__(
        self,
        config: Config,
        genesis: Genesis,
        key: KeyPair,
        server: Server,
        tokens: dict[str, Scope],
    ) -> None:
        """`tokens` is what `server` knows its callers by."""
        self._server = server
        self._tokens = tokens
        self._config = config
        self._genesis = genesis
        self._chain_id = chain_id(genesis)
        self._key = key
        self._stop = trio.Event()

    async def main(self) -> None:
        config, key, server = self._config, self._key, self._server
        bans = Bans(config.deny)
        bans.restore(netapi.load(config.data_dir))
        store = ChainStore(
            config.data_dir / "chain",
            self._genesis,
            keep=config.keep_blocks,
            checkpoint=config.trusted,
        )
        try:
            async with (
                # First, for it takes a second: who connects to the host expects to be served.
                open_machine(
                    config.data_dir,
                    chain_id=self._chain_id,
                    listen=(config.carrier_listen,),
                    launcher=config.launcher,
                    device=config.device,
                    worker_memory=config.worker_memory,
                ) as machine,
                open_host(key.seed, config.listen, bans=bans) as host,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._signals, nursery)
                peers = PeerService(
                    host,
                    key,
                    self._chain_id,
                    config.data_dir / "peers.json",
                    [PeerInfo(peer_id, addresses) for peer_id, addresses in config.bootstrap()],
                    registered=lambda node: State(store.get).owner_of(node) is not None,
                    validates=lambda node: _validates(store, node),
                )
                nursery.start_soon(peers.run)
                if config.sync == "snapshot" and store.height == 0:
                    await self._join(host, store)
                chain = ChainService(host, store, self._genesis, key)
                reach = self._reachability(host, peers, machine, chain)
                agent = Agent(
                    key=key,
                    chain_id=self._chain_id,
                    chain=chain,
                    machine=machine,
                    book=peers.book,
                    data_dir=config.data_dir,
                    ask=self._ask(),
                    ask_blocks=2 * self._genesis.parameters.epoch_blocks,
                    witnessed=reach,
                )
                api = Api(
                    key=key,
                    genesis=self._genesis,
                    host=host,
                    chain=chain,
                    store=store,
                    machine=machine,
                    agent=agent,
                    peers=peers,
                    reach=ReachApi(
                        reach, host, machine.reach, lambda node: _witness_owner(chain, node)
                    ),
                    data_dir=config.data_dir,
                    stop=self._stop,
                )
                await nursery.start(chain.run)  # type: ignore[arg-type]  # third-party stubs of trio
                reach.on_news = agent.look_again
                nursery.start_soon(reach.run)
                nursery.start_soon(self._announce, peers, machine, reach)
                nursery.start_soon(self._keep_validators, peers, chain)
                nursery.start_soon(agent.run)
                nursery.start_soon(api.run)
                nursery.start_soon(api.net.run)
                self._tokens[write_access(config.data_dir, server.url)] = Scope.ADMIN
                log.info(
                    "node %s of chain %s listens on %s, RPC on %s",
                    key.address,
                    self._genesis.chain,
                    ", ".join(host.addresses),
                    server.url,
                )
                await server.serve(api, self._stop)
                nursery.cancel_scope.cancel()
        finally:
            clear_access(config.data_dir)
            store.close()
        log.info("stopped")

    async def _join(self, host: Host, store: ChainStore) -> None:
        """Begin with another node's state; the RPC server starts after it."""
        alone = [v.node for v in self._genesis.validators] == [self._key.public]
        if alone:
            return
        await SnapshotClient(host, Protocols(self._chain_id).sync, store).join()

    def _ask(self) -> AskPolicy | None:
        ask = self._config.ask
        if not ask.enabled:
            return None
        return AskPolicy(
            class_id=machine_class(self._config.device),
            memory=ask.memory,
            price=ask.price,
            audit_capacity=ask.audit_capacity,
            standby_slots=ask.standby_slots,
        )

    def _reachability(
        self, host: Host, peers: PeerService, machine: Machine, chain: ChainService
    ) -> Reachability:
        config, parameters = self._config, self._genesis.parameters
        policy = ReachPolicy(
            announce=config.announce,
            carrier_announce=config.carrier_announce,
            mdns=config.mdns,
            upnp=config.upnp,
            relay=config.relay,
            receipt_blocks=parameters.epoch_blocks,
            receipts=parameters.dial_receipts,
        )
        return Reachability(
            host,
            self._key,
            self._chain_id,
            peers.book,
            machine.reach,
            public_key(machine.session),
            policy,
            height=lambda: chain.height,
            owner_of=lambda node: _witness_owner(chain, node),
        )

    async def _announce(self, peers: PeerService, machine: Machine, reach: Reachability) -> None:
        """Sign a new record whenever this node is to be found elsewhere, and now and then."""
        session = public_key(machine.session)
        while True:
            changed = reach.changed
            peers.announce(
                session,
                reach.carrier_addresses,
                peers.now_ms(),
                addresses=reach.daemon_addresses,
                relays=bool(reach.relaying),
            )
            with trio.move_on_after(ANNOUNCE_SECONDS):
                await changed.wait()

    async def _keep_validators(self, peers: PeerService, chain: ChainService) -> None:
        """In every epoch others may validate, who must be reached before they do."""
        epoch = -1
        async for _ in chain.heads():
            if chain.store.epoch != epoch:
                epoch = chain.store.epoch
                peers.validators_changed()

    async def _signals(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for number in received:
                if self._stop.is_set():
                    log.warning("second signal: stopping at once")
                    nursery.cancel_scope.cancel()
                log.info("%s: stopping", signal.Signals(number).name)
                self._stop.set()


def _witness_owner(chain: ChainService, node: bytes) -> bytes | None:
    """The owner of a node whose word counts on the chain now."""
    record = chain.state().node(node)
    if record is None or record.revoked or record.from_height > chain.height:
        return None
    return record.owner


def _validates(store: ChainStore, node: bytes) -> bool:
    """Whether a node votes in this epoch or the next."""
    for epoch in (store.epoch, store.epoch + 1):
        committee = store.committee(epoch)
        if committee is not None and committee.index(node) is not None:
            return True
    return False


def _genesis(path: Path) -> Genesis:
    try:
        return load_genesis(read_file(path, GENESIS_BYTES_MAX))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing", next="copy the network's genesis.json there"
        ) from error
    except FileTooLarge as error:
        raise UserError(f"{path} is no genesis document", why=str(error)) from error
    except ChainError as error:
        raise UserError(
            f"{path} is no genesis document",
            why=str(error),
            next="copy the network's genesis.json there again",
        ) from error


def _check_disk(data_dir: Path) -> None:
    free = shutil.disk_usage(data_dir).free
    if free < FREE_BYTES_MIN:
        raise UserError(
            f"the disk of {data_dir} is full: {free >> 20} MiB are free",
            why=f"a node needs {FREE_BYTES_MIN >> 20} MiB to start",
            next="free some space, or move the directory to a larger disk",
        )


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Hold the directory's lock file; UserError when another daemon holds it."""
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            raise UserError(
                f"another daemon runs in {data_dir}" + (f" (process {holder})" if holder else ""),
                next="stop it first, or give this one a directory of its own with --data-dir",
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception inside a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
