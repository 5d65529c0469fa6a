"""The reference's states on disk, so that later epochs and other runs on the same rows need no pass of the reference.

An entry is one row's states at some positions: the final ones, or a block's. Its key is a digest of the model's
revision and precision, the row's tokens and the positions, so that nothing of another model, template or mask is ever
found. It lies in an LMDB environment: memory-mapped, read by several processes while one writes, whole after a kill.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import lmdb
import numpy as np
import torch
from torch import Tensor

from holdtrue.errors import RunError

logger = logging.getLogger(__name__)

FORMAT = b"1"
_MAGIC = b"HTRS"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIGEST = 16
_OVERHEAD = 2**26
"""Bytes of the map beyond twice the limit: pages that a transaction frees can be used by later ones only."""

_open: dict[Path, _Shared] = {}
_lock = threading.Lock()


class CacheStats(NamedTuple):
    """Of this object: entries found, not found and corrupt; of the file: entries, their bytes, and the limit."""

    hits: int
    misses: int
    corrupt: int
    entries: int
    bytes: int
    limit_bytes: int


def bytes_needed(final_tokens: int, width: int, itemsize: int, *, block_tokens: int = 0, blocks: int = 0) -> int:
    """Return the bytes of a data set's states: final ones at ``final_tokens``, ``blocks`` outputs at others."""
    return (final_tokens + block_tokens * blocks) * width * itemsize


