"""A folder of a process's own for content that it needs for a moment, and that nobody may find afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from filelock import FileLock

FOLDER = "scratch"
_LOCK = ".lock"


class Scratch:
    """A folder under a service's home, for as long as this object and its process live.

    A process that is killed cleans up nothing: whoever begins deletes the folders of those who live no more. A lock on
    each folder tells who lives; the system ends it with its process, however that ends.

    Attributes:
        path: the folder.
    """

    def __init__(self, home: Path) -> None:
        root = home.absolute() / FOLDER
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(root / _LOCK):  # nobody looks at a folder between its making and its lock
            _empty(root)
            self.path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
            held = _lock(self.path)
            held.acquire(timeout=0)
        self._leave = weakref.finalize(self, _leave, self.path, held, os.getpid())

    def close(self) -> None:
        """Delete the folder."""
        self._leave()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / _LOCK, thread_local=False)  # any thread may drop the last reference to it


def _empty(root: Path) -> None:
    for folder in root.iterdir():
        if folder.is_dir():
            with contextlib.suppress(OSError), _lock(folder).acquire(timeout=0):  # held by the living; or just leaving
                shutil.rmtree(folder, ignore_errors=True)


def _leave(folder: Path, held: FileLock, owner: int) -> None:
    if os.getpid() == owner:  # and not a copy of that process
        shutil.rmtree(folder, ignore_errors=True)
        held.release()
