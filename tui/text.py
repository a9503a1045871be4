"""How values are spelt on the screens."""

from rich.table import Table
from rich.text import Text

GOOD, BUSY, BAD = "green", "yellow", "red"


def units(amount: str | int) -> str:
    """An amount with thousands separated."""
    return f"{int(amount):,}"


def short(address: str) -> str:
    """An address that can still be told from others."""
    return f"{address[:8]}…{address[-4:]}" if len(address) > 20 else address or "—"


def nats(loss: int | None) -> str:
    """Micro-nats as nats with fixed decimals."""
    return "—" if loss is None else f"{loss / 1e6:.3f}"


def bar(part: float, whole: float, width: int, colour: str) -> Text:
    """A bar of `width` cells, filled in eighths."""
    share = min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    filled = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
    text = Text(filled, style=colour)
    text.append("·" * (width - len(filled)), style="dim")
    return text


def percent(part: float, whole: float) -> str:
    """A share in whole percent, four characters wide."""
    return f"{100 * part / whole:3.0f}%" if whole > 0 else "  —"


def right(text: str, style: str = "") -> Text:
    """A cell that is set to the right."""
    return Text(text, justify="right", style=style)


def pairs(*rows: tuple[str, str | Text]) -> Table:
    """Labels on the left, values set to the right edge."""
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True, ratio=1)
    for label, value in rows:
        grid.add_row(label, value)
    return grid


def state_style(state: str) -> str:
    """The colour of a job's, slot's or audit's state."""
    first = state.split(" ", 1)[0].rstrip(":,")
    if first in ("active", "running", "passed", "closed", "done", "ready", "finishing"):
        return GOOD
    if first in ("refunded", "failed", "mismatch", "expired", "unaudited", "dead"):
        return BAD
    return BUSY
