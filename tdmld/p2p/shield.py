"""Cancel scopes for the few places that must finish although their task is cancelled."""

import trio


def shielded(seconds: float) -> trio.CancelScope:
    """Ignore cancellation from outside, but for at most `seconds`; check `cancelled_caught`."""
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)
