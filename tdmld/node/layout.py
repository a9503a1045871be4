"""Where things lie in a node's directory (the machine's part of it)."""

import errno
import os
import re
from pathlib import Path

from tdmld.train.contribution import contribution_name

DISK_RESERVE_BYTES = 256 << 20
"""Left free on the disk by everything that jobs write, so that the chain's database can go on."""
SEED_BYTES = 32
"""Size of the session key's file."""
MAX_LOG_TAIL_BYTES = 4096
_SAFE = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")


class Layout:
    """Paths below a data directory. Nothing is created here.

    jobs/<job>/spec.json   result/   audit/<lane>.<stage>.<segment>
               slot-<lane>.<stage>/{ring,list,state/<boundary>,contribution,incarnation}
               standby-<lane>.<stage>/{state/<boundary>,contribution}
    content/ab/<hex of 32 bytes>
            sealed/<spec id>/<key epoch>.<key id>/{key,<hex of 32 bytes>}
            given/<root of a stage's given weights>
    keys/session.key   logs/
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.session_key = data_dir / "keys" / "session.key"
        self.content = data_dir / "content"
        self.jobs = data_dir / "jobs"
        self.logs = data_dir / "logs"

    def blob(self, content: bytes) -> Path:
        """A file of the content store."""
        name = content.hex()
        return self.content / name[:2] / name

    def sealed(self, spec: bytes) -> Path:
        """What is sealed of one spec's content, with the keys that are here."""
        return self.content / "sealed" / spec.hex()

    def sealed_under(self, spec: bytes, epoch: int, key: bytes) -> Path:
        """What is sealed under one content key, and that key."""
        return self.sealed(spec) / f"{epoch}.{key.hex()}"

    def content_key(self, spec: bytes, epoch: int, key: bytes) -> Path:
        """The content key with the id `key`, boxed to this node's session."""
        return self.sealed_under(spec, epoch, key) / "key"

    def sealed_blob(self, spec: bytes, epoch: int, key: bytes, content: bytes) -> Path:
        """Ciphertext of the content with this id."""
        return self.sealed_under(spec, epoch, key) / content.hex()

    def job(self, job: bytes) -> Path:
        """A job's directory."""
        return self.jobs / job.hex()

    def spec(self, job: bytes) -> Path:
        """The canonical spec."""
        return self.job(job) / "spec.json"

    def slot(self, job: bytes, lane: int, stage: int) -> Path:
        """A slot that this node works on."""
        return self.job(job) / f"slot-{lane}.{stage}"

    def standby(self, job: bytes, lane: int, stage: int) -> Path:
        """Copies of a slot that this node stands by for."""
        return self.job(job) / f"standby-{lane}.{stage}"

    def audit(self, job: bytes, lane: int, stage: int, segment: int) -> Path:
        """Scratch directory of an audit."""
        return self.job(job) / "audit" / f"{lane}.{stage}.{segment}"

    def given(self, root: bytes) -> Path:
        """The weights that a stage begins with, in a job that goes on from given ones."""
        return self.content / "given" / root.hex()

    def result(self, job: bytes) -> Path:
        """The exported model."""
        return self.job(job) / "result"

    def states(self, job: bytes, lane: int, stage: int, boundary: int) -> tuple[Path, Path]:
        """Where a state may lie here: as own slot, as standby copy."""
        return (
            state(self.slot(job, lane, stage), boundary),
            state(self.standby(job, lane, stage), boundary),
        )

    def contributions(self, job: bytes, lane: int, stage: int, number: int) -> list[Path]:
        """Where the contribution of a slot in a round is here: at that slot, at a sibling that
        fetched it, or with a standby copy. Blocking."""
        owners = sorted(self.job(job).glob(f"s*-*.{stage}"))
        found = [contribution_file(owner, number, lane) for owner in owners]
        return [path for path in found if path.is_file()]


def state(owner: Path, boundary: int) -> Path:
    """The state directory of a slot or standby directory."""
    return owner / "state" / str(boundary)


def list_file(slot: Path, segment: int) -> Path:
    """A segment's digest list."""
    return slot / "list" / str(segment)


def contributions(owner: Path) -> Path:
    """Where contributions to outer rounds lie in a slot's, standby's or audit's directory."""
    return owner / "contribution"


def contribution_file(owner: Path, number: int, lane: int) -> Path:
    """A lane's contribution of round `number`, at the directory of a slot of its stage."""
    return contributions(owner) / contribution_name(number, lane)


def is_file_name(name: str) -> bool:
    """Whether a peer may name a file of a result like this."""
    return _SAFE.match(name) is not None


def tail(path: Path, start: int = 0) -> str:
    """The last lines of a log after offset `start`, on one line, for an error text."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, 2) - MAX_LOG_TAIL_BYTES, start))
            raw = file.read(MAX_LOG_TAIL_BYTES)
    except OSError:
        return ""
    lines = [line.strip() for line in raw.decode("utf-8", "replace").splitlines() if line.strip()]
    return " | ".join(lines[-4:])[-600:]


def free_bytes(directory: Path) -> int:
    """What jobs may still write on the disk of `directory`; negative when it is too full."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize - DISK_RESERVE_BYTES


def disk_text(error: OSError) -> str:
    """An error of the disk with its remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error}); free some space, nothing unsettled was deleted"
    return str(error)
