"""What happened in a job, as it happens."""

from rich.text import Text
from textual.widgets import RichLog

from tdmld.rpc.types import JobEvent
from tui.text import BAD, GOOD

_STYLES = {"fault": BAD, "payment": GOOD, "settled": GOOD, "result": GOOD, "audit": "cyan"}
LINES_MAX = 500


class EventsLog(RichLog):
    """One line an event; steps are left out, there are too many of them."""

    def on_mount(self) -> None:
        """Put the title into the frame."""
        self.border_title = "Events"
        self.max_lines = LINES_MAX
        self.can_focus = False

    def show(self, event: JobEvent) -> None:
        """Append a line."""
        if event.kind == "step":
            return
        line = Text(f"{event.time[11:19]} ", style="dim")
        line.append(f"{event.height:>8,}  ", style="dim")
        line.append(event.text, style=_STYLES.get(event.kind, ""))
        self.write(line)
