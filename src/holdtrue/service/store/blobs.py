"""Content in an object store: files and folders under keys of ours, visible whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import fsspec

from holdtrue.errors import RunError
from holdtrue.models.digest import tree_digest
from holdtrue.runs.files import sync_folder
from holdtrue.service.store.away import Reading, StoreAwayError, reaching

_KEY = re.compile(r"[bt]-[0-9a-f]{32}")
_SHARE = re.compile(r"[0-9a-f]{2}")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
"""Where fsspec's stores say when something was written; each has its own word."""
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
        # Other processes write into the store: a list of a while ago is not what it holds.
        self._fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        self._root = str(root).rstrip("/")
        self._local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)
        if self._local:
            Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)
            Path(self._root, _INCOMING).mkdir(exist_ok=True)

    def put(self, stream: IO[bytes], *, limit: int) -> Blob:
        """Store what a stream holds under a new key.

        Raises:
            BlobError: more than ``limit`` bytes; nothing is kept.
            StoreAwayError, OSError: the store is away, or full; nothing is kept.
        """
        return self._put(f"b-{secrets.token_hex(16)}", stream, limit)

    def put_tree(self, folder: Path) -> tuple[str, str]:
        """Store a folder of plain files under a new key; return it with the folder's digest.

        Raises:
            RunError: the folder is empty or holds a link.
            StoreAwayError, OSError: the store is away, or full; nothing is kept.
        """
        key, digest = f"t-{secrets.token_hex(16)}", tree_digest(folder)
        self._put_tree(key, folder, digest)
        return key, digest

    def open(self, key: str) -> IO[bytes]:
        """Open a stored file for reading.

        Raises:
            BlobError: there is none.
            StoreAwayError: the store cannot be reached, now or while the file is read.
        """
        try:
            with reaching():
                return cast("IO[bytes]", Reading(self._fs.open(self._path(key), "rb")))
        except FileNotFoundError:
            self._check_shares()
            raise BlobError(f"the object store has no {key}") from None

    def check(self) -> None:
        """Ask the store for something; ``StoreAwayError`` where it does not answer."""
        if self._local:
            self._check_folder()
            return
        with contextlib.suppress(FileNotFoundError), reaching():
            self._fs.info(self._path("b-" + "0" * 32))

    def fetch(self, key: str, path: Path) -> None:
        """Copy a stored file to a local path, whole or not at all; raises as :meth:`open` does."""
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with self.open(key) as source, draft.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def fetch_tree(self, key: str, folder: Path, digest: str | None = None) -> None:
        """Copy a stored folder to a local one, whole or not at all; its content is what was stored, or this fails.

        Args:
            key: of the stored folder.
            folder: where to; it must not be there yet, or hold the same already.
            digest: what its digest must be, where somebody else than the store says so.

        Raises:
            BlobError: there is none, a file of it is missing, or its digest is another.
            StoreAwayError: the store cannot be reached.
        """
        names, stored = self._listing(key)
        digest = stored if digest is None else digest
        draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            for name in names:
                target = draft / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with (
                    target.open("wb") as file,
                    reaching(),
                    self._fs.open(f"{self._path(key)}/{name}", "rb") as source,
                ):
                    shutil.copyfileobj(source, file, _CHUNK)
            if (found := tree_digest(draft)) != digest:
                raise BlobError(
                    f"{key} in the object store is not what was stored: its digest is {found}, not {digest}"
                )
            try:
                draft.rename(folder)
            except OSError:
                # Another process may have been faster with the same.
                if not folder.is_dir() or tree_digest(folder) != digest:
                    raise
        except FileNotFoundError as error:
            self._check_shares()
            raise BlobError(f"{key} in the object store lacks a file: {error.filename}") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def copy(self, key: str, to: Blobs, place: Path) -> str:
        """Copy what a key holds into another store, under the same key; return its SHA-256, or a folder's digest.

        Args:
            key: of a file or a folder.
            to: the other store.
            place: a local folder in which a stored one may lie meanwhile.

        Raises:
            BlobError: there is none, or a folder is not what was stored.
        """
        if key.startswith("t-"):
            with tempfile.TemporaryDirectory(dir=place) as folder:
                digest = self._listing(key).digest
                self.fetch_tree(key, Path(folder, "tree"))
                to._put_tree(key, Path(folder, "tree"), digest)
            return digest
        with self.open(key) as source:
            return to._put(key, source).sha256

    def digest(self, key: str, place: Path) -> str:
        """Return the SHA-256 of what a key holds, or a folder's digest; raises as :meth:`copy`, and has its place."""
        if key.startswith("t-"):
            with tempfile.TemporaryDirectory(dir=place) as folder:
                self.fetch_tree(key, Path(folder, "tree"))
                return tree_digest(Path(folder, "tree"))
        digest = hashlib.sha256()
        with self.open(key) as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def exists(self, key: str) -> bool:
        """Say whether a key holds something; what is no key of ours does not. ``StoreAwayError`` as elsewhere."""
        if _KEY.fullmatch(key) is None:
            return False
        path = self._path(key)
        try:
            with reaching():
                self._fs.info(f"{path}.list" if key.startswith("t-") else path)  # fsspec's exists() hides failures
        except FileNotFoundError:
            self._check_folder()
            return False
        return True

    def delete(self, key: str) -> None:
        """Delete what a key holds; nothing happens where it holds nothing."""
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError), reaching():
            if key.startswith("t-"):
                # The list goes first: a deletion that is cut short leaves no folder that counts.
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{path}.list")
                for name in self._fs.find(path):
                    self._fs.rm_file(name)
                self._fs.rm(path, recursive=True)  # where folders are more than a part of names
            else:
                self._fs.rm_file(path)

    def stored(self) -> Iterator[Stored]:
        """Yield every key that takes room, also folders of which only a part came."""
        for share in self._list(self._root):
            if share["type"] != "directory" or _SHARE.fullmatch(_name(share)) is None:
                continue
            found: dict[str, list[Mapping[str, Any]]] = {}
            for entry in self._list(share["name"]):
                key = _name(entry).removesuffix(".list")
                if _KEY.fullmatch(key) is not None:
                    found.setdefault(key, []).append(entry)
            for key, entries in found.items():
                yield Stored(key, self._written(entries))

    def drop_drafts(self, before: float) -> int:
        """Delete what was last written to before a time and never ended, and return how many: their writers died."""
        count = 0
        if self._local:
            for path in Path(self._root, _INCOMING).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        path.unlink()
                        count += 1
        return count

    def _written(self, entries: list[Mapping[str, Any]]) -> float | None:
        """Return when a key was last written to: an object store knows that of files alone."""
        times = [time for entry in entries if (time := _time(entry)) is not None]
        if not times and entries[0]["type"] == "directory":
            with reaching():
                files = self._fs.find(entries[0]["name"], detail=True)
            times = [time for entry in files.values() if (time := _time(entry)) is not None]
        return max(times, default=None)

    def _list(self, path: str) -> list[dict[str, Any]]:
        try:
            with reaching():
                return self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return []

    def _check_folder(self) -> None:
        """Raise where a local store's folder is not what was opened: its disk is not mounted any more."""
        if self._local and not Path(self._root, _INCOMING).is_dir():
            raise StoreAwayError("the object store's folder is gone; is its disk mounted?")

    def is_bare(self) -> bool:
        """Say whether a local store has never held anything; of any other it is not known, and the answer is no.

        A store that was opened without its disk has made its folder for what comes in, but has no share.
        """
        return self._local and not any(_SHARE.fullmatch(_name(entry)) for entry in self._list(self._root))

    def _check_shares(self) -> None:
        """Raise where a key is not found because a local store holds nothing at all: its disk is not mounted."""
        if self.is_bare():
            raise StoreAwayError("the object store holds nothing at all; is its disk mounted?")

    def _put(self, key: str, stream: IO[bytes], limit: float = float("inf")) -> Blob:
        digest, count = hashlib.sha256(), 0
        with reaching(writing=True), self._new(self._path(key)) as target:
            while chunk := stream.read(_CHUNK):
                count += len(chunk)
                if count > limit:
                    raise BlobError(f"more than the {limit} bytes that are allowed")
                digest.update(chunk)
                target.write(chunk)
        return Blob(key, digest.hexdigest(), count)

    def _put_tree(self, key: str, folder: Path, digest: str) -> None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        try:
            for name in names:
                with (
                    (folder / name).open("rb") as source,
                    reaching(writing=True),
                    self._new(f"{self._path(key)}/{name}") as target,
                ):
                    shutil.copyfileobj(source, target, _CHUNK)
            # A folder counts once its list is there, which comes last.
            with reaching(writing=True), self._new(f"{self._path(key)}.list") as target:
                target.write(json.dumps({"sha256": digest, "files": names}).encode())
        except BaseException:
            with contextlib.suppress(Exception):
                self.delete(key)
            raise

    def _listing(self, key: str) -> _Listing:
        try:
            with reaching():
                text = self._fs.cat_file(f"{self._path(key)}.list")
        except FileNotFoundError:
            self._check_shares()
            raise BlobError(f"the object store has no {key}") from None
        try:
            content = json.loads(text)
            names, digest = [str(name) for name in content["files"]], str(content["sha256"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BlobError(f"the list of {key} in the object store is damaged") from None
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
            raise BlobError(f"the list of {key} names files outside of it")
        return _Listing(names, digest)

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
                file.close()
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                with contextlib.suppress(Exception):
                    file.closed = True  # else it writes what it has when it is forgotten
                with contextlib.suppress(Exception):
                    self._fs.rm_file(path)
                raise
            return
        draft, target = Path(self._root, _INCOMING, secrets.token_hex(16)), Path(path)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _make_folder(target.parent)
            draft.replace(target)
            sync_folder(target.parent)
        finally:
            draft.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it, on the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


class _Listing(NamedTuple):
    names: list[str]
    digest: str


def _name(entry: Mapping[str, Any]) -> str:
    return PurePosixPath(entry["name"]).name


def _time(entry: Mapping[str, Any]) -> float | None:
    at = next((entry[word] for word in _TIMES if entry.get(word)), None)
    if isinstance(at, str):
        at = datetime.fromisoformat(at)
    if not isinstance(at, datetime):
        return at
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
