"""holdtrue persona extract, holdtrue persona directions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.evaluate import Json, JudgeName, JudgeUrl, MaxCost, TokenBudget, TokenPrices, spending
from holdtrue.cli.interrupt import stop_on_interrupt
from holdtrue.cli.output import Result
from holdtrue.cli.progress import ProgressView
from holdtrue.errors import Interrupted, SpecError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from holdtrue.data import ChatRow
    from holdtrue.models import VectorFile

PAIRS = "builtin:probes-select"
SOURCES = ("rollouts", "pairs")

app = typer.Typer(help="Make persona vectors, for the defense steering.", no_args_is_help=True, rich_markup_mode=None)
Out = Annotated[Path, typer.Option(help="The safetensors file to write.", show_default=False)]
First = Annotated[int | None, typer.Option(help="Take the first so many [default: all].", show_default=False)]
PairsFile = Annotated[str | None, typer.Option(help=f"Pairs of answers [default: {PAIRS}].", show_default=False)]


@app.command("extract")
def extract(
    model: Annotated[str, typer.Argument(help="Alias, hub id or path.", show_default=False)],
    out: Out,
    from_: Annotated[
        str, typer.Option("--from", help="rollouts: the model's own answers, as published; pairs: given answers.")
    ] = "rollouts",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)] = None,
    pairs: PairsFile = None,
    rollouts: Annotated[
        int | None, typer.Option(help="Answers to each prompt [default: 10].", show_default=False)
    ] = None,
    instructions: First = None,
    questions: First = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer [default: 1000].", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the answers [default: 0].", show_default=False)] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of the trait, 0 to 100 [default: 50].", min=0, max=100, show_default=False)
    ] = None,
    coherence: Annotated[
        float | None, typer.Option(help="The least that counts [default: 50].", min=0, max=100, show_default=False)
    ] = None,
    judge: JudgeName = None,
    judge_url: JudgeUrl = None,
    budget: TokenBudget = None,
    max_cost: MaxCost = None,
    prices: TokenPrices = None,
    as_json: Json = False,
) -> Result:
    """Write a model's persona vectors, one for each block."""
    if from_ not in SOURCES:
        raise SpecError(f"--from {from_}: it is {' or '.join(SOURCES)}{nearest(from_, SOURCES)}")
    sampling = {"samples": rollouts, "max_new_tokens": max_new_tokens, "seed": seed}
    judging = {"judge": judge, "judge_url": judge_url, **spending(budget, max_cost, prices)}
    limits = {"threshold": threshold, "coherence": coherence}
    first = {"instructions": instructions, "questions": questions}
    of_rollouts = _given({"rollouts": rollouts, **sampling, **judging, **limits, **first}).keys() - {"samples"}
    if from_ == "pairs" and of_rollouts:
        options = ", ".join("--" + name.replace("_", "-") for name in sorted(of_rollouts))
        raise SpecError(f"--from pairs samples nothing; {options}: for --from rollouts only")
    if from_ == "rollouts" and pairs is not None:
        raise SpecError("--pairs is for --from pairs")
    from holdtrue.models import resolve
    from holdtrue.persona import Loaded, extract_from_pairs, extract_from_rollouts

    source = resolve(model, revision)
    with stop_on_interrupt() as stop, ProgressView() as view:
        if from_ == "pairs":
            probes = _probes(pairs or PAIRS)
            found = extract_from_pairs(Loaded.load(source), probes, out, progress=_telling("read", view, stop))
        else:
            settings = _sampling(_given(sampling))
            trait = _first_of_trait(first)
            chosen = _judge(_given(judging))
            found = extract_from_rollouts(
                Loaded.load(source),
                out,
                folder=_answers(),
                judge=chosen,
                sampling=settings,
                trait=trait,
                sampled=_telling("sample", view, stop),
                read=_telling("read", view, stop),
                **_given(limits),
            )
    return _result(found)


