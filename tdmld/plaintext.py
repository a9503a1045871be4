"""Text of strangers, made fit for terminals and logs."""


def plain(text: str) -> str:
    """`text` with every character that does not print (escape sequences, line ends, marks that
    reverse the direction) replaced."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
