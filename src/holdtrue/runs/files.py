"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdtrue.errors import RunError

_DISK_FULL = "the disk is full"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TORCH = ("pytorchstreamwriter", "unexpected pos")
"""What torch says, in place of the system's text, where a file that it writes takes no more."""


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (a rename, a new file) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush every file and folder under ``root`` (or the one file) to the disk."""
    for path in [root, *root.rglob("*")] if root.is_dir() else [root]:
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(root.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Raises ``ValueError`` for NaN and infinities, which JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that holdtrue wrote; ``RunError`` names it when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and resume the run to write it again") from error


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder beside ``target``, then sync and rename it over ``target``."""
    temporary = target.with_name(f".{target.name}.tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        sync_tree(temporary)
        remove(target)
        temporary.rename(target)
    except BaseException:
        remove(temporary)
        raise
    sync_folder(target.parent)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from, each once: an error that is raised again may have come from itself."""
    found: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and not any(seen is one for one in found):
        yield seen
        found.append(seen)
        seen = seen.__cause__ or seen.__context__


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error, or what caused it, is a disk, quota or file-size limit that was reached."""
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        # Writers in compiled code (safetensors, Arrow) raise types of their own with the system's text.
        texts = (*_TORCH, *(os.strerror(code).lower() for code in FULL))
        if any(text in str(seen).lower() for text in texts):
            return True
    return False


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a ``RunError`` that names the place and how to go on."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) or str(error).startswith(_DISK_FULL):
            raise
        what = error if isinstance(error, RunError) else f"cannot write {getattr(error, 'filename', None) or folder}"
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise RunError(
            f"{_DISK_FULL}: {what} ({free / 2**20:.0f} MiB free on its file system). "
            f"What was done is kept; free some space and run: holdtrue resume {folder}"
        ) from error
