"""From runs to the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdtrue.errors import SpecError
from holdtrue.runs import files
from holdtrue.runs.directory import Run
from holdtrue.runs.report import numbers
from holdtrue.runs.report.context import context

TEMPLATE = "report.html.j2"
FILTERS = (
    numbers.nats,
    numbers.signed,
    numbers.share,
    numbers.signed_share,
    numbers.span,
    numbers.signed_span,
    numbers.share_span,
    numbers.count,
    numbers.seconds,
    numbers.memory,
)


def render_report(runs: Sequence[Run], out: str | Path, *, title: str = "holdtrue report") -> Path:
    """Write one self-contained HTML file about the runs, and return its absolute path.

    What is missing (a run that is not finished, a suite that was not run) is said in the page. Everything that comes
    from runs is escaped.

    Args:
        runs: at least one; untouched models are taken from their evaluations.
        out: the file; its folder is made where there is none.
        title: the page's.

    Raises:
        SpecError: no run was given, or ``out`` is a folder.
        RunError: a file of a run is damaged, or the disk is full.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    target = Path(out).absolute()
    if target.is_dir():
        raise SpecError(f"{target} is a folder; name the HTML file")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({function.__name__: function for function in FILTERS})
    text = environment.get_template(TEMPLATE).render(context(runs, title))
    with files.disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder's name may hold bytes that are no text.
        files.write_text(target, text.encode("utf-8", "replace").decode("utf-8"))
    return target
