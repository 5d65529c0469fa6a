"""The data sets that holdtrue ships, and what a path in a spec means."""

from __future__ import annotations

from pathlib import Path

from holdtrue.errors import SpecError, nearest

PREFIX = "builtin:"
_FOLDER = Path(__file__).parent / "builtin"


def builtin_names() -> list[str]:
    """Return the names of the shipped data sets, in order."""
    return sorted(_files())


def builtin(name: str) -> Path:
    """Return the file of a shipped data set; ``SpecError`` if there is none of that name."""
    files = _files()
    if name not in files:
        names = sorted(files)
        raise SpecError(f"there is no builtin data set {name!r}{nearest(name, names)}; there are: {', '.join(names)}")
    return files[name]


def resolve_data(value: str | Path, folder: str | Path) -> Path:
    """Return the file that a spec's value means: ``builtin:NAME``, or a path that starts in ``folder``.

    Whether a file is there is left to whoever reads it. Raises ``SpecError`` for an unknown builtin or an empty value.
    """
    text = str(value)
    if text.startswith(PREFIX):
        return builtin(text[len(PREFIX) :])
    if not text.strip():
        raise SpecError("the path of a data file is empty; give a path or builtin:NAME")
    return Path(folder) / Path(text).expanduser()


def builtin_name(path: Path) -> str | None:
    """Return ``builtin:NAME`` for a file that the package ships, ``None`` for any other."""
    return f"{PREFIX}{path.stem}" if path.parent == _FOLDER else None


def _files() -> dict[str, Path]:
    return {path.stem: path for path in _FOLDER.iterdir() if path.suffix in (".jsonl", ".yaml")}
