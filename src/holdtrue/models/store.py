"""Where holdtrue keeps what it builds once, and how several processes build it without colliding."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from holdtrue.errors import RunError


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache folder: ``cache``, else $HOLDTRUE_CACHE, $XDG_CACHE_HOME/holdtrue or ~/.cache/holdtrue."""
    if cache is not None:
        return Path(cache).expanduser()
    if own := os.environ.get("HOLDTRUE_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "holdtrue"
    return Path.home() / ".cache" / "holdtrue"


def build_once(folder: Path, build: Callable[[Path], None], complete: Callable[[Path], bool]) -> Path:
    """Return ``folder``, built if it is not complete. A half-built folder is never seen under its name.

    Processes that ask at once wait for the first; one that was killed leaves nothing in the others' way.

    Args:
        folder: the wanted folder.
        build: fills the empty folder that it is given.
        complete: whether a folder of that name is whole.

    Raises:
        RunError: the folder cannot be written (permissions, a full disk).
    """
    if complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not complete(folder):
                for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                with new_folder(folder) as temporary:
                    build(temporary)
    except OSError as error:
        raise RunError(
            f"cannot write {folder}: {error}. Free some space there, or set HOLDTRUE_CACHE to another folder."
        ) from error
    return folder


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes ``folder``'s place, whole and on disk, when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(temporary)
        _swap(temporary, folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.replace(folder)
        return
    # A folder that is not empty cannot be replaced in one call: the old one moves aside first.
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-"))
    folder.replace(aside / "old")
    try:
        new.replace(folder)
    except BaseException:
        (aside / "old").replace(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder to flush it
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
