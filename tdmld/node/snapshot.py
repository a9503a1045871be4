"""A new node begins with the state of a recent height instead of executing every block.

    client                          server
    SnapshotRequest(checkpoint) ->  copy of the state at height S, pinned: headers S+1..D, the
                                <-  certificate of D, the mix and the history's peaks at S
    TurnsRequest(epoch)         ->
                                <-  Turns, from that epoch on, about 1 MiB at a time
    StateRequest(S, after)      ->
                                <-  StateItems, in order of keys, about 1 MiB at a time

Trust: genesis names the first validators; over the turns of all epochs (`chain.turns`), every
signature checked, they lead to those of D, who signed D; the headers lead back to S; the first that
commits S gives the state root, against which the rebuilt tree is checked, and the history root,
against which the peaks are. The VRF proof of S+1 verifies under the right mix only. A configured
checkpoint must stand in that history (or be S itself); a chain that has another block there ends
the node. Everything else that is wrong costs that peer its turn, and the store goes back to
genesis. After it, blocks follow by block sync. The turns are kept: the node proves and gives
snapshots as if it had seen every epoch.
"""

import logging
import shutil
import time
from functools import partial
from itertools import pairwise

import trio

from tdmld.chain import history
from tdmld.chain.accounts import (
    ValidatorSet,
)
from tdmld.chain.blocks import Header, beacon_mix, block_hash, epoch_of
from tdmld.chain.checkpoint import Checkpoint
from tdmld.chain.codec import decode, encode
from tdmld.chain.epochs import genesis_set
from tdmld.chain.errors import ChainError, DecodeError, ProofRefused
from tdmld.chain.genesis import protocol_at
from tdmld.chain.history import NotHeld
from tdmld.chain.light import Ancestor, check_headers, shows
from tdmld.chain.turns import Turn, check_final, follow
from tdmld.node.chainerrors import SnapshotUnavailable, StoreError
from tdmld.node.chainwire import (
    STATE_BYTES,
    TURNS,
    NoSnapshot,
    Snapshot,
    SnapshotRequest,
    StateItems,
    StateRequest,
    SyncAnswer,
    Turns,
    TurnsRequest,
    blocks_bytes,
)
from tdmld.node.finality import Finality
from tdmld.node.pinning import Pinned, pin
from tdmld.node.store import PROTOCOLS, ChainStore, Head, StoreCopy, check_checkpoint
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import P2PError

log = logging.getLogger(__name__)

OFFER_SECONDS = 600.0
"""A copy is offered to new clients for so long; one that is being read lives longer."""
IDLE_SECONDS = 60.0
"""An old copy that nobody read for so long makes room for a newer one."""
PIN_SECONDS = 5.0
ANSWER_SECONDS = 15.0
JOIN_SECONDS = 120.0
"""How long a new node looks for a peer that can give a snapshot, before it says so and stops."""
ROUND_SECONDS = 1.0


