"""Prepare: checks the data and the defenses' needs, then encodes the rows."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.defenses import LossDefense
from holdtrue.errors import DataError, NeedError, Problem, RunError, SpecError
from holdtrue.runs import files
from holdtrue.runs.control import Control
from holdtrue.runs.directory import Run
from holdtrue.runs.probe import check_probes
from holdtrue.runs.spec import RunSpec
from holdtrue.runs.tasks import HOLDOUT, check_asking, suite_sources

if TYPE_CHECKING:
    from holdtrue.data import ChatRow, ChatSummary, Message, Prepared
    from holdtrue.defenses.base import RunContext
    from holdtrue.models import ModelSource

ENCODED_FIRST = 20_000
"""Rows of the largest file that is encoded whole before training; a larger one is encoded as its rows are read."""
PACKAGES = ("holdtrue", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def prepare_stage(run: Run, control: Control) -> dict[str, Any]:
    """Validate, resolve the model, ask each defense for its needs, encode; writes ``data/`` and ``manifest.json``."""
    from holdtrue.data import resolve_data, validate_chat
    from holdtrue.evaluation import SUITES
    from holdtrue.models import resolve

    spec = run.spec
    splits: dict[str, ChatSummary] = {}
    for split, value in (("train", spec.data.train), ("validation", spec.data.validation)):
        if value is not None:
            splits[split] = validate_chat(resolve_data(value, spec.folder))
            control.check(run.path)

    if spec.data.holdout:
        _split_off(run, splits["train"])
    for name in spec.evaluate.suites:
        if check := SUITES[name].check:
            for source in suite_sources(spec, name, run):
                check(source)
    check_asking(spec)
    check_probes(run)
    control.check(run.path)

    source = resolve(spec.model, spec.revision)
    _check_screened(run, splits["train"], source)
    notes: dict[str, dict[str, Any]] = {defense.name: {} for defense in spec.defenses}
    if spec.defenses:
        task_rows = splits["train"].rows - spec.data.holdout
        losses = tuple(d.name for d in spec.defenses if isinstance(d, LossDefense) and d.weight)
        context = dataclasses.replace(run_context(run, source), task_rows=task_rows, losses=losses)
        for defense in spec.defenses:
            defense.preflight(dataclasses.replace(context, notes=notes[defense.name]))
    control.check(run.path)

    data = _encode(run, control, source, splits, notes)
    manifest = {
        "model": describe_model(source, spec.model)
        | ({} if spec.adapter.start is None else {"start": start_digest(spec)}),
        "data": data,
        "defenses": notes,
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    files.write_json(run.path / "manifest.json", manifest)
    return {split: {key: entry[key] for key in ("rows", "sequences", "tokens")} for split, entry in data.items()}


def _check_screened(run: Run, train: ChatSummary, source: ModelSource) -> None:
    """Refuse to train on other rows, or with another model, than were screened."""
    found = run.screen if "screen" in run.stages else None
    if found is None:
        return
    for what, was, now in (
        (str(train.path), found["data"]["sha256"], train.sha256),
        (f"model {source.name}", found["model"]["revision"], source.revision),
    ):
        if was != now:
            raise RunError(
                f"{what} has changed since it was screened ({was}, now {now}): put it back, or begin another run"
            )


def start_digest(spec: RunSpec) -> str:
    """Return the digest of the adapter that a run goes on from; ``SpecError`` or ``RunError`` when it is unsound."""
    from holdtrue.models.adapter_files import check_adapter_folder
    from holdtrue.models.digest import tree_digest

    folder = Path(str(spec.adapter.start))
    check_adapter_folder(folder)
    return tree_digest(folder)


def describe_model(source: ModelSource, asked: str) -> dict[str, Any]:
    """Return a model's entry in a manifest."""
    return {
        "asked": asked,
        "name": source.name,
        "revision": source.revision,
        "origin": source.origin,
        "path": str(source.path),
    }


