"""What one host grants to peers, in one place; each number with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one host. The defaults suit a daemon; a carrier may want fewer streams."""

    connections: int = 256
    """Established connections, both directions. Peers that we keep are let in above it."""
    connections_per_address: int = 64
    """Of these with one IP address; peers that we keep are let in above it. Identities cost
    nothing, addresses do: nobody takes all places with one."""
    pending_handshakes: int = 64
    """Accepted sockets that have not proved an identity yet: half-open floods stop here."""
    pending_per_address: int = 16
    """Of these from one IP address, so that one flooder cannot take every place."""
    handshake_seconds: float = 10.0
    """From the accepted (or dialled) socket to an authenticated, multiplexed connection."""
    dial_seconds: float = 10.0
    """One attempt over all addresses of a peer, handshake included."""
    open_stream_seconds: float = 10.0
    """Protocol negotiation on an established connection."""
    streams_per_peer: int = 128
    """Streams that one peer may hold open towards us at the same time."""
    message_bytes: int = 256 * 1024 * 1024
    """Above any `receive(limit)`: no caller may allow more in one message."""
    buffer_bytes: int = 256 * 1024 * 1024
    """What all connections together may hold for readers that have not taken it yet; from half of
    it on nobody is granted more (see `memory`). A carrier needs 8 MiB for each busy link."""
    keepalive_seconds: float = 10.0
    """Interval between pings on a connection."""
    keepalive_timeout_seconds: float = 8.0
    """No byte from the peer for so long after a ping: disconnected. 10 + 8 s detect a frozen peer
    within 20 s."""
    redial_first_seconds: float = 0.1
    redial_last_seconds: float = 5.0
    """Exponential back-off of redials of a kept peer, with jitter."""
    redial_patient_seconds: float = 60.0
    """The last one of a peer whose addresses are hearsay, until one of them has led to it: they may
    be those of a victim, and all of us would knock there."""
    relays: int = 2
    """Relays that we keep a reservation on, when we were given candidates: one may die."""
    shutdown_seconds: float = 1.5
    """Time for saying goodbye to all peers when the host closes."""
    gossip_bytes: int = 256 * 1024
    """Largest gossip message of any topic; larger things are announced and fetched by stream."""
    gossip_queue: int = 512
    """Messages waiting for a slow subscriber before the oldest-first reader drops new ones
    (counted)."""
    gossip_per_second: float = 50.0
    """Pace of our own publications: above it libp2p's 32-message queues drop silently."""


WRITE_SECONDS = 20.0
"""A secure-channel write that takes longer means a dead or hostile peer: the connection is closed.
It is shielded from cancellation for as long, because half a record would corrupt every stream of
the connection."""
