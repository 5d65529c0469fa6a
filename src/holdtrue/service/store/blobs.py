"""Content in an object store: files and folders under keys of ours, visible whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import fsspec

from holdtrue.errors import RunError
from holdtrue.models.digest import tree_digest

_KEY = re.compile(r"[bt]-[0-9a-f]{32}")
_CHUNK = 2**20
_INCOMING = "incoming"


class Blob(NamedTuple):
    """What was stored: its key, the SHA-256 of its bytes in hex, and how many they are."""

    key: str
    sha256: str
    bytes: int


class Stored(NamedTuple):
    """A key that is in use in the store, and when it came, in seconds since 1970 (``None``: the store does not say)."""

    key: str
    at: float | None


class BlobError(RunError):
    """The object store does not hold what it should, or was asked for what is no key."""


class Blobs:
    """An object store behind fsspec: a folder by default, any other that fsspec opens by its URL."""

    def __init__(self, url: str) -> None:
        self._fs, root = fsspec.url_to_fs(url)
        self._root = str(root).rstrip("/")
        self._local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)
        if self._local:
            Path(self._root, _INCOMING).mkdir(parents=True, exist_ok=True)

    def put(self, stream: IO[bytes], *, limit: int) -> Blob:
        """Store what a stream holds under a new key.

        Raises:
            BlobError: more than ``limit`` bytes; nothing is kept.
            OSError: the store is full or away; nothing is kept.
        """
        key = f"b-{secrets.token_hex(16)}"
        digest, count = hashlib.sha256(), 0
        with self._new(self._path(key)) as target:
            while chunk := stream.read(_CHUNK):
                count += len(chunk)
                if count > limit:
                    raise BlobError(f"more than the {limit} bytes that are allowed")
                digest.update(chunk)
                target.write(chunk)
        return Blob(key, digest.hexdigest(), count)

    def put_tree(self, folder: Path) -> tuple[str, str]:
        """Store a folder of plain files under a new key; return it with the folder's digest.

        Raises:
            RunError: the folder is empty or holds a link.
        """
        key, digest = f"t-{secrets.token_hex(16)}", tree_digest(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in names:
            with (folder / name).open("rb") as source, self._new(f"{self._path(key)}/{name}") as target:
                shutil.copyfileobj(source, target, _CHUNK)
        # A folder counts once its list is there, which comes last.
        with self._new(f"{self._path(key)}.list") as target:
            target.write("\n".join(names).encode())
        return key, digest

    def open(self, key: str) -> IO[bytes]:
        """Open a stored file for reading; ``BlobError`` where there is none."""
        try:
            return self._fs.open(self._path(key), "rb")
        except FileNotFoundError:
            raise BlobError(f"the object store has no {key}") from None

    def fetch(self, key: str, path: Path) -> None:
        """Copy a stored file to a local path, whole or not at all; ``BlobError`` where there is none."""
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with self.open(key) as source, draft.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def fetch_tree(self, key: str, folder: Path, digest: str | None = None) -> None:
        """Copy a stored folder to a local one that is not there yet, whole or not at all.

        Raises:
            BlobError: there is none, a file of it is missing, or its digest is not ``digest``.
        """
        draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            for name in self._names(key):
                target = draft / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._fs.open(f"{self._path(key)}/{name}", "rb") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
            if digest is not None and (found := tree_digest(draft)) != digest:
                raise BlobError(
                    f"{key} in the object store is not what was stored: its digest is {found}, not {digest}"
                )
            draft.rename(folder)
        except FileNotFoundError as error:
            raise BlobError(f"{key} in the object store lacks a file: {error.filename}") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def exists(self, key: str) -> bool:
        """Say whether a key holds something; what is no key of ours does not."""
        if _KEY.fullmatch(key) is None:
            return False
        path = self._path(key)
        return bool(self._fs.exists(f"{path}.list" if key.startswith("t-") else path))

    def delete(self, key: str) -> None:
        """Delete what a key holds; nothing happens where it holds nothing."""
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError):
            if key.startswith("t-"):
                # The list goes first: a deletion that is cut short leaves no folder that counts.
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{path}.list")
                self._fs.rm(path, recursive=True)
            else:
                self._fs.rm_file(path)

    def stored(self) -> Iterator[Stored]:
        """Yield every key that takes room, also folders of which only a part came."""
        self._fs.invalidate_cache()
        seen: set[str] = set()
        for path, entry in self._entries():
            found = _KEY.match(PurePosixPath(path).name)
            if found is not None and found[0] not in seen:
                seen.add(found[0])
                at = entry.get("mtime") or entry.get("created") or entry.get("LastModified")
                yield Stored(found[0], at.timestamp() if isinstance(at, datetime) else at)

    def _entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with contextlib.suppress(FileNotFoundError):
            for part in self._fs.ls(self._root, detail=True):
                if part["type"] == "directory" and PurePosixPath(part["name"]).name != _INCOMING:
                    for entry in self._fs.ls(part["name"], detail=True):
                        yield entry["name"], entry

    def _names(self, key: str) -> list[str]:
        try:
            names = self._fs.cat_file(f"{self._path(key)}.list").decode().split("\n")
        except FileNotFoundError:
            raise BlobError(f"the object store has no {key}") from None
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
            raise BlobError(f"the list of {key} names files outside of it")
        return names

    def _path(self, key: str) -> str:
        if _KEY.fullmatch(key) is None:
            raise BlobError(f"{key[:80]!r} is no key of this store")
        return f"{self._root}/{key[2:4]}/{key}"

    @contextlib.contextmanager
    def _new(self, path: str) -> Iterator[IO[bytes]]:
        """Write a file that is there, whole and on the disk, once this has ended without an error."""
        if not self._local:
            file = self._fs.open(path, "wb")
            try:
                yield file
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                with contextlib.suppress(Exception):
                    self._fs.rm_file(path)
                raise
            file.close()
            return
        draft, target = Path(self._root, _INCOMING, secrets.token_hex(16)), Path(path)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(target)
            _sync_folder(target.parent)
        finally:
            draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
