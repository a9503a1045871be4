"""kill -9 of real validators under load, and a check of everything that they ever said was final.

Kills are of several kinds: one at random, the proposer just as a block is executed, the same one
again while it starts, two at once (no quorum), and all. Transfers run all the time; each owner has
one on its way, and says it again through another node until it is final. At the end:

    lost_final_blocks  (height, hash) that any node reported as final and that some node lacks, and
                       transactions reported as executed that some node has no receipt for
    double_signs       two votes (or proposals) of one validator that exclude each other, among all
                       that any node ever received, before and after restarts, with good signatures
    supply_conserved   the money of every node's whole state, counted
    one_head           all nodes rest on one head and one root
"""

import argparse
import random
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import trio
from chainnet import BlockSeen, Network, Peer, Wallets, make_genesis, network, owner_keys
from chainpeer import SIGNED
from report import Report, say

from tdmld.chain.blocks import (
    PROPOSAL_DOMAIN,
    Committee,
    Kind,
    Vote,
    block_hash,
    verify_vote,
    view_epoch,
)
from tdmld.chain.crypto import sha256, verify
from tdmld.chain.genesis import chain_id
from tdmld.chain.ledger import recount
from tdmld.node.store import ChainStore

PROPOSAL = 3
OWNERS = 200
AGAIN_SECONDS = 5.0
"""A transfer that is not final after so long is said again."""
KINDS = ("random", "proposer", "again", "two", "all")
WEIGHTS = (40, 35, 15, 7, 3)
UP_SECONDS = (0.0, 1.5)
"""Between the last restart and the next kill."""
PATIENCE_SECONDS = 120.0


class ChaosFailed(Exception):
    """A check did not hold, or the network did not come back."""


class Ledger:
    """What any node ever said: final blocks, and transactions executed."""

    def __init__(self) -> None:
        self.blocks: dict[int, set[bytes]] = defaultdict(set)
        self.executed: set[bytes] = set()
        self.failed = 0
        self.height = 0
        self.last = BlockSeen(0, 0, b"", 0, 0, [], 0)
        self.moved = trio.Event()

    def saw(self, seen: BlockSeen) -> None:
        self.blocks[seen.height].add(seen.hash)
        self.executed.update(seen.ids)
        self.height = max(self.height, seen.height)
        self.last = seen
        self.moved.set()
        self.moved = trio.Event()


class Load:
    """Transfers, one of each owner at a time, through nodes that live."""

    def __init__(self, net: Network, ledger: Ledger, rng: random.Random, pace: float) -> None:
        self._net, self._ledger, self._rng, self._pace = net, ledger, rng, pace
        self._wallets = Wallets(owner_keys(OWNERS), net.chain_id)
        self._waiting: dict[int, tuple[bytes, bytes, float]] = {}
        self.sent = 0
        self.stopping = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def _say(self, raw: bytes) -> None:
        alive = [peer for peer in self._net.peers if peer.alive]
        if alive:
            await self._rng.choice(alive).tell("submit", [raw])

    async def run(self) -> None:
        free = list(range(OWNERS))
        while True:
            await trio.sleep(1 / self._pace)
            now = trio.current_time()
            for sender, (raw, key, said) in list(self._waiting.items()):
                if key in self._ledger.executed:
                    del self._waiting[sender]
                    free.append(sender)
                elif now > said + AGAIN_SECONDS:
                    self._waiting[sender] = raw, key, now
                    await self._say(raw)
            if free and not self.stopping:
                sender = free.pop(self._rng.randrange(len(free)))
                raw = self._wallets.transfer(sender)
                self._waiting[sender] = raw, sha256(raw), now
                self.sent += 1
                await self._say(raw)


