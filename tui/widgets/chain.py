"""The chain as this node sees it."""

from tdmld.rpc.types import NodeStatus
from tui.text import pairs
from tui.widgets.card import Card


class ChainCard(Card):
    """Height, view, peers, epoch and this node's part in it."""

    TITLE = "Chain"

    def show(self, status: NodeStatus) -> None:
        """Replace the numbers."""
        self.update(
            pairs(
                ("height (final)", f"{status.height:,}"),
                ("view", f"{status.view:,}"),
                ("head", status.head[:12]),
                ("peers", str(status.peers)),
                ("epoch", f"{status.epoch:,}"),
                ("role", _role(status)),
            )
        )


def _role(status: NodeStatus) -> str:
    """What the node is in this epoch, its share of the votes, and what changes with the next."""
    weight, total = int(status.weight), int(status.total_weight)
    if not weight:
        validates = int(status.next_weight) > 0
        return "validator next epoch" if validates else "follower"
    share = f"validator {100 * weight / total:.1f}%"
    return share if int(status.next_weight) else f"{share}, leaves"
