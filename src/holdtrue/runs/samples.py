"""Sample answers of a run's model and of the untouched one, kept in the run for a report to show side by side."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from holdtrue.errors import RunError
from holdtrue.runs import files
from holdtrue.runs.control import Control
from holdtrue.runs.directory import Run
from holdtrue.runs.tasks import key_of, sha256_of
from holdtrue.runs.train import pinned_model

FILE = "samples.json"


class Question(NamedTuple):
    """One user turn, and a word on where it is from."""

    text: str
    origin: str = ""


def sample_answers(
    run: Run, questions: Sequence[Question], *, max_new_tokens: int = 48, control: Control | None = None
) -> dict[str, Any]:
    """Let both models answer, greedily; keep the record in ``evaluations/samples.json`` and return it.

    Answers that are there for the same questions and weights are kept, and those of the untouched model are taken
    from a run beside this one. The record's ``rows`` have ``question``, ``origin``, ``untouched`` and ``tuned``.

    Raises:
        RunError: the run has no adapter yet, or another process works on it.
        Interrupted: a stop was asked for.
    """
    from holdtrue.models import load_adapter, load_model, load_tokenizer

    if not run.is_done("finalise"):
        raise RunError(f"{run.path} has no adapter yet: holdtrue resume {run.path}")
    control = control or Control()
    path = run.path / "evaluations" / FILE
    adapter_hash = sha256_of(run.adapter / "adapter_model.safetensors")
    base_key = key_of([*questions], max_new_tokens, run.manifest["model"]["revision"], version("holdtrue"))
    key = key_of(base_key, adapter_hash)
    if (kept := _read(path)) is not None and kept.get("key") == key:
        return kept
    with run.lock(), files.disk_errors(run.path):
        texts = [question.text for question in questions]
        source = pinned_model(run)
        tokenizer, model = load_tokenizer(source), load_model(source)
        untouched = _from_sibling(run, base_key)
        if untouched is None:
            untouched = _answers(run, control, model, tokenizer, texts, max_new_tokens, source.name)
        tuned_model = load_adapter(model, run.adapter)
        tuned = _answers(run, control, tuned_model, tokenizer, texts, max_new_tokens, run.name)
        record = {
            "suite": "samples",
            "which": "both",
            "model": run.name,
            "n": len(questions),
            "max_new_tokens": max_new_tokens,
            "decoding": "greedy",
            "rows": [
                {"question": q.text, "origin": q.origin, "untouched": before, "tuned": after}
                for q, before, after in zip(questions, untouched, tuned, strict=True)
            ],
            "base_key": base_key,
            "key": key,
        }
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, record)
    return record


def _answers(
    run: Run, control: Control, model: Any, tokenizer: Any, texts: Sequence[str], max_new_tokens: int, name: str
) -> list[str]:
    from holdtrue.data import Message
    from holdtrue.evaluation.sampling import Decoding, Request, TransformersSampler

    control.check(run.path)
    control.tell("sample answers", what=f"of {name}")
    requests = [Request((Message("user", text),), seed=0) for text in texts]
    batches = TransformersSampler(model, tokenizer).sample(requests, Decoding(0.0, max_new_tokens))
    by_index = {answer.index: answer.text for batch in batches for answer in batch}
    return [by_index[index] for index in range(len(texts))]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return files.read_json(path)
    except (FileNotFoundError, RunError):
        return None


def _from_sibling(run: Run, base_key: str) -> list[str] | None:
    for path in sorted(run.path.parent.glob(f"*/evaluations/{FILE}")):
        record = _read(path)
        if record is not None and record.get("base_key") == base_key:
            return [row["untouched"] for row in record["rows"]]
    return None
