"""A state that a final header commits, held while the chain goes on.

The header that commits a state comes one block or more after it, and a store has one live version.
So: take a view, then follow the chain until a header names the view's root, and on to the next
block with a finalization of its own. Under load a header may pass over the view's height; then
another view is taken. At rest the newest header commits the present state already.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

from tdmld.chain.blocks import Certificate, Header
from tdmld.chain.light import MAX_HEADERS
from tdmld.node.finality import Finality, HeadFeed
from tdmld.node.store import ChainStore, StoreView

V = TypeVar("V", bound=StoreView)


@dataclass(frozen=True, slots=True)
class Pinned(Generic[V]):
    """`headers[0]` commits the view's state; `certificate` finalizes the last of them."""

    view: V
    headers: tuple[Header, ...]
    certificate: Certificate


async def pin(finality: Finality, take: Callable[[], V]) -> Pinned[V]:
    """Take a view and wait until it is committed and certified. The caller closes the view, and
    sets a time limit: a chain without validators never gets there. Cancellation closes it."""
    store = finality.store
    with closing(finality.heads()) as feed:
        while True:
            view = take()
            try:
                first = await _committed(store, feed, view)
                headers = None if first is None else await _certified(store, feed, first)
            except BaseException:  # also cancellation: a view holds files until it is closed
                view.close()
                raise
            if headers is not None:
                certificate = store.certificate(headers[-1].height)
                if certificate is not None:
                    return Pinned(view, headers, certificate)
            view.close()


async def _committed(store: ChainStore, feed: HeadFeed, view: StoreView) -> int | None:
    """The height of a header that commits the view's state; None when it was passed over."""
    head = view.head
    height = head.height
    header = head.header
    while height == 0 or header.state_root != head.state_root:
        if height > head.height and header.state_height > head.height:
            return None
        height += 1
        found = await _header(store, feed, height)
        if found is None:
            return None
        header = found
    return height


async def _certified(store: ChainStore, feed: HeadFeed, height: int) -> tuple[Header, ...] | None:
    """Headers from `height` to the first with a finalization of its own."""
    headers: list[Header] = []
    while len(headers) < MAX_HEADERS:
        header = await _header(store, feed, height)
        if header is None:
            return None
        headers.append(header)
        if store.certificate(height) is not None:
            return tuple(headers)
        height += 1
    return None


async def _header(store: ChainStore, feed: HeadFeed, height: int) -> Header | None:
    """The final header of a height, when it is there; None when it is not held."""
    while store.height < height:
        await feed.receive()
    if store.height == height:
        return store.head.header
    block = store.block(height)
    return None if block is None else block.header
