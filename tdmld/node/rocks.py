"""Opening RocksDB, and its errors in our words: rocksdict raises bare Exception for every cause."""

from pathlib import Path

from rocksdict import Options, Rdict

from tdmld.node.chainerrors import StoreCorrupt, StoreError, StoreLocked

WRITE_BUFFER_BYTES = 8 << 20


def open_database(path: Path) -> Rdict:
    """Open or make the database. StoreLocked, StoreCorrupt or StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the directory {path}: {error}") from error
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_keep_log_file_num(4)
    try:
        return Rdict(str(path), options)
    except Exception as error:  # rocksdict raises bare Exception for every cause
        raise translated(path, "open", error) from error


def translated(path: Path, doing: str, error: Exception) -> StoreError:
    """What to raise for an error of RocksDB; `doing`: open, read or write."""
    text = str(error)
    if "lock" in text.lower() and "LOCK" in text:
        return StoreLocked(
            f"another tdmld process uses {path}: stop it, or give this node its own --data-dir"
        )
    if "Corruption" in text or "checksum" in text:
        return StoreCorrupt(
            f"the chain database {path} is damaged ({text}): move it away and start again; the "
            "node fetches the chain from its peers. A validator should ask for help first, since "
            "its record of votes is in there"
        )
    if "No space left" in text:
        return StoreError(f"no space left for {path}: free some and start again")
    return StoreError(f"cannot {doing} the chain database {path}: {text}")
