"""A framed box with a title."""

from textual.widgets import Static


class Card(Static):
    """Base of the small boxes."""

    TITLE = ""

    def on_mount(self) -> None:
        """Put the title into the frame."""
        self.border_title = self.TITLE
