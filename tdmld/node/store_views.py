"""The ledger's state as it was at one moment, read while the chain goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path

from rocksdict import AccessType, Options, Rdict

from tdmld.chain.codec import decode
from tdmld.chain.crypto import sha256
from tdmld.chain.tree import Item, Tree, TreeProof
from tdmld.node.rocks import translated
from tdmld.node.store_file import MAX_RECORD_BYTES
from tdmld.node.store_types import Head


class StoreView:
    """The ledger's state as it was at one moment, while the chain goes on."""

    def __init__(self, path: Path, read: Callable[[bytes], bytes | None]) -> None:
        self._path = path
        self._read = read
        self.head = decode(Head, read(b"H") or b"", MAX_RECORD_BYTES)

    def close(self) -> None:
        """Give up what the view holds."""

    def get(self, key: bytes) -> bytes | None:
        """The ledger's state then."""
        return self._read(b"s" + key)

    def prove(self, key: bytes) -> TreeProof:
        """A proof of the state key's value, or of its absence, under the view's state root."""
        return Tree(lambda path: self._read(b"t" + path)).prove(sha256(key))


class StoreCopy(StoreView):
    """A view that can also be walked: a directory of hard links to the database's files, which
    `close` removes. rocksdict's own snapshots are no snapshots under an iterator."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = Rdict(str(path), Options(raw_mode=True), access_type=AccessType.read_only())
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(path, "open", error) from error
        super().__init__(path, self._db.get)

    def close(self) -> None:
        self._db.close()
        shutil.rmtree(self._path, ignore_errors=True)

    def state_after(self, after: bytes, limit: int) -> tuple[list[Item], bool]:
        """State items above the key `after` in order, up to the one that passes `limit` bytes;
        whether there are more."""
        found, size = list[Item](), 0
        try:
            for key, value in self._db.items(from_key=b"s" + after):
                if not isinstance(key, bytes) or key >= b"t":
                    break
                if key[1:] == after:
                    continue
                if size > limit:
                    return found, True
                found.append((key[1:], bytes(value)))
                size += len(key) + len(value)
        except Exception as error:  # rocksdict raises bare Exception for every cause
            raise translated(self._path, "read", error) from error
        return found, False