@app.command("directions")
def directions(
    tuned: Annotated[str, typer.Option(help="A run, or an adapter's folder.", show_default=False)],
    out: Out,
    components: Annotated[int, typer.Option(help="Directions of each block.", min=1)] = 5,
    pairs: PairsFile = None,
    data: Annotated[str | None, typer.Option(help="Chat rows in place of pairs.", show_default=False)] = None,
    block: Annotated[
        list[int] | None, typer.Option(help="Only this block, from 0; may be given again.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> Result:
    """Write the directions in which a tuned model's hidden states differ from its base's."""
    if pairs is not None and data is not None:
        raise SpecError("give --pairs or --data, not both")
    from holdtrue.persona import Loaded, extract_directions
    from holdtrue.runs.tasks import sha256_of

    rows, name, sha256 = _answers_to_read(pairs, data)
    source, adapter = _tuned(tuned)
    material = {name: sha256, "adapter": sha256_of(adapter / "adapter_model.safetensors")}
    with stop_on_interrupt() as stop, ProgressView() as view:
        found = extract_directions(
            Loaded.load(source),
            adapter,
            rows,
            out,
            components=components,
            material=material,
            blocks=block or None,
            progress=_telling("read", view, stop),
        )
    return _result(found)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _telling(stage: str, view: ProgressView, stop: threading.Event) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        if stop.is_set():
            raise Interrupted("interrupted; answers so far are kept. To go on, give the same command again")
        view({"stage": stage, "done": done, "total": total})

    return tell


def _sampling(given: dict[str, Any]) -> Any:
    from holdtrue.evaluation import SamplingSpec
    from holdtrue.persona.rollouts import PUBLISHED

    try:
        return SamplingSpec(**{**PUBLISHED, **given})
    except ValueError as error:
        raise SpecError(f"how answers are sampled: {error}") from None


def _first_of_trait(given: dict[str, int | None]) -> Any:
    from holdtrue.persona import builtin_trait

    found = builtin_trait()
    return found._replace(trait=found.trait.first(**given))


def _judge(given: dict[str, Any]) -> Any:
    from holdtrue.evaluation.judges import load_judge

    return load_judge(
        given.pop("judge", "offline"), **{{"judge_url": "base_url"}.get(k, k): value for k, value in given.items()}
    )


def _answers() -> Path:
    from holdtrue.models.store import cache_root

    return cache_root() / "persona"


def _probes(value: str) -> Any:
    from holdtrue.data import resolve_data
    from holdtrue.evaluation import read_probes

    return read_probes(resolve_data(value, Path.cwd()))


def _answers_to_read(pairs: str | None, data: str | None) -> tuple[list[ChatRow], str, str]:
    """Return the rows whose answers are read, what they are called in a record, and their file's SHA-256."""
    from holdtrue.data import ChatRow, Message, read_chat, resolve_data, validate_chat

    if data is not None:
        path = resolve_data(data, Path.cwd())
        return list(read_chat(path)), "rows", validate_chat(path).sha256
    probes = _probes(pairs or PAIRS)
    rows = [
        ChatRow((Message("user", probe.question), Message("assistant", answer)))
        for probe in probes.rows
        for answer in (probe.misaligned, probe.aligned)
    ]
    return rows, "pairs", probes.sha256


def _tuned(value: str) -> tuple[Any, Path]:
    """Return the base model and the adapter's folder of a run or of an adapter."""
    from holdtrue.runs import Run, find_target, is_run
    from holdtrue.runs.train import pinned_model

    folder = Path(value).expanduser()
    if is_run(folder):
        run = Run(folder)
        if not run.is_done("finalise"):
            raise SpecError(f"{folder} has no adapter yet: holdtrue resume {folder}")
        return pinned_model(run), run.adapter
    found = find_target(value)
    if found.adapter is None:
        raise SpecError(f"--tuned {value}: neither a run nor an adapter's folder; its base model is found by itself")
    return found.source, found.adapter


def _result(found: VectorFile) -> Result:
    sizes = {str(index): round(float(tensor.norm()), 4) for index, tensor in found.tensors.items()}
    info = found.info.model_dump(mode="json")

    def show(console: Console) -> None:
        from rich.table import Table

        shape = "norm" if found.info.kind == "vector" else "directions"
        table = Table("block", shape, box=None)
        for index, tensor in found.tensors.items():
            table.add_row(str(index), str(len(tensor)) if found.info.kind == "directions" else f"{tensor.norm():.3f}")
        console.print(table)
        counts = ", ".join(f"{name} {count}" for name, count in found.info.counts.items())
        console.print(f"{found.info.trait} in {found.info.model}; {counts}", markup=False, soft_wrap=True)
        console.print(f"in a spec: steering: {{vector: {found.path}}}", markup=False, soft_wrap=True)

    norms = (
        {"norms": sizes}
        if found.info.kind == "vector"
        else {"directions": {str(index): len(tensor) for index, tensor in found.tensors.items()}}
    )
    return Result({"out": str(found.path), **norms, "info": info}, show)
