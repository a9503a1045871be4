"""For all tests. Examples have no deadline: a loaded machine is slow, not wrong."""

import pytest
import trio
import trio.testing
from hypothesis import settings

settings.register_profile("tdmld", deadline=None)
settings.load_profile("tdmld")


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Time jumps when every task waits, as with pytest-trio's own fixture of this name, and no
    thread works for one: a slow disk would look like seconds in which nothing came."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    jump = clock._autojump

    def jump_when_idle() -> None:
        if trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0:
            jump()

    clock._autojump = jump_when_idle  # type: ignore[method-assign]
    return clock
