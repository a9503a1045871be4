"""The ledger's state and its tree in the database: the live version, and views of it."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rocksdict import Checkpoint as RocksCheckpoint
from rocksdict import WriteBatch

from tdmld.chain.crypto import sha256
from tdmld.chain.tree import Item, Tree
from tdmld.node.rocks import translated
from tdmld.node.store_file import StoreFile
from tdmld.node.store_views import StoreCopy, StoreView


class StoredState(StoreFile):
    """One version lives: that at the head."""

    def get(self, key: bytes) -> bytes | None:
        """The ledger's state at the head."""
        return self._read(b"s" + key)

    def state_items(self, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of the ledger's state whose key begins with `prefix`, ascending, at
        the head that was there when the first was asked for."""
        try:
            for key, value in self._db.items(from_key=b"s" + prefix):
                if not isinstance(key, bytes) or not key.startswith(b"s" + prefix):
                    break
                yield key[1:], bytes(value)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self.path, "read", error) from error

    def view(self) -> StoreView:
        """The state as it is now."""
        frozen, path = self._db.snapshot(), self.path

        def read(key: bytes) -> bytes | None:
            try:
                value: bytes = frozen[key]
            except Exception as error:  # rocksdict raises bare Exception for every cause
                if str(error) == "key not found":
                    return None
                raise translated(path, "read", error) from error
            return value

        return StoreView(self.path, read)

    def copy(self, directory: Path) -> StoreCopy:
        """The state as it is now, in `directory`, which is removed first. Takes a few
        milliseconds and holds disk space until it is closed."""
        shutil.rmtree(directory, ignore_errors=True)
        try:
            RocksCheckpoint(self._db).create_checkpoint(str(directory))
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(directory, "make", error) from error
        return StoreCopy(directory)

    def take_state(self, items: Sequence[Item]) -> None:
        """Add state items (key, value)."""
        batch = WriteBatch(raw_mode=True)
        self._write_state(batch, dict(items))
        self._write(batch, self._unsynced)

    def taken_root(self) -> bytes:
        """The root over everything taken so far."""
        return Tree(lambda path: self._read(b"t" + path)).root

    def _write_state(self, batch: WriteBatch, changes: dict[bytes, bytes | None]) -> bytes:
        tree = Tree(lambda path: self._read(b"t" + path))
        items = []
        for key, value in changes.items():
            items.append((sha256(key), b"" if value is None else sha256(value)))
            if value is None:
                batch.delete(b"s" + key)
            else:
                batch.put(b"s" + key, value)
        root = tree.update(sorted(items))
        for path, page in tree.pages().items():
            if page is None:
                batch.delete(b"t" + path)
            else:
                batch.put(b"t" + path, page)
        return root