class Chaos:
    """Who is killed when."""

    def __init__(self, net: Network, ledger: Ledger, rng: random.Random) -> None:
        self._net, self._ledger, self._rng = net, ledger, rng
        self.kills: Counter[str] = Counter()
        self.stuck_seconds = 0.0

    async def run(self, kills: int) -> None:
        while (done := self.kills.total()) < kills:
            await trio.sleep(self._rng.uniform(*UP_SECONDS))
            kind = self._rng.choices(KINDS, WEIGHTS)[0]
            victims = await self._choose(kind)
            for peer in victims:
                peer.kill()
                self.kills[kind] += 1
            await self._restart(victims, kind)
            await self._progress()
            if done // 10 != self.kills.total() // 10:
                say(f"{self.kills.total()} kills, height {self._ledger.height}")

    async def _choose(self, kind: str) -> list[Peer]:
        peers = self._net.peers
        match kind:
            case "two":
                return self._rng.sample(peers, 2)
            case "all":
                return list(peers)
            case "proposer":
                with trio.move_on_after(3):
                    await self._ledger.moved.wait()
                await trio.sleep(self._rng.uniform(0, 0.03))
                return [peers[self._ledger.last.node]]
        return [self._rng.choice(peers)]

    async def _restart(self, victims: list[Peer], kind: str) -> None:
        await trio.sleep(self._rng.choice((0.0, 0.3, 1.0)))
        for peer in victims:
            await peer.process.wait()
            await self._net.restart(peer)
        if kind == "again":
            await trio.sleep(self._rng.uniform(0.2, 3.0))
            for peer in victims:
                peer.kill()
                self.kills[kind] += 1
                await peer.process.wait()
                await self._net.restart(peer)
        for peer in victims:
            if not await peer.ready():
                raise ChaosFailed(f"node {peer.index} did not start: {peer.complaints()[-3000:]}")
            await peer.ask("hear")
            await peer.ask("sample", 0)
            await self._net.introduce(peer)

    async def _progress(self) -> None:
        """The chain must move on."""
        began, height = trio.current_time(), self._ledger.height
        with trio.move_on_after(PATIENCE_SECONDS) as late:
            while self._ledger.height <= height + 1:
                await self._ledger.moved.wait()
        self.stuck_seconds = max(self.stuck_seconds, trio.current_time() - began)
        if late.cancelled_caught:
            raise ChaosFailed(f"no block for {PATIENCE_SECONDS} s after height {height}")


# ---- the checks ----------------------------------------------------------------------------------


def double_signs(net: Network) -> list[str]:
    """Pairs of signed things that one validator may not both sign."""
    committees: dict[int, Committee | None] = {}
    said: dict[tuple[int, int, int], dict[bytes, bytes]] = defaultdict(dict)
    for peer in net.peers:
        path = peer.directory / "heard"
        raw = path.read_bytes() if path.exists() else b""
        for start in range(0, len(raw) - SIGNED.size + 1, SIGNED.size):
            kind, view, voter, key, signature = SIGNED.unpack_from(raw, start)
            said[voter, view, kind][key] = signature

    def signed(kind: int, view: int, voter: int, key: bytes, signature: bytes) -> bool:
        committee = committees[view_epoch(view)]
        if committee is None or voter >= len(committee.nodes):
            return False
        if kind == PROPOSAL:
            return verify(committee.nodes[voter], PROPOSAL_DOMAIN, net.chain_id, key, signature)
        return verify_vote(committee, Vote(Kind(kind), view, key, voter, signature))

    found = []
    with ChainStore(net.peers[0].directory / "chain", net.genesis) as store:
        for _, view, _ in said:
            epoch = view_epoch(view)
            committees[epoch] = committees.get(epoch) or store.committee(epoch)
    for (voter, view, kind), values in said.items():
        rivals = [(kind, *item) for item in values.items()]
        if kind == Kind.NULLIFY:
            other = said.get((voter, view, int(Kind.FINALIZE)), {})
            rivals += [(int(Kind.FINALIZE), *item) for item in other.items()]
        good = [row for row in rivals if signed(row[0], view, voter, row[1], row[2])]
        if len(good) > 1:
            found.append(f"validator {voter}, view {view}: {[row[0] for row in good]}")
    return found


