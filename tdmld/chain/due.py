"""The due queue: what the chain does by itself at a height.

A due entry is (timer, job, slot, segment); that is also its identity: setting it again moves it,
so nothing stale is left to keep a resting chain awake. Entries are executed in order of height and,
within one height, of setting; at most `due_per_block` a block, the rest in the next. All of them
are *hot*: they count heights, and the chain makes blocks while any is pending.
"""

from bisect import bisect_left, insort

from tdmld.chain.codec import encode
from tdmld.chain.errors import InvariantViolation
from tdmld.chain.limits import DUE_BUCKET
from tdmld.chain.records import At, Due, DueList, Heights
from tdmld.chain.state import State, u64

_INDEX = b"D"


def put(state: State, due: Due, height: int) -> None:
    """Set or move `due` to `height`."""
    cancel(state, due)
    key = b"d" + u64(height)
    entries = state.read(DueList, key)
    if entries is None:
        _add(state, _INDEX + u64(height // DUE_BUCKET), height)
        _add(state, _INDEX, height // DUE_BUCKET)
        state.write(key, DueList((due,)))
    else:
        state.write(key, DueList((*entries.entries, due)))
    state.write(_place(due), At(height))


def cancel(state: State, due: Due) -> None:
    """Forget `due`; nothing happens when it is not set."""
    at = state.read(At, _place(due))
    if at is None:
        return
    state.write(_place(due), None)
    key = b"d" + u64(at.height)
    entries = state.read(DueList, key)
    if entries is None or due not in entries.entries:
        raise InvariantViolation(f"the due queue has lost {due}")
    left = tuple(entry for entry in entries.entries if entry != due)
    if left:
        state.write(key, DueList(left))
        return
    state.write(key, None)
    if _discard(state, _INDEX + u64(at.height // DUE_BUCKET), at.height):
        _discard(state, _INDEX, at.height // DUE_BUCKET)


def height_of(state: State, due: Due) -> int | None:
    """The height that `due` is set for."""
    at = state.read(At, _place(due))
    return None if at is None else at.height


def lowest(state: State) -> int | None:
    """The lowest height that has an entry."""
    buckets = state.read(Heights, _INDEX)
    if buckets is None:
        return None
    heights = state.read(Heights, _INDEX + u64(buckets.heights[0]))
    if heights is None:
        raise InvariantViolation("the index of the due queue has lost a bucket")
    return heights.heights[0]


def take(state: State, height: int) -> Due | None:
    """Remove and return the next entry that is due at or before `height`."""
    at = lowest(state)
    if at is None or at > height:
        return None
    entries = state.read(DueList, b"d" + u64(at))
    if entries is None:
        raise InvariantViolation(f"the due queue has lost height {at}")
    due = entries.entries[0]
    cancel(state, due)
    return due


def _place(due: Due) -> bytes:
    return b"t" + encode(due)


def _add(state: State, key: bytes, number: int) -> None:
    numbers = list((state.read(Heights, key) or Heights()).heights)
    place = bisect_left(numbers, number)
    if place == len(numbers) or numbers[place] != number:
        insort(numbers, number)
        state.write(key, Heights(tuple(numbers)))


def _discard(state: State, key: bytes, number: int) -> bool:
    """Take `number` out; True when nothing is left."""
    heights = state.read(Heights, key) or Heights()
    left = tuple(n for n in heights.heights if n != number)
    state.write(key, Heights(left) if left else None)
    return not left