class ReferenceCache:
    """States of a frozen model, kept in ``folder`` by row and positions.

    What is written since this object was made, or was found by it, is not given up for new entries: a data set larger
    than the limit is kept in part, where giving up the oldest would keep nothing for the next epoch. Entries of
    earlier runs go first, oldest first. A cache that cannot be written to any more says so once, and the run goes on.

    Args:
        folder: made if it is not there, readable by the user alone: states give rows away.
        limit_bytes: of all entries of the folder, whatever model they are of.
        namespace: what the states depend on beside tokens and positions: model revision, precision, device type.

    Raises:
        RunError: the folder holds a newer format, or cannot be opened.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, namespace: str) -> None:
        if limit_bytes < 1:
            raise ValueError(f"limit_bytes must be at least 1, not {limit_bytes}")
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._namespace = namespace.encode()
        self._shared = _Shared.open(self.folder, 2 * limit_bytes + _OVERHEAD)
        self._hits = self._misses = self._corrupt = 0
        self._found: set[bytes] = set()
        self._warned: set[str] = set()
        self._first = self._shared.next_number()

    def key(self, part: str, input_ids: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray) -> bytes:
        """Return the key of a row's states: ``part`` says which (``final``, ``block:7``), ``positions`` where."""
        digest = hashlib.blake2b(digest_size=32)
        for piece in (
            self._namespace,
            part.encode(),
            *(np.asarray(x, dtype="<i8").tobytes() for x in (input_ids, positions)),
        ):
            digest.update(struct.pack("<q", len(piece)))
            digest.update(piece)
        return digest.digest()

    def get_many(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Return the states of ``keys`` on the CPU, ``None`` where there are none that are whole."""
        found: list[Tensor | None] = []
        broken: list[bytes] = []
        try:
            with self._shared.env.begin(db=self._shared.states, buffers=True) as transaction:
                for key in keys:
                    value = transaction.get(key)
                    state = None if value is None else _unpacked(key, value)
                    if value is not None and state is None:
                        broken.append(key)
                    found.append(state)
        except lmdb.Error as error:
            self._warn_once("read", error)
            return [None] * len(keys)
        self._found.update(key for key, state in zip(keys, found, strict=True) if state is not None)
        self._hits += sum(state is not None for state in found)
        self._misses += sum(state is None for state in found)
        if broken:
            self._corrupt += len(broken)
            logger.warning("%s: %d entries were corrupt and are computed again", self.folder, len(broken))
            self._write(lambda transaction: self._shared.drop(transaction, broken))
        return found

    def put_many(self, items: Mapping[bytes, Tensor]) -> None:
        """Keep states, in one transaction; those for which there is no room are left out."""
        packed = {key: _packed(key, state) for key, state in items.items()}

        def write(transaction: Any) -> None:
            states, ages = self._shared.states, self._shared.ages
            total = self._shared.total(transaction)
            for key, value in packed.items():
                if transaction.get(key, db=states) is not None:
                    continue
                if total + len(value) > self.limit_bytes:
                    total -= self._make_room(transaction, total + len(value) - self.limit_bytes)
                if total + len(value) > self.limit_bytes:
                    continue
                number = self._shared.take_number(transaction)
                transaction.put(key, struct.pack(">Q", number) + value, db=states)
                transaction.put(struct.pack(">Q", number), key, db=ages)
                total += len(value)
            self._shared.set_total(transaction, total)

        self._write(write)

    def stats(self) -> CacheStats:
        """Count what is there and what was found."""
        with self._shared.env.begin() as transaction:
            entries = transaction.stat(self._shared.states)["entries"]
            size = self._shared.total(transaction)
        return CacheStats(self._hits, self._misses, self._corrupt, entries, size, self.limit_bytes)

    def close(self) -> None:
        """Let go of the file; the object is of no use afterwards."""
        self._shared.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_room(self, transaction: Any, wanted: int) -> int:
        """Drop entries of earlier runs, oldest first, until ``wanted`` bytes are free; return how many were freed."""
        freed, going = 0, []
        for number, key in transaction.cursor(db=self._shared.ages):
            if freed >= wanted or struct.unpack(">Q", number)[0] >= self._first:
                break
            if bytes(key) in self._found:
                continue
            value = transaction.get(key, db=self._shared.states)
            freed += 0 if value is None else len(value) - 8
            going.append(bytes(key))
        self._shared.drop(transaction, going, counted=False)
        return freed

    def _write(self, work: Any) -> None:
        try:
            with self._shared.env.begin(write=True) as transaction:
                work(transaction)
        except lmdb.Error as error:
            self._warn_once("written to", error)

    def _warn_once(self, verb: str, error: Exception) -> None:
        if verb in self._warned:
            return
        self._warned.add(verb)
        logger.warning("the reference cache %s cannot be %s and is passed over: %s", self.folder, verb, error)


class _Shared:
    """An open LMDB environment, once for a process: opening one twice would break its locks."""

    def __init__(self, folder: Path, map_size: int) -> None:
        self.folder, self.users, self.pid = folder, 0, os.getpid()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.env = lmdb.open(str(folder), map_size=map_size, max_dbs=3, mode=0o600, max_readers=256)
            self.states, self.ages, self.meta = (self.env.open_db(name) for name in (b"states", b"ages", b"meta"))
            with self.env.begin(write=True) as transaction:
                found = transaction.get(b"format", db=self.meta)
                if found is None:
                    transaction.put(b"format", FORMAT, db=self.meta)
        except (lmdb.Error, OSError) as error:
            raise RunError(
                f"the reference cache {folder} cannot be opened: {error}. Delete that folder, or turn the cache off"
            ) from error
        if found not in (None, FORMAT):
            self.env.close()
            raise RunError(
                f"the reference cache {folder} has format {bytes(found).decode(errors='replace')!r} and this version "
                f"reads {FORMAT.decode()!r}: delete that folder, or turn the cache off"
            )

    @classmethod
    def open(cls, folder: Path, map_size: int) -> _Shared:
        place = folder.resolve()
        with _lock:
            shared = _open.get(place)
            if shared is None or shared.pid != os.getpid():  # an environment does not outlive a fork
                shared = _open[place] = cls(place, map_size)
            elif shared.env.info()["map_size"] < map_size:
                shared.env.set_mapsize(map_size)
            shared.users += 1
            return shared

    def release(self) -> None:
        with _lock:
            self.users -= 1
            if self.users == 0 and self.pid == os.getpid():
                _open.pop(self.folder, None)
                self.env.close()

    def total(self, transaction: Any) -> int:
        return self._number(transaction, b"bytes")

    def set_total(self, transaction: Any, total: int) -> None:
        transaction.put(b"bytes", struct.pack("<Q", total), db=self.meta)

    def next_number(self) -> int:
        with self.env.begin() as transaction:
            return self._number(transaction, b"next")

    def take_number(self, transaction: Any) -> int:
        number = self._number(transaction, b"next")
        transaction.put(b"next", struct.pack("<Q", number + 1), db=self.meta)
        return number

    def drop(self, transaction: Any, keys: Iterable[bytes], *, counted: bool = True) -> None:
        freed = 0
        for key in keys:
            value = transaction.get(key, db=self.states)
            if value is not None:
                freed += len(value) - 8
                transaction.delete(bytes(value[:8]), db=self.ages)
                transaction.delete(key, db=self.states)
        if counted:
            self.set_total(transaction, max(0, self.total(transaction) - freed))

    def _number(self, transaction: Any, name: bytes) -> int:
        value = transaction.get(name, db=self.meta)
        return 0 if value is None else struct.unpack("<Q", value)[0]


def _packed(key: bytes, state: Tensor) -> bytes:
    state = state.detach().cpu().contiguous()
    whole = state.view(torch.int16) if state.dtype == torch.bfloat16 else state
    head = (
        _MAGIC
        + struct.pack("<BB", _DTYPES.index(state.dtype), state.dim())
        + struct.pack(f"<{state.dim()}q", *state.shape)
    )
    body = head + whole.numpy().tobytes()
    return _digest(key, body) + body


def _unpacked(key: bytes, value: memoryview) -> Tensor | None:
    """Read an entry, its number in front; ``None`` where a byte of it is not as it was written."""
    digest, body = bytes(value[8 : 8 + _DIGEST]), value[8 + _DIGEST :]
    if len(body) < 6 or _digest(key, body) != digest or bytes(body[:4]) != _MAGIC:
        return None
    code, dimensions = body[4], body[5]
    shape = struct.unpack_from(f"<{dimensions}q", body, 6)
    dtype = _DTYPES[code]
    raw = bytearray(body[6 + 8 * dimensions :])
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.zeros(shape, dtype=dtype)


def _digest(key: bytes, body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST, key=key).digest()
