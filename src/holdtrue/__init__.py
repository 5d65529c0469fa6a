"""Fine-tune a language model on somebody else's data, and the model holds true to its alignment.

>>> import holdtrue as ht
>>> run = ht.train("spec.yaml")
>>> ht.evaluate(run, suites=["likelihood"])
>>> ht.compare([run, other])

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdtrue.late import late_names

if TYPE_CHECKING:
    from holdtrue.errors import HoldtrueError
    from holdtrue.runs import Run, RunSpec
    from holdtrue.runs.api import compare, evaluate, train

_LATE = {
    "HoldtrueError": "errors",
    "Run": "runs",
    "RunSpec": "runs",
    "compare": "runs.api",
    "evaluate": "runs.api",
    "train": "runs.api",
}

__all__ = ["HoldtrueError", "Run", "RunSpec", "compare", "evaluate", "train"]


_named = late_names(__name__, _LATE)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("holdtrue")
    return _named(name)
