"""The reference cache's folder: an LMDB environment, opened once in a process, and the book of what it holds."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.errors import RunError

if TYPE_CHECKING:
    import lmdb

FORMAT = 1
PAGE = min(mmap.PAGESIZE, 32768)
"""LMDB stores large values in whole pages of this many bytes."""
BOOKKEEPING = 256
"""Bytes charged for an entry's key, place and order."""
SPARE = 64 * 2**20
"""Bytes of the file for a transaction in flight, and for the pages of the one before it."""
_FILES = {"data.mdb", "lock.mdb"}
_PAIR = struct.Struct(">QQ")  # stamp, size; big endian, so that stamps sort
_STAMP = struct.Struct(">Q")
_TRIES = 4


def footprint(length: int) -> int:
    """Return the bytes of the limit that an entry of ``length`` bytes takes."""
    return -(-(length + 16) // PAGE) * PAGE + BOOKKEEPING


class Book:
    """What one transaction may do with the entries; ``total`` and ``count`` are kept in the same transaction.

    An entry's stamp says when it was last used. Stamps grow by one with each use noted, over all processes.
    """

    def __init__(self, store: Store, txn: lmdb.Transaction) -> None:
        self._txn = txn
        self._entries, self._places, self._order, self._meta = store.tables

    @property
    def total(self) -> int:
        """Bytes charged for all entries."""
        return self._number(b"bytes")

    @property
    def count(self) -> int:
        """Entries."""
        return self._txn.stat(self._entries)["entries"]

    @property
    def next_stamp(self) -> int:
        """The stamp that the next use gets."""
        return self._number(b"stamp")

    def get(self, key: bytes) -> memoryview | None:
        """Return an entry, valid only while the transaction is open."""
        found: Any = self._txn.get(key, db=self._entries)
        return found

    def stamp(self, key: bytes) -> int | None:
        """Return when the entry was last used; ``None`` if there is none."""
        place = self._txn.get(key, db=self._places)
        return _PAIR.unpack(place)[0] if place is not None else None

    def insert(self, key: bytes, entry: bytearray) -> None:
        """Store an entry as the newest, in place of one of the same key."""
        self.remove(key)
        size = footprint(len(entry))
        self._txn.put(key, entry, db=self._entries)
        self._place(key, size)
        self._set(b"bytes", self.total + size)

    def remove(self, key: bytes) -> None:
        """Delete an entry if it is there."""
        self._txn.delete(key, db=self._entries)
        place = self._txn.get(key, db=self._places)
        if place is not None:
            stamp, size = _PAIR.unpack(place)
            self._txn.delete(key, db=self._places)
            self._txn.delete(_STAMP.pack(stamp), db=self._order)
            self._set(b"bytes", self.total - size)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that entries were used."""
        for key in keys:
            place = self._txn.get(key, db=self._places)
            if place is None:
                continue  # another process evicted it
            stamp, size = _PAIR.unpack(place)
            self._txn.delete(_STAMP.pack(stamp), db=self._order)
            self._place(key, size)

    def evict(self, goal: int, before: int) -> int:
        """Delete the longest unused entries until ``total`` is ``goal`` or none of a stamp under ``before`` is left.

        Returns:
            How many were deleted.
        """
        count = 0
        while self.total > goal:
            with self._txn.cursor(self._order) as cursor:
                if not cursor.first() or _STAMP.unpack(cursor.key())[0] >= before:
                    break
                key = bytes(cursor.value())
                cursor.delete()
            self.remove(key)
            count += 1
        return count

    def mark(self) -> None:
        """Write something: pages that a transaction freed can be used by the next but one."""
        self._set(b"stamp", self.next_stamp + 1)

    def _place(self, key: bytes, size: int) -> None:
        stamp = self.next_stamp
        self._txn.put(key, _PAIR.pack(stamp, size), db=self._places)
        self._txn.put(_STAMP.pack(stamp), key, db=self._order, append=True)
        self._set(b"stamp", stamp + 1)

    def _number(self, name: bytes) -> int:
        found = self._txn.get(name, db=self._meta)
        return _STAMP.unpack(found)[0] if found is not None else 0

    def _set(self, name: bytes, value: int) -> None:
        self._txn.put(name, _STAMP.pack(value), db=self._meta)


class Store:
    """One folder's environment. Threads take turns; processes read at once and write in turn.

    Get one from :func:`acquire`: LMDB must not open a folder twice in a process.
    """

    def __init__(self, folder: Path, map_bytes: int) -> None:
        import lmdb

        self.folder = folder
        self.users = 0
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._map_bytes = map_bytes
        try:
            _make_private(folder)
            # Without metasync a power cut may undo the last transaction, no more; a cache can bear that.
            self._env = lmdb.open(
                str(folder), map_size=map_bytes, max_dbs=4, max_readers=1024, metasync=False, mode=0o700
            )
        except (OSError, lmdb.Error) as error:
            raise _unusable(folder, error) from error
        try:
            self._env.reader_check()
            self._make_whole()
            with self._env.begin(write=True, buffers=True) as txn:
                self.tables = tuple(self._env.open_db(n, txn=txn) for n in (b"entries", b"places", b"order", b"meta"))
                self._check_format(txn)
        except (OSError, lmdb.Error, struct.error) as error:
            self._env.close()
            raise _unusable(folder, error) from error
        except RunError:
            self._env.close()
            raise

    @contextlib.contextmanager
    def open(self, *, write: bool = False) -> Iterator[Book]:
        """Open a transaction; what was written counts only if the block ends without an error.

        Raises:
            lmdb.Error: the disk or the map is full, or the file is damaged.
        """
        with self._lock, self._begin(write) as txn:
            yield Book(self, txn)

    def grow(self, map_bytes: int) -> None:
        """Let the file become as large as ``map_bytes`` if it could not yet."""
        with self._lock:
            if map_bytes > self._map_bytes:
                self._env.set_mapsize(map_bytes)
                self._map_bytes = map_bytes

    def check_process(self) -> None:
        """Raise ``RunError`` in a process that was forked from the one that opened the folder: LMDB forbids it."""
        if self.pid != os.getpid():
            raise RunError(
                f"the reference cache {self.folder} was opened before this process was forked. Use it where it was "
                "opened, open it only after the fork, or start processes with spawn"
            )

    def forget_dead_readers(self) -> None:
        """Free what processes that were killed were reading."""
        with self._lock:
            self._env.reader_check()

    def close(self) -> None:
        """Close the environment."""
        with self._lock:
            self._env.close()

    def _begin(self, write: bool) -> lmdb.Transaction:
        import lmdb

        for left in reversed(range(_TRIES)):
            try:
                return self._env.begin(write=write, buffers=True)
            except lmdb.MapResizedError:  # another process has a larger limit, and used it
                if not left:
                    raise
                self._env.set_mapsize(0)
            except lmdb.ReadersFullError:
                if not left:
                    raise
                self._env.reader_check()
        raise AssertionError

    def _make_whole(self) -> None:
        """Append zeros to a file that was cut short: to read a mapped page that is not there kills the process."""
        path = self.folder / "data.mdb"
        with self._env.begin(write=True):  # keeps other processes from growing the file meanwhile
            whole = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
            if path.stat().st_size < whole:
                os.truncate(path, whole)
        # To delete takes pages too, also in a file that was filled under a larger limit.
        if self._env.info()["map_size"] < whole + SPARE:
            self._env.set_mapsize(whole + SPARE)

    def _check_format(self, txn: lmdb.Transaction) -> None:
        meta = self.tables[3]
        found: Any = txn.get(b"format", db=meta)
        if found is None:
            txn.put(b"format", _STAMP.pack(FORMAT), db=meta)
        elif (stored := _STAMP.unpack(found)[0]) != FORMAT:
            raise RunError(
                f"the reference cache {self.folder} has format {stored}, and this version of holdtrue uses {FORMAT}. "
                "Turn the cache off, give it another folder, or delete this one: what it holds is computed again"
            )


_stores: dict[Path, Store] = {}
_guard = threading.Lock()


def acquire(folder: Path, map_bytes: int) -> Store:
    """Return this process's only store for a folder, opened if it is not; give it back with :func:`release`.

    Raises:
        RunError: the folder cannot be used; the text says what to do.
    """
    with _guard:
        folder = folder.expanduser().resolve()
        store = _stores.get(folder)
        if store is None:
            store = _stores[folder] = Store(folder, map_bytes)
        else:
            store.check_process()
            store.grow(map_bytes)
        store.users += 1
        return store


def release(store: Store) -> None:
    """Close the store once nobody in this process uses it."""
    with _guard:
        store.users -= 1
        if store.users == 0:
            if _stores.get(store.folder) is store:
                del _stores[store.folder]
            store.close()


def _renew_guard() -> None:
    global _guard
    _guard = threading.Lock()  # another thread may have held it when this process was forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_guard)


def _make_private(folder: Path) -> None:
    """Hidden states give the rows away: nobody but the owner may read the folder."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in _FILES)
    if strangers:
        raise RunError(
            f"{folder} holds other files ({', '.join(strangers[:3])}); give the reference cache a folder of its own"
        )
    if os.name == "posix":
        for path in (folder, *folder.iterdir()):
            if path.stat().st_mode & 0o077:
                path.chmod(0o700 if path is folder else 0o600)


def _unusable(folder: Path, error: Exception) -> RunError:
    return RunError(
        f"the reference cache {folder} cannot be opened: {str(error).rstrip('.')}. Turn the cache off, give it another "
        "folder, or delete this one: what it holds is computed again"
    )
