"""The database file of a chain: reads, writes and scans, with its errors in our words."""

from pathlib import Path
from typing import TypeVar

from rocksdict import WriteBatch, WriteOptions

from tdmld.chain.codec import decode
from tdmld.chain.errors import DecodeError
from tdmld.node.chainerrors import StoreCorrupt
from tdmld.node.rocks import open_database, translated
from tdmld.node.store_types import Head

T = TypeVar("T")

MAX_RECORD_BYTES = 64 << 20
"""Bound for decoding what we wrote ourselves; larger than any block that genesis may allow."""


def number(value: int) -> bytes:
    """A height or a view in a key: big-endian, so that keys ascend with it."""
    return value.to_bytes(8, "big")


class StoreFile:
    """An open RocksDB and the head of the chain in it; `store.ChainStore` is what others use.

    Raises StoreLocked, StoreCorrupt or StoreError.
    """

    _head: Head

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced = WriteOptions()
        self._synced.sync = True
        self._unsynced = WriteOptions()
        self._db = open_database(path)

    def close(self) -> None:
        """Flush and close; reads after it fail."""
        self._db.close()

    @property
    def head(self) -> Head:
        """The highest applied block; height 0 is genesis."""
        return self._head

    def _read(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "read", error) from error
        return value

    def _write(self, batch: WriteBatch, how: WriteOptions) -> None:
        try:
            self._db.write(batch, how)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "write", error) from error

    def _keys(self, start: bytes, end: bytes) -> list[bytes]:
        found: list[bytes] = []
        try:
            for key in self._db.keys(from_key=start):
                if not isinstance(key, bytes) or key >= end:
                    break
                found.append(key)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "read", error) from error
        return found

    def _decode(self, kind: type[T], raw: bytes, what: str) -> T:
        try:
            return decode(kind, raw, MAX_RECORD_BYTES)
        except DecodeError as error:
            raise StoreCorrupt(
                f"{self.path}: the stored {what} is damaged ({error}): move the directory away "
                "and start again; the node fetches the chain from its peers"
            ) from error