class SnapshotServer:
    """Gives the copies. At most one at a time lies beside the database."""

    def __init__(self, finality: Finality) -> None:
        self._finality = finality
        self._pinned: Pinned[StoreCopy] | None = None
        self._made = self._used = 0.0
        self._lock = trio.Lock()
        path = finality.store.path
        self._directory = path.with_name(path.name + "-copy")
        shutil.rmtree(self._directory, ignore_errors=True)  # of a run that was killed

    async def offer(self, checkpoint: int) -> Snapshot | NoSnapshot:
        """A snapshot that can be asked for now."""
        async with self._lock:
            try:
                pinned = await self._current()
            except StoreError as error:
                log.warning("no snapshot can be made: %s", error)
                pinned = None
        if pinned is None:
            return NoSnapshot("no block commits a recent state: the chain does not go on")
        store, committing = self._finality.store, pinned.headers[0]
        base = committing.state_height
        headers = []
        for height in range(base, pinned.headers[-1].height + 1):
            block = store.block(height)
            if block is None:
                return NoSnapshot(f"this node began at height {store.base} itself: ask later")
            headers.append(block.header)
        passed, place = store.passed(base), None
        if passed is None:
            return NoSnapshot(f"height {base} has been forgotten here")
        if checkpoint and checkpoint < base:
            leaf = store.history_leaf(checkpoint)
            try:
                path = store.history_proof(checkpoint, base)
            except NotHeld:
                leaf, path = None, ()
            if leaf is None:
                return NoSnapshot(f"this node cannot show the checkpoint {checkpoint}")
            place = leaf[0], Ancestor(checkpoint, leaf[1], path)
        return Snapshot(
            header=headers[0],
            mix=passed.mix,
            peaks=store.history_peaks(base),
            headers=tuple(headers[1:]),
            certificate=pinned.certificate,
            checkpoint=place,
        )

    def items(self, height: int, after: bytes) -> StateItems | NoSnapshot:
        """A part of the state of the snapshot at `height`."""
        pinned = self._pinned
        if pinned is None or pinned.headers[0].state_height != height:
            return NoSnapshot(f"the snapshot at height {height} is gone: begin with a newer one")
        self._used = time.monotonic()
        try:
            items, more = pinned.view.state_after(after, STATE_BYTES)
        except StoreError as error:  # another thread has just removed the copy
            log.info("a part of the snapshot at height %d: %s", height, error)
            return NoSnapshot(f"the snapshot at height {height} is gone: begin with a newer one")
        return StateItems(height, tuple(items), more)

    async def run(self) -> None:
        """Remove a copy that nobody reads, for ever; when cancelled, whatever is there."""
        try:
            while True:
                await trio.sleep(IDLE_SECONDS)
                if time.monotonic() > max(self._made, self._used) + OFFER_SECONDS:
                    self.close()
        finally:
            self.close()

    def close(self) -> None:
        """Remove the copy."""
        if self._pinned is not None:
            self._pinned.view.close()
            self._pinned = None

    async def _current(self) -> Pinned[StoreCopy] | None:
        now = time.monotonic()
        if self._pinned is not None:
            if now < self._made + OFFER_SECONDS or now < self._used + IDLE_SECONDS:
                return self._pinned
            self.close()
        store = self._finality.store
        with trio.move_on_after(PIN_SECONDS):
            self._pinned = await pin(self._finality, lambda: store.copy(self._directory))
            self._made = self._used = now
        return self._pinned


def turns_from(store: ChainStore, first: int) -> Turns:
    """A page of turns, from the end of epoch `first` on."""
    found, size = list[Turn](), 0
    while len(found) < TURNS and size <= STATE_BYTES:
        turn = store.turn(first + len(found))
        if turn is None:
            break
        found.append(turn)
        size += len(encode(turn))
    return Turns(tuple(found))


def check_snapshot(
    store: ChainStore, chosen: ValidatorSet, offered: Snapshot
) -> tuple[Head, tuple[bytes, ...]]:
    """The head to begin with, and the peaks; `chosen`: the validators of the last header's epoch.
    ProofRefused. CheckpointMismatch: the network's quorum contradicts the operator's checkpoint."""
    header, headers = offered.header, offered.headers
    base, key = header.height, block_hash(header)
    if base == 0 or not headers:
        raise ProofRefused("the snapshot is of no block")
    check_headers((header, *headers))
    epoch_blocks = store.genesis.parameters.epoch_blocks
    check_final(store.chain_id, epoch_blocks, chosen, headers[-1], offered.certificate)
    committing = next((h for h in headers if h.state_height == base), None)
    if committing is None:
        raise ProofRefused(f"no header of the snapshot commits the state of height {base}")
    for one in (header, *headers):
        version = protocol_at(store.genesis, one.height)
        if one.protocol != version or version not in PROTOCOLS:
            raise ProofRefused(f"block {one.height} follows protocol {one.protocol}")
    try:
        beacon_mix(store.chain_id, offered.mix, headers[0])
    except ChainError as error:
        raise ProofRefused(f"the beacon mix is not that of height {base}") from error
    names = history.peaks(base + 1)
    if len(offered.peaks) != len(names) or history.bag(offered.peaks) != committing.history_root:
        raise ProofRefused("the peaks are not those of the header's history root")
    _check_checkpoint(store.checkpoint, offered, committing)
    return Head(base, header.view, key, offered.mix, committing.state_root, header), offered.peaks


def _check_checkpoint(checkpoint: Checkpoint | None, offered: Snapshot, committing: Header) -> None:
    if checkpoint is None:
        return
    last = offered.headers[-1].height
    if last < checkpoint.height:
        raise ProofRefused(f"it ends at block {last}, below the checkpoint {checkpoint.height}")
    for header in (offered.header, *offered.headers):
        check_checkpoint(checkpoint, header.height, block_hash(header))
    if checkpoint.height >= offered.header.height:
        return
    if offered.checkpoint is None:
        raise ProofRefused(f"it does not show the checkpoint {checkpoint.height}")
    block, place = offered.checkpoint
    if place.height != checkpoint.height or not shows(place, block, committing):
        raise ProofRefused(f"its proof of the checkpoint {checkpoint.height} does not hold")
    check_checkpoint(checkpoint, checkpoint.height, block)


