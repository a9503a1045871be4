"""A table whose rows are updated in place, so that cursor and scroll position stay."""

from collections.abc import Mapping, Sequence

from rich.text import Text
from textual.widgets import DataTable

Row = Sequence[str | Text]


class Rows(DataTable[str | Text]):
    """Base of the tables: `HEAD` names the columns, those in `RIGHT` hold numbers."""

    TITLE = ""
    HEAD: tuple[str, ...] = ()
    RIGHT: frozenset[str] = frozenset()
    CHOICE = False
    """Whether a row can be chosen; others only scroll."""

    def on_mount(self) -> None:
        """Make the columns."""
        self.border_title = self.TITLE
        self.cursor_type = "row" if self.CHOICE else "none"
        self.zebra_stripes = True
        for name in self.HEAD:
            label = Text(name, justify="right" if name in self.RIGHT else "left")
            self.add_column(label, key=name)

    def replace(self, rows: Mapping[str, Row]) -> None:
        """Show exactly `rows`; those that are there already change only where they differ."""
        if list(rows) != [key.value for key in self.rows][: len(rows)]:
            self.clear()
        for key in [key.value for key in self.rows if key.value not in rows]:
            self.remove_row(str(key))
        for key, row in rows.items():
            cells = [
                # A plain string would be read as markup, and much here is others' words.
                Text(str(cell), justify="right" if name in self.RIGHT else "left")
                if name in self.RIGHT or isinstance(cell, str)
                else cell
                for name, cell in zip(self.HEAD, row, strict=True)
            ]
            if key not in self.rows:
                self.add_row(*cells, key=key)
                continue
            for name, cell in zip(self.HEAD, cells, strict=True):
                if self.get_cell(key, name) != cell:
                    self.update_cell(key, name, cell, update_width=True)
