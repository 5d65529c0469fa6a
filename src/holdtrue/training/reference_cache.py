"""States of the frozen reference kept on disk, so that no row goes through the reference twice."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from holdtrue.errors import RunError
from holdtrue.training import cache_entry
from holdtrue.training.cache_store import BOOKKEEPING, PAGE, SPARE, Book, acquire, footprint, release

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_NOTE_AFTER = 1024
_TRIES = 3


class CacheStats(NamedTuple):
    """``entries`` and ``bytes`` are the folder's; the other counts are of one open cache."""

    entries: int
    bytes: int
    limit_bytes: int
    hits: int
    misses: int
    corrupt: int
    evicted: int
    skipped: int


def bytes_needed(tokens: int, width: int, parts: int, itemsize: int, *, rows: int = 0) -> int:
    """Return how many bytes of the limit some rows will take.

    Args:
        tokens: positions stored, over all rows.
        width: the model's hidden size.
        parts: tensors for each row: 1 for the final states, and 1 for each block.
        itemsize: bytes of a number: 2 or 4.
        rows: with their number the result is an upper bound; without it, the bare numbers.
    """
    # An entry starts with 16 bytes and 8 for each of at most four dimensions, and ends within a page.
    return tokens * width * parts * itemsize + rows * parts * (16 + 32 + 16 + PAGE + BOOKKEEPING)


