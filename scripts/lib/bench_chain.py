"""How fast the chain is: real validator processes over libp2p and RocksDB, and the generator.

Phases (choose with --only):
  floor    what the machine can: signatures checked a second, a synced write of RocksDB
  idle     one transaction at a time on a chain at rest: send -> executed at the slowest node
  paced    the same at --pace transfers a second, an open loop
  load     as many transfers as go through, a closed loop; the roots and the money are checked
  sync     a new node takes the chain that the phases before made, from its peers
  replay   one process checks signatures and executes a chain, 10,000 accounts
  cost     executing alone, at 10,000 and (--skip-1m leaves it out) 1,000,000 accounts
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import trio
from chainnet import (
    START_BALANCE,
    BlockSeen,
    Network,
    Peer,
    Wallets,
    key_of,
    make_genesis,
    network,
    now_ns,
    owner_keys,
)
from report import Report, percentile, say
from rocksdict import Options, Rdict, WriteBatch, WriteOptions

from tdmld.chain import vrf
from tdmld.chain.blocks import (
    Block,
    Header,
    beacon_input,
    block_hash,
    sign_block,
    start_view,
    transactions_root,
)
from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import KeyPair, sha256
from tdmld.chain.genesis import Genesis, chain_id
from tdmld.chain.ledger import recount
from tdmld.chain.transactions import decode_transaction, verify_transaction
from tdmld.node.store import ChainStore

PHASES = ("floor", "idle", "paced", "load", "sync", "replay", "cost")
ACCOUNTS = 10_000
MILLION = 1_000_000
WINDOW = 6000
"""Transfers on their way in the closed loop: one and a half full blocks."""
BATCH = 64
BLOCK = 2000
"""Transfers in a block of the replayed chain."""
SAMPLE = 31
"""Of the ids whose first byte has none of these bits (one in 32) the latency is taken."""
RESTING_SECONDS = 6.0
"""Before the idle phase: what the nodes use without blocks is not counted as the blocks'."""
REST_SECONDS = 0.6
"""Longer than the interval between blocks: the next transaction waits for nothing."""


class BenchFailed(Exception):
    """A check did not hold."""


# ---- floors --------------------------------------------------------------------------------------


def floors(home: Path) -> dict[str, float]:
    """Raw figures of this machine, taken before the rest."""
    key, chain = key_of("floor", 0), bytes(32)
    wallet = Wallets([key], chain)
    transactions = [decode_transaction(wallet.transfer(0), chain) for _ in range(2000)]
    began = time.perf_counter()
    if not all(verify_transaction(transaction, chain) for transaction in transactions):
        raise BenchFailed("a good signature was refused")
    verify = len(transactions) / (time.perf_counter() - began)
    options, synced = Options(raw_mode=True), WriteOptions()
    options.create_if_missing(True)
    synced.sync = True
    database, times = Rdict(str(home / "floor"), options), []
    for number in range(200):
        batch = WriteBatch(raw_mode=True)
        batch.put(number.to_bytes(8, "big"), bytes(200))
        began = time.perf_counter()
        database.write(batch, synced)
        times.append(1000 * (time.perf_counter() - began))
    database.close()
    return {"verify_per_second": verify, "synced_write_p50_ms": statistics.median(times)}


# ---- live phases ---------------------------------------------------------------------------------


class Watch:
    """What was sent when, and when each node had executed it."""

    def __init__(self, net: Network) -> None:
        self._nodes = len(net.peers)
        self._sent: dict[bytes, int] = {}
        self._seen: dict[bytes, int] = {}
        self._height = [0] * self._nodes
        self.executed = [0] * self._nodes
        self.blocks = [0] * self._nodes
        self.failed = 0
        self.latencies: list[float] = []
        self.moved = trio.Event()
        net.on_block = self._block

    def send(self, raw: bytes, mask: int) -> None:
        key = sha256(raw)
        if not key[0] & mask:
            self._sent[key] = now_ns()

    def _block(self, seen: BlockSeen) -> None:
        if seen.node >= self._nodes:
            return
        self.executed[seen.node] += seen.transactions
        self.blocks[seen.node] += 1
        self.failed += seen.failed
        for key in seen.ids:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] == self._nodes and key in self._sent:
                del self._seen[key]
                self.latencies.append((seen.time_ns - self._sent.pop(key)) / 1e6)
        self.moved.set()
        self.moved = trio.Event()

    @property
    def slowest(self) -> int:
        """Transactions executed at the slowest node."""
        return min(self.executed)


