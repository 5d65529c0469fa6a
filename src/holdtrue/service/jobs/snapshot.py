"""A run's directory in the object store, so that another host goes on from where a dead one was."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from holdtrue.errors import RunError
from holdtrue.runs import Run, RunSpec
from holdtrue.runs import files as run_files
from holdtrue.service.store.blobs import Blobs

MOST_BYTES = 64 * 2**30
_ROWS = "data"


def save_rows(run: Run, blobs: Blobs) -> str:
    """Put a run's encoded rows, which never change, into the object store; return the key."""
    return _save(run.path, _files(run.path / _ROWS), blobs)


def save_rest(run: Run, blobs: Blobs) -> str:
    """Put all else of a run's directory, as it is now, into the object store; return the key."""
    inside = run.path / _ROWS
    return _save(run.path, (path for path in _files(run.path) if inside not in path.parents), blobs)


def restore(keys: Iterable[str], folder: Path, spec: RunSpec, blobs: Blobs) -> Run:
    """Bring a run back into ``folder``, whole or not at all, with the paths that it has on this host.

    Args:
        keys: as :func:`save_rows` and :func:`save_rest` returned them. The content is ours, and is unpacked as if it
            were not.
        folder: where to; what is there is replaced.
        spec: of the run, as this host resolves it.
        blobs: the object store.

    Raises:
        RunError: the stored directory is damaged.
    """

    def unpack(target: Path) -> None:
        for key in keys:
            with blobs.open(key) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                tar.extractall(target, filter="data")
        # The hash stays: it binds the finished stages to the policy and data that they were done with.
        stored = run_files.read_json(target / "spec.json")
        run_files.write_json(target / "spec.json", {**stored, "spec": spec.canonical()})

    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_files.replace_folder(folder, unpack)
    except (tarfile.TarError, json.JSONDecodeError, KeyError) as error:
        raise RunError(f"the saved state of {folder.name} cannot be brought back: {error}") from error
    return Run(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")


def _save(root: Path, paths: Iterable[Path], blobs: Blobs) -> str:
    with tempfile.TemporaryFile(dir=root.parent) as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in paths:
                tar.add(path, path.relative_to(root).as_posix(), recursive=False)
        file.seek(0)
        return blobs.put(file, limit=MOST_BYTES).key
