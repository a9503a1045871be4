"""Every limit of the RPC server, in one place.

Orders of magnitude are those of CometBFT's RPC; each bounds what one caller can make a node do.
"""

BODY_BYTES = 1 << 20
"""A request body or WebSocket message; an offer with its spec is below 200 KiB."""

BATCH_CALLS = 50
"""Members of one batch."""

CALLS_IN_FLIGHT = 32
"""Calls of one WebSocket at a time; the next message waits unread."""

SUBSCRIPTIONS = 16
"""Live subscriptions of one WebSocket: a dashboard needs two."""

CONNECTIONS = 128
"""Open sockets of all callers together; further ones are closed at once."""

QUEUE_MESSAGES = 256
"""Unsent messages of one WebSocket. A subscriber that lets it fill is disconnected: it reconnects
and reads the present state, which is better than stale events or unbounded memory."""

SEND_SECONDS = 10.0
"""A peer that does not take one message for so long is gone; its socket is closed."""

BODY_SECONDS = 20.0
"""From the end of a request's headers to the end of its body."""

GONE_SECONDS = 1.0
"""From the end of a caller's bytes to the end of what runs for it."""

STOP_SECONDS = 2.0
"""From the stop event to the forced close of what is still open."""

ID_CHARACTERS = 256
"""A request id is echoed; longer ones are refused."""
