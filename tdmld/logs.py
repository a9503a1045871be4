"""Logs: one JSON object a line in a file, readable lines on stderr.

structlog over the standard library, so that what our dependencies log goes the same way. Context
(`structlog.contextvars.bind_contextvars`) follows a trio task. stdout belongs to the commands.
"""

import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any

import structlog

from tdmld.plaintext import plain

_FILE_BYTES = 16 << 20
_tracebacks = structlog.processors.ExceptionRenderer(
    # Without the frames' local variables: keys, tokens and passwords are among them.
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
_FILES_KEPT = 4
"""A node's logs take at most 80 MiB a process."""
_NOISY = ("libp2p", "multiaddr", "hypercorn", "httpx", "httpcore", "asyncio")
"""Libraries that tell a node's story in places where only its own words help."""


def configure(
    level: str = "info", *, file: Path | None = None, console: bool | None = None, **context: Any
) -> None:
    """Send this process's logs to `file` (JSON lines) and, with `console`, to stderr.

    Unless said, stderr gets lines when it is a terminal or when there is no file. `context` stands
    in every line (for example process="carrier"). May be called again; the last call holds. Losing
    a log line (a full disk) never stops a process.
    """
    logging.raiseExceptions = False
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _adder(context),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        rotating = logging.handlers.RotatingFileHandler(
            file, maxBytes=_FILE_BYTES, backupCount=_FILES_KEPT, encoding="utf-8", delay=True
        )
        rotating.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    _tracebacks,
                    structlog.processors.JSONRenderer(default=str),
                ],
            )
        )
        root.addHandler(rotating)
    if console if console is not None else file is None or sys.stderr.isatty():
        stream = logging.StreamHandler(sys.stderr)
        colors = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        stream.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    _plain_event,
                    structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="time"),
                ],
            )
        )
        root.addHandler(stream)
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(number)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def _plain_event(_logger: Any, _method: str, event: Any) -> dict[str, Any]:
    """For terminals: lines quote what peers sent. (JSON escapes it by itself.)"""
    return {**event, "event": plain(str(event.get("event", "")))}


def _adder(context: dict[str, Any]) -> Any:
    def add(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        return context | event

    return add
