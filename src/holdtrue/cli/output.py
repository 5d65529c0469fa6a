"""Where output goes: results on stdout, everything else on stderr; with --json, one document on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Result:
    """What a command found: ``document`` for ``--json``, how to ``show`` it to people, and the exit code."""

    document: Any
    show: Callable[[Console], None]
    exit_code: int = 0


@contextlib.contextmanager
def stdout_kept(as_json: bool) -> Iterator[Callable[[Any], None]]:
    """Yield a function that writes the one JSON document.

    Meanwhile whatever else writes to stdout, compiled libraries and child processes included, goes to stderr.
    """
    if not as_json:
        yield lambda document: None
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)

    def write(document: Any) -> None:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
        with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream:
            stream.write(text)

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield write
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def show(result: Result) -> None:
    """Print a result for people, on stdout."""
    from rich.console import Console

    # A pipe has no width of its own: wide enough that a table's cells are not cut.
    result.show(Console(soft_wrap=False, highlight=False, width=None if sys.stdout.isatty() else 160))


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def set_up_logging(verbose: bool = False) -> None:
    """Send holdtrue's own log to stderr and keep the libraries' bars off where nobody watches."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("holdtrue")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    # What libraries tell their developers is no concern of those who run holdtrue.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch|accelerate|datasets")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
