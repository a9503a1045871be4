"""What the network thinks of this node's owner, and what the node offers."""

from tdmld.rpc.types import NodeStatus
from tui.text import GOOD, bar, pairs, units
from tui.widgets.card import Card


class StandingCard(Card):
    """Reputation, stakes and the ask."""

    TITLE = "Reputation"

    def show(self, status: NodeStatus) -> None:
        """Replace the numbers."""
        score = bar(status.reputation, 1_000_000, 10, GOOD)
        score.append(f" {status.reputation / 1e6:.3f}", style="bold")
        ask = status.ask
        self.update(
            pairs(
                ("score", score),
                ("work stake", units(status.work_stake)),
                ("vote stake", units(status.vote_stake)),
                ("my price", units(ask.price) if ask else "no ask"),
                (
                    "capacity",
                    f"audits {ask.audit_capacity}, standby {ask.standby_slots}" if ask else "—",
                ),
            )
        )