class SnapshotClient:
    """Begins an empty store with a snapshot from a connected peer."""

    def __init__(self, host: Host, protocol: str, store: ChainStore) -> None:
        self._host, self._protocol, self._store = host, protocol, store
        self._limit = blocks_bytes(store.genesis.parameters.block_bytes)

    async def join(self) -> None:
        """Take the first snapshot that holds. Raises SnapshotUnavailable after JOIN_SECONDS,
        CheckpointMismatch at once. Cancelled, it leaves the store at genesis when it is opened
        again."""
        why: dict[str, str] = {}
        deadline = trio.current_time() + JOIN_SECONDS
        while trio.current_time() < deadline:
            for peer in sorted(self._host.connected()):
                try:
                    await self._take(peer)
                except (P2PError, DecodeError, ProofRefused, trio.TooSlowError) as error:
                    log.info("no snapshot from %s: %s", peer, error)
                    why[peer] = str(error)
                    continue
                return
            await trio.sleep(ROUND_SECONDS)
        reasons = "; ".join(f"{peer}: {text}" for peer, text in why.items())
        raise SnapshotUnavailable(
            f"no peer gave a snapshot that holds ({reasons or 'none is connected'}): check `peers` "
            'in tdmld.toml, or set sync = "blocks"'
        )

    async def _take(self, peer: str) -> None:
        checkpoint = self._store.checkpoint
        height = 0 if checkpoint is None else checkpoint.height
        async with await self._host.open_stream(peer, self._protocol) as stream:
            offered = await self._ask(stream, SnapshotRequest(height))
            if not isinstance(offered, Snapshot):
                raise ProofRefused(offered.why if isinstance(offered, NoSnapshot) else "no answer")
            chosen = await self._follow(stream, offered)
            head, peaks = check_snapshot(self._store, chosen, offered)
            log.info("taking the state of height %d from %s", head.height, peer)
            self._store.begin_snapshot()
            try:
                taken = await self._take_state(stream, head.height)
                if self._store.taken_root() != head.state_root:
                    raise ProofRefused(f"its state of height {head.height} has another root")
            except (P2PError, DecodeError, ProofRefused, trio.TooSlowError):
                self._store.drop_snapshot()
                raise
            self._store.finish_snapshot(head, peaks)
            log.info("began with %d state items of height %d", taken, head.height)

    async def _follow(self, stream: Stream, offered: Snapshot) -> ValidatorSet:
        """The validators of the snapshot's last header, over every turn from genesis on."""
        store = self._store
        epoch_blocks = store.genesis.parameters.epoch_blocks
        height = offered.headers[-1].height if offered.headers else 0
        epoch = max(epoch_of(height, epoch_blocks), 0)
        known = genesis_set(store.genesis, min(epoch, 1))
        while known.epoch < epoch:
            part = await self._ask(stream, TurnsRequest(known.epoch))
            turns = part.turns[: epoch - known.epoch] if isinstance(part, Turns) else ()
            if not turns:
                raise ProofRefused(f"it does not show how epoch {known.epoch} ended")
            check = partial(follow, store.chain_id, epoch_blocks, known, turns)
            known = await trio.to_thread.run_sync(check)
            await trio.to_thread.run_sync(store.take_turns, turns)
        return known

    async def _take_state(self, stream: Stream, height: int) -> int:
        after, taken = b"", 0
        while True:
            part = await self._ask(stream, StateRequest(height, after))
            if not isinstance(part, StateItems):
                raise ProofRefused(part.why if isinstance(part, NoSnapshot) else "no answer")
            keys = [after, *(key for key, _ in part.items)]
            if part.height != height or any(a >= b for a, b in pairwise(keys)):
                raise ProofRefused("its keys do not ascend")
            if part.more and not part.items:
                raise ProofRefused("it says that there is more and gives nothing")
            if part.items:
                await trio.to_thread.run_sync(self._store.take_state, part.items)
            taken += len(part.items)
            if not part.more:
                return taken
            after = keys[-1]

    async def _ask(
        self, stream: Stream, request: SnapshotRequest | TurnsRequest | StateRequest
    ) -> SyncAnswer:
        with trio.fail_after(ANSWER_SECONDS):
            await stream.send(encode(request))
            raw = await stream.receive(self._limit)
        answer: SyncAnswer = decode(SyncAnswer, raw, self._limit)  # type: ignore[arg-type]
        return answer