def check_stores(net: Network, ledger: Ledger) -> dict[str, Any]:
    """Open every node's directory, and hold it against what was said."""
    lost, heads, conserved, votes = 0, set(), True, 0
    for peer in net.peers:
        with ChainStore(peer.directory / "chain", net.genesis) as store:
            heads.add((store.height, store.head.hash, store.state_root))
            for height, hashes in ledger.blocks.items():
                block = store.block(height)
                lost += block is None or {block_hash(block.header)} != hashes
            for key in ledger.executed:
                receipt = store.receipt(key)
                lost += receipt is None or not receipt.ok
            try:
                recount(store.state_items())
            except Exception as error:
                say(f"node {peer.index}: {error}")
                conserved = False
            heard = peer.directory / "heard"
            votes += heard.stat().st_size // SIGNED.size if heard.exists() else 0
    rivals = double_signs(net)
    for text in rivals:
        say(f"double sign: {text}")
    return {
        "lost_final_blocks": lost,
        "double_signs": len(rivals),
        "signed_things_checked": votes,
        "supply_conserved": conserved,
        "one_head": len(heads) == 1,
        "final_blocks_checked": len(ledger.blocks),
    }


async def run(options: argparse.Namespace, home: Path, found: dict[str, Any]) -> None:
    rng, ledger = random.Random(options.seed), Ledger()
    genesis = make_genesis(owner_keys(OWNERS), options.validators)
    assert chain_id(genesis)
    async with network(genesis, home) as net:
        net.on_block = ledger.saw
        await net.start(options.validators)
        for peer in net.peers:
            await peer.ask("hear")
            await peer.ask("sample", 0)
        await net.linked()
        load, chaos = Load(net, ledger, rng, options.pace), Chaos(net, ledger, rng)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await chaos.run(options.kills)
            load.stopping = True
            with trio.move_on_after(PATIENCE_SECONDS) as late:
                while load.waiting:  # noqa: ASYNC110  # it polls itself
                    await trio.sleep(0.05)
                await net.rest()
            nursery.cancel_scope.cancel()
        if late.cancelled_caught:
            raise ChaosFailed(f"no rest: {load.waiting} transfers wait, {await net.statuses()}")
        for peer in net.peers:
            await peer.stop()
        logs = [line for peer in net.peers for line in peer.complaints().splitlines()]
        found |= {
            "kills": chaos.kills.total(),
            "faults": dict(chaos.kills),
            "transfers": load.sent,
            "longest_recovery_s": chaos.stuck_seconds,
            "evidence_logged": sum("signed twice" in line for line in logs),
        }
        found |= check_stores(net, ledger)


def leaves(group: BaseExceptionGroup[ChaosFailed]) -> list[BaseException]:
    """The exceptions in a group of groups."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos chain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write one JSON document there")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--validators", type=int, default=4)
    parser.add_argument("--pace", type=float, default=50.0, help="transfers a second")
    parser.add_argument("--keep", type=Path, help="keep the nodes' directories there")
    options = parser.parse_args(arguments)
    report = Report("scripts/chaos chain")
    found: dict[str, Any] = {"seed": options.seed, "validators": options.validators}
    with tempfile.TemporaryDirectory(prefix="tdmld-chaos-") as place:
        home = options.keep or Path(place)
        home.mkdir(parents=True, exist_ok=True)
        try:
            trio.run(run, options, home, found)
        except* ChaosFailed as group:
            for error in leaves(group):
                say(f"FAILED: {error}")
            found["failed"] = True
    if "failed" in found:
        return 1
    report.document |= found
    report.finish(options.json)
    wrong = found["lost_final_blocks"] or found["double_signs"] or found["evidence_logged"]
    return int(bool(wrong) or not (found["supply_conserved"] and found["one_head"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
