"""From runs to the page."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from holdtrue.errors import SpecError
from holdtrue.runs import files
from holdtrue.runs.directory import Run
from holdtrue.runs.report import numbers
from holdtrue.runs.report.context import context

TEMPLATE = "report.html.j2"
SCRIPT = "browser.js"
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that would show text in another order than it is read in."""
FILTERS = (
    numbers.nats,
    numbers.signed,
    numbers.share,
    numbers.signed_share,
    numbers.span,
    numbers.signed_span,
    numbers.share_span,
    numbers.signed_share_span,
    numbers.points,
    numbers.count,
    numbers.seconds,
    numbers.memory,
)

if TYPE_CHECKING:
    from jinja2 import Environment


def templates(folder: Path) -> Environment:
    """Return the environment of a page about what strangers wrote: all of it escaped, control characters visible."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_report(runs: Sequence[Run], out: str | Path, *, title: str = "holdtrue report") -> Path:
    """Write one self-contained HTML file about the runs, and return its absolute path.

    What is missing (a run that is not finished, a suite that was not run) is said in the page. Everything that comes
    from runs is escaped, and control characters in it are made visible. The page's policy lets its own script run,
    which filters the answers, and nothing else.

    Args:
        runs: at least one; untouched models are taken from their evaluations.
        out: the file; its folder is made where there is none.
        title: the page's.

    Raises:
        SpecError: no run was given, or ``out`` is a folder.
        RunError: a file of a run is damaged, or the disk is full.
    """
    target = Path(out).absolute()
    if target.is_dir():
        raise SpecError(f"{target} is a folder; name the HTML file")
    environment = templates(Path(__file__).parent)
    environment.filters.update({function.__name__: function for function in FILTERS})
    script = Path(__file__).with_name(SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(TEMPLATE).render(
        {**context(runs, title), "script": Markup(script), "script_digest": digest}
    )
    with files.disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder's name may hold bytes that are no text.
        files.write_text(target, text.encode("utf-8", "replace").decode("utf-8"))
    return target


def visible(value: Any) -> Any:
    """Return a text with its control characters, those that turn the direction of text among them, written out."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        f"[U+{ord(char):04X}]"
        if char in BIDI or (unicodedata.category(char) == "Cc" and char not in "\r\n\t")
        else char
        for char in value
    )
