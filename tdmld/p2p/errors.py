"""Everything `tdmld.p2p` raises. No error of libp2p or of a socket leaves this package.

P2PError
├── AddressInvalid       a PeerId or multiaddr that nobody could dial; fix the configuration
├── ListenFailed         our own address cannot be opened (port in use); tell the operator
├── DialFailed           the peer cannot be reached now; expected, try again later
├── ProtocolRefused      connected, but the peer does not serve this protocol
├── BansFull             the operator's list of bans is full; lift some
├── GossipRefused        our own message is too large, or gossip is off: a bug of the caller
└── StreamError          this stream is over; reconnect and resume
    ├── StreamClosed     it ended cleanly, between two messages
    ├── StreamBroken     it was reset, the connection died, or a message was cut
    └── MessageTooLarge  the peer announced more than we allow; the stream has been reset
"""


class P2PError(Exception):
    """Root of the package's errors."""


class AddressInvalid(P2PError):
    """A PeerId or multiaddr cannot be used. Catch where addresses enter."""


class ListenFailed(P2PError):
    """A listen address cannot be opened; `str(error)` names the address, the cause and the
    remedy."""


class DialFailed(P2PError):
    """No connection to the peer; `str(error)` names every address tried and why it failed."""


class ProtocolRefused(P2PError):
    """The peer is connected but does not serve the protocol. Do not retry at once."""


class GossipRefused(P2PError):
    """The message cannot be gossiped: larger than the topic's limit, or gossip is off here."""


class BansFull(P2PError):
    """No more bans by hand: each is looked at for every new connection."""


class StreamError(P2PError):
    """A stream cannot be used any more."""


class StreamClosed(StreamError):
    """The peer finished; nothing is lost. Also raised for using a stream after closing it."""


class StreamBroken(StreamError):
    """The stream ended in the middle: what was in flight may or may not have arrived."""


class MessageTooLarge(StreamError):
    """An announced message exceeds the limit given to `receive`; nothing of its body was read."""