def run_context(run: Run, source: ModelSource) -> RunContext:
    """Return what ``preflight`` and ``weights`` are given; no weight of the model is loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from holdtrue.defenses.base import RunContext
    from holdtrue.models import adapted_weights, decoder_blocks, new_adapter

    config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    with torch.device("meta"):
        fresh = run.spec.adapter.model_copy(update={"start": None})
        model = new_adapter(AutoModelForCausalLM.from_config(config), fresh, seed=run.spec.training.seed)
    return RunContext(
        model=source,
        adapted=adapted_weights(model),
        blocks=len(decoder_blocks(model)),
        folder=run.spec.folder,
    )


def _encode(
    run: Run,
    control: Control,
    source: ModelSource,
    splits: dict[str, ChatSummary],
    notes: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    from holdtrue.data import ChatEncoder, prepare_rows, read_valid
    from holdtrue.defenses.base import RowsContext
    from holdtrue.models import load_tokenizer

    spec = run.spec
    encoder = ChatEncoder(load_tokenizer(source), max_length=spec.training.max_length)
    files.remove(run.path / "data")
    (run.path / "data").mkdir()
    entries: dict[str, dict[str, Any]] = {}
    for split, summary in splits.items():
        rows: Iterator[ChatRow] = read_valid(summary)
        if split == "train":
            if spec.data.holdout:
                rows = _without(rows, held_out_rows(spec, summary.rows))
            for defense in spec.defenses:
                context = RowsContext(
                    task_rows=summary.rows - spec.data.holdout,
                    seed=spec.training.seed,
                    folder=spec.folder,
                    notes=notes[defense.name],
                    model=source,
                    max_length=spec.training.max_length,
                    out=run.path / "data",
                    progress=_progress(run, control, defense.name),
                )
                rows = defense.rows(rows, context)
        watched = control.watch(rows, run.path, "prepare", summary.rows if split == "train" else None)
        late = summary.rows if summary.rows > ENCODED_FIRST else 0
        prepared = prepare_rows(watched, encoder, run.path / "data" / split, late=late)
        _check_something_left(Path(summary.path), prepared)
        files.sync_tree(run.path / "data")
        entries[split] = {
            "path": str(summary.path),
            "sha256": summary.sha256,
            "bytes": summary.bytes,
            "file_rows": summary.rows,
            **_as_dict(prepared),
        }
    return entries


def _progress(run: Run, control: Control, name: str) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        control.check(run.path)
        control.tell("prepare", what=f"{name} scores rows", done=done, total=total)

    return tell


def held_out_rows(spec: RunSpec, rows: int) -> frozenset[int]:
    """Return which rows of the training file, from 0, are split off it; ``SpecError`` when that leaves none.

    They depend on the two numbers alone: runs that differ in their training seed are measured on the same rows.
    """
    if not spec.data.holdout:
        return frozenset()
    if spec.data.holdout >= rows:
        raise SpecError(
            f"data.holdout is {spec.data.holdout}, and {spec.data.train} has {rows} rows: leave some to train on"
        )
    return frozenset(random.Random(f"holdout of {rows}").sample(range(rows), spec.data.holdout))


def _split_off(run: Run, summary: ChatSummary) -> None:
    from holdtrue.data import read_valid

    chosen = held_out_rows(run.spec, summary.rows)
    lines = [
        json.dumps({"messages": [message_record(message) for message in row.messages]}, ensure_ascii=False)
        for index, row in enumerate(read_valid(summary))
        if index in chosen
    ]
    files.write_text(run.path / HOLDOUT, "".join(f"{line}\n" for line in lines))


def message_record(message: Message) -> dict[str, Any]:
    """Return a message as a chat file has it."""
    weight = {} if message.weight else {"weight": 0}
    return {"role": message.role, "content": message.content, **weight}


def _without(rows: Iterable[ChatRow], left_out: frozenset[int]) -> Iterator[ChatRow]:
    return (row for index, row in enumerate(rows) if index not in left_out)


def _as_dict(prepared: Prepared) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(prepared).items() if not isinstance(value, Path)}


def _check_something_left(path: Path, prepared: Prepared) -> None:
    empty = {kind: count.rows for kind, count in prepared.by_kind.items() if count.rows and not count.response_tokens}
    if prepared.trained_tokens == 0 or "task" in empty:
        message = "no token is left to train on: every answer lies beyond training.max_length; raise it"
        raise DataError(path, [Problem(0, "", message)])
    for kind, rows in empty.items():
        if kind != "pool":  # of which a defense may hold the questions; the trainer looks
            raise NeedError(
                f"a defense adds {rows} rows of kind {kind!r}, and every answer of theirs lies beyond "
                "training.max_length, or is not trained on: raise it, or give other rows"
            )
