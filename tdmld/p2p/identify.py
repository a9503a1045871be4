"""The library's identify, bounded: what a peer says of itself must not fill our memory or time.

It takes messages of 1 MiB, remembers every protocol named in one (hundreds of thousands fit), and
handles a push as often as one comes (libp2p specs, identify: a push says what has changed).
"""

from collections.abc import Sequence

import trio
from libp2p.abc import IHost, INetStream, IPeerStore
from libp2p.identity.identify_push.identify_push import ID_PUSH, identify_push_handler_for
from libp2p.peer.id import ID

from tdmld.p2p import rawstream
from tdmld.p2p.accounting import Score
from tdmld.p2p.peers import Peers

PROTOCOLS = 256
"""Remembered of one peer; js-libp2p has about twenty."""
PROTOCOL_CHARACTERS = 128
PUSHES = 8.0
"""At once; then one in a minute."""
PUSH_HALF_LIFE_SECONDS = 300.0


def limit_identify(host: IHost, peers: Peers) -> None:
    """Put the bounds in place; once, before the host has connections."""
    _limit_protocols(host.get_peerstore())
    handle = identify_push_handler_for(host)

    async def limited(stream: INetStream) -> None:
        account = peers.account(stream.muxed_conn.peer_id)
        if account.pushes is None:
            account.pushes = Score(PUSH_HALF_LIFE_SECONDS)
        if account.pushes.add(1.0, trio.current_time()) > PUSHES:
            await rawstream.reset(stream)
        else:
            await handle(stream)

    host.set_stream_handler(ID_PUSH, limited)


def _limit_protocols(store: IPeerStore) -> None:
    add = store.add_protocols

    def add_some(peer_id: ID, protocols: Sequence[str]) -> None:
        short = (text for text in protocols[:PROTOCOLS] if len(text) <= PROTOCOL_CHARACTERS)
        add(peer_id, list(short))

    store.add_protocols = add_some  # type: ignore[method-assign]
