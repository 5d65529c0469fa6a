"""Adapters over one base model, by what is in them: fetched, checked, put on, and forgotten when others are used."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from holdtrue.errors import HoldtrueError
from holdtrue.models.digest import tree_digest
from holdtrue.serving.port import AdapterRef, ChatError

if TYPE_CHECKING:
    from torch import nn

    from holdtrue.models import ModelSource

KEPT = 16
"""Adapters in memory besides those in use."""

Fetch = Callable[[str, Path], None]
"""Copies the folder at a location to a path that is not there yet."""


def copy_folder(location: str, folder: Path) -> None:
    """Fetch from a folder of this machine."""
    shutil.copytree(location, folder)


class Adapters:
    """Hands out models: each the base model's weights under an adapter of its own.

    Every adapter has modules of its own on weights that all share, so that nothing is switched between two of them and
    none can answer for another. Nothing of an adapter is kept on this machine's disk.

    Args:
        source: the base model.
        fetch: gets an adapter's folder from its location.
        place: where its files lie while it is loaded; by default where the system has temporary ones.
    """

    def __init__(self, source: ModelSource, fetch: Fetch = copy_folder, place: Path | None = None) -> None:
        from holdtrue.models.reuse import KeptModel

        self.source = source
        self._fetch, self._place = fetch, place
        self._base = KeptModel()
        self._kept: OrderedDict[str | None, nn.Module] = OrderedDict()
        self._lock = threading.Lock()

    def load_base(self) -> nn.Module:
        """Load the base model's weights, once, and return a model on them.

        Raises:
            SpecError, RunError: as :func:`holdtrue.models.load_model`.
        """
        return self.get(None)

    def get(self, ref: AdapterRef | None) -> nn.Module:
        """Return the model under an adapter, or the base model; it stays whole for as long as somebody holds it.

        Raises:
            ChatError: the adapter cannot be fetched, is not what its digest says, or does not fit the base model.
        """
        key = None if ref is None else ref.digest
        with self._lock:  # one load at a time: each needs room, and two of the same would need it twice
            if key not in self._kept:
                self._kept[key] = self._base.model(self.source) if ref is None else self._load(ref)
            self._kept.move_to_end(key)
            adapters = [each for each in self._kept if each is not None]
            for oldest in adapters[: max(0, len(adapters) - KEPT)]:
                del self._kept[oldest]
            return self._kept[key]

    def _load(self, ref: AdapterRef) -> nn.Module:
        from holdtrue.models import load_adapter

        with tempfile.TemporaryDirectory(prefix="holdtrue-adapter-", dir=self._place) as temporary:
            folder = Path(temporary) / "adapter"
            try:
                self._fetch(ref.location, folder)
                found = tree_digest(folder)
            except (HoldtrueError, OSError) as error:
                raise ChatError("adapter", f"the adapter {ref.digest} cannot be fetched: {error}") from error
            if found != ref.digest:
                raise ChatError("adapter", f"the adapter {ref.digest} is not what was stored: its digest is {found}")
            try:
                return load_adapter(self._base.model(self.source), folder)
            except HoldtrueError as error:
                raise ChatError("adapter", f"the adapter {ref.digest} cannot be put on: {error}") from error
