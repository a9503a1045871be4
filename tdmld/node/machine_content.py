"""A machine's dealings with peers and content: who may have what, texts, given weights."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import trio

from tdmld.node import control
from tdmld.node.carrierclient import CarrierClient
from tdmld.node.gather import Gatherer
from tdmld.node.jobfiles import remove_files, remove_tree
from tdmld.node.layout import Layout
from tdmld.node.machine_types import SlotId
from tdmld.node.reachcarrier import ReachCarrier
from tdmld.p2p import Ban, PeerInfo
from tdmld.train.spec import decode_spec

log = logging.getLogger(__name__)

R = TypeVar("R", bound=control.Reply)


class ContentSide:
    """The base of `tdmld.node.machine.Machine`: what it does without a slot."""

    reach: ReachCarrier
    """How the carrier can be reached by others, and others through it."""

    def __init__(self, layout: Layout, session: str) -> None:
        self.session = session
        self._layout = layout
        self._peers: tuple[control.Peer, ...] = ()
        self._bans: tuple[control.Denied, ...] = ()
        self._members: dict[bytes, Callable[[int], control.Request]] = {}
        """Of each job: who may have its content, for a restarted carrier."""

    def _attach(self, carrier: CarrierClient) -> None:
        self._carrier = carrier
        self.reach = ReachCarrier(carrier)
        self._gather = Gatherer(self._layout, self.session, carrier)

    async def set_peers(self, peers: Sequence[PeerInfo]) -> None:
        """Replace the carriers (sessions) to keep a connection with; the first ones, if they are
        more than one message holds."""
        self._peers = _that_fit(peers)
        await self._call(lambda n: control.SetPeers(n, self._peers), control.Done)

    async def set_bans(self, bans: Sequence[Ban]) -> None:
        """Replace whom the carrier refuses besides those that it found out itself; the first ones,
        if they are more than one message holds."""
        self._bans = tuple(
            control.Denied(ban.subject, ban.until, ban.reason[: control.MAX_REASON])
            for ban in bans[: control.MAX_BANS]
        )
        await self._call(lambda n: control.SetBans(n, self._bans), control.Done)

    async def set_members(
        self,
        job: bytes,
        sessions: frozenset[str],
        sealed: bytes | None = None,
        *,
        private: bool = False,
        given: Sequence[bytes] = (),
    ) -> None:
        """Replace the sessions that may fetch this job's content from us; auditors are added when
        they are drawn. An empty set closes the job for others.

        sealed   the spec id of a sealed job; its members get the content key
        private  a split job: the text, states and contributions of stage 0 and the result are given
                 to nobody
        given    roots of the given weights that members may have (`workers.shared_roots`)
        """
        named = _named(sessions)
        self._members[job] = lambda n: control.SetMembers(
            n, job, named, sealed, private, tuple(given)
        )
        await self._call(self._members[job] if named else self._members.pop(job), control.Done)

    async def rekey(
        self,
        job: bytes,
        remaining: frozenset[str],
        sealed: bytes,
        *,
        private: bool = False,
        given: Sequence[bytes] = (),
    ) -> None:
        """For the submitter, when a worker of a sealed job was replaced: `remaining` are its
        members now; what is sealed from now on is sealed under a new content key, which only they
        are given. The rest as `set_members`. ContentUnavailable when this node has not published
        the spec."""
        named, roots = _named(remaining), tuple(given)
        self._members[job] = lambda n: control.SetMembers(n, job, named, sealed, private, roots)
        await self._call(
            lambda n: control.Rekey(n, job, named, sealed, private, roots), control.Done
        )

    async def import_text(self, path: Path, sealed: bytes | None = None) -> list[tuple[bytes, int]]:
        """Cut a text into shards of 1 MiB and keep them: [(shard id, size)]; sealed under a content
        key of the spec id `sealed` when one is given. ContentError."""
        text = str(Path.cwd() / path)
        reply = await self._call(lambda n: control.ImportText(n, text, sealed), control.Imported)
        return list(reply.shards)

    async def fetch_data(self, job: bytes, spec: bytes, holders: Sequence[str]) -> None:
        """Bring all data shards of a spec, and the content key of sealed ones. ContentError. Needed
        before `open_slot` and `genesis_roots`. At once for what is here."""
        await self._gather.fetch_data(job, spec, holders)

    async def publish_given(self, files: Mapping[bytes, Path]) -> None:
        """Keep the files that a job begins with when it goes on from given weights (root -> file,
        as the spec names them) for its members. FileError, ContentRefused (no room)."""
        await self._gather.publish_given(files)

    async def fetch_given(
        self, job: bytes, spec: bytes, slot: SlotId, holders: Sequence[str]
    ) -> None:
        """Bring the files that a slot begins with, checked against the spec; at once when they are
        here, or when the spec draws them. Needed before `open_slot` at boundary 0 and
        `genesis_roots`. ContentError."""
        await self._gather.fetch_given(job, spec, slot, holders)

    async def drop_data(self, names: Collection[bytes]) -> None:
        """Remove texts by their `seal.stored_names`, and given weights by their roots: no job that
        is not over needs them."""
        blobs = [self._layout.blob(name) for name in names]
        given = [self._layout.given(name) for name in names]
        await trio.to_thread.run_sync(remove_files, [*blobs, *given])
        for name in names:
            await trio.to_thread.run_sync(remove_tree, self._layout.sealed(name))

    async def probe_frame(
        self, job: bytes, spec: bytes, slot: SlotId, epoch: int, link: str, seq: int, holder: str
    ) -> bool:
        """As a witness: whether the session `holder`, which has `slot`, gives out the frame `seq`
        that it should have sent on `link` (named as seen from that slot), signed in this epoch or
        an older one. CarrierUnavailable."""
        limit = decode_spec(spec).link_frame_bytes(slot.stage, link)
        wire_slot = control.Slot(job, *slot)
        reply = await self._call(
            lambda n: control.ProbeFrame(n, wire_slot, epoch, link, seq, limit, holder),
            control.Probed,
        )
        if not reply.delivered:
            log.info("slot %s does not give frame %d of %s: %s", slot, seq, link, reply.text)
        return reply.delivered

    async def _call(
        self,
        make: Callable[[int], control.Request],
        kind: type[R],
        descriptors: tuple[int, ...] = (),
    ) -> R:
        return await self._carrier.call(make, kind, descriptors)

    def _restore(self) -> list[Callable[[int], control.Request]]:
        """What a restarted carrier must know."""
        return [
            *self.reach.restore(),
            lambda n: control.SetPeers(n, self._peers),
            lambda n: control.SetBans(n, self._bans),
            *self._members.values(),
        ]


def _named(sessions: frozenset[str]) -> tuple[str, ...]:
    """As many members as a message names."""
    return tuple(sorted(sessions)[: control.MAX_MEMBERS])


def _that_fit(peers: Sequence[PeerInfo]) -> tuple[control.Peer, ...]:
    """As many of `peers`, with as many addresses, as one SetPeers can carry."""
    found: list[control.Peer] = []
    size = 0
    for peer in peers:
        wire = control.Peer(peer.peer_id, tuple(peer.addresses)[: control.MAX_ADDRESSES])
        size += sum(len(text.encode()) + 4 for text in (wire.session, *wire.addresses))
        if size > control.MESSAGE_BYTES // 2 or len(found) == control.MAX_PEERS:
            log.warning("%d carriers are too many to stay connected with", len(peers))
            break
        found.append(wire)
    return tuple(found)
