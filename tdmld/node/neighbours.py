"""Whom a node keeps connected, so that all of them are one component. Pure: no clock, no network.

Nodes stand on a ring, by a hash of their keys. From the records that it knows a node keeps

    successors  those that follow it on the ring and are not away
    probes      a few that are away, others each time, for they may be back
    others      as many more as it has places, in an order of its own

**Claim.** When nothing changes for long enough, any two live nodes of which one stands in the book
of the other, or in that of anybody in the other's component, are in one component.

*Argument.* Records are exchanged over every connection, so all of a component C know the same. Let
them know a live w outside of C that can be dialled, and let p be the member of C before w on the
ring. Between p and w stand no members of C: they are dead, and away for p after a while, or they
are live and outside of C as well. So unless p holds w to be away, p keeps w or a live node before
it, and C grows. If p does, the probes come to w in time, from p and from everybody else in C. So
the number of components falls until no book names a live node outside. Two parts of a network that
was cut join again in the same way, for their books outlive the cut; and parts that never heard of
each other have no bootstrap node in common, which is what a bootstrap list is for.

A node that nobody can dial is kept by no one; it dials its own successors, and so hangs on the
component of each.

The order of the others is a hash of both keys: it stays as it is when records come and go, differs
from node to node, and makes the graph one of short paths (a random one), while the ring alone has
paths of N / SUCCESSORS.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

SUCCESSORS = 4
"""So many in a row may vanish at once, and nobody is cut off for a moment."""
PROBES = 4
"""Nodes that are away, tried at the same time."""


@lru_cache(maxsize=1 << 14)
def _place(node: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(node, digest_size=16, person=b"tdmld ring").digest())


def _order(me: bytes, turn: int) -> Callable[[bytes], bytes]:
    """A permutation of all nodes that is ours; another one each turn."""
    seed = hashlib.blake2b(
        me + turn.to_bytes(8, "big"), digest_size=32, person=b"tdmld others"
    ).digest()
    return lambda node: hashlib.blake2b(node, digest_size=16, key=seed).digest()


def choose(
    me: bytes, known: Iterable[bytes], away: Collection[bytes], *, most: int, turn: int
) -> set[bytes]:
    """At most `most` of the `known` node keys, to be kept connected by `me`; never less than the
    successors and probes.

    `away`: those that we did not reach for a while. `turn` grows from time to time: then other ones
    of these are tried.
    """
    candidates = {node for node in known if node != me}
    if len(candidates) <= most:
        return candidates
    start = _place(me)
    present = [node for node in candidates if node not in away]
    present.sort(key=lambda node: (_place(node) - start) % (1 << 128))
    absent = sorted(candidates - set(present), key=_order(me, turn))
    chosen = set(present[:SUCCESSORS]) | set(absent[:PROBES])
    others = sorted(present[SUCCESSORS:], key=_order(me, 0)) + absent[PROBES:]
    chosen.update(others[: max(0, most - len(chosen))])
    return chosen