async def cpu_seconds(peers: Sequence[Peer]) -> float:
    return sum([(await peer.ask("status"))["cpu"] for peer in peers])


async def idle(net: Network, wallets: Wallets, count: int) -> dict[str, float]:
    """One transaction at a time, in turn at each node."""
    for peer in net.peers:
        await peer.ask("sample", 0)
    await net.rest()
    cpu = await cpu_seconds(net.peers)
    await trio.sleep(RESTING_SECONDS)
    resting = (await cpu_seconds(net.peers) - cpu) / RESTING_SECONDS
    watch, cpu, began = Watch(net), await cpu_seconds(net.peers), trio.current_time()
    for number in range(count):
        await trio.sleep(REST_SECONDS)
        raw = wallets.transfer(number % len(wallets.keys))
        watch.send(raw, 0)
        await net.peers[number % len(net.peers)].tell("submit", [raw])
        while len(watch.latencies) <= number:
            await watch.moved.wait()
        await trio.sleep(REST_SECONDS)  # the block that commits the state comes now
    used, blocks = await cpu_seconds(net.peers) - cpu, sum(watch.blocks)
    used -= resting * (trio.current_time() - began)
    return {
        "finality_p50_ms": percentile(watch.latencies, 0.5),
        "finality_p99_ms": percentile(watch.latencies, 0.99),
        "finality_transactions": count,
        "cpu_ms_per_block_and_node": 1000 * used / blocks,
        "cpu_share_of_a_node_at_rest": resting / len(net.peers),
    }


async def paced(net: Network, wallets: Wallets, pace: int, seconds: float) -> dict[str, float]:
    """An open loop at a fixed rate."""
    for peer in net.peers:
        await peer.ask("sample", SAMPLE)
    await net.rest()
    watch, began, sent, nodes = Watch(net), trio.current_time(), 0, len(net.peers)
    while (now := trio.current_time() - began) < seconds:
        wave: list[list[bytes]] = [[] for _ in net.peers]
        while sent < now * pace:
            sender = sent % len(wallets.keys)
            raw = wallets.transfer(sender)
            watch.send(raw, SAMPLE)
            wave[sender % nodes].append(raw)
            sent += 1
        for peer, raws in zip(net.peers, wave, strict=True):
            if raws:
                await peer.tell("submit", raws)
        await trio.sleep(0.01)
    while watch.slowest < sent:
        await watch.moved.wait()
    return {
        "paced_per_second": pace,
        "paced_p50_ms": percentile(watch.latencies, 0.5),
        "paced_p99_ms": percentile(watch.latencies, 0.99),
    }


async def load(net: Network, wallets: Wallets, seconds: float) -> dict[str, Any]:
    """As many as go through. Every node gets transfers of its own senders, in their order."""
    for peer in net.peers:
        await peer.ask("sample", SAMPLE)
    await net.rest()
    watch, nodes, sent = Watch(net), len(net.peers), 0
    cpu, mine = await cpu_seconds(net.peers), time.process_time()
    began = trio.current_time()
    waves: list[list[bytes]] = [[] for _ in net.peers]
    while trio.current_time() < began + seconds:
        if sent - watch.slowest >= WINDOW:
            await watch.moved.wait()
            continue
        for _ in range(BATCH):
            sender = sent % len(wallets.keys)
            raw = wallets.transfer(sender)
            watch.send(raw, SAMPLE)
            waves[sender % nodes].append(raw)
            sent += 1
        for index, peer in enumerate(net.peers):
            await peer.tell("submit", waves[index])
            waves[index] = []
    wall, done = trio.current_time() - began, watch.slowest
    generator = time.process_time() - mine
    used = await cpu_seconds(net.peers) - cpu
    blocks = max(watch.blocks)
    while watch.slowest < sent:
        await watch.moved.wait()
    rows = await net.rest()
    if len({row["root"] for row in rows}) != 1 or watch.failed or any(r["refused"] for r in rows):
        raise BenchFailed(f"roots differ or transfers failed: {watch.failed}, {rows}")
    return {
        "transfers_per_second": done / wall,
        "transfers": done,
        "load_seconds": wall,
        "loaded_p50_ms": percentile(watch.latencies, 0.5),
        "loaded_p99_ms": percentile(watch.latencies, 0.99),
        "transfers_per_block": done / max(1, blocks),
        "generator_cpu_share": generator / wall / (os.cpu_count() or 1),
        "cpu_us_per_transfer_and_node": 1e6 * used / nodes / max(1, done),
        "roots_equal": True,
    }


