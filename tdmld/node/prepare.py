"""What lies in a node's directory before its carrier starts."""

import contextlib
import os
import secrets
from pathlib import Path

from tdmld.chain.crypto import KeyPair
from tdmld.node.errors import MachineError
from tdmld.node.jobfiles import keep_newest_logs, remove_leftovers
from tdmld.node.layout import SEED_BYTES, Layout

KEPT_WORKER_LOGS = 200


def prepare(data_dir: Path) -> tuple[Layout, str]:
    """Make directories and session key; gives the session (a PeerId). OSError, MachineError."""
    layout = Layout(data_dir.resolve())
    for directory in (layout.content, layout.jobs, layout.logs, layout.session_key.parent):
        directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(layout)
    keep_newest_logs(layout.logs, KEPT_WORKER_LOGS)
    with contextlib.suppress(FileExistsError):
        fd = os.open(layout.session_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            file.write(secrets.token_bytes(SEED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    size = layout.session_key.stat().st_size
    if size != SEED_BYTES:
        raise MachineError(
            f"{layout.session_key} has {size} bytes and is no session key; delete it, a new one"
            " will be made"
        )
    return layout, KeyPair(layout.session_key.read_bytes()).address
