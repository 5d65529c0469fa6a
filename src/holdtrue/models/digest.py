"""One name for the content of a folder: what a receipt signs and what is checked before weights are loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from holdtrue.errors import RunError


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(folder: str | Path) -> str:
    """Return the SHA-256, in hex, of a folder's list of files with the SHA-256 of each.

    The list is what ``sha256sum`` prints for the files in the byte order of their paths, each as ``./path``:
    ``find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum`` gives the same.

    Raises:
        RunError: the folder is not there, is empty, or holds a link, whose target could change unseen.
    """
    root = Path(folder)
    if not root.is_dir():
        raise RunError(f"{root} is no folder")
    lines: list[bytes] = []
    for path in root.rglob("*"):
        if path.is_symlink():
            raise RunError(f"{path} is a link; a digest covers plain files only: put the file itself there")
        if path.is_file():
            name = f"./{path.relative_to(root).as_posix()}"
            if "\n" in name or "\\" in name:
                raise RunError(f"{path!r}: a file name with a line break or a backslash cannot be listed; rename it")
            lines.append(f"{file_digest(path)}  {name}\n".encode())
    if not lines:
        raise RunError(f"{root} holds no file")
    lines.sort(key=lambda line: line[66:])
    return hashlib.sha256(b"".join(lines)).hexdigest()