async def sync(net: Network) -> dict[str, float]:
    """A new node takes the whole chain; the clock starts when it is up."""
    target = (await net.statuses())[0]
    transactions = [0]
    done = trio.Event()

    def saw(seen: BlockSeen) -> None:
        if seen.node == len(net.peers) - 1:
            transactions[0] += seen.transactions
            if seen.height >= target["height"]:
                done.set()

    net.on_block = saw
    [peer] = await net.start(1, follow=True)
    began, cpu = trio.current_time(), (await peer.ask("status"))["cpu"]
    await done.wait()
    wall, row = trio.current_time() - began, await peer.ask("status")
    if row["root"] != target["root"]:
        raise BenchFailed("the new node has another root")
    return {
        "sync_blocks": target["height"],
        "sync_blocks_per_second": target["height"] / wall,
        "sync_transactions_per_second": transactions[0] / wall,
        "sync_cpu_share": (row["cpu"] - cpu) / wall,
    }


def conserved(net: Network) -> bool:
    """Count the money of every node's whole state; InvariantViolation when it is not right."""
    for peer in net.peers:
        with ChainStore(peer.directory / "chain", net.genesis) as store:
            recount(store.state_items())
    return True


def batched(raws: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    """Lists of `size`, the last one shorter."""
    while batch := list(islice(raws, size)):
        yield batch


# ---- phases in this process ----------------------------------------------------------------------


def chain_of(
    store: ChainStore, bodies: Iterator[list[bytes]], leader: KeyPair, chain: bytes
) -> Iterator[Block]:
    """Blocks with real proofs and signatures; the consumer applies each before the next."""
    for body in bodies:
        head = store.head
        header = Header(
            protocol=1,
            height=head.height + 1,
            view=start_view(head.height, head.view, store.genesis.parameters.epoch_blocks) + 1,
            parent_view=head.view,
            parent=head.hash,
            time_ms=head.header.time_ms + 1,
            proposer=leader.public,
            proof=vrf.prove(leader.seed, beacon_input(chain, head.mix, head.height + 1)),
            tx_root=transactions_root(body),
            state_height=head.height,
            history_root=store.history_root(head.height) or b"",
            state_root=head.state_root,
            validators=store.set_ids(store.epoch)[0],
            next_validators=store.set_ids(store.epoch)[1],
        )
        yield sign_block(leader, chain, header, body)


def replay(home: Path, count: int) -> dict[str, float]:
    """Build a chain, then execute it afresh from its bytes with every signature checked."""
    owners = owner_keys(ACCOUNTS)
    genesis = make_genesis(owners, 1)
    chain, leader = chain_id(genesis), key_of("node", 0)
    wallets = Wallets(owners, chain)
    raws = (wallets.transfer(number % ACCOUNTS) for number in range(count))
    encoded: list[bytes] = []
    costs = 0.0
    with ChainStore(home / "made", genesis) as store:
        for block in chain_of(store, batched(raws, BLOCK), leader, chain):
            encoded.append(encode(block))
            began = time.perf_counter()
            applied = store.apply(block, None)
            costs += time.perf_counter() - began
            if not all(receipt.ok for receipt in applied.receipts):
                raise BenchFailed("a transfer of the made chain failed")
        wanted = store.state_root
    with ChainStore(home / "replayed", genesis) as store:
        began, cpu = time.perf_counter(), time.process_time()
        for raw in encoded:
            block = decode(Block, raw, 64 << 20)
            if transactions_root(block.transactions) != block.header.tx_root:
                raise BenchFailed("a body is not its header's")
            for item in block.transactions:
                if not verify_transaction(decode_transaction(item, chain), chain):
                    raise BenchFailed("a signature is bad")
            store.apply(block, None)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        if store.state_root != wanted or block_hash(block.header) != store.head.hash:
            raise BenchFailed("the replay has another root")
        recount(store.state_items())
    return {
        "replay_per_second": count / wall,
        "replay_per_cpu_second": count / cpu,
        "us_per_tx_10k": 1e6 * costs / count,
    }


def cost_at(home: Path, accounts: int, count: int) -> float:
    """Microseconds to execute a transfer among so many accounts. Senders have keys; the others are
    only there, and get what is sent."""
    senders = owner_keys(min(accounts, ACCOUNTS))
    small = make_genesis(senders, 1)
    known = {owner for owner, _ in small.accounts}
    extra = [(sha256(b"other", i.to_bytes(8, "big")), START_BALANCE) for i in range(accounts)]
    rows = [row for row in extra[: accounts - len(known)] if row[0] not in known]
    genesis = Genesis(
        small.chain,
        small.time_ms,
        small.protocol,
        tuple(sorted([*small.accounts, *rows])),
        small.validators,
        small.work_stakes,
        small.nodes,
        small.mature_classes,
        small.auditors,
        small.parameters,
    )
    chain, leader = chain_id(genesis), key_of("node", 0)
    wallets = Wallets(senders, chain, [owner for owner, _ in genesis.accounts])
    raws = (wallets.transfer(number % len(senders)) for number in range(count))
    spent = 0.0
    with ChainStore(home / f"at-{accounts}", genesis) as store:
        for block in chain_of(store, batched(raws, BLOCK), leader, chain):
            began = time.perf_counter()
            store.apply(block, None)
            spent += time.perf_counter() - began
    return 1e6 * spent / count


# ---- all of it -----------------------------------------------------------------------------------


async def live(options: argparse.Namespace, phases: set[str], found: dict[str, Any]) -> None:
    owners = owner_keys(ACCOUNTS)
    genesis = make_genesis(owners, options.validators)
    async with network(genesis) as net:
        say(f"starting {options.validators} validators")
        await net.start(options.validators)
        await net.linked()
        wallets = Wallets(owners, net.chain_id)
        if "idle" in phases:
            say(f"idle: {options.transactions} transactions, one at a time")
            found |= await idle(net, wallets, options.transactions)
        if "paced" in phases:
            say(f"paced: {options.pace} transfers a second")
            found |= await paced(net, wallets, options.pace, min(15.0, options.seconds))
        if "load" in phases:
            say(f"load: {options.seconds} seconds")
            found |= await load(net, wallets, options.seconds)
        if "sync" in phases:
            say("sync: a new node")
            found |= await sync(net)
        for peer in net.peers:
            await peer.stop()
        found["supply_conserved"] = conserved(net)
        found["complaints"] = sum(bool(peer.complaints()) for peer in net.peers)
        for peer in net.peers:
            if peer.complaints():
                say(f"node {peer.index} said: {peer.complaints()[-2000:]}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench chain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load phase")
    parser.add_argument("--validators", type=int, default=4)
    parser.add_argument("--transactions", type=int, default=60, help="of the idle phase")
    parser.add_argument("--pace", type=int, default=500, help="of the paced phase, per second")
    parser.add_argument("--replay", type=int, default=40_000, help="transfers to replay")
    parser.add_argument("--skip-1m", action="store_true", help="leave the million accounts out")
    parser.add_argument("--only", default=",".join(PHASES), help="phases, with commas")
    options = parser.parse_args(arguments)
    phases = set(options.only.split(","))
    if not phases <= set(PHASES):
        parser.error(f"--only takes {','.join(PHASES)}")
    report = Report("scripts/bench chain")
    found: dict[str, Any] = {"validators": options.validators}
    try:
        with tempfile.TemporaryDirectory(prefix="tdmld-bench-") as place:
            home = Path(place)
            if "floor" in phases:
                found["floor"] = floors(home)
            if phases & {"idle", "paced", "load", "sync"}:
                trio.run(live, options, phases, found)
            if "replay" in phases:
                say(f"replay: {options.replay} transfers")
                found |= replay(home, options.replay)
            if "cost" in phases:
                if "us_per_tx_10k" not in found:
                    found["us_per_tx_10k"] = cost_at(home, ACCOUNTS, options.replay)
                if not options.skip_1m:
                    say("cost: a million accounts")
                    found["us_per_tx_1m"] = cost_at(home, MILLION, 20_000)
    except BenchFailed as error:
        say(f"FAILED: {error}")
        return 1
    report.document |= found
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
