"""One line that answers the question a volunteer asks first: why am I not earning?"""

from rich.text import Text
from textual.widgets import Static

from tdmld.rpc.types import NodeStatus
from tui.feed import Link


class Notice(Static):
    """What is wrong and what to do; green when nothing is. The node's words are never markup."""

    def show(self, link: Link | None, status: NodeStatus | None) -> None:
        """An offline node's problem goes before its market's."""
        bad = link is not None and not link.live
        if bad and link is not None:
            self.update(Text(link.problem))
        elif status is None:
            self.update("waiting for the node ...")
        elif status.why_not_earning:
            self.update(Text(f"Why am I not earning?  {status.why_not_earning}"))
        else:
            count = len(status.tasks)
            self.update(f"Earning: {count} task{'' if count == 1 else 's'} at work")
        self.set_class(bad, "-bad")
        self.set_class(not bad and status is not None and not status.why_not_earning, "-good")
