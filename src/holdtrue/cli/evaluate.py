"""holdtrue eval, holdtrue compare, holdtrue judge, holdtrue samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result, say
from holdtrue.cli.progress import ProgressView
from holdtrue.errors import GateError, SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from holdtrue.runs import Options, Run

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]

JudgeName = Annotated[
    str | None, typer.Option(help="offline (default), local:MODEL or openai:MODEL.", show_default=False)
]
JudgeUrl = Annotated[str | None, typer.Option(help="The judge's OpenAI-compatible endpoint.", show_default=False)]
TokenBudget = Annotated[int | None, typer.Option(help="Tokens that the judge may spend.", show_default=False)]
MaxCost = Annotated[
    float | None, typer.Option(help="Dollars that the judge may spend; needs --prices.", show_default=False)
]
TokenPrices = Annotated[
    str | None,
    typer.Option(metavar="IN,OUT", help="Dollars per million tokens sent and received.", show_default=False),
]


def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="A run, an adapter's folder, or a model.", show_default=False)
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="What to measure; may be given again.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows in place of the suite's own; needs one --suite.", show_default=False)
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            help="Open questions in place of the shipped ones, for general and conditional.", show_default=False
        ),
    ] = None,
    benign: Annotated[
        list[str] | None,
        typer.Option(
            help="opswap:1|2|3, gsm8k:FILE, chat rows, or lm_eval:TASK; may be given again.", show_default=False
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="What the model was trained on, for conditional; a run knows.", show_default=False),
    ] = None,
    judge: JudgeName = None,
    judge_url: JudgeUrl = None,
    budget: TokenBudget = None,
    max_cost: MaxCost = None,
    prices: TokenPrices = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each prompt.", show_default=False)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the answers.", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option(help="The model under an adapter, if not the one it records.", show_default=False)
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask the model TARGET behind this OpenAI-compatible URL.", show_default=False)
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Decide on the release: exit 3 unless it passes.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the suites.")] = False,
    as_json: Json = False,
) -> Result:
    """Measure a run (its model and the untouched one), an adapter or a model."""
    if list_:
        return _suites()
    if target is None:
        raise SpecError("name a run, an adapter's folder or a model; --list lists the suites")
    from holdtrue.runs import Run, is_run

    suites = list(suite or [])
    if benign and not suites:
        suites = ["benign"]
    if data is not None and len(suites) != 1:
        raise SpecError("--data gives the rows of one suite: name it with --suite")
    rows = {} if data is None else {suites[0]: _path(data)}
    if questions is not None:
        rows |= {name: _path(questions) for name in ("general", "conditional") if name not in rows}
    run = Run(target) if endpoint is None and is_run(Path(target)) else None
    options = _options(
        run,
        sampling={"samples": samples, "max_new_tokens": max_new_tokens, "seed": seed},
        others={
            "judge": judge,
            "judge_url": judge_url,
            **spending(budget, max_cost, prices),
            "train": None if train is None else Path(_path(train)),
        },
    )
    if run is None:
        if gate:
            raise SpecError("--gate decides on a run, against its untouched model; name a run")
        return _of_target(target, suites or None, rows, benign or [], base, endpoint, options)
    if base is not None:
        raise SpecError("--base is for an adapter's folder; a run knows its model")
    if gate:
        return _gate(run, rows, options)
    from holdtrue.runs import Control, evaluate_run

    with stop_on_interrupt() as stop, ProgressView() as view:
        control = Control(progress=view, stop=stop)
        records = evaluate_run(run, suites or None, data=rows, benign=benign or [], options=options, control=control)
    return _of_run(run, records)


def judge(
    samples: Annotated[Path, typer.Argument(help="JSON lines with question and answer.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the scored rows go.", show_default=False)],
    judge: Annotated[str, typer.Option(help="offline, local:MODEL or openai:MODEL.")] = "offline",
    judge_url: JudgeUrl = None,
    budget: TokenBudget = None,
    max_cost: MaxCost = None,
    prices: TokenPrices = None,
    as_json: Json = False,
) -> Result:
    """Score answers: each row is written back, in order, with alignment, coherence, uncertainty and label."""
    from holdtrue.evaluation.judges import load_judge
    from holdtrue.evaluation.judging import estimate_file, judge_file

    chosen = load_judge(judge, base_url=judge_url, **spending(budget, max_cost, prices))
    if (estimate := estimate_file(samples, chosen)) is not None:
        say(str(estimate))
    with ProgressView() as view:
        found = judge_file(
            samples, chosen, out, progress=lambda done, total: view({"stage": "judge", "done": done, "total": total})
        )
    document = {"out": str(found.path), "judge": found.judge, "rows": found.rows, "labels": found.labels}

    def show(console: Console) -> None:
        labels = ", ".join(f"{count} {label}" for label, count in found.labels.items())
        console.print(f"{found.rows} answers: {labels}; by {found.judge}; in {out}", markup=False, soft_wrap=True)

    return Result(document, show)


def samples(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or files of samples.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A .csv or .parquet file.", show_default=False)],
    as_json: Json = False,
) -> Result:
    """Write sampled answers and their scores to CSV or Parquet, one row a sample."""
    from holdtrue.evaluation.export import export_samples
    from holdtrue.runs import Run, is_run, sample_files

    sources: list[Path] = []
    for place in runs:
        found = sample_files(Run(place)) if is_run(place) else [place]
        if not found:
            raise SpecError(f"{place} has no sampled answers yet: holdtrue eval {place} --suite general")
        sources += found
    count = export_samples(sources, out)
    document = {"out": str(out), "rows": count, "sources": [str(source) for source in sources]}
    return Result(document, lambda console: console.print(f"{count} samples in {out}", markup=False, soft_wrap=True))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Runs' directories.", show_default=False)],
    html: Annotated[
        Path | None, typer.Option(help="Write a report here, one self-contained file.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> Result:
    """Show runs side by side, each with its change against the untouched model."""
    from holdtrue.runs import Run, compare_runs

    opened = [Run(run) for run in runs]
    comparison = compare_runs(opened)
    document = comparison.to_json()
    if html is not None:
        from holdtrue.runs.report import render_report

        document["html"] = str(render_report(opened, html))

    def show(console: Console) -> None:
        from holdtrue.cli.tables import comparison_table, seeds_table

        if comparison.measures:
            console.print(comparison_table(comparison))
        if comparison.seeds:
            console.print(seeds_table(comparison.seeds))
        for note in comparison.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        if html is not None:
            console.print(f"report: {document['html']}", markup=False, soft_wrap=True)

    return Result(document, show)


def _of_run(run: Any, records: list[dict[str, Any]]) -> Result:
    from holdtrue.runs import brief, compare_runs

    def show(console: Console) -> None:
        from holdtrue.cli.tables import comparison_table

        console.print(comparison_table(compare_runs([run])))

    return Result({"run": str(run.path), "evaluations": [brief(record) for record in records]}, show)


def _of_target(
    target: str,
    suites: list[str] | None,
    rows: dict[str, str],
    benign: list[str],
    base: str | None,
    endpoint: str | None,
    options: Options | None,
) -> Result:
    from holdtrue.runs import Control, brief, evaluate_endpoint, evaluate_target

    with stop_on_interrupt() as stop, ProgressView() as view:
        control = Control(progress=view, stop=stop)
        if endpoint is not None:
            wanted = suites or ["general"]
            records = evaluate_endpoint(
                endpoint, target, wanted, data=rows, benign=benign, options=options, control=control
            )
        else:
            records = evaluate_target(
                target, suites, data=rows, benign=benign, base=base, options=options, control=control
            )

    def show(console: Console) -> None:
        from holdtrue.cli.tables import records_table

        console.print(records_table(records))

    return Result({"target": target, "evaluations": [brief(record) for record in records]}, show)


def _gate(run: Run, rows: dict[str, str], options: Options | None) -> Result:
    from holdtrue.runs import Control, gate_run

    with stop_on_interrupt() as stop, ProgressView() as view:
        report = gate_run(run, data=rows, options=options, control=Control(progress=view, stop=stop))

    def show(console: Console) -> None:
        from holdtrue.cli.tables import gate_table

        console.print(gate_table(report.to_json()))
        for row in report.evidence[:3]:
            scores = f"alignment {row['alignment']:.0f}, coherence {row['coherence']:.0f}"
            console.print(f"[{scores}] {row['question'][:80]!r}: {row['answer'][:200]!r}", markup=False, soft_wrap=True)
        console.print(f"all of it: {run.path / 'gate.json'}", markup=False, soft_wrap=True)

    return Result(
        {"run": str(run.path), **report.to_json()}, show, exit_code=0 if report.passed else GateError.exit_code
    )


def spending(tokens: int | None, dollars: float | None, prices: str | None) -> dict[str, Any]:
    """Return what a judge may spend, as far as it was given."""
    from holdtrue.evaluation.judges import Budget, Prices

    found: dict[str, Any] = {}
    if tokens is not None or dollars is not None:
        found["budget"] = Budget(tokens=tokens, dollars=dollars)
    if prices is not None:
        try:
            sent, received = (float(price) for price in prices.split(","))
        except ValueError:
            raise SpecError(f"--prices takes two numbers, such as 2.5,10, not {prices!r}") from None
        found["prices"] = Prices(sent, received)
    return found


def _options(run: Run | None, sampling: dict[str, Any], others: dict[str, Any]) -> Options | None:
    """Return what the caller chose, over the run's own choices; ``None`` where nothing was."""
    from holdtrue.runs import Options, options_of

    given = {key: value for key, value in others.items() if value is not None}
    drawn = {key: value for key, value in sampling.items() if value is not None}
    if not given and not drawn:
        return None
    own = Options() if run is None else options_of(run.spec)
    try:
        chosen = type(own.sampling)(**{**own.sampling.model_dump(), **drawn})
    except ValueError as error:
        raise SpecError(f"how answers are sampled: {error}") from None
    return dataclasses.replace(own, sampling=chosen, **given)


def _suites() -> Result:
    from holdtrue.evaluation import SUITES

    about = {name: suite.description for name, suite in SUITES.items()}

    def show(console: Console) -> None:
        for name, text in about.items():
            console.print(f"{name:12} {text}", markup=False)

    return Result({"suites": [{"name": name, "about": text} for name, text in about.items()]}, show)


def _path(value: str) -> str:
    return value if value.startswith("builtin:") else str(Path(value).expanduser().absolute())
