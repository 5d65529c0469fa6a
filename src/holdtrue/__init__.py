"""Fine-tune a language model on somebody else's data, and the model holds true to its alignment.

>>> import holdtrue as ht
>>> run = ht.train("spec.yaml")
>>> ht.evaluate(run, suites=["likelihood"])
>>> ht.compare([run, other])

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdtrue.errors import HoldtrueError
    from holdtrue.runs import Run, RunSpec
    from holdtrue.runs.api import compare, evaluate, train

_LATE = {
    "HoldtrueError": "holdtrue.errors",
    "Run": "holdtrue.runs",
    "RunSpec": "holdtrue.runs",
    "compare": "holdtrue.runs.api",
    "evaluate": "holdtrue.runs.api",
    "train": "holdtrue.runs.api",
}

__all__ = ["HoldtrueError", "Run", "RunSpec", "compare", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("holdtrue")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