class ReferenceCache:
    """Tensors in one LMDB file under keys that name the model, the row and the positions.

    Several processes may use a folder at once. What fails afterwards costs time and no run: an entry that cannot be
    read is absent, one that cannot be written is not kept, and the log says so once. What is damaged is deleted and
    never returned.

    When full, a put deletes what was unused for longest, but nothing that was used since this cache was opened: an
    epoch reads each row once, so that to make room for a row by deleting another of the same data loses more than it
    brings. What then does not fit is not stored (``skipped``). Open one cache for each run.

    Args:
        folder: holds nothing else; made, and kept, readable for its owner only. On a local disk.
        limit_bytes: of all entries together, as :func:`bytes_needed` counts them. The file can become a quarter and
            64 MiB larger, and does not shrink.
        namespace: all that the states depend on beside row and part: the model's revision, dtype, attention, format.

    Raises:
        RunError: the folder cannot be opened, is not private, holds other files, or is of another format.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, namespace: str) -> None:
        if limit_bytes <= 0:
            raise RunError(
                f"the reference cache's limit is {limit_bytes} bytes; give at least 1, or turn the cache off"
            )
        self.limit_bytes = limit_bytes
        self.namespace = namespace
        self._store = acquire(Path(folder), -(-(limit_bytes + limit_bytes // 4 + SPARE) // PAGE) * PAGE)
        self.folder = self._store.folder
        self._closed = False
        self._own = threading.Lock()
        self._warned: set[str] = set()
        self._used: set[bytes] = set()
        self._hits = self._misses = self._corrupt = self._evicted = self._skipped = 0
        self._since = 0
        with self._harmless("read"), self._store.open() as book:
            self._since = book.next_stamp

    def key(self, part: str, input_ids: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray) -> bytes:
        """Return an entry's key, 32 bytes: BLAKE2b over namespace, part, token ids and positions, each with its length.

        Args:
            part: ``final``, or ``block:7``.
            input_ids: the row, (length,).
            positions: which of its positions are stored, (stored,).

        Raises:
            ValueError: ids or positions are not whole numbers in one dimension.
        """
        digest = hashlib.blake2b(digest_size=32, person=b"holdtrue refs")
        for data in (
            self.namespace.encode("utf-8", "surrogatepass"),
            part.encode("utf-8", "surrogatepass"),
            _integers("input_ids", input_ids),
            _integers("positions", positions),
        ):
            digest.update(struct.pack("<Q", len(data)) + data)
        return digest.digest()

    def get_many(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Return tensors on the CPU, each in memory of its own; ``None`` for what is absent or damaged."""
        self._check_open()
        found: list[Tensor | None] = [None] * len(keys)
        damaged: list[bytes] = []
        with self._own:
            with self._harmless("read"), self._store.open() as book:
                for i, key in enumerate(keys):
                    entry = book.get(key)
                    if entry is None:
                        continue
                    found[i] = cache_entry.unpack(key, entry)
                    if found[i] is None:
                        damaged.append(key)
                    elif (book.stamp(key) or 0) < self._since:
                        self._used.add(key)
            hits = sum(tensor is not None for tensor in found)
            self._hits += hits
            self._misses += len(keys) - hits
            if damaged:
                self._delete(damaged)
            if len(self._used) >= _NOTE_AFTER:
                self._note_use()
        return found

    def put_many(self, items: Mapping[bytes, Tensor]) -> None:
        """Store tensors in one transaction, as far as they fit; see the class for what makes room.

        Raises:
            TypeError: a tensor is not float32, bfloat16, float16 or float64.
        """
        import lmdb

        self._check_open()
        if not items:
            return
        entries = {key: cache_entry.pack(key, tensor) for key, tensor in items.items()}
        with self._own, self._harmless("written"):
            for left in reversed(range(_TRIES)):
                try:
                    with self._store.open(write=True) as book:
                        evicted, skipped = self._put(book, entries)
                except lmdb.MapFullError:
                    if not left:
                        raise
                    self._make_room(2 * sum(footprint(len(entry)) for entry in entries.values()))
                    continue
                self._used.clear()
                self._evicted += evicted
                self._skipped += skipped
                if skipped:
                    self._warn(
                        "full",
                        f"the reference cache {self.folder} is full ({self.limit_bytes} bytes) of what this run uses; "
                        "rows that do not fit go through the reference each time. Raise its limit to change that",
                    )
                return

    def stats(self) -> CacheStats:
        """Return the folder's contents and what this cache did so far."""
        self._check_open()
        entries = size = 0
        with self._harmless("read"), self._store.open() as book:
            entries, size = book.count, book.total
        counts = (self._hits, self._misses, self._corrupt, self._evicted, self._skipped)
        return CacheStats(entries, size, self.limit_bytes, *counts)

    def close(self) -> None:
        """Note what was used, and close the file if no other cache of this process uses it."""
        if self._closed or self._store.pid != os.getpid():  # a forked process has nothing to close
            return
        with self._own:
            self._closed = True
            self._note_use()
            release(self._store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _put(self, book: Book, entries: Mapping[bytes, bytearray]) -> tuple[int, int]:
        book.touch(self._used)
        evicted = skipped = 0
        for key, entry in entries.items():
            book.remove(key)
            size = footprint(len(entry))
            if size <= self.limit_bytes:
                evicted += book.evict(self.limit_bytes - size, self._since)
            if book.total + size <= self.limit_bytes:
                book.insert(key, entry)
            else:
                skipped += 1
        return evicted, skipped

    def _make_room(self, size: int) -> None:
        """Free more than is needed: the file is cut up, or others still read what was freed."""
        with self._store.open(write=True) as book:
            book.touch(self._used)
            evicted = book.evict(max(0, book.total - size), self._since)
        self._used.clear()
        self._evicted += evicted
        self._store.forget_dead_readers()
        with self._store.open(write=True) as book:
            book.mark()

    def _note_use(self) -> None:
        if self._used:
            with self._harmless("written"), self._store.open(write=True) as book:
                book.touch(self._used)
            self._used.clear()

    def _delete(self, keys: list[bytes]) -> None:
        self._corrupt += len(keys)
        self._warn(
            "corrupt",
            f"the reference cache {self.folder} held a damaged entry; it was deleted and is computed again. "
            "If this comes again, check the disk",
        )
        with self._harmless("written"), self._store.open(write=True) as book:
            for key in keys:
                entry = book.get(key)
                # Another process may have stored it anew.
                if entry is not None and cache_entry.unpack(key, entry) is None:
                    book.remove(key)

    def _check_open(self) -> None:
        if self._closed:
            raise RunError(f"the reference cache {self.folder} is closed; open it again")
        self._store.check_process()

    @contextlib.contextmanager
    def _harmless(self, done: str) -> Iterator[None]:
        """Log the file's errors once, and go on as if there were no cache."""
        import lmdb

        try:
            yield
        except (lmdb.Error, OSError, struct.error) as error:
            self._warn(
                done,
                f"the reference cache {self.folder} cannot be {done}: {error}. Training goes on without what is "
                "missing. Free some space, or delete the folder if it is damaged",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(text)


def _integers(name: str, values: Sequence[int] | np.ndarray) -> bytes:
    given = np.asarray(values)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be whole numbers in one dimension, not {given.dtype} of shape {given.shape}")
    whole = given.astype("<i8")
    if given.dtype.kind == "u" and (whole < 0).any():
        raise ValueError(f"{name} holds a number above 2**63 - 1")
    return whole.tobytes()
