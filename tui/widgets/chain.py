"""The chain as this node sees it."""

from tdmld.rpc.types import NodeStatus
from tui.text import pairs
from tui.widgets.card import Card


class ChainCard(Card):
    """Height, view, peers and this node's part in it."""

    TITLE = "Chain"

    def show(self, status: NodeStatus) -> None:
        """Replace the numbers."""
        self.update(
            pairs(
                ("height (final)", f"{status.height:,}"),
                ("view", f"{status.view:,}"),
                ("head", status.head[:12]),
                ("peers", str(status.peers)),
                ("role", "validator" if status.validator else "follower"),
            )
        )
