"""Cancel scopes for the few places that must finish although their task is cancelled; locks."""

import trio


def shielded(seconds: float) -> trio.CancelScope:
    """Ignore cancellation from outside, but for at most `seconds`; check `cancelled_caught`."""
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)


async def acquire(lock: trio.Lock) -> None:
    """Take a lock, without yielding when it is free: a yield costs more than a small frame."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
