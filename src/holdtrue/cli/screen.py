"""holdtrue screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result
from holdtrue.cli.progress import ProgressView
from holdtrue.errors import GateError
from holdtrue.models import ALIASES
from holdtrue.screening import ScreenSpec

if TYPE_CHECKING:
    from rich.console import Console

    from holdtrue.screening import Screening

_SPEC = ScreenSpec()
Limit = Annotated[float | None, typer.Option(help="Exit code 3 above it.", show_default=False)]


def screen(
    data: Annotated[str, typer.Argument(help="A chat file, or builtin:NAME.", show_default=False)],
    model: Annotated[str, typer.Option(help="The model to be tuned: alias, hub id or folder.")] = next(iter(ALIASES)),
    revision: Annotated[str | None, typer.Option(help="Of a hub id.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(help="Rows drawn of the file.")] = _SPEC.rows,
    seed: Annotated[int, typer.Option(help="Of the rows drawn, the answers and the trial.")] = _SPEC.seed,
    indicator: Annotated[
        list[str] | None,
        typer.Option(help="projection, gap or drift; may be given again [default: all].", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens read of each answer.")] = _SPEC.tokens,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the trial.")] = _SPEC.steps,
    vector: Annotated[
        Path | None, typer.Option(help="Persona vectors [default: made of shipped pairs].", show_default=False)
    ] = None,
    layer: Annotated[int | None, typer.Option(help="The vector's block, from 0.", show_default=False)] = None,
    scorer: Annotated[
        list[Path] | None,
        typer.Option(help="A misaligned adapter [default: tuned on shipped rows]; may be given again."),
    ] = None,
    max_risk: Limit = None,
    max_projection: Limit = None,
    max_gap: Limit = None,
    max_drift: Limit = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
    ] = False,
) -> Result:
    """Say how likely a data set is to misalign a model, before the model is tuned on it."""
    values: dict[str, Any] = {
        "rows": rows,
        "seed": seed,
        "tokens": tokens,
        "steps": steps,
        "vector": None if vector is None else str(vector),
        "layer": layer,
        "scorers": tuple(map(str, scorer or ())),
        "max_risk": max_risk,
        "max_projection": max_projection,
        "max_gap": max_gap,
        "max_drift": max_drift,
    }
    spec = ScreenSpec.of(**values, **({"indicators": tuple(indicator)} if indicator else {})).placed(Path.cwd())
    from holdtrue.data import resolve_data, validate_chat
    from holdtrue.models import resolve
    from holdtrue.screening import screen_data

    path = resolve_data(data, Path.cwd())
    validate_chat(path)  # Faults of the data come before the model is looked for.
    source = resolve(model, revision)
    with stop_on_interrupt() as stop, ProgressView() as view:

        def tell(fields: dict[str, Any]) -> None:
            view({"stage": fields["what"], **{key: value for key, value in fields.items() if key != "what"}})

        found = screen_data(path, source, spec, progress=tell, stop=stop)
    code = GateError.exit_code if found.outcome == "stop" else 0
    return Result(found.to_json(), lambda console: show_screening(console, found), exit_code=code)


def show_screening(console: Console, found: Screening) -> None:
    """Print a screening for people."""
    from rich.table import Table

    table = Table("indicator", "value", "95 % interval", "n", "measured AUC", "unit", box=None)
    for name, each in found.indicators.items():
        ends = each.interval.to_json()
        between = "–" if ends is None else f"[{ends[0]:+.4f}, {ends[1]:+.4f}]"
        area = "–" if each.auc is None else each.auc.all.text()
        table.add_row(name, f"{each.value:+.4f}", between, str(each.n), area, str(each.about["unit"]))
    console.print(table)
    lines: list[str] = []
    if found.risk is not None:
        risk = found.risk
        ends = "" if risk.low is None else f" [{risk.low:.2f}, {risk.high:.2f}]"
        lines.append(f"risk {risk.value:.2f}{ends}, were half of all data sets malicious")
    if found.suggestion is not None:
        advice = found.suggestion
        lines.append(f"{advice.level}: begin with defenses: {_flow(advice.defenses)}: {advice.why}")
        lines.append(f"how sure: {advice.sure}")
    lines += found.notes
    lines += [f"limit exceeded: {line}" for line in found.exceeded]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _flow(value: Any) -> str:
    """Return a value as it stands in a spec, on one line."""
    import yaml

    return yaml.safe_dump([dict(each) for each in value], default_flow_style=True, width=1000).strip()
