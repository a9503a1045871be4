"""The exit codes of every command. Scripts may rely on them."""

from enum import IntEnum


class Exit(IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1
    """It was tried and did not succeed."""
    USAGE = 2
    """Wrong arguments or configuration; nothing was tried."""
    UNREACHABLE = 3
    """No node answers where one was expected."""
    NOT_FOUND = 4
    """The node answers, but knows no such job, account, block or file."""
    REFUSED = 5
    """Refused: a wrong token or password, too little money or stake."""
    TIMED_OUT = 6
    INTERRUPTED = 130
    """SIGINT: Ctrl-C."""
