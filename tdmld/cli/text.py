"""How commands spell values for people."""

from tdmld.rpc.types import AmountText


def units(amount: AmountText | int) -> str:
    """An amount with thousands separated."""
    return f"{int(amount):,}"


def short(address: str) -> str:
    """An address that still can be told from others: 12D3KooW…k2Xq."""
    return f"{address[:8]}…{address[-4:]}" if len(address) > 20 else address or "-"


def nats(loss: int | None) -> str:
    """Micro-nats as nats."""
    return "-" if loss is None else f"{loss / 1e6:.3f}"


def size(count: int) -> str:
    """Bytes in the unit that fits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the loop returns")


def span(seconds: float) -> str:
    """A time that is left, in its two largest units: 3 h 20 min."""
    left, parts = max(0, round(seconds)), list[str]()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def share(part: AmountText | int, whole: AmountText | int) -> str:
    """A percentage; - of nothing."""
    return f"{100 * int(part) / int(whole):.0f} %" if int(whole) else "-"


def job_id(given: str) -> str:
    """A job id as typed: lower case, without 0x."""
    return given.strip().lower().removeprefix("0x")


def frame(title: str, rows: list[tuple[str, str]], width: int = 62) -> list[str]:
    """A framed block of label and value, as `tdmld status` shows them."""
    label = max((len(name) for name, _ in rows), default=0)
    lines = [f"┌ {title} {'─' * (width - len(title) - 4)}┐"]
    for name, value in rows:
        inner = f" {name.ljust(label)}  {value}"
        lines.append(f"│{inner.ljust(width - 1)}│" if len(inner) < width else f"│{inner}")
    lines.append(f"└{'─' * (width - 1)}┘")
    return lines
